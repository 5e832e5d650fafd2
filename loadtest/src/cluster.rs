//! A mesh in memory: shards, edges and users as they are, on a simulated network, on tokio's paused clock.
//!
//! What a process does is the real thing, from `mesh_cloud::start_with` and `mesh_edge::start_with`; what control decides
//! is too, and its API and database are played ([`control`]). After every step the rules are looked at ([`rules`]). No socket, file or name server of the machine is touched: the runtime has no I/O driver and
//! panics if somebody tries.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::bail;
use parking_lot::Mutex;
use proto::{audit::AccessRecord, id::EdgeId};
use runtime::{access::AccessWriter, clock::SteeredClock, link::quic::LinkLimits, shutdown::Tasks, tls::TrustBundle};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::{
    probe::StreamEnd,
    simnet::{Net, Path},
};

mod act;
pub mod authority;
pub mod control;
pub mod edge;
mod finish;
pub mod hand;
pub mod op;
pub mod rules;
pub mod shard;
pub mod traffic;
pub mod user;

use authority::Authority;
use control::Control;
use edge::EdgeSeat;
use rules::Rules;
use shard::ShardSeat;
use user::User;

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How long the mesh may take to become calm after the last disturbance: the longest pause of an edge, twice.
const CALM: Duration = Duration::from_secs(180);
/// Between two looks at whether the rules hold, while time passes.
const STEP: Duration = Duration::from_millis(250);
/// What the wall clock shows at the beginning, in milliseconds since 1970.
const EPOCH: u64 = 1_800_000_000_000;
/// Records that wait to be counted.
const RECORDS: usize = 4096;

/// What there is at the beginning. Edges are not started by themselves; shards are.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Shards.
    pub shards: usize,
    /// Edges.
    pub edges: usize,
    /// Users.
    pub users: usize,
    /// How links are.
    pub path: Path,
    /// Receive windows of a stream and of a link, in bytes; `None` for those of a real mesh, which take long to fill.
    pub windows: Option<(u32, u32)>,
    /// How long a shard that is asked to stop lets its streams go on, in seconds.
    pub drain_secs: u64,
    /// Replicas of control.
    pub replicas: usize,
}

impl Default for Layout {
    fn default() -> Self {
        Self { shards: 1, edges: 1, users: 1, path: Path::default(), windows: None, drain_secs: 25, replicas: 1 }
    }
}

impl Layout {
    /// Limits as a process sets them, with the windows of this layout.
    fn limits(&self, real: LinkLimits) -> LinkLimits {
        match self.windows {
            Some((stream_window, link_window)) => LinkLimits { stream_window, link_window, ..real },
            None => real,
        }
    }
}

/// A mesh in memory.
#[derive(Debug)]
pub struct Cluster {
    /// The network, for stories that cut and heal.
    pub net: Net,
    /// The shards' places, taken or not.
    pub shards: Vec<ShardSeat>,
    /// The edges' places, taken or not.
    pub edges: Vec<EdgeSeat>,
    /// The users.
    pub users: Vec<Arc<User>>,
    /// Control.
    pub control: Control,
    /// The wall clock of all processes.
    pub clock: SteeredClock,
    layout: Layout,
    seed: u64,
    bundle: TrustBundle,
    authority: Authority,
    access: AccessWriter,
    records: Arc<Mutex<BTreeMap<String, u64>>>,
    harness: Tasks,
    streams: Vec<(String, JoinHandle<StreamEnd>)>,
    opened: u64,
    leaving: Vec<(String, Tasks)>,
    past: Vec<Past>,
    pauses: Vec<(IpAddr, JoinHandle<()>)>,
    rules: Mutex<Rules>,
    baseline: usize,
}

/// What is kept of a shard's process, to see whether it leaves something behind.
#[derive(Debug)]
struct Past {
    name: String,
    metrics: Arc<mesh_cloud::metrics::Metrics>,
    live: mesh_cloud::live::LiveCredentials,
}

impl Cluster {
    /// Builds the mesh and starts control and the shards.
    ///
    /// # Errors
    /// If a shard does not start.
    pub fn new(seed: u64, layout: Layout) -> anyhow::Result<Self> {
        rules::watch_panics();
        let clock = SteeredClock::set(EPOCH);
        let harness = Tasks::new();
        let net = Net::new(seed, layout.path, &harness);
        let (access, records) = count_records(&harness);
        let mut authority = Authority::new();
        let bundle = authority.bundle();
        let shards = (0..layout.shards).map(|i| ShardSeat::new(i, &mut authority)).collect::<Result<Vec<_>, _>>()?;
        let edges = (0..layout.edges).map(|i| EdgeSeat::new(i, &mut authority)).collect::<Result<Vec<_>, _>>()?;
        let baseline = tokio::runtime::Handle::current().metrics().num_alive_tasks();
        let users = (0..layout.users)
            .map(|i| User::new(i, &mut authority, (&net, &bundle), &layout).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let mut cluster = Self {
            control: Control::new(&net, layout.replicas),
            net,
            shards,
            edges,
            users,
            clock,
            layout,
            seed,
            bundle,
            authority,
            access,
            records,
            harness,
            streams: Vec::new(),
            opened: 0,
            leaving: Vec::new(),
            past: Vec::new(),
            pauses: Vec::new(),
            rules: Mutex::default(),
            baseline,
        };
        cluster.publish();
        for i in 0..layout.shards {
            cluster.start_shard(i)?;
        }
        Ok(cluster)
    }

    /// Whom everybody trusts.
    #[must_use]
    pub const fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// The seed of it all.
    #[must_use]
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// The shard that holds an edge, if exactly one does.
    #[must_use]
    pub fn holder(&self, edge: &EdgeId) -> Option<usize> {
        let mut holders = (0..self.shards.len()).filter(|&i| self.shards[i].holds(edge));
        holders.next().filter(|_| holders.next().is_none())
    }

    /// Looks whether the rules hold.
    ///
    /// # Errors
    /// With the rule that is broken.
    pub fn look(&self) -> anyhow::Result<()> {
        self.rules.lock().look(self)
    }

    /// Lets time pass, and looks whether the rules hold meanwhile.
    ///
    /// # Errors
    /// With the rule that is broken.
    pub async fn pass(&self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            sleep(STEP.min(end - Instant::now())).await;
            self.look()?;
        }
        Ok(())
    }

    /// Waits for a condition. Returns how long it took.
    ///
    /// # Errors
    /// If it takes longer than `limit`; the state of the mesh is told.
    pub async fn wait_for(
        &self,
        what: &str,
        limit: Duration,
        condition: impl Fn(&Self) -> bool,
    ) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        while !condition(self) {
            if begun.elapsed() >= limit {
                bail!("not within {} s: {what}\n{}", limit.as_secs_f32(), self.picture());
            }
            sleep(LOOK).await;
            self.look()?;
        }
        Ok(begun.elapsed())
    }

    /// Waits until all is as [`Cluster::is_calm`] says. Returns how long it took.
    ///
    /// # Errors
    /// If it takes longer than three minutes.
    pub async fn calm(&self) -> anyhow::Result<Duration> {
        self.calm_within(CALM).await
    }

    /// Waits until all is calm.
    ///
    /// # Errors
    /// If it takes longer than `limit`, with what is not.
    pub async fn calm_within(&self, limit: Duration) -> anyhow::Result<Duration> {
        match self.wait_for("all is calm", limit, Self::is_calm).await {
            Err(e) => Err(match self.disorder() {
                Some(disorder) => e.context(disorder),
                None => e,
            }),
            took => took,
        }
    }

    /// How things stand, for a failure's report.
    #[must_use]
    pub fn picture(&self) -> String {
        let mut text = format!("at {:.3} s\n", self.net.elapsed().as_secs_f64());
        for seat in &self.shards {
            let edges: Vec<_> = self.edges.iter().filter(|e| seat.holds(&e.name)).map(|e| e.name.as_str()).collect();
            let few = &edges[..edges.len().min(20)];
            let _ = writeln!(text, "{} ({}) holds {} edges: {few:?}", seat.id, seat.state(), edges.len());
        }
        text.push_str(&self.control.picture());
        let restless = |e: &&EdgeSeat| self.edges.len() <= 20 || (e.runs() && !e.is_connected());
        for seat in self.edges.iter().filter(restless).take(20) {
            let _ = writeln!(text, "{}{}: {}", seat.name, if seat.revoked { " (revoked)" } else { "" }, seat.state());
        }
        text
    }

    /// Access records by outcome, as shards and edges wrote them.
    #[must_use]
    pub fn records(&self) -> BTreeMap<String, u64> {
        self.records.lock().clone()
    }
}

/// Counts access records by who wrote them and how the stream ended.
fn count_records(tasks: &Tasks) -> (AccessWriter, Arc<Mutex<BTreeMap<String, u64>>>) {
    let (sender, mut receiver) = mpsc::channel::<AccessRecord>(RECORDS);
    let records = Arc::new(Mutex::new(BTreeMap::new()));
    let counts = Arc::clone(&records);
    tasks.spawn(tasks.token().run_until_cancelled_owned(async move {
        while let Some(record) = receiver.recv().await {
            *counts.lock().entry(format!("{} {}", record.outcome, record.code)).or_default() += 1;
        }
    }));
    (AccessWriter::to_channel(sender), records)
}

/// The host of a kind's i-th member: shards are 10.0, edges 10.1, users 10.2, replicas of control 10.3, the database 10.4.
const fn host(kind: u8, i: usize) -> IpAddr {
    let i = i + 1;
    IpAddr::V4(Ipv4Addr::new(10, kind, (i >> 8) as u8, i as u8))
}

const fn address(kind: u8, i: usize, port: u16) -> SocketAddr {
    SocketAddr::new(host(kind, i), port)
}
