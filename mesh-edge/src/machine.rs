//! What belongs to this machine, as the kernel says: its own addresses, and the addresses of the pods that run on it.
//!
//! kube-apiserver may reach these by default, and nothing beyond. Pods are told from the machine's neighbours by the
//! route that leads to them: one over a device that a network plugin makes for its own node. Plugins that do it in
//! another way are served by `pod_networks` in the configuration. Reads `/proc/net`, which is that of the process's own
//! network namespace; the parsers are pure.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use proto::book::Cidr;

/// Devices that have all pods of a node behind them: of the bridge plugin and flannel, kubenet, kube-router, antrea,
/// OVN-Kubernetes and weave.
const BRIDGES: &[&str] = &["cni", "cbr", "kube-bridge", "antrea-gw", "ovn-k8s-mp", "weave"];
/// Devices whose gateway is an address of the node's own pods: Cilium routes other nodes' pods there as well, with the
/// same gateway.
const GATEWAYS: &[&str] = &["cilium_host"];
/// Devices with one pod behind each: of the ptp plugin, Calico, Cilium, Azure, AWS and GKE.
const SINGLE: &[&str] = &["veth", "cali", "lxc", "azv", "eni", "gke", "pod"];
/// Bit of a route that leads to a gateway, and of one that is in use (route(8)).
const RTF_GATEWAY: u32 = 0x2;
const RTF_UP: u32 = 0x1;

/// A route as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Route<'a> {
    to: Cidr,
    gateway: Option<IpAddr>,
    device: &'a str,
}

/// Whether the machine itself has this address, and it is none of loopback.
#[must_use]
pub fn has_address(ip: IpAddr) -> bool {
    let own = match ip {
        IpAddr::V4(v4) => read("fib_trie").is_some_and(|text| own_v4(&text).any(|own| own == v4)),
        IpAddr::V6(v6) => read("if_inet6").is_some_and(|text| own_v6(&text).any(|own| own == v6)),
    };
    own && !ip.is_loopback() && !ip.is_unspecified()
}

/// Whether this is the address of a pod that runs here, as far as the routes tell.
#[must_use]
pub fn has_pod(ip: IpAddr) -> bool {
    let (file, parse): (&str, fn(&str) -> Option<Route<'_>>) =
        if ip.is_ipv4() { ("route", route_v4) } else { ("ipv6_route", route_v6) };
    read(file).is_some_and(|text| leads_to_pod(text.lines().filter_map(parse), ip))
}

/// The device by which packets to an address leave this machine, as the main routing table says.
#[must_use]
pub fn device_to(ip: IpAddr) -> Option<String> {
    let (file, parse): (&str, fn(&str) -> Option<Route<'_>>) =
        if ip.is_ipv4() { ("route", route_v4) } else { ("ipv6_route", route_v6) };
    let text = read(file)?;
    let routes = text.lines().filter_map(parse).filter(|route| route.to.contains(ip));
    Some(routes.max_by_key(|route| route.to.bits())?.device.to_owned())
}

fn read(name: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/net/{name}")).ok()
}

fn leads_to_pod<'a>(routes: impl Iterator<Item = Route<'a>>, ip: IpAddr) -> bool {
    let Some(best) = routes.filter(|r| r.to.contains(ip)).max_by_key(|r| r.to.bits()) else { return false };
    let of = |kinds: &[&str]| kinds.iter().any(|kind| best.device.starts_with(kind));
    let width = if ip.is_ipv4() { 32 } else { 128 };
    if best.to.bits() == 0 {
        return false;
    }
    match best.gateway {
        Some(gateway) => of(GATEWAYS) && best.to.contains(gateway),
        None => of(BRIDGES) || of(GATEWAYS) || (of(SINGLE) && best.to.bits() == width),
    }
}

/// `/proc/net/fib_trie`: an address in one line, and what it is in the ones below.
fn own_v4(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    let mut last = None;
    text.lines().filter_map(move |line| {
        let line = line.trim_start();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.trim_end().parse().ok();
            return None;
        }
        last.filter(|_| line.starts_with("/32 host LOCAL"))
    })
}

/// `/proc/net/if_inet6`: one address in each line.
fn own_v6(text: &str) -> impl Iterator<Item = Ipv6Addr> {
    text.lines().filter_map(|line| hex_v6(line.split_whitespace().next()?))
}

/// A line of `/proc/net/route`; addresses are hexadecimal in the byte order of the machine.
fn route_v4(line: &str) -> Option<Route<'_>> {
    let mut words = line.split_whitespace();
    let device = words.next()?;
    let [to, gateway, flags] = [words.next()?, words.next()?, words.next()?].map(|w| u32::from_str_radix(w, 16));
    let mask = words.nth(3).map(|w| u32::from_str_radix(w, 16))?;
    let (to, gateway, flags, mask) = (to.ok()?, gateway.ok()?, flags.ok()?, mask.ok()?);
    let address = |raw: u32| IpAddr::V4(Ipv4Addr::from(raw.to_ne_bytes()));
    let bits = u8::try_from(mask.count_ones()).ok()?;
    let gateway = (flags & RTF_GATEWAY != 0).then(|| address(gateway));
    (flags & RTF_UP != 0).then_some(())?;
    Some(Route { to: Cidr::new(address(to), bits)?, gateway, device })
}

/// A line of `/proc/net/ipv6_route`.
fn route_v6(line: &str) -> Option<Route<'_>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [to, bits, _, _, gateway, _, _, _, flags, device] = words[..] else { return None };
    let flags = u32::from_str_radix(flags, 16).ok()?;
    let to = Cidr::new(IpAddr::V6(hex_v6(to)?), u8::from_str_radix(bits, 16).ok()?)?;
    let gateway = hex_v6(gateway).filter(|_| flags & RTF_GATEWAY != 0).map(IpAddr::V6);
    (flags & RTF_UP != 0).then_some(Route { to, gateway, device })
}

fn hex_v6(text: &str) -> Option<Ipv6Addr> {
    (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok().map(Ipv6Addr::from_bits))?
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0100630A\t0003\t0\t0\t0\t00000000\t0\t0\t0
cni0\t0001F40A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
flannel.1\t0002F40A\t0002F40A\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0
cali12ab\t0503A8C0\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
veth1\t0004A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
cilium_host\t0001000A\t1401000A\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0
cilium_host\t0002000A\t1401000A\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0
";

    #[test]
    #[cfg(target_endian = "little")]
    fn pods_are_behind_the_devices_of_network_plugins() {
        for (ip, expected) in [
            ("10.244.1.9", true),
            ("10.244.2.9", false),
            ("192.168.3.5", true),
            ("192.168.3.6", false),
            // A network behind such a device is not one pod: it may be the way out.
            ("192.168.4.7", false),
            ("10.0.1.7", true),
            ("10.0.2.7", false),
            ("8.8.8.8", false),
        ] {
            let routes = ROUTES.lines().filter_map(route_v4);
            assert_eq!(leads_to_pod(routes, ip.parse().unwrap()), expected, "{ip}");
        }
    }

    #[test]
    fn pods_with_ipv6() {
        let text = "\
fd000001000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     cni0
fd000002000000000000000000000000 40 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
";
        let pod = |ip: &str| leads_to_pod(text.lines().filter_map(route_v6), ip.parse().unwrap());
        assert!(pod("fd00:1::7"));
        assert!(!pod("fd00:2::7"));
        assert!(!pod("2001:db8::1"));
    }

    #[test]
    fn own_addresses_are_those_of_the_local_table() {
        let trie = "Local:\n  +-- 0.0.0.0/0 2 0 2\n     |-- 10.99.0.5\n        /32 host LOCAL\n     |-- 10.99.0.7\n        /32 link BROADCAST\n     |-- 127.0.0.0\n        /8 host LOCAL\n";
        assert_eq!(own_v4(trie).collect::<Vec<_>>(), [Ipv4Addr::new(10, 99, 0, 5)]);
        let inet6 = "fd000000000000000000000000000005 02 40 00 80     eth0\nnonsense\n";
        assert_eq!(own_v6(inet6).collect::<Vec<_>>(), ["fd00::5".parse::<Ipv6Addr>().unwrap()]);
        assert!(!has_address(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        assert!(!has_address("192.0.2.1".parse().unwrap()), "an address for documentation is nobody's");
    }
}
