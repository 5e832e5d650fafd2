//! An HTTP proxy between an edge and its shard: CONNECT, with Basic authentication if asked for.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::link::{EndCause, LinkEnd, end};

/// The longest head of an answer.
const HEAD: usize = 8 * 1024;

/// A proxy. Its credentials are in no log and no error.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    host: String,
    port: u16,
    /// `user:password`.
    credentials: Option<String>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "http://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "http://{}:{}", self.host, self.port)
        }
    }
}

/// A proxy that cannot be understood. The text itself is not repeated: it may hold a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidProxy {
    /// Another protocol.
    #[error(
        "a proxy is written http://[USER:PASSWORD@]HOST[:PORT]; proxies that are spoken to by TLS or SOCKS are not supported"
    )]
    Scheme,
    /// No host, or a port that is none.
    #[error("the proxy's address has no host, or a port that is no number; write http://[USER:PASSWORD@]HOST[:PORT]")]
    Address,
}

impl FromStr for Proxy {
    type Err = InvalidProxy;

    fn from_str(text: &str) -> Result<Self, InvalidProxy> {
        let rest = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some(_) => return Err(InvalidProxy::Scheme),
            None => text,
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (credentials, address) = match authority.rsplit_once('@') {
            Some((credentials, address)) => (Some(decoded(credentials)), address),
            None => (None, authority),
        };
        let (host, port) = match address.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, rest)) => (host, Some(rest.strip_prefix(':').ok_or(InvalidProxy::Address)?)),
            None => match address.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (address, None),
            },
        };
        let port = port.map_or(Ok(80), |port| port.parse().map_err(|_| InvalidProxy::Address))?;
        if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(InvalidProxy::Address);
        }
        Ok(Self { host: host.to_owned(), port, credentials })
    }
}

/// Undoes the percent encoding of a URL.
fn decoded(text: &str) -> String {
    let (bytes, mut out) = (text.as_bytes(), Vec::with_capacity(text.len()));
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let hex = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(|_| byte == b'%') {
            Some(value) => {
                out.push(value);
                at += 3;
            }
            None => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl Proxy {
    /// The same proxy with these credentials, if there are some.
    #[must_use]
    pub fn with_credentials(self, credentials: Option<String>) -> Self {
        Self { credentials: credentials.or(self.credentials), ..self }
    }

    /// Opens a connection to `address` (`host:port`) through the proxy.
    ///
    /// # Errors
    /// If the proxy cannot be reached, or does not let it through.
    pub(super) async fn connect(&self, address: &str) -> Result<TcpStream, LinkEnd> {
        let unreached = |e: std::io::Error| {
            let end = end::from_io(&e);
            LinkEnd::new(EndCause::ProxyRefused, format!("the proxy {self} cannot be reached: {}", end.detail))
        };
        let mut socket = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(unreached)?;
        socket.write_all(self.request(address).as_bytes()).await.map_err(unreached)?;
        let head = read_head(&mut socket).await.map_err(unreached)?;
        match status(&head) {
            Some(200..300) => Ok(socket),
            Some(status) => {
                let why = match status {
                    407 if self.credentials.is_some() => ": it does not accept the credentials",
                    407 => ": it asks for credentials",
                    403 => ": it forbids that address",
                    502..=504 => ": it cannot reach that address itself",
                    _ => "",
                };
                let why = format!("the proxy {self} answered {status} to CONNECT {address}{why}");
                Err(LinkEnd::new(EndCause::ProxyRefused, why))
            }
            None => {
                let why = format!("{self} is no HTTP proxy: its answer cannot be understood");
                Err(LinkEnd::new(EndCause::ProxyRefused, why))
            }
        }
    }

    fn request(&self, address: &str) -> String {
        let authorization = self.credentials.as_ref().map_or_else(String::new, |credentials| {
            format!("Proxy-Authorization: Basic {}\r\n", STANDARD.encode(credentials))
        });
        format!("CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{authorization}\r\n")
    }
}

/// Reads up to the empty line and not further: what follows belongs to TLS.
async fn read_head(socket: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == HEAD {
            return Err(std::io::Error::other("the head of its answer is too long"));
        }
        head.push(socket.read_u8().await?);
    }
    Ok(head)
}

fn status(head: &[u8]) -> Option<u16> {
    let line = head.split(|byte| *byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    words.next().filter(|version| version.starts_with("HTTP/1."))?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_are_read_as_people_write_them() {
        let proxy = |text: &str| text.parse::<Proxy>();
        assert_eq!(proxy("http://proxy.lan:3128").unwrap().to_string(), "http://proxy.lan:3128");
        assert_eq!(proxy("proxy.lan").unwrap().to_string(), "http://proxy.lan:80");
        assert_eq!(proxy("http://[fd00::1]:3128/").unwrap().to_string(), "http://[fd00::1]:3128");
        let secret = proxy("http://alice:p%40ss@proxy.lan:3128").unwrap();
        assert!(secret.request("s:1").contains(&STANDARD.encode("alice:p@ss")));
        assert!(!format!("{secret} {secret:?}").contains("alice"));
        assert_eq!(proxy("socks5://h:1"), Err(InvalidProxy::Scheme));
        assert_eq!(proxy("https://h:1"), Err(InvalidProxy::Scheme));
        for bad in ["", "http://", "http://h:x", "http://h:99999", "http://[::1]x"] {
            assert_eq!(proxy(bad), Err(InvalidProxy::Address), "{bad}");
        }
    }

    #[test]
    fn an_answer_is_understood_by_its_first_line() {
        assert_eq!(status(b"HTTP/1.1 200 Connection established\r\n\r\n"), Some(200));
        assert_eq!(status(b"HTTP/1.0 407 x\r\nProxy-Authenticate: Basic\r\n\r\n"), Some(407));
        for bad in [&b"SSH-2.0-x\r\n\r\n"[..], b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\xff\r\n\r\n"] {
            assert_eq!(status(bad), None);
        }
    }
}
