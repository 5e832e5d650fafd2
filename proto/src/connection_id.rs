//! QUIC connection ids that say to whom they belong, so that a packet which reaches another shard (a load balancer that was
//! changed, an edge that has another address) can be told from noise. The layout is that of QUIC-LB's plaintext ids with a
//! server id of four bytes: `docs/protocol.md`, *Connection ids*.
//!
//! Nothing secret is in them, and nothing that they say is believed: a packet still has to decrypt.

use std::fmt;

use crate::{id::ShardId, ring};

/// Bytes of an id.
pub const LEN: usize = 12;
/// The first byte: configuration 0 in the three upper bits, and how many bytes follow (QUIC-LB, 3.2).
const FIRST: u8 = LEN as u8 - 1;
/// Random bytes at the end: no two links of a process have the same.
pub const NONCE: usize = 7;

/// A shard in three bytes: the uppermost of the hash of its name, which is the ring's. Two shards of a mesh may have the
/// same; of a hundred, any two with a chance of 1 in 3400.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardTag([u8; 3]);

impl ShardTag {
    /// The tag of a shard.
    #[must_use]
    pub fn of(shard: &ShardId) -> Self {
        let [a, b, c, ..] = ring::name_hash(shard.as_str()).to_be_bytes();
        Self([a, b, c])
    }
}

impl fmt::Display for ShardTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c] = self.0;
        write!(f, "{a:02x}{b:02x}{c:02x}")
    }
}

impl fmt::Debug for ShardTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShardTag({self})")
    }
}

/// To whom a link belongs on the side that gave the id out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The shard.
    pub shard: ShardTag,
    /// Its worker; 0 in a shard that has one.
    pub worker: u8,
}

impl Place {
    /// An id for a link at this place.
    #[must_use]
    pub const fn id(self, nonce: [u8; NONCE]) -> [u8; LEN] {
        let ([a, b, c], [n0, n1, n2, n3, n4, n5, n6]) = (self.shard.0, nonce);
        [FIRST, a, b, c, self.worker, n0, n1, n2, n3, n4, n5, n6]
    }

    /// Whose id this is; `None` if it is none of a shard's.
    #[must_use]
    pub fn of_id(id: &[u8]) -> Option<Self> {
        match *id {
            [FIRST, a, b, c, worker, ..] if id.len() == LEN => Some(Self { shard: ShardTag([a, b, c]), worker }),
            _ => None,
        }
    }

    /// For whom a UDP datagram is, by the connection id that it begins with (RFC 8999, 5). `None` if that is none of a
    /// shard's, as the one that a client makes up for its first packets.
    #[must_use]
    pub fn of_datagram(datagram: &[u8]) -> Option<Self> {
        let (first, rest) = datagram.split_first()?;
        if first & 0x80 == 0 {
            // A short header: the id is as long as whoever gave it out knows it to be.
            return Self::of_id(rest.get(..LEN)?);
        }
        // A long header: version, length of the id, the id.
        let (length, rest) = rest.get(4..)?.split_first()?;
        Self::of_id(rest.get(..usize::from(*length))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(shard: &str, worker: u8) -> Place {
        Place { shard: ShardTag::of(&shard.parse().unwrap()), worker }
    }

    #[test]
    fn the_layout_stays_as_it_is() {
        let id = place("shard-1", 3).id([1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(id[0], 0x0b);
        assert_eq!(id[1..4], place("shard-1", 0).shard.0);
        assert_eq!(id[4..], [3, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(place("shard-1", 0).shard.to_string(), "f7b329");
    }

    #[test]
    fn a_datagram_tells_for_whom_it_is() {
        let mine = place("shard-1", 0);
        let id = mine.id([9; NONCE]);
        let short = [&[0x40], &id[..], &[0; 30]].concat();
        assert_eq!(Place::of_datagram(&short), Some(mine));
        assert_ne!(Place::of_datagram(&short), Some(place("shard-2", 0)));
        let long = [&[0xc3, 0, 0, 0, 1, 12], &id[..], &[0; 30]].concat();
        assert_eq!(Place::of_datagram(&long), Some(mine));
        for none in [&[][..], &[0x40], &short[..12], &[0xc3, 0, 0, 0, 1], &[0xc3, 0, 0, 0, 1, 200, 1], &[0x40; 40]] {
            assert_eq!(Place::of_datagram(none), None, "{none:?}");
        }
    }
}
