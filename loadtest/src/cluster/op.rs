//! What can happen to a mesh, as a list that a seed can draw.

use std::time::Duration;

use rand::{RngExt, rngs::StdRng};
use tokio::time::sleep;

use super::Cluster;
use crate::{
    probe::Load,
    simnet::{Path, seed_for},
};

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// An edge starts, if it does not run.
    StartEdge(usize),
    /// An edge gets SIGTERM.
    StopEdge(usize),
    /// An edge gets SIGKILL.
    KillEdge(usize),
    /// An edge gets SIGKILL and starts again at once.
    RestartEdge(usize),
    /// An edge's NAT gives it another address.
    Roam(usize),
    /// An edge's certificate is revoked.
    Revoke(usize),
    /// Nothing passes between an edge and a shard.
    CutEdge {
        /// The edge.
        edge: usize,
        /// The shard.
        shard: usize,
    },
    /// Nothing passes between a user and a shard.
    CutUser {
        /// The user.
        user: usize,
        /// The shard.
        shard: usize,
    },
    /// Everything passes again.
    Heal,
    /// A shard starts, if it does not run.
    StartShard(usize),
    /// A shard gets SIGTERM.
    StopShard(usize),
    /// A shard gets SIGKILL.
    KillShard(usize),
    /// So many of a thousand datagrams are lost, everywhere.
    Loss(u32),
    /// Streams are opened.
    Streams {
        /// By whom.
        user: usize,
        /// To whom.
        edge: usize,
        /// How many.
        count: usize,
        /// How long each is, in bytes.
        bytes: u64,
    },
    /// Time passes, in milliseconds.
    Wait(u64),
    /// Time passes until each edge that lives has its one tunnel.
    Calm,
}

impl Op {
    /// Draws one for a mesh of this size. Edges are revoked by stories of their own, not here.
    #[must_use]
    pub fn draw(chance: &mut StdRng, edges: usize, users: usize, shards: usize) -> Self {
        let (edge, user, shard) =
            (chance.random_range(0..edges), chance.random_range(0..users), chance.random_range(0..shards));
        match chance.random_range(0..100) {
            0..30 => Self::Wait(chance.random_range(1..8_000)),
            30..55 => {
                Self::Streams { user, edge, count: chance.random_range(1..4), bytes: chance.random_range(0..60_000) }
            }
            55..62 => Self::StartEdge(edge),
            62..65 => Self::StopEdge(edge),
            65..68 => Self::KillEdge(edge),
            68..72 => Self::RestartEdge(edge),
            72..76 => Self::Roam(edge),
            76..80 => Self::CutEdge { edge, shard },
            80..82 => Self::CutUser { user, shard },
            82..86 => Self::Heal,
            86..91 => Self::StartShard(shard),
            91..93 => Self::StopShard(shard),
            93..95 => Self::KillShard(shard),
            _ => Self::Loss(*[0, 0, 10, 50, 100].get(chance.random_range(0..5)).unwrap_or(&0)),
        }
    }
}

impl Cluster {
    /// Lets things happen, one after the other.
    ///
    /// # Errors
    /// If a process does not start, or [`Op::Calm`] is not reached.
    pub async fn run(&mut self, ops: &[Op]) -> anyhow::Result<()> {
        for op in ops {
            self.net.note(format!("{op:?}"));
            self.happen(*op).await?;
        }
        Ok(())
    }

    async fn happen(&mut self, op: Op) -> anyhow::Result<()> {
        match op {
            Op::StartEdge(edge) => self.start_edge(edge)?,
            Op::StopEdge(edge) => self.stop_edge(edge),
            Op::KillEdge(edge) => self.kill_edge(edge),
            Op::RestartEdge(edge) => {
                self.kill_edge(edge);
                self.start_edge(edge)?;
            }
            Op::Roam(edge) => self.roam(edge),
            Op::Revoke(edge) => self.revoke_edge(edge),
            Op::CutEdge { edge, shard } => self.net.cut(self.edges[edge].host, self.shards[shard].address.ip()),
            Op::CutUser { user, shard } => {
                self.net.cut(self.users[user].address.ip(), self.shards[shard].address.ip());
            }
            Op::Heal => self.net.heal_all(),
            Op::StartShard(shard) => self.start_shard(shard)?,
            Op::StopShard(shard) => self.stop_shard(shard),
            Op::KillShard(shard) => self.kill_shard(shard),
            Op::Loss(per_mille) => {
                self.net.set_all(Path { loss: f64::from(per_mille) / 1000.0, ..self.layout.path });
            }
            Op::Streams { user, edge, count, bytes } => {
                self.open_streams(user, edge, 1, bytes);
                // The others are read late, so that they fill what buffers there are.
                for late in 1..count as u64 {
                    let seed = seed_for(self.seed, (user, edge, late, bytes));
                    self.open_stream(user, edge, Load { rest: Duration::from_secs(2 * late), ..Load::of(seed, bytes) });
                }
            }
            Op::Wait(millis) => sleep(Duration::from_millis(millis)).await,
            Op::Calm => {
                self.calm().await?;
            }
        }
        Ok(())
    }

    fn roam(&mut self, edge: usize) {
        if let Some(process) = &mut self.edges[edge].running {
            let before = process.address;
            process.address.set_port(before.port() + 1000);
            self.net.roam(before, process.address);
        }
    }
}
