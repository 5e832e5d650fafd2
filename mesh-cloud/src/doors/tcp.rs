//! The TCP door: a port that leads to a target.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use bytes::{BufMut, Bytes, BytesMut};
use proto::principal::Principal;
use runtime::splice::TcpEnd;
use tokio::net::TcpStream;

use super::Visitor;
use crate::{
    config::TcpDoorConfig,
    route::{Request, Router},
};

/// How a header of PROXY protocol version 2 begins (HAProxy's specification, 2.2).
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, on behalf of somebody else.
const VERSION_2_PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
const UNSPECIFIED: u8 = 0;

/// Lets a visitor through. Its first bytes go behind the Open without waiting for the target; a refusal ends its
/// connection with a reset, since TCP has no words.
pub async fn visit(visitor: Visitor, router: Router, door: TcpDoorConfig) {
    let Visitor { socket, from } = visitor;
    let head = if door.proxy_protocol { introduction(&socket, from) } else { Ok(Bytes::new()) };
    let Ok(end) = head.and_then(|head| TcpEnd::new(socket, head)) else { return };
    let who = Principal::Door { name: door.name.clone() };
    let request = Request::new(who, from.to_string(), &door.name, door.target);
    match router.open(request).await {
        Ok(pending) => pending.splice(end).await,
        Err(refusal) => tracing::debug!(door = door.name, code = %refusal.code, reason = refusal.reason, "refused"),
    }
}

/// What the target hears before the visitor's first byte: from where it comes, and to which address of ours.
fn introduction(socket: &TcpStream, from: SocketAddr) -> io::Result<Bytes> {
    let to = socket.local_addr()?;
    let to = SocketAddr::new(to.ip().to_canonical(), to.port());
    Ok(header(from, to))
}

/// The header of a TCP connection; of no known family if the two addresses are not of the same one.
fn header(from: SocketAddr, to: SocketAddr) -> Bytes {
    let mut addresses = BytesMut::new();
    let family = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            addresses.put_slice(&from.octets());
            addresses.put_slice(&to.octets());
            TCP_OVER_IPV4
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            addresses.put_slice(&from.octets());
            addresses.put_slice(&to.octets());
            TCP_OVER_IPV6
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => UNSPECIFIED,
    };
    if family != UNSPECIFIED {
        addresses.put_u16(from.port());
        addresses.put_u16(to.port());
    }
    let mut header = BytesMut::from(SIGNATURE);
    header.put_slice(&[VERSION_2_PROXY, family]);
    header.put_u16(u16::try_from(addresses.len()).unwrap_or(0));
    header.put_slice(&addresses);
    header.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_names_both_addresses() {
        let header = |from: &str, to: &str| header(from.parse().unwrap(), to.parse().unwrap());
        let ipv4 = header("192.0.2.1:256", "198.51.100.2:443");
        assert_eq!(&ipv4[..12], SIGNATURE);
        assert_eq!(&ipv4[12..], [0x21, 0x11, 0, 12, 192, 0, 2, 1, 198, 51, 100, 2, 1, 0, 1, 187]);
        let ipv6 = header("[2001:db8::1]:1", "[2001:db8::2]:2");
        assert_eq!((ipv6.len(), &ipv6[12..16]), (52, &[0x21, 0x21, 0, 36][..]));
        assert_eq!((ipv6[31], ipv6[47], &ipv6[48..]), (1, 2, &[0, 1, 0, 2][..]));
        assert_eq!(&header("192.0.2.1:1", "[::1]:2")[12..], [0x21, 0, 0, 0]);
    }
}
