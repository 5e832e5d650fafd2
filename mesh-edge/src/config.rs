//! What an edge is told: one TOML file, every key optional.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

use proto::{
    book::Cidr,
    id::{EdgeId, ServiceName},
    message::{MAX_SERVICES, Service, ServiceKind},
    target::{HostPort, Target},
};
use runtime::{
    access::AccessLog,
    link::{congestion::Congestion, quic::LinkLimits, tcp::proxy::Proxy},
    telemetry::LogConfig,
};
use serde::Deserialize;

use crate::allow::{Allow, Cluster, Local, Rule};

/// Streams that the carrier lets in beyond the cap, so that one too many gets an answer instead of waiting.
const STREAM_SLACK: u32 = 16;

/// The configuration of `mesh-edge`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EdgeConfig {
    /// Where the identity lives. Default: `/var/lib/causeway/edge`.
    pub data_dir: PathBuf,
    /// Addresses (`host:port`) of shards to dial first. Default: those that enrolment noted.
    pub shards: Vec<String>,
    /// Where `/livez`, `/readyz` and `/metrics` are served. Default: `127.0.0.1:7494`.
    pub admin: SocketAddr,
    /// Where access records go: `"stdout"`, `"off"` or `{ file = "/path" }`. Default: `"stdout"`.
    pub access: AccessLog,
    /// How to log. Default: `info`, as text.
    pub log: LogConfig,
    /// What this edge answers for. Default: nothing.
    pub services: Vec<ServiceConfig>,
    /// Targets that may be dialled besides kubelet, sshd and the services: `127.0.0.1:5432`, `10.0.0.0/24:80`,
    /// `printer.lan:631`, `[fd00::]/64:*`, with a port, a range `8000-8100`, or `*`, and `/udp` behind it for UDP.
    /// Default: none.
    pub allow: Vec<Rule>,
    /// Whether kubelet's port 10250 on this machine may be dialled. Default: true.
    pub kubelet: bool,
    /// Whether kube-apiserver may reach every port of this machine's own addresses (not of loopback) and of the pods
    /// that run on it. Default: true.
    pub kubernetes: bool,
    /// Networks of this machine's pods, for network plugins whose routes do not tell: `10.244.1.0/24`. Default: none.
    pub pod_networks: Vec<Cidr>,
    /// Whether sshd's port 22 on this machine may be dialled. Default: true.
    pub sshd: bool,
    /// How long dialling a target may take, with resolving its name, in seconds. Default: 8.
    #[serde(deserialize_with = "seconds")]
    pub dial_timeout: Duration,
    /// Silence after which a UDP flow ends, in seconds; more than 0. Default: 60.
    #[serde(deserialize_with = "seconds")]
    pub udp_idle: Duration,
    /// How long streams may go on after SIGTERM, in seconds. Default: 10.
    #[serde(deserialize_with = "seconds")]
    pub drain: Duration,
    /// By what a shard is reached.
    pub carriers: CarriersConfig,
    /// The HTTP proxy for networks where nothing else gets out.
    pub proxy: ProxyConfig,
    /// Where programs on this machine enter the mesh.
    pub doors: DoorsConfig,
    /// Bounds of what the edge takes upon itself.
    pub limits: LimitsConfig,
}

/// QUIC comes first; TCP is for networks that let no UDP through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CarriersConfig {
    /// Whether a shard may be reached over TCP. Default: true.
    pub tcp: bool,
    /// How long QUIC is tried alone before TCP is tried beside it, in seconds. Default: 0.3.
    #[serde(deserialize_with = "seconds")]
    pub head_start: Duration,
}

impl Default for CarriersConfig {
    fn default() -> Self {
        Self { tcp: true, head_start: Duration::from_millis(300) }
    }
}

/// The proxy. It is used for TCP alone, and QUIC is tried past it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyConfig {
    /// `http://[USER:PASSWORD@]HOST[:PORT]`, or `"none"` for no proxy whatever the environment says. Default: what
    /// `HTTPS_PROXY` says.
    #[serde(deserialize_with = "proxy_address")]
    pub url: ProxyAddress,
    /// A file that holds `USER:PASSWORD`, so that the configuration need not. Default: none.
    pub credentials_file: Option<PathBuf>,
    /// Shards that are reached without it: names, domains (`.lan`), addresses, networks (`10.0.0.0/8`), or `*`.
    /// Default: what `NO_PROXY` says.
    pub except: Option<Vec<String>>,
}

/// Which proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ProxyAddress {
    /// As the environment says.
    #[default]
    Environment,
    /// None.
    Off,
    /// This one.
    At(Proxy),
}

fn proxy_address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<ProxyAddress, D::Error> {
    match String::deserialize(deserializer)?.as_str() {
        "none" => Ok(ProxyAddress::Off),
        url => url.parse().map(ProxyAddress::At).map_err(serde::de::Error::custom),
    }
}

/// The doors of an edge, on loopback unless an address says otherwise: whoever comes in speaks for the edge.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DoorsConfig {
    /// HTTP CONNECT and SOCKS5: an address, or `none`. Default: `127.0.0.1:51009`, unless that is taken.
    pub proxy: ProxyDoor,
    /// The domain below which edges and services have names. Default: `mesh.local`.
    pub domain: String,
    /// Ports that lead to targets. Default: none.
    pub forward: Vec<ForwardConfig>,
}

impl Default for DoorsConfig {
    fn default() -> Self {
        Self { proxy: ProxyDoor::default(), domain: "mesh.local".into(), forward: Vec::new() }
    }
}

/// Where the proxy door is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum ProxyDoor {
    /// At the default address, if nobody else is.
    #[default]
    Default,
    /// Here.
    At(SocketAddr),
    /// Shut.
    Off,
}

impl ProxyDoor {
    /// The address, if there is one.
    #[must_use]
    pub fn address(self) -> Option<SocketAddr> {
        match self {
            Self::Default => Some(SocketAddr::from(([127, 0, 0, 1], 51009))),
            Self::At(address) => Some(address),
            Self::Off => None,
        }
    }

    /// Whether nobody has said where.
    #[must_use]
    pub fn is_default(self) -> bool {
        self == Self::Default
    }
}

impl TryFrom<String> for ProxyDoor {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self::Off);
        }
        let wrong = |_| format!("{text:?} is neither an address with a port, like \"127.0.0.1:51009\", nor \"none\"");
        text.parse().map(Self::At).map_err(wrong)
    }
}

/// A port that leads to a target.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForwardConfig {
    /// Where it listens: `127.0.0.1:5432`.
    pub listen: SocketAddr,
    /// Where it leads: `shop-2:5432`, `shop-2/web`, `*/dns`.
    #[serde(deserialize_with = "target")]
    pub target: Target,
    /// Whether it is for datagrams. Default: false.
    #[serde(default)]
    pub udp: bool,
}

fn target<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Target, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// Bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Streams that are served at once; one more is refused with `limit-reached`. Default: 1024.
    pub streams: u32,
    /// UDP flows among them; one more is refused with `limit-reached`. Default: 512.
    pub udp_flows: u32,
    /// Who decides how much is sent at once on a tunnel: `model`, a model of the path, or `cubic`. Default: `model`.
    pub congestion: Congestion,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self { streams: 1024, udp_flows: 512, congestion: Congestion::default() }
    }
}

/// A service of this edge.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceConfig {
    /// Its name: one DNS label.
    pub name: ServiceName,
    /// `tcp`, `http`, `https`, `ssh` or `udp`. Default: `tcp`.
    #[serde(default = "tcp")]
    pub kind: ServiceKind,
    /// Where it listens, as seen from this machine: `host:port`.
    #[serde(deserialize_with = "host_port")]
    pub address: HostPort,
    /// For policy. Default: none.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

const fn tcp() -> ServiceKind {
    ServiceKind::Tcp
}

fn host_port<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<HostPort, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

fn seconds<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let seconds = f64::deserialize(deserializer)?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|d| *d <= Duration::from_secs(24 * 3600))
        .ok_or_else(|| serde::de::Error::custom(format!("{seconds} is no number of seconds from 0 to 86400")))
}

impl Default for EdgeConfig {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/causeway/edge".into(),
            shards: Vec::new(),
            admin: SocketAddr::from(([127, 0, 0, 1], 7494)),
            access: AccessLog::default(),
            log: LogConfig::default(),
            services: Vec::new(),
            allow: Vec::new(),
            kubelet: true,
            kubernetes: true,
            pod_networks: Vec::new(),
            sshd: true,
            dial_timeout: Duration::from_secs(8),
            udp_idle: runtime::flow::IDLE,
            drain: Duration::from_secs(10),
            carriers: CarriersConfig::default(),
            proxy: ProxyConfig::default(),
            doors: DoorsConfig::default(),
            limits: LimitsConfig::default(),
        }
    }
}

/// A configuration that can be read and makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// Two services with one name.
    #[error("service {0} is configured twice; names of services are unique on an edge")]
    TwiceNamed(ServiceName),
    /// More services than an edge may announce.
    #[error("{0} services are configured; an edge announces at most {MAX_SERVICES}")]
    TooManyServices(usize),
    /// A cap of no streams at all.
    #[error("limits.streams is 0, so that nothing could ever be served; write 1 or more")]
    NoStreams,
    /// A flow that would end at once.
    #[error("udp_idle is 0, so that every UDP flow would end at once; write the seconds of silence that are too many")]
    NoIdle,
    /// A shard address that is none.
    #[error("shards: {0}")]
    Shard(#[from] proto::target::InvalidTarget),
}

impl EdgeConfig {
    /// Checks what the types alone cannot.
    ///
    /// # Errors
    /// If something makes no sense; the text says what to write instead.
    pub fn check(&self) -> Result<(), InvalidConfig> {
        let mut names = BTreeSet::new();
        if let Some(twice) = self.services.iter().find(|s| !names.insert(&s.name)) {
            return Err(InvalidConfig::TwiceNamed(twice.name.clone()));
        }
        if self.services.len() > MAX_SERVICES {
            return Err(InvalidConfig::TooManyServices(self.services.len()));
        }
        if self.limits.streams == 0 {
            return Err(InvalidConfig::NoStreams);
        }
        if self.udp_idle.is_zero() {
            return Err(InvalidConfig::NoIdle);
        }
        self.shards.iter().try_for_each(|address| Ok(address.parse::<HostPort>().map(drop)?))
    }

    /// What is announced to a shard.
    #[must_use]
    pub fn announced(&self) -> Vec<Service> {
        let announce = |s: &ServiceConfig| Service {
            name: s.name.clone(),
            kind: s.kind,
            port: s.address.port,
            labels: s.labels.clone(),
        };
        self.services.iter().map(announce).collect()
    }

    /// What may be dialled from this edge.
    #[must_use]
    pub fn allowed(&self, edge: EdgeId) -> Allow {
        let services = self.services.iter().map(|s| (s.name.clone(), (s.kind, s.address.clone()))).collect();
        let cluster = Cluster { open: self.kubernetes, pod_networks: self.pod_networks.clone() };
        let local = Local { kubelet: self.kubelet, sshd: self.sshd };
        Allow::new(edge, local, services, self.allow.clone()).with_cluster(cluster)
    }

    /// What is allowed by itself, as it is told to the mesh: `kubelet`, `sshd`, `kubernetes`, and the lines of `allow`.
    #[must_use]
    pub fn told_allows(&self) -> Vec<String> {
        let words = [("kubelet", self.kubelet), ("sshd", self.sshd), ("kubernetes", self.kubernetes)];
        let words = words.into_iter().filter(|(_, open)| *open).map(|(word, _)| word.to_owned());
        words.chain(self.allow.iter().map(ToString::to_string)).collect()
    }

    /// What a link may use.
    #[must_use]
    pub fn link_limits(&self) -> LinkLimits {
        // quinn gives the credit of streams that ended back in portions of an eighth of the limit.
        let withheld = self.limits.streams.div_ceil(7);
        let streams = self.limits.streams.saturating_add(withheld).saturating_add(STREAM_SLACK);
        LinkLimits { streams, congestion: self.limits.congestion, ..LinkLimits::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(sets: &[&str]) -> Result<EdgeConfig, runtime::config::ConfigError> {
        runtime::config::load(None, &sets.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn every_key_has_a_default() {
        let config = load(&[]).unwrap();
        assert_eq!(config.admin.port(), 7494);
        assert_eq!((config.dial_timeout.as_secs(), config.drain.as_secs()), (8, 10));
        assert!(config.kubelet && config.sshd && config.check().is_ok());
    }

    #[test]
    fn services_and_rules_are_read() {
        let config = load(&[
            "services=[{name = \"web\", kind = \"http\", address = \"127.0.0.1:8080\", labels = {tier = \"front\"}}]",
            "allow=[\"10.0.0.0/24:80\", \"printer.lan:631\"]",
            "drain=0.5",
        ])
        .unwrap();
        assert_eq!(config.announced()[0].port, 8080);
        assert_eq!(config.allow.len(), 2);
        assert_eq!(config.drain, Duration::from_millis(500));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let twice = "services=[{name = \"web\", address = \"h:1\"}, {name = \"web\", address = \"h:2\"}]";
        assert!(matches!(load(&[twice]).unwrap().check(), Err(InvalidConfig::TwiceNamed(_))));
        assert!(matches!(load(&["limits.streams=0"]).unwrap().check(), Err(InvalidConfig::NoStreams)));
        assert!(matches!(load(&["shards=[\"x\"]"]).unwrap().check(), Err(InvalidConfig::Shard(_))));
        for bad in ["drain=-1", "drain=1e9", "allow=[\"10.0.0.0/33:1\"]", "nonsense=1"] {
            assert!(load(&[bad]).is_err(), "{bad}");
        }
    }
}
