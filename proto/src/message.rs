//! What is said on the control stream, by direction. The flow is drawn in `proto/control_stream.proto`.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::{
    code::CloseCode,
    frame::{self, FrameError, MAX_EDGE_TO_SHARD, MAX_SHARD_TO_EDGE},
    id::{EdgeId, ServiceName, ShardId},
    standing::Standing,
    wire,
};

/// Most services that an edge announces.
pub const MAX_SERVICES: usize = 256;
/// Most candidates, and most addresses of one.
const MAX_CANDIDATES: usize = 64;
/// Most shards that an edge avoids.
pub const MAX_AVOIDED: usize = 16;
/// What an edge says in [`EdgeToShard::Bye`] when it goes on elsewhere.
pub const BYE_MOVED: &str = "moved to another shard";
/// Most certificates of a chain or a bundle.
const MAX_CERTIFICATES: usize = 16;

/// From edge to shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EdgeToShard {
    /// The first message.
    Hello(Hello),
    /// All services of the edge.
    Announce(Vec<Service>),
    /// Keep-alive and probe; answered by [`ShardToEdge::Pong`] with the same token.
    Ping(u64),
    /// Asks for the next certificate.
    Renew(Renew),
    /// The edge leaves by its own will.
    Bye {
        /// Why, for logs.
        reason: String,
    },
    /// How the edge reaches the mesh, for people.
    Standing(Standing),
}

/// From shard to edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShardToEdge {
    /// The tunnel serves.
    Welcome(Welcome),
    /// Dial another shard.
    Redirect {
        /// Which one.
        to: Candidate,
        /// The ring that says so.
        epoch: u64,
    },
    /// Dial the next shard while this tunnel still serves.
    Move {
        /// Which one.
        to: Candidate,
        /// The ring that says so.
        epoch: u64,
        /// By when.
        within: Duration,
    },
    /// The shard is leaving.
    Drain {
        /// How long to wait before dialling another one.
        reconnect_in: Duration,
        /// When the shard closes the link.
        deadline: Duration,
        /// Where to go.
        candidates: Vec<Candidate>,
    },
    /// The answer to [`EdgeToShard::Renew`].
    Renewed(Result<Renewal, Refuse>),
    /// The shard does not serve this edge; the link is closed after it.
    Refuse(Refuse),
    /// The answer to [`EdgeToShard::Ping`].
    Pong(u64),
}

/// Who the edge says it is, and how it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Must be the name in the certificate.
    pub name: EdgeId,
    /// Drawn at process start.
    pub instance: u64,
    /// Of the software.
    pub version: String,
    /// The edge's clock, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Newest ring epoch that it has heard of.
    pub epoch: u64,
    /// Shards that it cannot reach, or that asked it to leave; at most [`MAX_AVOIDED`].
    pub avoid: Vec<ShardId>,
}

/// The shard serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Who it is.
    pub shard: ShardId,
    /// Of the ring that it decided by.
    pub epoch: u64,
    /// Where to go if it is lost, best first.
    pub candidates: Vec<Candidate>,
    /// The shard's clock, in milliseconds since 1970.
    pub unix_ms: u64,
    /// How often to ping.
    pub ping: Duration,
    /// Of this tunnel among those of the edge.
    pub generation: u64,
    /// The address that the edge came from, as the shard sees it; empty if it does not say.
    pub seen_as: String,
}

/// A shard and its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Its name.
    pub shard: ShardId,
    /// `host:port`, best first.
    pub addresses: Vec<String>,
}

/// What kind of traffic a service takes, and so which doors lead to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceKind {
    /// Any TCP protocol.
    Tcp,
    /// HTTP in plain text at the service.
    Http,
    /// TLS that ends at the service.
    Https,
    /// An SSH server.
    Ssh,
    /// Datagrams.
    Udp,
}

impl ServiceKind {
    /// The word in configuration and tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Https => "https",
            Self::Ssh => "ssh",
            Self::Udp => "udp",
        }
    }
}

/// A service that an edge answers for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// What it takes.
    pub kind: ServiceKind,
    /// Where it listens at the edge.
    pub port: u16,
    /// For policy.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// A request for the next certificate, signed with the present one's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renew {
    /// PKCS#10, DER.
    pub csr: Bytes,
    /// The present leaf, DER.
    pub certificate: Bytes,
    /// Over [`RENEW_CONTEXT`] and the CSR.
    pub signature: Bytes,
}

/// What a [`Renew`] signs before the CSR, so that the signature fits nothing else.
pub const RENEW_CONTEXT: &[u8] = b"causeway renew v1\0";

/// The next certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// DER, leaf first.
    pub chain: Vec<Bytes>,
    /// The trust bundle, DER.
    pub roots: Vec<Bytes>,
}

/// Why the shard does not serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refuse {
    /// The kind.
    pub code: CloseCode,
    /// One sentence for people.
    pub reason: String,
    /// When to come again; `None`: as the code says.
    pub retry_after: Option<Duration>,
}

impl Refuse {
    /// A refusal with a sentence of its own.
    #[must_use]
    pub fn because(code: CloseCode, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into(), retry_after: None }
    }
}

impl EdgeToShard {
    /// As a frame.
    ///
    /// # Errors
    /// If it is longer than the cap.
    pub fn encode(self) -> Result<Bytes, FrameError> {
        use wire::edge_to_shard::Message as M;
        let message = match self {
            Self::Hello(hello) => M::Hello(wire::Hello {
                name: hello.name.to_string(),
                instance: hello.instance,
                version: hello.version,
                unix_ms: hello.unix_ms,
                epoch: hello.epoch,
                avoid: hello.avoid.into_iter().map(Into::into).collect(),
            }),
            Self::Announce(services) => {
                M::Announce(wire::Announce { services: services.into_iter().map(service_to_wire).collect() })
            }
            Self::Ping(token) => M::Ping(wire::Ping { token }),
            Self::Renew(Renew { csr, certificate, signature }) => M::Renew(wire::Renew { csr, certificate, signature }),
            Self::Bye { reason } => M::Bye(wire::Bye { reason }),
            Self::Standing(standing) => M::Standing(standing.into_wire()),
        };
        frame::encode(&wire::EdgeToShard { message: Some(message) }, MAX_EDGE_TO_SHARD)
    }

    /// From the body of a frame; `None` for a message of a newer version, which is to be skipped.
    ///
    /// # Errors
    /// If it is no message, or one with an impossible value.
    pub fn decode(body: Bytes) -> Result<Option<Self>, FrameError> {
        use wire::edge_to_shard::Message as M;
        let Some(message) = wire::EdgeToShard::decode(body)?.message else { return Ok(None) };
        Ok(Some(match message {
            M::Hello(hello) => Self::Hello(Hello {
                avoid: avoided_from_wire(hello.avoid)?,
                name: hello.name.parse().map_err(|e| invalid("name", e))?,
                instance: hello.instance,
                version: hello.version.chars().take(64).collect(),
                unix_ms: hello.unix_ms,
                epoch: hello.epoch,
            }),
            M::Announce(announce) => {
                if announce.services.len() > MAX_SERVICES {
                    return Err(invalid("services", format!("more than {MAX_SERVICES}")));
                }
                Self::Announce(announce.services.into_iter().map(service_from_wire).collect::<Result<_, _>>()?)
            }
            M::Ping(ping) => Self::Ping(ping.token),
            M::Renew(wire::Renew { csr, certificate, signature }) => Self::Renew(Renew { csr, certificate, signature }),
            M::Bye(bye) => Self::Bye { reason: bye.reason.chars().take(256).collect() },
            M::Standing(standing) => Self::Standing(Standing::from_wire(standing)),
        }))
    }
}

impl ShardToEdge {
    /// As a frame.
    ///
    /// # Errors
    /// If it is longer than the cap.
    pub fn encode(self) -> Result<Bytes, FrameError> {
        use wire::shard_to_edge::Message as M;
        let message = match self {
            Self::Welcome(welcome) => M::Welcome(wire::Welcome {
                shard: welcome.shard.to_string(),
                epoch: welcome.epoch,
                candidates: welcome.candidates.into_iter().map(candidate_to_wire).collect(),
                unix_ms: welcome.unix_ms,
                ping_ms: millis(welcome.ping),
                generation: welcome.generation,
                seen_as: welcome.seen_as,
            }),
            Self::Redirect { to, epoch } => M::Redirect(wire::Redirect { to: Some(candidate_to_wire(to)), epoch }),
            Self::Move { to, epoch, within } => {
                M::Move(wire::Move { to: Some(candidate_to_wire(to)), epoch, within_ms: millis(within) })
            }
            Self::Drain { reconnect_in, deadline, candidates } => M::Drain(wire::Drain {
                reconnect_in_ms: millis(reconnect_in),
                deadline_ms: millis(deadline),
                candidates: candidates.into_iter().map(candidate_to_wire).collect(),
            }),
            Self::Renewed(Ok(Renewal { chain, roots })) => M::Renewed(wire::Renewed { chain, roots, refused: None }),
            Self::Renewed(Err(refused)) => M::Renewed(wire::Renewed {
                chain: Vec::new(),
                roots: Vec::new(),
                refused: Some(refuse_to_wire(refused)),
            }),
            Self::Refuse(refuse) => M::Refuse(refuse_to_wire(refuse)),
            Self::Pong(token) => M::Pong(wire::Pong { token }),
        };
        frame::encode(&wire::ShardToEdge { message: Some(message) }, MAX_SHARD_TO_EDGE)
    }

    /// From the body of a frame; `None` for a message of a newer version, which is to be skipped.
    ///
    /// # Errors
    /// If it is no message, or one with an impossible value.
    pub fn decode(body: Bytes) -> Result<Option<Self>, FrameError> {
        use wire::shard_to_edge::Message as M;
        let Some(message) = wire::ShardToEdge::decode(body)?.message else { return Ok(None) };
        let to = |to: Option<wire::Candidate>| candidate_from_wire(to.ok_or_else(|| invalid("to", "missing"))?);
        let from_millis = |ms: u32| Duration::from_millis(ms.into());
        Ok(Some(match message {
            M::Welcome(welcome) => Self::Welcome(Welcome {
                shard: welcome.shard.parse().map_err(|e| invalid("shard", e))?,
                epoch: welcome.epoch,
                candidates: candidates_from_wire(welcome.candidates)?,
                unix_ms: welcome.unix_ms,
                ping: from_millis(welcome.ping_ms),
                generation: welcome.generation,
                seen_as: welcome.seen_as.chars().take(64).collect(),
            }),
            M::Redirect(redirect) => Self::Redirect { to: to(redirect.to)?, epoch: redirect.epoch },
            M::Move(order) => {
                Self::Move { to: to(order.to)?, epoch: order.epoch, within: from_millis(order.within_ms) }
            }
            M::Drain(drain) => Self::Drain {
                reconnect_in: from_millis(drain.reconnect_in_ms),
                deadline: from_millis(drain.deadline_ms),
                candidates: candidates_from_wire(drain.candidates)?,
            },
            M::Renewed(wire::Renewed { refused: Some(refused), .. }) => Self::Renewed(Err(refuse_from_wire(refused))),
            M::Renewed(wire::Renewed { chain, roots, refused: None }) => {
                if chain.len().max(roots.len()) > MAX_CERTIFICATES {
                    return Err(invalid("chain", format!("more than {MAX_CERTIFICATES} certificates")));
                }
                Self::Renewed(Ok(Renewal { chain, roots }))
            }
            M::Refuse(refuse) => Self::Refuse(refuse_from_wire(refuse)),
            M::Pong(pong) => Self::Pong(pong.token),
        }))
    }
}

fn invalid(field: &'static str, why: impl ToString) -> FrameError {
    FrameError::Invalid { field, why: why.to_string() }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn avoided_from_wire(avoid: Vec<String>) -> Result<Vec<ShardId>, FrameError> {
    if avoid.len() > MAX_AVOIDED {
        return Err(invalid("avoid", format!("more than {MAX_AVOIDED}")));
    }
    avoid.into_iter().map(|shard| shard.parse().map_err(|e| invalid("avoid", e))).collect()
}

fn candidate_to_wire(candidate: Candidate) -> wire::Candidate {
    wire::Candidate { shard: candidate.shard.to_string(), addresses: candidate.addresses }
}

fn candidate_from_wire(candidate: wire::Candidate) -> Result<Candidate, FrameError> {
    if candidate.addresses.len() > MAX_CANDIDATES {
        return Err(invalid("addresses", format!("more than {MAX_CANDIDATES}")));
    }
    let shard = candidate.shard.parse().map_err(|e| invalid("shard", e))?;
    Ok(Candidate { shard, addresses: candidate.addresses })
}

fn candidates_from_wire(candidates: Vec<wire::Candidate>) -> Result<Vec<Candidate>, FrameError> {
    if candidates.len() > MAX_CANDIDATES {
        return Err(invalid("candidates", format!("more than {MAX_CANDIDATES}")));
    }
    candidates.into_iter().map(candidate_from_wire).collect()
}

fn refuse_to_wire(refuse: Refuse) -> wire::Refuse {
    wire::Refuse {
        code: refuse.code.number(),
        reason: refuse.reason,
        retry_after_ms: refuse.retry_after.map_or(0, millis),
    }
}

fn refuse_from_wire(refuse: wire::Refuse) -> Refuse {
    Refuse {
        code: CloseCode::from_number(refuse.code).unwrap_or(CloseCode::ProtocolError),
        reason: refuse.reason.chars().take(1024).collect(),
        retry_after: (refuse.retry_after_ms != 0).then(|| Duration::from_millis(refuse.retry_after_ms.into())),
    }
}

fn service_to_wire(service: Service) -> wire::Service {
    use wire::service::Kind;
    let kind = match service.kind {
        ServiceKind::Tcp => Kind::Tcp,
        ServiceKind::Http => Kind::Http,
        ServiceKind::Https => Kind::Https,
        ServiceKind::Ssh => Kind::Ssh,
        ServiceKind::Udp => Kind::Udp,
    };
    wire::Service {
        name: service.name.to_string(),
        kind: kind.into(),
        port: service.port.into(),
        labels: service.labels.into_iter().collect(),
    }
}

fn service_from_wire(service: wire::Service) -> Result<Service, FrameError> {
    use wire::service::Kind;
    let kind = match service.kind() {
        // A kind from the future is still a stream of bytes.
        Kind::Tcp | Kind::Unspecified => ServiceKind::Tcp,
        Kind::Http => ServiceKind::Http,
        Kind::Https => ServiceKind::Https,
        Kind::Ssh => ServiceKind::Ssh,
        Kind::Udp => ServiceKind::Udp,
    };
    let port = u16::try_from(service.port).ok().filter(|&p| p != 0).ok_or_else(|| invalid("port", service.port))?;
    Ok(Service {
        name: service.name.parse().map_err(|e| invalid("service", e))?,
        kind,
        port,
        labels: service.labels.into_iter().collect(),
    })
}
