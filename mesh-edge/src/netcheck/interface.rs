//! What the interface takes by which packets leave this machine, as the kernel says. Linux alone knows; elsewhere
//! nothing is said.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
};

use crate::machine;

/// Bytes of the headers of IP and UDP.
const fn headers(peer: SocketAddr) -> u32 {
    if peer.is_ipv4() { 28 } else { 48 }
}

/// The largest UDP payload that the interface takes which leads to an address; `None` if it cannot be told.
pub(super) fn payload_to(peer: SocketAddr) -> Option<u16> {
    let device = if machine::has_address(peer.ip()) || peer.ip().is_loopback() {
        "lo".to_owned()
    } else {
        machine::device_to(peer.ip())?
    };
    let text = fs::read_to_string(format!("/sys/class/net/{device}/mtu")).ok()?;
    let mtu: u32 = text.trim().parse().ok()?;
    u16::try_from(mtu.checked_sub(headers(peer))?.min(u16::MAX.into())).ok()
}

/// Whether an address is this machine's own.
pub(super) fn is_own(ip: IpAddr) -> bool {
    ip.is_loopback() || machine::has_address(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn loopback_takes_large_ones() {
        let payload = payload_to(SocketAddr::from(([127, 0, 0, 1], 1)));
        assert!(payload.is_some_and(|bytes| bytes > 1400), "{payload:?}");
        assert!(is_own(IpAddr::from([127, 0, 0, 1])));
    }
}
