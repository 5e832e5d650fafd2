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
    over: Over,
    text: String,
}

/// What a target speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
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
    "{0:?} is no target to allow; write 127.0.0.1:5432, 10.0.0.0/24:80, printer.lan:631 or [fd00::]/64:*, with a port, a range such as 8000-8100, or *, and /udp behind it for UDP"
)]
pub struct InvalidTargetRule(String);

impl FromStr for Rule {
    type Err = InvalidTargetRule;

    fn from_str(text: &str) -> Result<Self, InvalidTargetRule> {
        let no = || InvalidTargetRule(text.chars().take(120).collect());
        let (place, over) = match text.strip_suffix("/udp") {
            Some(place) => (place, Over::Udp),
            None => (text, Over::Tcp),
        };
        let (host, ports) = place.rsplit_once(':').ok_or_else(no)?;
        let ports = ports.parse().map_err(|_| no())?;
        let host = Host::parse(host).ok_or_else(no)?;
        Ok(Self { host, ports, over, text: text.to_owned() })
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
    /// Exchange datagrams.
    Flow {
        /// With a name or an address.
        to: HostPort,
        /// What allows it, for the access record.
        rule: String,
        /// As in [`Plan::Dial`].
        by_address: bool,
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
            Target::Service { name, .. } => self.service(name),
            Target::Tcp { to, .. } => self.tcp(to),
            Target::Udp { to, .. } => self.udp(to),
        }
    }

    fn service(&self, name: &ServiceName) -> Result<Plan, Refusal> {
        match self.services.get(name) {
            Some((ServiceKind::Udp, to)) => {
                Ok(Plan::Flow { to: to.clone(), rule: format!("service {name}"), by_address: false })
            }
            Some((ServiceKind::Tcp | ServiceKind::Http | ServiceKind::Https | ServiceKind::Ssh, to)) => {
                Ok(Plan::Dial { to: to.clone(), rule: format!("service {name}"), by_address: false, or: None })
            }
            None => {
                let why = format!("edge {} has no service {name}; services stand in its configuration", self.edge);
                Err(Refusal::because(RefuseCode::ServiceUnknown, why))
            }
        }
    }

    /// What is meant: kube-apiserver asks for the node by its name, which is this machine by definition.
    fn meant(&self, asked: &HostPort) -> HostPort {
        let here = asked.host == self.edge.as_str();
        if here { HostPort { host: "localhost".into(), port: asked.port } } else { asked.clone() }
    }

    fn tcp(&self, asked: &HostPort) -> Result<Plan, Refusal> {
        let to = self.meant(asked);
        let dial =
            |rule: &str, by_address| Ok(Plan::Dial { to: to.clone(), rule: rule.to_owned(), by_address, or: None });
        let loopback = to.is_loopback();
        if loopback && self.local.kubelet && to.port == KUBELET {
            return dial("kubelet", false);
        }
        if loopback && self.local.sshd && to.port == SSHD {
            return dial("sshd", false);
        }
        if let Some((name, address)) = self.service_at(&to, Over::Tcp) {
            return Ok(Plan::Dial {
                to: address.clone(),
                rule: format!("service {name}"),
                by_address: false,
                or: None,
            });
        }
        match self.ruled(&to, Over::Tcp) {
            Some((rule, by_address)) => dial(rule, by_address),
            None => Err(self.denied(asked, Over::Tcp)),
        }
    }

    fn udp(&self, asked: &HostPort) -> Result<Plan, Refusal> {
        let to = self.meant(asked);
        if let Some((name, address)) = self.service_at(&to, Over::Udp) {
            return Ok(Plan::Flow { to: address.clone(), rule: format!("service {name}"), by_address: false });
        }
        match self.ruled(&to, Over::Udp) {
            Some((rule, by_address)) => Ok(Plan::Flow { to, rule: rule.to_owned(), by_address }),
            None => Err(self.denied(asked, Over::Udp)),
        }
    }

    /// The service that listens there.
    fn service_at(&self, to: &HostPort, over: Over) -> Option<(&ServiceName, &HostPort)> {
        let same = |s: &HostPort| s.port == to.port && (s.host == to.host || (s.is_loopback() && to.is_loopback()));
        let speaks = |kind: ServiceKind| (kind == ServiceKind::Udp) == (over == Over::Udp);
        let found = self.services.iter().find(|(_, (kind, address))| speaks(*kind) && same(address));
        found.map(|(name, (_, address))| (name, address))
    }

    /// The rule that allows a target, and whether each address that it resolves to has to be looked at as well.
    fn ruled(&self, to: &HostPort, over: Over) -> Option<(&str, bool)> {
        if let Ok(ip) = to.host.parse::<IpAddr>() {
            return self.address(ip, to.port, over).map(|rule| (rule.text.as_str(), false));
        }
        let mut rules = self.rules.iter().filter(|r| r.over == over && r.ports.contains(to.port));
        match rules.clone().find(|r| r.host.names(&to.host)) {
            Some(rule) => Some((&rule.text, false)),
            None => rules.any(|r| matches!(r.host, Host::Net { .. })).then_some(("", true)),
        }
    }

    /// The rule that allows an address, if one does.
    #[must_use]
    pub fn address(&self, ip: IpAddr, port: u16, over: Over) -> Option<&Rule> {
        let ip = ip.to_canonical();
        let fits = |r: &&Rule| r.over == over && r.ports.contains(port) && !ip.is_unspecified() && r.host.contains(ip);
        self.rules.iter().find(fits)
    }

    /// Whether an address that a configured *name* resolved to may be dialled: a name is trusted with any address but
    /// those of the metadata service, which must be listed by themselves.
    #[must_use]
    pub fn named_address(&self, ip: IpAddr, port: u16, over: Over) -> bool {
        !METADATA.contains(&ip.to_canonical()) || self.address(ip, port, over).is_some()
    }

    /// The refusal of a target that nothing allows.
    #[must_use]
    pub fn denied(&self, to: &HostPort, over: Over) -> Refusal {
        let over = match over {
            Over::Tcp => "",
            Over::Udp => "/udp",
        };
        let why = format!(
            "edge {} does not allow {to}{over}; to open it, add \"{to}{over}\" to `allow` in the edge's configuration",
            self.edge
        );
        Refusal::because(RefuseCode::EdgeDenied, why)
    }
}

#[cfg(test)]
mod tests;
