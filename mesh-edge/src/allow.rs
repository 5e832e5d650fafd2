//! What this edge itself lets the mesh reach. Default deny: whatever policy the shards apply, an edge dials kubelet,
//! sshd, its announced services, and what its own configuration lists. Pure: names are resolved elsewhere, and each
//! address is brought back here.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use proto::{
    book::Cidr,
    code::RefuseCode,
    id::{EdgeId, ServiceName},
    message::ServiceKind,
    policy::Ports,
    principal::Principal,
    stream::Refusal,
    target::{HostPort, Target},
};
use serde::Deserialize;

/// kubelet's port.
const KUBELET: u16 = 10250;
/// sshd's port.
const SSHD: u16 = 22;
/// Where clouds hand out credentials to whoever asks from the machine itself. A network that happens to contain them
/// is not meant to open them.
const METADATA: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254))];

/// One line of the configuration's `allow`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Rule {
    host: Host,
    ports: Ports,
    text: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    /// This name, whatever it resolves to.
    Name(String),
    /// Every address that begins with these bits, by whatever name.
    Net { ip: IpAddr, bits: u8 },
}

/// A text was no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no target to allow; write 127.0.0.1:5432, 10.0.0.0/24:80, printer.lan:631 or [fd00::]/64:*, with a port, a range such as 8000-8100, or *"
)]
pub struct InvalidTargetRule(String);

impl FromStr for Rule {
    type Err = InvalidTargetRule;

    fn from_str(text: &str) -> Result<Self, InvalidTargetRule> {
        let no = || InvalidTargetRule(text.chars().take(120).collect());
        let (host, ports) = text.rsplit_once(':').ok_or_else(no)?;
        let ports = ports.parse().map_err(|_| no())?;
        let host = Host::parse(host).ok_or_else(no)?;
        Ok(Self { host, ports, text: text.to_owned() })
    }
}

impl TryFrom<String> for Rule {
    type Error = InvalidTargetRule;

    fn try_from(text: String) -> Result<Self, InvalidTargetRule> {
        text.parse()
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Host {
    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let ip: Option<IpAddr> = match address.strip_prefix('[') {
            Some(v6) => Some(IpAddr::V6(v6.strip_suffix(']')?.parse().ok()?)),
            None => address.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        };
        match (ip, bits) {
            (Some(ip), None) => Some(Self::Net { ip, bits: width(ip) }),
            (Some(ip), Some(bits)) => {
                let bits = bits.parse().ok().filter(|&b| b <= width(ip))?;
                Some(Self::Net { ip, bits })
            }
            // HostPort knows what a name is; the port plays no part.
            (None, None) if address.contains(':') => None,
            (None, None) => HostPort::new(address, 1).ok().map(|to| Self::Name(to.host)),
            (None, Some(_)) => None,
        }
    }

    fn names(&self, host: &str) -> bool {
        matches!(self, Self::Name(name) if name == host)
    }

    fn contains(&self, address: IpAddr) -> bool {
        match self {
            Self::Name(_) => false,
            Self::Net { ip, bits } if METADATA.contains(&address) => *ip == address && *bits == width(*ip),
            Self::Net { ip, bits } => shares_prefix(*ip, address, *bits),
        }
    }
}

const fn width(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn shares_prefix(a: IpAddr, b: IpAddr, bits: u8) -> bool {
    match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            (a.to_bits() ^ b.to_bits()).checked_shr(32 - u32::from(bits)).unwrap_or(0) == 0
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            (a.to_bits() ^ b.to_bits()).checked_shr(128 - u32::from(bits)).unwrap_or(0) == 0
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

/// What of this machine kube-apiserver may reach besides kubelet.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// Whether its own addresses and the pods that run on it are open to it.
    pub open: bool,
    /// Networks whose addresses are pods of this machine, whatever the routes say.
    pub pod_networks: Vec<Cidr>,
}

/// What the kernel knows of an address.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Whether the machine has it.
    pub has_address: fn(IpAddr) -> bool,
    /// Whether a pod that runs on it has.
    pub has_pod: fn(IpAddr) -> bool,
}

/// What is open by itself.
#[derive(Clone, Copy, Debug)]
pub struct Local {
    /// Port 10250 of this machine.
    pub kubelet: bool,
    /// Port 22 of this machine.
    pub sshd: bool,
}

/// All that an edge may dial.
#[derive(Clone, Debug)]
pub struct Allow {
    edge: EdgeId,
    local: Local,
    services: BTreeMap<ServiceName, (ServiceKind, HostPort)>,
    rules: Vec<Rule>,
    cluster: Cluster,
}

/// What to do for a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Echo.
    Echo,
    /// Dial.
    Dial {
        /// A name or an address.
        to: HostPort,
        /// What allows it, for the access record.
        rule: String,
        /// Whether each address that the name resolves to must be allowed by [`Allow::address`] as well.
        by_address: bool,
        /// Whom to dial if nobody listens there: kubelet may listen on loopback only.
        or: Option<HostPort>,
    },
}

impl Allow {
    /// Puts it together.
    #[must_use]
    pub const fn new(
        edge: EdgeId,
        local: Local,
        services: BTreeMap<ServiceName, (ServiceKind, HostPort)>,
        rules: Vec<Rule>,
    ) -> Self {
        Self { edge, local, services, rules, cluster: Cluster { open: false, pod_networks: Vec::new() } }
    }

    /// With these things open to kube-apiserver.
    #[must_use]
    pub fn with_cluster(mut self, cluster: Cluster) -> Self {
        self.cluster = cluster;
        self
    }

    /// Decides on a target that somebody asks for: kube-apiserver may reach more of this machine than others.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn plan_for(&self, who: Option<&Principal>, target: &Target, machine: Machine) -> Result<Plan, Refusal> {
        let plan = self.plan(target);
        let (Err(refusal), Some(Principal::Apiserver), Target::Tcp { to, .. }) = (&plan, who, target) else {
            return plan;
        };
        match to.host.parse::<IpAddr>() {
            Ok(ip) if refusal.code == RefuseCode::EdgeDenied => {
                self.for_apiserver(ip.to_canonical(), to, machine).map_or(plan, Ok)
            }
            Ok(_) | Err(_) => plan,
        }
    }

    fn for_apiserver(&self, ip: IpAddr, to: &HostPort, machine: Machine) -> Option<Plan> {
        if !self.cluster.open || METADATA.contains(&ip) || ip.is_loopback() || ip.is_unspecified() {
            return None;
        }
        let kubelet = to.port == KUBELET;
        let listed = self.cluster.pod_networks.iter().any(|net| net.contains(ip));
        let (rule, or) = if (self.local.kubelet || !kubelet) && (machine.has_address)(ip) {
            ("node address", kubelet.then(|| HostPort { host: "localhost".into(), port: KUBELET }))
        } else if listed || (machine.has_pod)(ip) {
            ("local pod", None)
        } else {
            return None;
        };
        Some(Plan::Dial { to: to.clone(), rule: rule.to_owned(), by_address: false, or })
    }

    /// Decides on a target.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn plan(&self, target: &Target) -> Result<Plan, Refusal> {
        if let Some(other) = target.edge().filter(|e| **e != self.edge) {
            let why = format!("this is edge {}, and the stream is for {other}", self.edge);
            return Err(Refusal::because(RefuseCode::EdgeUnknown, why));
        }
        match target {
            Target::Probe { .. } => Ok(Plan::Echo),
            Target::Udp { .. } => Err(unsupported()),
            Target::Service { name, .. } => self.service(name),
            Target::Tcp { to, .. } => self.tcp(to),
        }
    }

    fn service(&self, name: &ServiceName) -> Result<Plan, Refusal> {
        match self.services.get(name) {
            Some((ServiceKind::Udp, _)) => Err(unsupported()),
            Some((_, to)) => {
                Ok(Plan::Dial { to: to.clone(), rule: format!("service {name}"), by_address: false, or: None })
            }
            None => {
                let why = format!("edge {} has no service {name}; services stand in its configuration", self.edge);
                Err(Refusal::because(RefuseCode::ServiceUnknown, why))
            }
        }
    }

    fn tcp(&self, asked: &HostPort) -> Result<Plan, Refusal> {
        // kube-apiserver asks for the node by its name, which is this machine by definition.
        let here = asked.host == self.edge.as_str();
        let to = if here { HostPort { host: "localhost".into(), port: asked.port } } else { asked.clone() };
        let dial =
            |rule: &str, by_address| Ok(Plan::Dial { to: to.clone(), rule: rule.to_owned(), by_address, or: None });
        let loopback = to.is_loopback();
        if loopback && self.local.kubelet && to.port == KUBELET {
            return dial("kubelet", false);
        }
        if loopback && self.local.sshd && to.port == SSHD {
            return dial("sshd", false);
        }
        let same = |s: &HostPort| s.port == to.port && (s.host == to.host || (s.is_loopback() && loopback));
        if let Some((name, (_, address))) =
            self.services.iter().find(|(_, (kind, s))| *kind != ServiceKind::Udp && same(s))
        {
            return Ok(Plan::Dial {
                to: address.clone(),
                rule: format!("service {name}"),
                by_address: false,
                or: None,
            });
        }
        let mut rules = self.rules.iter().filter(|r| r.ports.contains(to.port));
        match to.host.parse::<IpAddr>() {
            Ok(ip) => match self.address(ip, to.port) {
                Some(rule) => dial(&rule.text, false),
                None => Err(self.denied(asked)),
            },
            Err(_) => match rules.clone().find(|r| r.host.names(&to.host)) {
                Some(rule) => dial(&rule.text, false),
                None if rules.any(|r| matches!(r.host, Host::Net { .. })) => dial("", true),
                None => Err(self.denied(asked)),
            },
        }
    }

    /// The rule that allows an address, if one does.
    #[must_use]
    pub fn address(&self, ip: IpAddr, port: u16) -> Option<&Rule> {
        let ip = ip.to_canonical();
        self.rules.iter().find(|r| r.ports.contains(port) && !ip.is_unspecified() && r.host.contains(ip))
    }

    /// Whether an address that a configured *name* resolved to may be dialled: a name is trusted with any address but
    /// those of the metadata service, which must be listed by themselves.
    #[must_use]
    pub fn named_address(&self, ip: IpAddr, port: u16) -> bool {
        !METADATA.contains(&ip.to_canonical()) || self.address(ip, port).is_some()
    }

    /// The refusal of a target that nothing allows.
    #[must_use]
    pub fn denied(&self, to: &HostPort) -> Refusal {
        let why = format!(
            "edge {} does not allow {to}; to open it, add \"{to}\" to `allow` in the edge's configuration",
            self.edge
        );
        Refusal::because(RefuseCode::EdgeDenied, why)
    }
}

fn unsupported() -> Refusal {
    Refusal::because(RefuseCode::Unsupported, "UDP targets are not supported by this edge")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allow(rules: &[&str]) -> Allow {
        let services = [
            ("web", (ServiceKind::Http, "127.0.0.1:8080")),
            ("cam", (ServiceKind::Tcp, "10.9.9.9:554")),
            ("dns", (ServiceKind::Udp, "127.0.0.1:53")),
        ];
        let services = services.map(|(n, (k, a))| (n.parse().unwrap(), (k, a.parse().unwrap()))).into();
        let rules = rules.iter().map(|r| r.parse().unwrap()).collect();
        Allow::new("shop-1".parse().unwrap(), Local { kubelet: true, sshd: false }, services, rules)
    }

    #[allow(clippy::unwrap_in_result, reason = "the result is what is tested, not the target")]
    fn rule(allow: &Allow, target: &str) -> Result<(String, String), RefuseCode> {
        match allow.plan(&target.parse().unwrap()) {
            Ok(Plan::Dial { to, rule, by_address, .. }) => {
                Ok((to.to_string(), if by_address { "?".to_owned() } else { rule }))
            }
            Ok(Plan::Echo) => Ok((String::new(), "echo".into())),
            Err(refusal) => Err(refusal.code),
        }
    }

    #[test]
    fn by_itself_an_edge_allows_kubelet_sshd_and_its_services() {
        let table = [
            ("shop-1:10250", Ok(("localhost:10250", "kubelet"))),
            ("shop-1/127.0.0.1:10250", Ok(("127.0.0.1:10250", "kubelet"))),
            ("shop-1/shop-1:10250", Ok(("localhost:10250", "kubelet"))),
            ("shop-1/10.0.0.7:10250", Err(RefuseCode::EdgeDenied)),
            ("shop-1:22", Err(RefuseCode::EdgeDenied)),
            ("shop-1/web", Ok(("127.0.0.1:8080", "service web"))),
            ("*/web", Ok(("127.0.0.1:8080", "service web"))),
            ("shop-1:8080", Ok(("127.0.0.1:8080", "service web"))),
            ("shop-1/10.9.9.9:554", Ok(("10.9.9.9:554", "service cam"))),
            ("shop-1/10.9.9.9:555", Err(RefuseCode::EdgeDenied)),
            ("shop-1/dns", Err(RefuseCode::Unsupported)),
            ("shop-1:53", Err(RefuseCode::EdgeDenied)),
            ("shop-1/nothing", Err(RefuseCode::ServiceUnknown)),
            ("shop-2:10250", Err(RefuseCode::EdgeUnknown)),
        ];
        for (target, expected) in table {
            let expected = expected.map(|(to, rule)| (to.to_owned(), rule.to_owned()));
            assert_eq!(rule(&allow(&[]), target), expected, "{target}");
        }
    }

    #[test]
    fn the_configuration_opens_addresses_networks_and_names() {
        let opened =
            allow(&["127.0.0.1:5432", "10.0.0.0/24:80-90", "printer.lan:631", "[fd00::]/64:*", "localhost:9000"]);
        let table = [
            ("127.0.0.1:5432", Some("127.0.0.1:5432")),
            ("127.0.0.2:5432", None),
            ("10.0.0.255:85", Some("10.0.0.0/24:80-90")),
            ("10.0.1.0:85", None),
            ("10.0.0.1:91", None),
            ("PRINTER.lan:631", Some("printer.lan:631")),
            ("printer.lan:80", Some("?")),
            ("scanner.lan:631", Some("?")),
            ("[fd00::5]:7", Some("[fd00::]/64:*")),
            ("[fd00:0:0:1::5]:7", None),
            ("[::ffff:10.0.0.1]:80", Some("10.0.0.0/24:80-90")),
            ("localhost:9000", Some("localhost:9000")),
            ("localhost:5432", Some("?")),
        ];
        for (to, expected) in table {
            let found = rule(&opened, &format!("shop-1/{to}")).ok().map(|(_, rule)| rule);
            assert_eq!(found.as_deref(), expected, "{to}");
        }
        let without = allow(&["printer.lan:631"]);
        assert_eq!(rule(&without, "shop-1/scanner.lan:631"), Err(RefuseCode::EdgeDenied), "no name is resolved for it");
    }

    #[test]
    fn the_metadata_address_must_be_listed_by_itself() {
        let metadata = "shop-1/169.254.169.254:80";
        for wide in ["0.0.0.0/0:80", "169.254.0.0/16:*", "169.254.169.254/31:80"] {
            assert_eq!(rule(&allow(&[wide]), metadata), Err(RefuseCode::EdgeDenied), "{wide}");
            assert_eq!(rule(&allow(&[wide]), "shop-1/[::ffff:a9fe:a9fe]:80"), Err(RefuseCode::EdgeDenied), "{wide}");
        }
        assert!(rule(&allow(&["169.254.169.254:80"]), metadata).is_ok());
        let ip = "169.254.169.254".parse().unwrap();
        assert!(!allow(&["metadata.lan:80"]).named_address(ip, 80));
        assert!(allow(&["169.254.169.254:80"]).named_address(ip, 80));
        assert_eq!(rule(&allow(&["0.0.0.0/0:*"]), "shop-1/0.0.0.0:22"), Err(RefuseCode::EdgeDenied));
    }

    #[test]
    fn kube_apiserver_may_reach_this_machine_and_its_pods_and_nobody_else_may() {
        let machine = Machine {
            has_address: |ip| ip == IpAddr::from([10, 99, 0, 5]),
            has_pod: |ip| matches!(ip, IpAddr::V4(v4) if v4.octets()[..3] == [10, 244, 1]),
        };
        let open = Cluster { open: true, pod_networks: vec!["10.50.0.0/16".parse().unwrap()] };
        let opened = allow(&[]).with_cluster(open.clone());
        let shut = allow(&[]);
        let sealed = Allow { local: Local { kubelet: false, sshd: false }, ..allow(&[]).with_cluster(open) };
        let plan = |allow: &Allow, who: &Principal, to: &str| match allow.plan_for(
            Some(who),
            &format!("shop-1/{to}").parse().unwrap(),
            machine,
        ) {
            Ok(Plan::Dial { rule, or, .. }) => {
                format!("{rule}{}", or.map(|or| format!(" or {or}")).unwrap_or_default())
            }
            Ok(Plan::Echo) => "echo".into(),
            Err(refusal) => refusal.code.slug().into(),
        };
        let kas = Principal::Apiserver;
        for (to, expected) in [
            ("10.99.0.5:10250", "node address or localhost:10250"),
            ("10.99.0.5:9100", "node address"),
            ("[::ffff:10.99.0.5]:9100", "node address"),
            ("10.244.1.9:80", "local pod"),
            ("10.50.1.1:80", "local pod"),
            ("localhost:10250", "kubelet"),
            ("127.0.0.1:9100", "edge-denied"),
            ("10.99.0.6:10250", "edge-denied"),
            ("10.244.2.9:80", "edge-denied"),
            ("169.254.169.254:80", "edge-denied"),
            ("0.0.0.0:10250", "edge-denied"),
        ] {
            assert_eq!(plan(&opened, &kas, to), expected, "{to}");
        }
        assert_eq!(plan(&shut, &kas, "10.99.0.5:10250"), "edge-denied");
        assert_eq!(plan(&sealed, &kas, "10.99.0.5:10250"), "edge-denied");
        let alice = Principal::User { name: "alice".parse().unwrap(), groups: vec![] };
        assert_eq!(plan(&opened, &alice, "10.99.0.5:10250"), "edge-denied");
        assert_eq!(plan(&opened, &alice, "10.244.1.9:80"), "edge-denied");
    }

    #[test]
    fn rules_that_are_none() {
        for text in [
            "",
            "h",
            "h:",
            "h:0",
            "h:1-",
            "10.0.0.0/33:1",
            "10.0.0.0/:1",
            "fd00::1:1",
            "[fd00::]/129:1",
            "a b:1",
            "h/8:1",
            "*:1",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
    }
}
