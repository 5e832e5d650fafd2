//! The head of a CONNECT request, of which only the first line counts: kube-apiserver always writes
//! `Host: 127.0.0.1`, so that whoever went by that field would always go wrong.

use crate::target::{HostPort, InvalidTarget};

/// Most bytes of a head; kube-apiserver sends a hundred.
pub const MAX_HEAD: usize = 16 * 1024;
/// How much of what was sent instead of a CONNECT is told back.
const TOLD: usize = 40;

/// A head that is no CONNECT.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHead {
    /// Another method.
    #[error("{0:?} is not served here; this door takes CONNECT HOST:PORT")]
    Method(String),
    /// Longer than [`MAX_HEAD`].
    #[error("the head of the request is longer than {MAX_HEAD} bytes")]
    TooLong,
    /// Not HTTP/1.
    #[error("this is no HTTP/1.1 request")]
    NotHttp,
    /// Not `host:port`.
    #[error("the request target is wrong: {0}")]
    Target(#[from] InvalidTarget),
}

/// Reads a head from what has arrived so far: where it wants to go, and its length. `None` if more is needed.
///
/// # Errors
/// If it is no CONNECT.
pub fn read(bytes: &[u8]) -> Result<Option<(HostPort, usize)>, BadHead> {
    let window = &bytes[..bytes.len().min(MAX_HEAD)];
    let Some(end) = window.windows(4).position(|w| w == b"\r\n\r\n") else {
        return if bytes.len() >= MAX_HEAD { Err(BadHead::TooLong) } else { Ok(None) };
    };
    let line = window.windows(2).position(|w| w == b"\r\n").map_or(window, |at| &window[..at]);
    let line = std::str::from_utf8(line).map_err(|_| BadHead::NotHttp)?;
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(BadHead::NotHttp);
    };
    if !matches!(version, "HTTP/1.1" | "HTTP/1.0") || method.is_empty() {
        return Err(BadHead::NotHttp);
    }
    if method != "CONNECT" {
        return Err(BadHead::Method(method.chars().take(TOLD).collect()));
    }
    Ok(Some((target.parse()?, end + 4)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_request_target_counts() {
        let read = |target: &str| {
            let text = format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nearly");
            read(text.as_bytes()).map(|found| found.map(|(to, length)| (to.to_string(), text[length..].to_owned())))
        };
        for target in ["10.99.0.5:10250", "node1:10250", "[fd00::1]:10250", "web.default.svc:443"] {
            assert_eq!(read(target), Ok(Some((target.to_owned(), "early".to_owned()))), "{target}");
        }
        for target in ["node1", "node1:0", "node1:x", "fd00::1:10250", "[fd00::1]", "/", "http://x/", "", "a\tb:1"] {
            assert!(matches!(read(target), Err(BadHead::Target(_) | BadHead::NotHttp)), "{target}");
        }
    }

    #[test]
    fn what_is_no_connect_is_told_so() {
        assert_eq!(read(b"GET / HTTP/1.1\r\n\r\n"), Err(BadHead::Method("GET".into())));
        for wrong in
            [&b"\r\n\r\n"[..], b"CONNECT a:1\r\n\r\n", b"CONNECT a:1 HTTP/2\r\n\r\n", b"\xff b HTTP/1.1\r\n\r\n"]
        {
            assert_eq!(read(wrong), Err(BadHead::NotHttp), "{wrong:?}");
        }
        assert_eq!(read(b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n"), Ok(None));
        assert_eq!(read(&[b'a'; MAX_HEAD]), Err(BadHead::TooLong));
    }
}
