//! The configuration of a shard. Every key is optional.

use std::{
    fmt::Display,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use proto::{
    id::ShardId,
    join::CaHash,
    target::{HostPort, Target},
};
use runtime::{access::AccessLog, link::congestion::Congestion, telemetry::LogConfig};
use serde::Deserialize;

/// A shard's configuration file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShardConfig {
    /// Where the identity lives. `/var/lib/causeway/shard`.
    pub data_dir: PathBuf,
    /// Name to enrol under; the host's name if none is given.
    pub name: Option<ShardId>,
    /// UDP address for tunnels, people's tools and other shards. `[::]:7400`.
    pub listen: SocketAddr,
    /// Whether tunnels may come over TCP as well, on the same address and port, for networks without UDP. `true`.
    pub tcp: bool,
    /// `host:port` at which edges reach `listen`; the port of `listen` on this host's own addresses if none is given.
    pub advertise: Vec<String>,
    /// DNS names and addresses that the certificate shall have, for tools that look at host names.
    pub names: Vec<String>,
    /// The domain below which services have names: `<service>.<edge>.<domain>`. `mesh.local`.
    pub domain: String,
    /// Where traffic enters.
    pub doors: DoorsConfig,
    /// `/livez`, `/readyz` and `/metrics`; `none` turns them off. `[::1]:7484`.
    #[serde(deserialize_with = "address_or_none")]
    pub admin: Option<SocketAddr>,
    /// Where access records go: `"stdout"`, `"off"`, or `{ file = "/path" }`.
    pub access: AccessLog,
    /// What of the access records control gets, for `meshctl audit`.
    pub audit: AuditConfig,
    /// Logging.
    pub log: LogConfig,
    /// Seconds that streams have to end after SIGTERM; must lie inside `terminationGracePeriodSeconds`. 25.
    pub drain_secs: u64,
    /// Seconds after SIGTERM in which the doors stay open, so that load balancers have time to look elsewhere; at most
    /// half of `drain_secs`. 5.
    pub linger_secs: u64,
    /// How much of the ring this shard takes compared with others, 1 to 1600. 100.
    pub weight: u32,
    /// Edges per second that one shard is sent after a change of the ring, by all others together. 50.
    pub moves_per_sec: f64,
    /// `host:port` of the replicas of control, best first; where it was at enrolment if none is given.
    pub control: Vec<String>,
    /// How to enrol without a join line, by the token of a pod's service account.
    pub enrol: Option<EnrolConfig>,
    /// Bounds.
    pub limits: LimitsConfig,
}

/// Access records on their way to control.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// Whether they are sent. `true`.
    pub enabled: bool,
    /// Of streams that finished well one of so many is sent; those that were refused, reset or cancelled all are. 1.
    pub one_of: u64,
    /// Records that wait while control is away; one more is counted and not kept. 20000.
    pub queue: usize,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self { enabled: true, one_of: 1, queue: 20_000 }
    }
}

/// How a shard in Kubernetes enrols: control knows its service account, and gives it the name of its pod.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrolConfig {
    /// `host:port` of control.
    #[serde(deserialize_with = "parsed")]
    pub control: HostPort,
    /// The hash of control's CA, as `mesh-control ca-hash` prints it.
    #[serde(deserialize_with = "parsed")]
    pub ca: CaHash,
    /// The file with the token, for the audience that control wants.
    pub token_file: PathBuf,
}

impl Default for ShardConfig {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/causeway/shard".into(),
            name: None,
            listen: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 7400)),
            tcp: true,
            advertise: Vec::new(),
            names: Vec::new(),
            domain: "mesh.local".into(),
            doors: DoorsConfig::default(),
            admin: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 7484))),
            access: AccessLog::default(),
            audit: AuditConfig::default(),
            log: LogConfig::default(),
            drain_secs: 25,
            linger_secs: 5,
            weight: proto::ring::WEIGHT,
            moves_per_sec: 50.0,
            control: Vec::new(),
            enrol: None,
            limits: LimitsConfig::default(),
        }
    }
}

/// The doors. One whose address is `none` is shut.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DoorsConfig {
    /// HTTP CONNECT and absolute-form HTTP, with or without TLS. `[::]:7480`.
    #[serde(deserialize_with = "address_or_none")]
    pub proxy: Option<SocketAddr>,
    /// Whether the proxy door takes tokens without TLS from other machines than this one. `false`.
    pub proxy_plain: bool,
    /// Services by the Host header. `[::]:7481`.
    #[serde(deserialize_with = "address_or_none")]
    pub http: Option<SocketAddr>,
    /// Services by TLS' server name. `[::]:7482`.
    #[serde(deserialize_with = "address_or_none")]
    pub https: Option<SocketAddr>,
    /// A jump host for OpenSSH, `ssh -J SHARD:2222 USER@EDGE`. Shut unless it is named here: `[::]:2222`.
    #[serde(deserialize_with = "address_or_none")]
    pub ssh: Option<SocketAddr>,
    /// The name server of `domain`, over UDP and TCP. Shut unless it is named here: `[::]:53`. On a host with several
    /// addresses, name the one that answers are to come from.
    #[serde(deserialize_with = "address_or_none")]
    pub dns: Option<SocketAddr>,
    /// Addresses that the names of edges lead to; those at which the shards of the ring are advertised if none is given.
    pub dns_answers: Vec<IpAddr>,
    /// Single ports that lead to single targets.
    pub tcp: Vec<TcpDoorConfig>,
    /// Single UDP ports that lead to single targets.
    pub udp: Vec<UdpDoorConfig>,
    /// kube-apiserver's way to nodes, pods and services.
    pub egress: EgressConfig,
}

impl Default for DoorsConfig {
    fn default() -> Self {
        let on = |port| Some(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
        Self {
            proxy: on(7480),
            proxy_plain: false,
            http: on(7481),
            https: on(7482),
            ssh: None,
            dns: None,
            dns_answers: Vec::new(),
            tcp: Vec::new(),
            udp: Vec::new(),
            egress: EgressConfig::default(),
        }
    }
}

/// The egress door. Its sockets are shut unless they are named here, and all of them can be open at once.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EgressConfig {
    /// HTTPConnect over this unix socket: `/run/causeway/egress.sock`.
    pub socket: Option<PathBuf>,
    /// konnectivity's gRPC over this one. kube-apiserver makes an HTTP/2 authority of the path, which is only a valid
    /// one if it ends in `@localhost`: `/run/causeway/grpc.sock@localhost`.
    pub grpc_socket: Option<PathBuf>,
    /// Permissions of the sockets. `"0600"`.
    pub mode: Mode,
    /// HTTPConnect over TCP, with TLS and client certificates.
    pub tcp: Option<EgressTcpConfig>,
    /// Seconds after which a dial has been answered, at most 10: kube-apiserver itself has no bound. 9.5.
    pub within_secs: f64,
}

impl Default for EgressConfig {
    fn default() -> Self {
        Self { socket: None, grpc_socket: None, mode: Mode(0o600), tcp: None, within_secs: 9.5 }
    }
}

/// HTTPConnect over TCP. The files are read again when they change.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressTcpConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Certificate to show, PEM, leaf first; the shard's own if none is given.
    #[serde(default)]
    pub cert: Option<PathBuf>,
    /// Its key, PEM.
    #[serde(default)]
    pub key: Option<PathBuf>,
    /// CAs of client certificates, PEM: as many as are in use.
    pub client_ca: PathBuf,
    /// Who may come in: common names, or DNS, URI or address names of the certificate. At least one.
    pub clients: Vec<String>,
}

/// File permissions, written in octal: `"0600"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Mode(pub u32);

impl TryFrom<String> for Mode {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let octal = !text.is_empty() && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
        let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| octal && *mode <= 0o777);
        mode.map(Self).ok_or_else(|| format!("{text:?} are no permissions; write \"0600\" or \"0660\""))
    }
}

/// A port that leads to a target.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcpDoorConfig {
    /// Its name, for policy: `door/NAME`.
    pub name: String,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where it leads: `shop-17:5432`, `shop-17/10.0.0.5:80`, `*/web`.
    #[serde(deserialize_with = "target")]
    pub target: Target,
    /// Whether the target is told first from where the visitor comes, by PROXY protocol v2. `false`.
    #[serde(default)]
    pub proxy_protocol: bool,
}

/// A UDP port that leads to a target.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UdpDoorConfig {
    /// Its name, for policy: `door/NAME`.
    pub name: String,
    /// Where it listens. On a host with several addresses, name the one that answers are to come from.
    pub listen: SocketAddr,
    /// Where it leads: `shop-17:53`, `shop-17/10.0.0.5:5060`, `*/dns`.
    #[serde(deserialize_with = "target")]
    pub target: Target,
    /// Seconds of silence after which a flow ends. 60.
    #[serde(default = "idle_secs")]
    pub idle_secs: f64,
    /// Flows at once, one for each address that sends; of more, the one that has been silent for longest ends. 256.
    #[serde(default = "flows")]
    pub flows: usize,
}

impl UdpDoorConfig {
    /// Silence after which a flow ends; a tenth of a second at least, a day at most.
    #[must_use]
    pub fn idle(&self) -> Duration {
        Duration::try_from_secs_f64(self.idle_secs.clamp(0.1, 86_400.0)).unwrap_or(runtime::flow::IDLE)
    }
}

const fn idle_secs() -> f64 {
    runtime::flow::IDLE.as_secs_f64()
}

const fn flows() -> usize {
    256
}

fn parsed<'de, D: serde::Deserializer<'de>, T: FromStr<Err: Display>>(deserializer: D) -> Result<T, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// An address with a port, or `none`.
fn address_or_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "none" {
        return Ok(None);
    }
    let wrong = |_| {
        serde::de::Error::custom(format!(
            "{text:?} is neither an address with a port, like \"[::]:7480\", nor \"none\""
        ))
    };
    text.parse().map(Some).map_err(wrong)
}

fn target<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Target, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// Bounds of a shard.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Tunnels and people's links at once. 20,000.
    pub links: usize,
    /// Handshakes at once; more wait, and are told to prove their address. Each may hold the others up for a
    /// millisecond of computing, streams included. The same number of SSH connections may be about to log in. 128.
    pub handshakes: usize,
    /// Connections at once on each door. 20,000.
    pub door_connections: usize,
    /// Streams that one link may have open towards the shard. 1,024.
    pub streams_per_link: u32,
    /// Links that one user may have here. 256.
    pub links_per_user: usize,
    /// Streams that one user may have here, over all links. 16,384.
    pub streams_per_user: usize,
    /// Streams that another shard may have passed on at once. 65,536.
    pub streams_per_peer: u32,
    /// Least milliseconds between two pings of an edge, 250 to 10,000; with more than 4,800 edges it becomes more by
    /// itself. Longer ones save an edge's data volume and find a killed shard later. 1,500.
    pub ping_ms: u64,
    /// Who decides how much is sent at once on links: `model`, a model of each path, or `cubic`. `model`.
    pub congestion: Congestion,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            links: 20_000,
            handshakes: 128,
            door_connections: 20_000,
            streams_per_link: 1024,
            links_per_user: 256,
            streams_per_user: 16_384,
            streams_per_peer: 65_536,
            ping_ms: 1500,
            congestion: Congestion::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_door_is_open_where_it_is_by_default_elsewhere_or_not_at_all() {
        let parse = |text: &str| runtime::config::parse::<ShardConfig>("shard.toml", text, &[]);
        let config = parse("admin = 'none'\n[doors]\nproxy = 'none'\nhttp = '127.0.0.1:80'\n").unwrap();
        assert_eq!((config.admin, config.doors.proxy), (None, None));
        assert_eq!(config.doors.http.unwrap().port(), 80);
        assert_eq!(config.doors.https, DoorsConfig::default().https);
        let error = parse("[doors]\nhttp = 'off'\n").unwrap_err().to_string();
        assert!(error.contains("neither an address") && error.contains("shard.toml:2:8"), "{error}");
    }
}
