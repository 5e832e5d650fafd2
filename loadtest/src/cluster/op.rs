//! What can happen to a mesh, as a list that a seed can draw.

use std::time::Duration;

use proto::api::ShardOrder;
use rand::{RngExt, rngs::StdRng};

use super::{Cluster, Layout, control::database::Health};
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
    /// Nothing passes any more between two.
    Cut(Cut),
    /// Everything passes again.
    Heal,
    /// A shard starts, if it does not run.
    StartShard(usize),
    /// A shard gets SIGTERM.
    StopShard(usize),
    /// A shard gets SIGKILL.
    KillShard(usize),
    /// A shard gets SIGKILL and starts again at once.
    RestartShard(usize),
    /// A shard is stopped for so many milliseconds, and goes on.
    PauseShard(usize, u64),
    /// One more shard is set up and starts.
    AddShard,
    /// An administrator wants something of a shard.
    Order(usize, ShardOrder),
    /// A replica of control starts, if it does not run.
    StartReplica(usize),
    /// A replica of control gets SIGKILL.
    KillReplica(usize),
    /// The database gets ill, or well.
    Database(Health),
    /// All wall clocks jump by so many milliseconds. Monotonic ones do not.
    Jump(i64),
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
    /// Time passes until all is as [`Cluster::is_calm`] says.
    Calm,
}

/// Between whom nothing passes any more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cut {
    /// An edge and a shard.
    Edge {
        /// The edge.
        edge: usize,
        /// The shard.
        shard: usize,
    },
    /// A user and a shard.
    User {
        /// The user.
        user: usize,
        /// The shard.
        shard: usize,
    },
    /// Two shards.
    Shards(usize, usize),
    /// Two shards, from the first to the second; the other way stays open.
    OneWay(usize, usize),
    /// A shard and a replica of control.
    Control {
        /// The shard.
        shard: usize,
        /// The replica.
        replica: usize,
    },
    /// A replica of control and the database.
    Replica(usize),
}

/// How much of everything there is, for drawing.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Edges.
    pub edges: usize,
    /// Users.
    pub users: usize,
    /// Shards.
    pub shards: usize,
    /// Replicas of control.
    pub replicas: usize,
}

impl From<Layout> for Size {
    fn from(Layout { shards, edges, users, replicas, .. }: Layout) -> Self {
        Self { edges, users, shards, replicas }
    }
}

impl Op {
    /// Draws one for a mesh of this size. Edges are revoked by stories of their own, not here.
    #[must_use]
    pub fn draw(chance: &mut StdRng, size: Size) -> Self {
        let (edge, user) = (chance.random_range(0..size.edges), chance.random_range(0..size.users));
        match chance.random_range(0..100) {
            0..30 => Self::Wait(chance.random_range(1..8_000)),
            30..50 => {
                Self::Streams { user, edge, count: chance.random_range(1..4), bytes: chance.random_range(0..60_000) }
            }
            50..57 => Self::StartEdge(edge),
            57..59 => Self::StopEdge(edge),
            59..61 => Self::KillEdge(edge),
            61..64 => Self::RestartEdge(edge),
            64..66 => Self::Roam(edge),
            66..69 => Self::Cut(Cut::Edge { edge, shard: chance.random_range(0..size.shards) }),
            69..71 => Self::Cut(Cut::User { user, shard: chance.random_range(0..size.shards) }),
            71..75 => Self::Heal,
            75..78 => Self::Loss(*[0, 0, 10, 50, 100].get(chance.random_range(0..5)).unwrap_or(&0)),
            78..90 => Self::draw_shard(chance, size.shards),
            _ => Self::draw_control(chance, size),
        }
    }

    /// Something that happens to shards.
    fn draw_shard(chance: &mut StdRng, shards: usize) -> Self {
        let (shard, other) = (chance.random_range(0..shards), chance.random_range(0..shards));
        match chance.random_range(0..100) {
            0..40 => Self::StartShard(shard),
            40..50 => Self::StopShard(shard),
            50..60 => Self::KillShard(shard),
            60..65 => Self::RestartShard(shard),
            65..75 => Self::PauseShard(shard, chance.random_range(500..20_000)),
            75..80 => Self::Cut(Cut::Shards(shard, other)),
            80..85 => Self::Cut(Cut::OneWay(shard, other)),
            85..93 => Self::Order(shard, ShardOrder::Serve),
            93..96 => Self::Order(shard, ShardOrder::Cordon),
            _ => Self::Order(shard, ShardOrder::Drain),
        }
    }

    /// Something that happens to control.
    fn draw_control(chance: &mut StdRng, size: Size) -> Self {
        let (shard, replica) = (chance.random_range(0..size.shards), chance.random_range(0..size.replicas));
        let healths = [
            Health::Good,
            Health::Good,
            Health::Slow(Duration::from_millis(chance.random_range(100..6_000))),
            Health::ReadOnly,
            Health::Away,
        ];
        match chance.random_range(0..100) {
            0..20 => Self::StartReplica(replica),
            20..30 => Self::KillReplica(replica),
            30..45 => Self::Cut(Cut::Replica(replica)),
            45..60 => Self::Cut(Cut::Control { shard, replica }),
            60..90 => Self::Database(*healths.get(chance.random_range(0..5)).unwrap_or(&Health::Good)),
            _ => Self::Jump(chance.random_range(-7_200_000..7_200_000)),
        }
    }

    /// Draws what people do with a mesh on purpose, and what must not be felt: nobody is killed or cut.
    #[must_use]
    pub fn draw_planned(chance: &mut StdRng, size: Size) -> Self {
        let (edge, user) = (chance.random_range(0..size.edges), chance.random_range(0..size.users));
        let shard = chance.random_range(0..size.shards);
        match chance.random_range(0..100) {
            0..30 => Self::Wait(chance.random_range(1..15_000)),
            30..75 => {
                Self::Streams { user, edge, count: chance.random_range(1..4), bytes: chance.random_range(0..60_000) }
            }
            75..85 => Self::StartShard(shard),
            85..90 => Self::StopShard(shard),
            90..94 => Self::Order(shard, ShardOrder::Serve),
            94..96 => Self::Order(shard, ShardOrder::Cordon),
            96..99 => Self::Order(shard, ShardOrder::Drain),
            _ => Self::Jump(chance.random_range(-60_000..60_000)),
        }
    }
}

impl Cluster {
    /// Lets things happen, one after the other.
    ///
    /// # Errors
    /// If a process does not start, a rule is broken, or [`Op::Calm`] is not reached.
    pub async fn run(&mut self, ops: &[Op]) -> anyhow::Result<()> {
        for op in ops {
            self.net.note(format!("{op:?}"));
            self.happen(*op).await?;
            self.look()?;
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
            Op::StartShard(shard) => self.start_shard(shard)?,
            Op::StopShard(shard) => self.stop_shard(shard),
            Op::KillShard(shard) => self.kill_shard(shard),
            Op::RestartShard(shard) => {
                self.kill_shard(shard);
                self.start_shard(shard)?;
            }
            Op::PauseShard(shard, millis) => self.pause_shard(shard, Duration::from_millis(millis)),
            Op::AddShard => _ = self.add_shard()?,
            Op::Order(shard, order) => self.order(shard, order),
            Op::StartReplica(replica) => self.control.start(replica),
            Op::KillReplica(replica) => self.control.kill(replica),
            Op::Database(health) => self.control.database.set_health(health),
            Op::Jump(millis) => self.clock.jump(millis),
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
            Op::Wait(millis) => self.pass(Duration::from_millis(millis)).await?,
            Op::Calm => _ = self.calm().await?,
            Op::Cut(cut) => self.cut(cut),
            Op::Heal => self.net.heal_all(),
        }
        Ok(())
    }

    /// Lets nothing pass between two any more. Nobody is cut off from itself.
    pub fn cut(&self, cut: Cut) {
        let shard = |i: usize| self.shards[i].address.ip();
        match cut {
            Cut::Edge { edge, shard: at } => self.net.cut(self.edges[edge].host, shard(at)),
            Cut::User { user, shard: at } => self.net.cut(self.users[user].address.ip(), shard(at)),
            Cut::Shards(a, b) if a == b => {}
            Cut::Shards(a, b) => self.net.cut(shard(a), shard(b)),
            Cut::OneWay(a, b) if a == b => {}
            Cut::OneWay(a, b) => self.net.cut_one_way(shard(a), shard(b)),
            Cut::Control { shard: at, replica } => self.net.cut(shard(at), self.control.replicas[replica].host),
            Cut::Replica(i) => self.net.cut(self.control.replicas[i].host, self.control.database.host()),
        }
    }

    fn roam(&mut self, edge: usize) {
        if let Some(process) = &mut self.edges[edge].running {
            let before = process.address;
            process.address.set_port(before.port() + 1000);
            self.net.roam(before, process.address);
        }
    }
}
