//! What shards say to each other. The flow is drawn in `proto/peer_stream.proto`.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;

use crate::{
    frame::{self, FrameError, MAX_SHARD_TO_SHARD},
    id::{EdgeId, ServiceName},
    wire,
};

/// Most edges of one message, so that it stays below the cap with the longest names.
pub const MAX_HELD: usize = 900;
/// Most services of one message.
pub const MAX_ANNOUNCED: usize = 3000;

/// From the shard that dialled to the other one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShardToShard {
    /// The first message; and again whenever all has been told that follows from the ring of this epoch.
    Greeting {
        /// Of the ring that the speaker goes by.
        epoch: u64,
        /// Of its software.
        version: String,
    },
    /// Tunnels that end at the speaker though the listener owns their edges.
    Held {
        /// Whether these are the first of all of them, so that what was said before is over.
        all: bool,
        /// At most [`MAX_HELD`].
        edges: Vec<Held>,
    },
    /// Tunnels that ended; at most [`MAX_HELD`].
    Released(Vec<EdgeId>),
    /// Services that edges at the speaker announce, and how many edges each; at most [`MAX_ANNOUNCED`].
    Announced(BTreeMap<ServiceName, u32>),
}

/// A tunnel that ends somewhere else than at the edge's owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Whose.
    pub edge: EdgeId,
    /// When the edge said Hello, by its own clock in milliseconds since 1970.
    pub unix_ms: u64,
}

fn invalid(field: &'static str, why: impl ToString) -> FrameError {
    FrameError::Invalid { field, why: why.to_string() }
}

impl ShardToShard {
    /// As a frame.
    ///
    /// # Errors
    /// If it is longer than the cap.
    pub fn encode(self) -> Result<Bytes, FrameError> {
        use wire::shard_to_shard::Message as M;
        let message = match self {
            Self::Greeting { epoch, version } => M::Greeting(wire::Greeting { epoch, version }),
            Self::Held { all, edges } => {
                let edge = |Held { edge, unix_ms }| wire::HeldEdge { edge: String::from(edge), unix_ms };
                M::Held(wire::Held { all, edges: edges.into_iter().map(edge).collect() })
            }
            Self::Released(edges) => M::Released(wire::Released { edges: edges.into_iter().map(Into::into).collect() }),
            Self::Announced(services) => M::Announced(wire::Announced {
                services: services.into_iter().map(|(name, count)| (name.into(), count)).collect(),
            }),
        };
        frame::encode(&wire::ShardToShard { message: Some(message) }, MAX_SHARD_TO_SHARD)
    }

    /// From the body of a frame; `None` for a message of a newer version, which is to be skipped.
    ///
    /// # Errors
    /// If it is no message, or one with an impossible value.
    pub fn decode(body: Bytes) -> Result<Option<Self>, FrameError> {
        use wire::shard_to_shard::Message as M;
        let Some(message) = wire::ShardToShard::decode(body)?.message else { return Ok(None) };
        Ok(Some(match message {
            M::Greeting(greeting) => {
                Self::Greeting { epoch: greeting.epoch, version: greeting.version.chars().take(64).collect() }
            }
            M::Held(held) => Self::Held { all: held.all, edges: held_from_wire(held.edges)? },
            M::Released(released) => {
                bounded("edges", released.edges.len(), MAX_HELD)?;
                let edges = released.edges.into_iter().map(|e| e.parse().map_err(|e| invalid("edge", e)));
                Self::Released(edges.collect::<Result<_, _>>()?)
            }
            M::Announced(announced) => {
                bounded("services", announced.services.len(), MAX_ANNOUNCED)?;
                let service =
                    |(name, count): (String, u32)| Ok((name.parse().map_err(|e| invalid("service", e))?, count));
                Self::Announced(announced.services.into_iter().map(service).collect::<Result<_, FrameError>>()?)
            }
        }))
    }
}

fn bounded(field: &'static str, len: usize, max: usize) -> Result<(), FrameError> {
    if len > max { Err(invalid(field, format!("{len} of them, at most {max} are allowed"))) } else { Ok(()) }
}

fn held_from_wire(edges: Vec<wire::HeldEdge>) -> Result<Vec<Held>, FrameError> {
    bounded("edges", edges.len(), MAX_HELD)?;
    let held =
        |wire::HeldEdge { edge, unix_ms }| Ok(Held { edge: edge.parse().map_err(|e| invalid("edge", e))?, unix_ms });
    edges.into_iter().map(held).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_and_the_longest_fit() {
        let long: EdgeId = ["a".repeat(63).as_str(); 4].join(".")[..253].trim_end_matches('.').parse().unwrap();
        let held = vec![Held { edge: long.clone(), unix_ms: u64::MAX }; MAX_HELD];
        let services = (0..MAX_ANNOUNCED).map(|i| (format!("{i:063}").parse().unwrap(), u32::MAX)).collect();
        for message in [
            ShardToShard::Greeting { epoch: u64::MAX, version: "0.1.0".into() },
            ShardToShard::Held { all: true, edges: held },
            ShardToShard::Held { all: false, edges: vec![] },
            ShardToShard::Released(vec![long; MAX_HELD]),
            ShardToShard::Announced(services),
        ] {
            let frame = message.clone().encode().unwrap();
            assert_eq!(ShardToShard::decode(frame.slice(frame::HEADER..)), Ok(Some(message)));
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let too_many = ShardToShard::Released(vec!["a".parse().unwrap(); MAX_HELD + 1]).encode().unwrap();
        assert!(ShardToShard::decode(too_many.slice(frame::HEADER..)).is_err());
        let nameless = wire::Held { all: false, edges: vec![wire::HeldEdge { edge: "A".into(), unix_ms: 0 }] };
        let message = wire::shard_to_shard::Message::Held(nameless);
        let body = wire::ShardToShard { message: Some(message) }.encode_to_vec();
        assert!(ShardToShard::decode(body.into()).is_err());
        assert_eq!(ShardToShard::decode(Bytes::new()), Ok(None), "a message of a newer version");
    }
}
