//! The head of a data stream: one [`Open`] from the opener, one [`Answer`] from the acceptor.

use std::time::Duration;

use bytes::Bytes;
use prost::Message;

use crate::{
    code::{RefuseCode, Retry},
    frame::{self, FrameError, MAX_STREAM_HEAD},
    id::{EdgeId, ShardId},
    principal::Principal,
    target::{HostPort, Target},
    wire,
};

/// Most groups of a user that an `Open` carries.
const MAX_GROUPS: usize = 64;
/// Most shards that an `Open` names as passed.
pub const MAX_VIA: usize = 8;
/// Longest name of a door, or reason, in bytes.
const MAX_TEXT: usize = 1024;

/// What a stream is for. The opener may send bytes right behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// Where to.
    pub target: Target,
    /// For whom. Only shards may state it; from anybody else it is ignored in favour of the certificate.
    pub principal: Option<Principal>,
    /// The door through which the flow entered.
    pub door: String,
    /// W3C trace context.
    pub trace: Option<Trace>,
    /// How many shards have passed it on.
    pub hops: u32,
    /// Which ones; at most [`MAX_VIA`]. Only shards may state it.
    pub via: Vec<ShardId>,
    /// Whether datagrams follow, as [`crate::datagram`] writes them, and not bytes.
    pub datagrams: bool,
}

/// Trace id and parent span id of W3C Trace Context (<https://www.w3.org/TR/trace-context/>).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    /// 16 bytes, not all zero.
    pub trace_id: [u8; 16],
    /// 8 bytes, not all zero.
    pub parent_id: [u8; 8],
}

/// What became of an [`Open`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The target is connected; its bytes follow.
    Opened {
        /// The edge that serves.
        edge: EdgeId,
        /// What it dialled.
        address: String,
    },
    /// It is not, and nothing follows.
    Refused(Refusal),
    /// Between shards only: the tunnel is found, and the edge's answer follows.
    Routed(Routed),
}

/// Where a stream was passed on to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Routed {
    /// The shard where the edge's tunnel ends.
    pub shard: ShardId,
    /// The edge.
    pub edge: EdgeId,
    /// The policy rule that allowed it.
    pub rule: String,
}

/// A stream was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// The kind.
    pub code: RefuseCode,
    /// One sentence for people, with cause and remedy.
    pub reason: String,
    /// A better guess than the code's own of when to try again.
    pub retry_after: Option<Duration>,
}

impl Refusal {
    /// A refusal with the code's own sentence.
    #[must_use]
    pub fn new(code: RefuseCode) -> Self {
        Self { code, reason: code.sentence().to_owned(), retry_after: None }
    }

    /// A refusal with a sentence of its own.
    #[must_use]
    pub fn because(code: RefuseCode, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into(), retry_after: None }
    }

    /// Whether and when to try again.
    #[must_use]
    pub fn retry(&self) -> Retry {
        self.retry_after.map_or_else(|| self.code.retry(), Retry::After)
    }
}

fn invalid(field: &'static str, why: impl ToString) -> FrameError {
    FrameError::Invalid { field, why: why.to_string() }
}

impl Open {
    /// An `Open` that says nothing but the target.
    #[must_use]
    pub const fn new(target: Target) -> Self {
        let datagrams = matches!(target, Target::Udp { .. });
        Self { target, principal: None, door: String::new(), trace: None, hops: 0, via: Vec::new(), datagrams }
    }

    /// The `Open` of a flow of datagrams.
    #[must_use]
    pub const fn flow(target: Target) -> Self {
        Self { target, principal: None, door: String::new(), trace: None, hops: 0, via: Vec::new(), datagrams: true }
    }

    /// As a frame.
    ///
    /// # Errors
    /// If it is longer than the cap, by a user in very many groups.
    pub fn encode(&self) -> Result<Bytes, FrameError> {
        let open = wire::Open {
            target: Some(target_to_wire(&self.target)),
            principal: self.principal.as_ref().map(principal_to_wire),
            door: self.door.clone(),
            trace: self.trace.map_or_else(Bytes::new, |t| [&t.trace_id[..], &t.parent_id[..]].concat().into()),
            hops: self.hops,
            via: self.via.iter().map(ToString::to_string).collect(),
            datagrams: self.datagrams && !matches!(self.target, Target::Udp { .. }),
        };
        frame::encode(&open, MAX_STREAM_HEAD)
    }

    /// From the body of a frame.
    ///
    /// # Errors
    /// If it is no `Open`, or one with an impossible value.
    pub fn decode(body: Bytes) -> Result<Self, FrameError> {
        let open = wire::Open::decode(body)?;
        let trace = match (open.trace.first_chunk::<16>(), open.trace.last_chunk::<8>(), open.trace.len()) {
            (Some(&trace_id), Some(&parent_id), 24) => Some(Trace { trace_id, parent_id }),
            (_, _, 0) => None,
            _ => return Err(invalid("trace", "not 24 bytes")),
        };
        if open.door.len() > MAX_TEXT {
            return Err(invalid("door", "too long"));
        }
        if open.via.len() > MAX_VIA {
            return Err(invalid("via", format!("more than {MAX_VIA}")));
        }
        let target = target_from_wire(open.target.ok_or_else(|| invalid("target", "missing"))?)?;
        Ok(Self {
            datagrams: open.datagrams || matches!(target, Target::Udp { .. }),
            target,
            principal: open.principal.map(principal_from_wire).transpose()?,
            door: open.door,
            trace,
            hops: open.hops,
            via: open.via.into_iter().map(|s| s.parse().map_err(|e| invalid("via", e))).collect::<Result<_, _>>()?,
        })
    }
}

impl Answer {
    /// As a frame; a reason that is too long is cut.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let answer = match self {
            Self::Opened { edge, address } => {
                wire::answer::Answer::Opened(wire::Opened { edge: edge.to_string(), address: cut(address).to_owned() })
            }
            Self::Refused(refusal) => wire::answer::Answer::Refused(wire::OpenRefused {
                code: refusal.code.number(),
                reason: cut(&refusal.reason).to_owned(),
                retry_after_ms: refusal.retry_after.map_or(0, millis),
            }),
            Self::Routed(routed) => wire::answer::Answer::Routed(wire::Routed {
                shard: routed.shard.to_string(),
                edge: routed.edge.to_string(),
                rule: cut(&routed.rule).to_owned(),
            }),
        };
        frame::encode(&wire::Answer { answer: Some(answer) }, MAX_STREAM_HEAD)
            .expect("names and cut texts are far below the cap")
    }

    /// From the body of a frame. A code from the future counts as [`RefuseCode::Internal`] and keeps its sentence.
    ///
    /// # Errors
    /// If it is no `Answer`.
    pub fn decode(body: Bytes) -> Result<Self, FrameError> {
        match wire::Answer::decode(body)?.answer {
            Some(wire::answer::Answer::Opened(opened)) => {
                Ok(Self::Opened { edge: opened.edge.parse().map_err(|e| invalid("edge", e))?, address: opened.address })
            }
            Some(wire::answer::Answer::Refused(refused)) => Ok(Self::Refused(Refusal {
                code: RefuseCode::from_number(refused.code).unwrap_or(RefuseCode::Internal),
                reason: refused.reason,
                retry_after: (refused.retry_after_ms != 0)
                    .then(|| Duration::from_millis(refused.retry_after_ms.into())),
            })),
            Some(wire::answer::Answer::Routed(routed)) => Ok(Self::Routed(Routed {
                shard: routed.shard.parse().map_err(|e| invalid("shard", e))?,
                edge: routed.edge.parse().map_err(|e| invalid("edge", e))?,
                rule: routed.rule,
            })),
            None => Err(invalid("answer", "neither opened nor refused nor routed")),
        }
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT)]
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn target_to_wire(target: &Target) -> wire::Target {
    let host_port = |to: &HostPort| wire::HostPort { host: to.host.clone(), port: to.port.into() };
    let (edge, what) = match target {
        Target::Tcp { edge, to } => (Some(edge), wire::target::What::Tcp(host_port(to))),
        Target::Udp { edge, to } => (Some(edge), wire::target::What::Udp(host_port(to))),
        Target::Service { edge, name } => (edge.as_ref(), wire::target::What::Service(name.to_string())),
        Target::Probe { edge } => (Some(edge), wire::target::What::Probe(wire::Probe {})),
    };
    wire::Target { edge: edge.map(ToString::to_string).unwrap_or_default(), what: Some(what) }
}

fn target_from_wire(target: wire::Target) -> Result<Target, FrameError> {
    let edge =
        (!target.edge.is_empty()).then(|| target.edge.parse::<EdgeId>()).transpose().map_err(|e| invalid("edge", e))?;
    let named = || edge.clone().ok_or_else(|| invalid("edge", "missing"));
    let host_port = |to: wire::HostPort| {
        let port = u16::try_from(to.port).map_err(|_| invalid("port", to.port))?;
        HostPort::new(&to.host, port).map_err(|e| invalid("host", e))
    };
    match target.what.ok_or_else(|| invalid("target", "no known kind"))? {
        wire::target::What::Tcp(to) => Ok(Target::Tcp { edge: named()?, to: host_port(to)? }),
        wire::target::What::Udp(to) => Ok(Target::Udp { edge: named()?, to: host_port(to)? }),
        wire::target::What::Service(name) => {
            Ok(Target::Service { edge, name: name.parse().map_err(|e| invalid("service", e))? })
        }
        wire::target::What::Probe(_) => Ok(Target::Probe { edge: named()? }),
    }
}

fn principal_to_wire(principal: &Principal) -> wire::Principal {
    use wire::principal::Kind;
    let (kind, name, groups, site) = match principal {
        Principal::User { name, groups } => {
            (Kind::User, name.to_string(), groups.iter().map(ToString::to_string).collect(), None)
        }
        Principal::Edge { name, site } => (Kind::Edge, name.to_string(), Vec::new(), site.as_ref()),
        Principal::Door { name } => (Kind::Door, name.clone(), Vec::new(), None),
        Principal::Apiserver => (Kind::Apiserver, String::new(), Vec::new(), None),
    };
    wire::Principal { kind: kind.into(), name, groups, site: site.map(ToString::to_string).unwrap_or_default() }
}

fn principal_from_wire(principal: wire::Principal) -> Result<Principal, FrameError> {
    use wire::principal::Kind;
    if principal.groups.len() > MAX_GROUPS {
        return Err(invalid("groups", format!("{} of them, at most {MAX_GROUPS} are allowed", principal.groups.len())));
    }
    match principal.kind() {
        Kind::User => Ok(Principal::User {
            name: principal.name.parse().map_err(|e| invalid("user", e))?,
            groups: principal
                .groups
                .iter()
                .map(|g| g.parse().map_err(|e| invalid("group", e)))
                .collect::<Result<_, _>>()?,
        }),
        Kind::Edge => Ok(Principal::Edge {
            name: principal.name.parse().map_err(|e| invalid("edge", e))?,
            site: (!principal.site.is_empty())
                .then(|| principal.site.parse())
                .transpose()
                .map_err(|e| invalid("site", e))?,
        }),
        Kind::Door if principal.name.len() <= MAX_TEXT => Ok(Principal::Door { name: principal.name }),
        Kind::Door => Err(invalid("door", "too long")),
        Kind::Apiserver => Ok(Principal::Apiserver),
        Kind::Unspecified => Err(invalid("principal", "no known kind")),
    }
}
