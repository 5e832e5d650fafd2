//! Free ports, for scripts and for processes that are started here.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use crate::say;

/// Below what Linux gives out to outgoing connections by default (32768), so that none of those takes one meanwhile.
const RANGE: std::ops::Range<u16> = 18_000..32_000;

/// Prints `count` ports that nobody uses.
pub(crate) fn print(count: usize) -> anyhow::Result<()> {
    free(count)?.into_iter().try_for_each(|port| Ok(say(port)?))
}

/// Finds `count` ports that nobody uses.
pub(crate) fn free(count: usize) -> anyhow::Result<Vec<u16>> {
    let (mut ports, mut held) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for _ in 0..20_000 {
        if held.len() == count {
            break;
        }
        let port = rand::random_range(RANGE);
        if let Some(hold) = hold(port) {
            ports.push(port);
            held.push(hold);
        }
    }
    anyhow::ensure!(held.len() == count, "this machine has no {count} free ports in {RANGE:?}");
    Ok(ports)
}

type Held = (TcpListener, UdpSocket, Option<TcpListener>);

/// Holds a port, so that it is not given twice.
fn hold(port: u16) -> Option<Held> {
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // A machine without IPv6 has nobody there either.
    let v6 = TcpListener::bind(SocketAddr::from((Ipv6Addr::LOCALHOST, port)));
    if v6.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::AddrInUse) {
        return None;
    }
    Some((TcpListener::bind(v4).ok()?, UdpSocket::bind(v4).ok()?, v6.ok()))
}
