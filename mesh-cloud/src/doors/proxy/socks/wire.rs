//! What is said in SOCKS5 (RFC 1928) with a user name and a password (RFC 1929), as bytes. Pure, and fuzzed as a file of
//! its own (`fuzz/src/door.rs`).
//!
//! Each reader takes what has come so far, and returns what it means and how long it was, or `None` if there is more
//! to come. Nothing is longer than 513 bytes.

use std::net::{Ipv4Addr, Ipv6Addr};

use proto::secret::Secret;

/// The version, first byte of the greeting, of the request and of most answers.
pub(super) const VERSION: u8 = 5;
/// Version of the login, which is a protocol of its own.
const LOGIN: u8 = 1;
/// The method of a user name and a password.
const PASSWORD: u8 = 2;
/// `CONNECT`.
const CONNECT: u8 = 1;

/// Take the user name and the password.
pub(super) const SAY_WHO: [u8; 2] = [VERSION, PASSWORD];
/// None of these methods.
pub(super) const NO_METHODS: [u8; 2] = [VERSION, 0xff];
/// You are who you say.
pub(super) const WELCOME: [u8; 2] = [LOGIN, 0];
/// You are not.
pub(super) const STRANGER: [u8; 2] = [LOGIN, 1];

/// What cannot be SOCKS5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Bad {
    /// Another version.
    #[error("this is no SOCKS5")]
    Version,
    /// Of RFC 1928, 5.
    #[error("there is no address of type {0} in SOCKS5")]
    AddressType(u8),
    /// A name or a password that is no UTF-8 or empty.
    #[error("a name or a password is empty, or no UTF-8")]
    Text,
}

/// Who somebody says to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Login {
    /// The user.
    pub(super) user: String,
    /// In place of a password.
    pub(super) token: Secret,
}

/// Where somebody wants to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Whether it is a `CONNECT`; nothing else is served.
    pub(super) connect: bool,
    /// A name or an address.
    pub(super) host: String,
    /// The port.
    pub(super) port: u16,
}

/// How a request ended (RFC 1928, 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// Bytes follow.
    Succeeded = 0,
    /// A fault of the mesh.
    Failure = 1,
    /// Policy.
    NotAllowed = 2,
    /// The edge is not there.
    NetworkUnreachable = 3,
    /// The edge cannot reach the target.
    HostUnreachable = 4,
    /// The target refused.
    Refused = 5,
    /// The target did not answer.
    Expired = 6,
    /// Something else than CONNECT.
    CommandNotSupported = 7,
    /// An address where only a name has a meaning.
    AddressNotSupported = 8,
}

impl Reply {
    /// As bytes, with an address that means nothing: where the edge dialled from is of no use to anybody.
    pub(super) const fn encode(self) -> [u8; 10] {
        [VERSION, self as u8, 0, 1, 0, 0, 0, 0, 0, 0]
    }
}

/// What is understood of some bytes, and how many of them: nothing yet if there is more to come.
pub(super) type Heard<T> = Result<Option<(T, usize)>, Bad>;

/// Whether the visitor can say who it is.
pub(super) fn greeting(bytes: &[u8]) -> Heard<bool> {
    let [version, count, rest @ ..] = bytes else { return Ok(None) };
    if *version != VERSION {
        return Err(Bad::Version);
    }
    let methods = rest.get(..usize::from(*count));
    Ok(methods.map(|methods| (methods.contains(&PASSWORD), 2 + methods.len())))
}

/// Who the visitor is.
pub(super) fn login(bytes: &[u8]) -> Heard<Login> {
    let Some((&version, rest)) = bytes.split_first() else { return Ok(None) };
    if version != LOGIN {
        return Err(Bad::Version);
    }
    let Some((user, rest)) = counted(rest) else { return Ok(None) };
    let Some((token, _)) = counted(rest) else { return Ok(None) };
    let length = 3 + user.len() + token.len();
    let (user, token) = (text(user)?, Secret::new(text(token)?));
    Ok(Some((Login { user, token }, length)))
}

/// Where the visitor wants to go.
pub(super) fn request(bytes: &[u8]) -> Heard<Request> {
    let [version, command, _, kind, rest @ ..] = bytes else { return Ok(None) };
    if *version != VERSION {
        return Err(Bad::Version);
    }
    let address = match kind {
        1 => rest.first_chunk::<4>().map(|ip| (Ipv4Addr::from(*ip).to_string(), 4)),
        3 => match counted(rest) {
            Some((name, _)) => Some((text(name)?, 1 + name.len())),
            None => None,
        },
        4 => rest.first_chunk::<16>().map(|ip| (Ipv6Addr::from(*ip).to_string(), 16)),
        kind => return Err(Bad::AddressType(*kind)),
    };
    let Some((host, length)) = address else { return Ok(None) };
    let port = rest.get(length..).and_then(|rest| rest.first_chunk::<2>());
    let connect = *command == CONNECT;
    Ok(port.map(|port| (Request { connect, host, port: u16::from_be_bytes(*port) }, 4 + length + 2)))
}

/// Bytes behind their number, and what follows.
fn counted(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&count, rest) = bytes.split_first()?;
    rest.split_at_checked(usize::from(count))
}

fn text(bytes: &[u8]) -> Result<String, Bad> {
    let text = std::str::from_utf8(bytes).ok().filter(|text| !text.is_empty());
    text.map(str::to_owned).ok_or(Bad::Text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads what is whole, and finds that whatever is shorter is not yet whole.
    fn whole<T>(read: impl Fn(&[u8]) -> Heard<T>, bytes: &[u8]) -> T {
        for length in 0..bytes.len() {
            assert!(read(&bytes[..length]).unwrap().is_none(), "{length} bytes of {bytes:?}");
        }
        let longer = [bytes, b"and more"].concat();
        let (what, length) = read(&longer).unwrap().unwrap();
        assert_eq!(length, bytes.len());
        what
    }

    #[test]
    fn a_conversation_is_read_byte_by_byte() {
        assert!(whole(greeting, &[5, 2, 0, 2]));
        assert!(!whole(greeting, &[5, 1, 0]));
        assert!(!whole(greeting, &[5, 0]));
        let who = whole(login, b"\x01\x05alice\x03a.b");
        assert_eq!((who.user.as_str(), who.token.reveal()), ("alice", "a.b"));
        let to = |host: &str, port| Request { connect: true, host: host.into(), port };
        assert_eq!(whole(request, b"\x05\x01\x00\x03\x06shop-1\x00\x16"), to("shop-1", 22));
        assert_eq!(whole(request, b"\x05\x01\x00\x01\x0a\x00\x00\x01\x01\xbb"), to("10.0.0.1", 443));
        assert_eq!(whole(request, &[&[5, 1, 0, 4][..], &[0; 15], &[1, 0, 80]].concat()), to("::1", 80));
        assert!(!whole(request, b"\x05\x03\x00\x03\x01a\x00\x16").connect);
    }

    #[test]
    fn what_is_no_socks5_is_not_taken_for_it() {
        assert_eq!(greeting(&[4, 1]), Err(Bad::Version));
        assert_eq!(login(&[5]), Err(Bad::Version));
        assert_eq!(login(b"\x01\x00\x01a"), Err(Bad::Text));
        assert_eq!(login(b"\x01\x01\xff\x01a"), Err(Bad::Text));
        assert_eq!(request(&[4, 1, 0, 1]), Err(Bad::Version));
        assert_eq!(request(&[5, 1, 0, 2]), Err(Bad::AddressType(2)));
        assert_eq!(request(b"\x05\x01\x00\x03\x00\x00\x16"), Err(Bad::Text));
    }
}
