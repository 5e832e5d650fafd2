//! What is said in SOCKS5 (RFC 1928), with a user name and a password (RFC 1929) or without.
//!
//! Each reader takes what has come so far, and returns what it means and how long it was, or `None` if there is more
//! to come. Nothing is longer than 513 bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::Bytes;

use crate::{code::RefuseCode, secret::Secret};

/// The version, first byte of the greeting, of the request and of most answers.
pub const VERSION: u8 = 5;
/// Version of the login, which is a protocol of its own.
const LOGIN: u8 = 1;
/// Kinds of addresses.
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;
/// The method of saying nothing.
const NOTHING: u8 = 0;
/// The method of a user name and a password.
const PASSWORD: u8 = 2;
/// `CONNECT`.
const CONNECT: u8 = 1;
/// `UDP ASSOCIATE`.
const ASSOCIATE: u8 = 3;

/// Take the user name and the password.
pub const SAY_WHO: [u8; 2] = [VERSION, PASSWORD];
/// Nobody has to say who it is.
pub const GO_ON: [u8; 2] = [VERSION, NOTHING];
/// None of these methods.
pub const NO_METHODS: [u8; 2] = [VERSION, 0xff];
/// You are who you say.
pub const WELCOME: [u8; 2] = [LOGIN, 0];
/// You are not.
pub const STRANGER: [u8; 2] = [LOGIN, 1];

/// What cannot be SOCKS5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
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
pub struct Login {
    /// The user.
    pub user: String,
    /// In place of a password.
    pub token: Secret,
}

/// How somebody can say who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Methods {
    /// Not at all.
    pub nothing: bool,
    /// By a user name and a password.
    pub password: bool,
}

/// What somebody wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// A connection.
    Connect,
    /// A way for datagrams.
    Associate,
    /// What is not served.
    Other(u8),
}

/// Where somebody wants to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it wants.
    pub command: Command,
    /// A name or an address.
    pub host: String,
    /// The port.
    pub port: u16,
}

/// How a request ended (RFC 1928, 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
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
    /// Neither CONNECT nor UDP ASSOCIATE.
    CommandNotSupported = 7,
    /// An address where only a name has a meaning.
    AddressNotSupported = 8,
}

impl Reply {
    /// As bytes, with an address that means nothing: where the edge dialled from is of no use to anybody.
    #[must_use]
    pub const fn encode(self) -> [u8; 10] {
        [VERSION, self as u8, 0, 1, 0, 0, 0, 0, 0, 0]
    }
}

impl Reply {
    /// The way for datagrams begins at this address.
    #[must_use]
    pub fn associated(at: SocketAddr) -> Bytes {
        let mut reply = vec![VERSION, Self::Succeeded as u8, 0];
        match at.ip().to_canonical() {
            IpAddr::V4(ip) => {
                reply.push(IPV4);
                reply.extend_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                reply.push(IPV6);
                reply.extend_from_slice(&ip.octets());
            }
        }
        reply.extend_from_slice(&at.port().to_be_bytes());
        reply.into()
    }
}

impl From<RefuseCode> for Reply {
    /// The closest to a code that SOCKS5 has.
    fn from(code: RefuseCode) -> Self {
        match code {
            RefuseCode::Unauthenticated | RefuseCode::PolicyDenied | RefuseCode::EdgeDenied => Self::NotAllowed,
            RefuseCode::EdgeOffline | RefuseCode::LinkLost | RefuseCode::MeshTimeout => Self::NetworkUnreachable,
            RefuseCode::EdgeUnknown
            | RefuseCode::ServiceUnknown
            | RefuseCode::TargetUnreachable
            | RefuseCode::TargetNameUnknown => Self::HostUnreachable,
            RefuseCode::TargetRefused => Self::Refused,
            RefuseCode::TargetTimeout => Self::Expired,
            RefuseCode::Unsupported => Self::AddressNotSupported,
            RefuseCode::BadRequest
            | RefuseCode::LimitReached
            | RefuseCode::Draining
            | RefuseCode::Internal
            | RefuseCode::LoopDetected
            | RefuseCode::NotReady => Self::Failure,
        }
    }
}

/// What is understood of some bytes, and how many of them: nothing yet if there is more to come.
pub type Heard<T> = Result<Option<(T, usize)>, Bad>;

/// How the visitor can say who it is.
///
/// # Errors
/// If it is no SOCKS5.
pub fn greeting(bytes: &[u8]) -> Heard<Methods> {
    let [version, count, rest @ ..] = bytes else { return Ok(None) };
    if *version != VERSION {
        return Err(Bad::Version);
    }
    let methods = rest.get(..usize::from(*count));
    Ok(methods.map(|methods| {
        let offered = Methods { nothing: methods.contains(&NOTHING), password: methods.contains(&PASSWORD) };
        (offered, 2 + methods.len())
    }))
}

/// Who the visitor is.
///
/// # Errors
/// If it is no login.
pub fn login(bytes: &[u8]) -> Heard<Login> {
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
///
/// # Errors
/// If it is no request, or not for a name or an address.
pub fn request(bytes: &[u8]) -> Heard<Request> {
    let [version, command, _, kind, rest @ ..] = bytes else { return Ok(None) };
    if *version != VERSION {
        return Err(Bad::Version);
    }
    let command = match *command {
        CONNECT => Command::Connect,
        ASSOCIATE => Command::Associate,
        other => Command::Other(other),
    };
    Ok(place(*kind, rest)?.map(|((host, port), length)| (Request { command, host, port }, 4 + length)))
}

/// An address and a port, and how long they are.
fn place(kind: u8, rest: &[u8]) -> Heard<(String, u16)> {
    let address = match kind {
        IPV4 => rest.first_chunk::<4>().map(|ip| (Ipv4Addr::from(*ip).to_string(), 4)),
        NAME => match counted(rest) {
            Some((name, _)) => Some((text(name)?, 1 + name.len())),
            None => None,
        },
        IPV6 => rest.first_chunk::<16>().map(|ip| (Ipv6Addr::from(*ip).to_string(), 16)),
        kind => return Err(Bad::AddressType(kind)),
    };
    let Some((host, length)) = address else { return Ok(None) };
    let port = rest.get(length..).and_then(|rest| rest.first_chunk::<2>());
    Ok(port.map(|port| ((host, u16::from_be_bytes(*port)), length + 2)))
}

/// For whom a datagram is (RFC 1928, 7), and how long that is; `None` if it is a fragment, which nobody sends and nobody
/// has to take, or does not say.
#[must_use]
pub fn addressed(datagram: &[u8]) -> Option<((String, u16), usize)> {
    let [_, _, 0, kind, rest @ ..] = datagram else { return None };
    let (to, length) = place(*kind, rest).ok()??;
    Some((to, 4 + length))
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
        assert_eq!(whole(greeting, &[5, 2, 0, 2]), Methods { nothing: true, password: true });
        assert_eq!(whole(greeting, &[5, 1, 0]), Methods { nothing: true, password: false });
        assert_eq!(whole(greeting, &[5, 0]), Methods { nothing: false, password: false });
        let who = whole(login, b"\x01\x05alice\x03a.b");
        assert_eq!((who.user.as_str(), who.token.reveal()), ("alice", "a.b"));
        let to = |host: &str, port| Request { command: Command::Connect, host: host.into(), port };
        assert_eq!(whole(request, b"\x05\x01\x00\x03\x06shop-1\x00\x16"), to("shop-1", 22));
        assert_eq!(whole(request, b"\x05\x01\x00\x01\x0a\x00\x00\x01\x01\xbb"), to("10.0.0.1", 443));
        assert_eq!(whole(request, &[&[5, 1, 0, 4][..], &[0; 15], &[1, 0, 80]].concat()), to("::1", 80));
        assert_eq!(whole(request, b"\x05\x03\x00\x03\x01a\x00\x16").command, Command::Associate);
        assert_eq!(whole(request, b"\x05\x02\x00\x03\x01a\x00\x16").command, Command::Other(2));
    }

    #[test]
    fn a_datagram_says_for_whom_it_is() {
        assert_eq!(addressed(b"\0\0\0\x03\x06shop-1\0\x35query"), Some((("shop-1".into(), 53), 13)));
        assert_eq!(addressed(b"\0\0\0\x01\x0a\0\0\x01\0\x35"), Some((("10.0.0.1".into(), 53), 10)));
        for wrong in
            [&b""[..], b"\0\0\0", b"\0\0\x01\x03\x01a\0\x35", b"\0\0\0\x02\x01a\0\x35", b"\0\0\0\x03\x05a\0\x35"]
        {
            assert_eq!(addressed(wrong), None, "{wrong:?}");
        }
        let at = |text: &str| Reply::associated(text.parse().unwrap());
        assert_eq!(at("127.0.0.1:258"), [5, 0, 0, 1, 127, 0, 0, 1, 1, 2][..]);
        assert_eq!(at("[::ffff:127.0.0.1]:258"), [5, 0, 0, 1, 127, 0, 0, 1, 1, 2][..]);
        assert_eq!(at("[::1]:1").len(), 22);
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
