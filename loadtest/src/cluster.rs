//! A mesh in memory: shards, edges and users as they are, on a simulated network, on tokio's paused clock.
//!
//! What a process does is the real thing, from `mesh_cloud::start_with` and `mesh_edge::start_with`; control is played by
//! the cluster itself. No socket, file or name server of the machine is touched: the runtime has no I/O driver and
//! panics if somebody tries.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use mesh_cloud::{metrics::Metrics, state::MeshState};
use parking_lot::Mutex;
use proto::{
    api::{Revoked, WatchEvent},
    id::EdgeId,
    identity::Role,
    message::Candidate,
    policy::Rule,
};
use runtime::{
    access::{AccessRecord, AccessWriter},
    link::quic::LinkLimits,
    shutdown::Tasks,
    tls::TrustBundle,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::{
    probe::{Load, StreamEnd},
    simnet::{Log, Net, Path, seed_for},
};

pub mod authority;
pub mod edge;
pub mod op;
pub mod shard;
pub mod user;

use authority::Authority;
use edge::EdgeSeat;
use shard::ShardSeat;
use user::User;

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How long the mesh may take to become calm after the last disturbance: the longest pause of an edge, twice.
const CALM: Duration = Duration::from_secs(180);
/// How long the end of everything may take.
const END: Duration = Duration::from_secs(120);
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
}

impl Default for Layout {
    fn default() -> Self {
        Self { shards: 1, edges: 1, users: 1, path: Path::default(), windows: None, drain_secs: 25 }
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

/// How streams ended.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Byte-exact.
    pub exact: usize,
    /// Refused, by code.
    pub refused: BTreeMap<&'static str, usize>,
    /// Broken, by reason.
    pub broken: BTreeMap<String, usize>,
    /// Against the rules.
    pub wrong: Vec<String>,
}

impl Tally {
    fn add(&mut self, name: &str, end: &StreamEnd) {
        match end {
            StreamEnd::Exact => self.exact += 1,
            StreamEnd::Refused(code) => *self.refused.entry(code.slug()).or_default() += 1,
            StreamEnd::Broken(why) => *self.broken.entry(why.clone()).or_default() += 1,
            StreamEnd::Wrong(why) => self.wrong.push(format!("{name}: {why}")),
        }
    }

    /// How many broke.
    #[must_use]
    pub fn broken(&self) -> usize {
        self.broken.values().sum()
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
    layout: Layout,
    seed: u64,
    bundle: TrustBundle,
    state: watch::Sender<Arc<MeshState>>,
    revoked: Vec<Revoked>,
    access: AccessWriter,
    records: Arc<Mutex<BTreeMap<String, u64>>>,
    harness: Tasks,
    streams: Vec<(String, JoinHandle<StreamEnd>)>,
    opened: u64,
    leaving: Vec<(String, Tasks)>,
    past: Vec<(Arc<Metrics>, mesh_cloud::live::LiveCredentials)>,
    baseline: usize,
}

impl Cluster {
    /// Builds the mesh and starts its shards.
    ///
    /// # Errors
    /// If a shard does not start.
    pub fn new(seed: u64, layout: Layout) -> anyhow::Result<Self> {
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
            net,
            shards,
            edges,
            users,
            layout,
            seed,
            bundle,
            state: watch::Sender::new(Arc::default()),
            revoked: Vec::new(),
            access,
            records,
            harness,
            streams: Vec::new(),
            opened: 0,
            leaving: Vec::new(),
            past: Vec::new(),
            baseline,
        };
        cluster.publish();
        for i in 0..layout.shards {
            cluster.start_shard(i)?;
        }
        Ok(cluster)
    }

    /// The seed of it all.
    #[must_use]
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// Starts a shard at its place.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_shard(&mut self, i: usize) -> anyhow::Result<()> {
        let seat = &mut self.shards[i];
        if seat.running.is_none() {
            let with = (&self.net, &self.bundle, self.state.subscribe(), self.access.clone());
            seat.start(with, &self.layout)?;
            let process = seat.running.as_ref().context("it has just started")?;
            self.past.push((Arc::clone(&process.metrics), process.live.clone()));
        }
        Ok(())
    }

    /// Asks a shard to stop, as SIGTERM does. Returns at once.
    pub fn stop_shard(&mut self, i: usize) {
        if let Some(process) = self.shards[i].running.take() {
            process.tasks.stop();
            self.leaving.push((format!("shard {i}"), process.tasks));
        }
    }

    /// Kills a shard: nobody hears a last word from it.
    pub fn kill_shard(&mut self, i: usize) {
        self.net.unplug(self.shards[i].address);
        self.stop_shard(i);
    }

    /// Starts an edge at its place.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_edge(&mut self, i: usize) -> anyhow::Result<()> {
        let shards = self.shards.iter().map(|s| s.address.to_string()).collect();
        let seat = &mut self.edges[i];
        match seat.running {
            None => seat.start((&self.net, &self.bundle), shards, &self.layout, self.seed),
            Some(_) => Ok(()),
        }
    }

    /// Starts every edge.
    ///
    /// # Errors
    /// If one does not start.
    pub fn start_edges(&mut self) -> anyhow::Result<()> {
        (0..self.edges.len()).try_for_each(|i| self.start_edge(i))
    }

    /// Asks an edge to stop, as SIGTERM does. Returns at once.
    pub fn stop_edge(&mut self, i: usize) {
        if let Some(process) = self.edges[i].running.take() {
            process.tasks.stop();
            self.leaving.push((format!("edge {i}"), process.tasks));
        }
    }

    /// Kills an edge: nobody hears a last word from it.
    pub fn kill_edge(&mut self, i: usize) {
        if let Some(process) = &self.edges[i].running {
            self.net.unplug(process.address);
        }
        self.stop_edge(i);
    }

    /// Revokes an edge's certificate, as control's word reaches the shards.
    pub fn revoke_edge(&mut self, i: usize) {
        let seat = &mut self.edges[i];
        seat.revoked = true;
        let (serial, name) = (seat.serial().to_owned(), seat.name.clone());
        self.revoked.push(Revoked { serial, role: Role::Edge, name, not_after: i64::MAX });
        self.publish();
    }

    /// Revokes a user's certificate.
    pub fn revoke_user(&mut self, i: usize) {
        let user = &self.users[i];
        let (serial, name) = (user.serial().to_owned(), user.name.clone());
        self.revoked.push(Revoked { serial, role: Role::User, name, not_after: i64::MAX });
        self.publish();
    }

    /// Says to every shard what control would.
    fn publish(&self) {
        let shards =
            self.shards.iter().map(|s| Candidate { shard: s.id.clone(), addresses: vec![s.address.to_string()] });
        let edges = self.edges.iter().filter(|e| !e.revoked).map(|e| (e.name.clone(), None));
        let event = WatchEvent {
            revision: self.state.borrow().revision + 1,
            policy: Some(everything()),
            revoked: Some(self.revoked.clone()),
            access_tokens: Some(Vec::new()),
            edges: Some(edges.collect()),
            shards: Some(shards.collect()),
            ..WatchEvent::default()
        };
        let next = Arc::new(self.state.borrow().after(event));
        self.state.send_replace(Arc::clone(&next));
        for process in self.shards.iter().filter_map(|s| s.running.as_ref()) {
            process.live.end_where(|credential| next.is_good(credential));
        }
    }

    /// The shard that holds an edge, if exactly one does.
    #[must_use]
    pub fn holder(&self, edge: &EdgeId) -> Option<usize> {
        let mut holders = (0..self.shards.len()).filter(|&i| self.shards[i].holds(edge));
        holders.next().filter(|_| holders.next().is_none())
    }

    /// Opens streams from a user to an edge, by way of the shard that holds it, and returns at once.
    pub fn open_streams(&mut self, user: usize, edge: usize, count: usize, bytes: u64) {
        for _ in 0..count {
            self.opened += 1;
            let load = Load::of(seed_for(self.seed, ("stream", self.opened)), bytes);
            self.open_stream(user, edge, load);
        }
    }

    /// Opens one stream, and returns at once.
    pub fn open_stream(&mut self, user: usize, edge: usize, load: Load) {
        let name = self.edges[edge].name.clone();
        let shard = self.holder(&name).or_else(|| self.shards.iter().position(|s| s.running.is_some())).unwrap_or(0);
        let (user, address) = (Arc::clone(&self.users[user]), self.shards[shard].address);
        let title = format!("{} to {name} by {address}, {} bytes at {:?}", user.name, load.bytes, self.net.elapsed());
        let stream = self.harness.spawn(async move { user.stream(address, &name, &load).await });
        self.streams.push((title, stream));
    }

    /// Drops every stream where it is, as an opener that crashes in its own code does.
    pub fn forget_streams(&mut self) {
        self.streams.drain(..).for_each(|(_, stream)| stream.abort());
    }

    /// Waits until every stream has ended, and says how.
    ///
    /// # Errors
    /// If one ended against the rules.
    pub async fn streams_ended(&mut self) -> anyhow::Result<Tally> {
        let mut tally = Tally::default();
        for (name, stream) in self.streams.drain(..) {
            let end = stream.await.unwrap_or_else(|e| StreamEnd::Wrong(e.to_string()));
            self.net.note(format!("{name}: {end}"));
            tally.add(&name, &end);
        }
        ensure!(tally.wrong.is_empty(), "streams ended as none may:\n{}", tally.wrong.join("\n"));
        Ok(tally)
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
        }
        Ok(begun.elapsed())
    }

    /// Waits until each edge that lives has one tunnel, and nobody else has any. Returns how long it took.
    ///
    /// # Errors
    /// If it takes longer than three minutes.
    pub async fn calm(&self) -> anyhow::Result<Duration> {
        self.wait_for("each living edge has one tunnel, and nobody else has any", CALM, Self::is_calm).await
    }

    /// Whether each edge that lives has one tunnel, and nobody else has any.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.edges.iter().all(|seat| {
            let tunnels = self.shards.iter().filter(|s| s.holds(&seat.name)).count();
            let wanted = usize::from(seat.running.is_some() && !seat.revoked);
            tunnels == wanted && (wanted == 0 || seat.is_connected())
        })
    }

    /// How things stand, for a failure's report.
    #[must_use]
    pub fn picture(&self) -> String {
        let mut text = format!("at {:.3} s\n", self.net.elapsed().as_secs_f64());
        for seat in &self.shards {
            let edges: Vec<_> = self.edges.iter().filter(|e| seat.holds(&e.name)).map(|e| e.name.as_str()).collect();
            let _ = writeln!(text, "{} ({}) holds {edges:?}", seat.id, seat.state());
        }
        for seat in &self.edges {
            let _ = writeln!(text, "{}{}: {}", seat.name, if seat.revoked { " (revoked)" } else { "" }, seat.state());
        }
        text
    }

    /// Access records by outcome, as shards and edges wrote them.
    #[must_use]
    pub fn records(&self) -> BTreeMap<String, u64> {
        self.records.lock().clone()
    }

    /// Ends everything in good order and checks that nothing is left (rule 4 of the design). Returns the log.
    ///
    /// # Errors
    /// If something is left: a task, a stream, a credential in use, a socket.
    pub async fn finish(mut self) -> anyhow::Result<Log> {
        self.streams_ended().await?;
        for i in 0..self.edges.len() {
            self.stop_edge(i);
        }
        for user in &self.users {
            user.leave();
        }
        for i in 0..self.shards.len() {
            self.stop_shard(i);
        }
        for (name, tasks) in self.leaving.drain(..) {
            let left = tasks.drained(END).await;
            ensure!(left == 0, "{name} has {left} tasks left");
        }
        self.users.clear();
        let (handle, begun) = (tokio::runtime::Handle::current(), Instant::now());
        while handle.metrics().num_alive_tasks() > self.baseline && begun.elapsed() < END {
            sleep(LOOK).await;
        }
        for (metrics, live) in &self.past {
            let gauges =
                [metrics.tunnels.get(), metrics.user_links.get(), metrics.streams.with_label_values(&["link"]).get()];
            ensure!(gauges == [0; 3], "tunnels, links of users and streams are left: {gauges:?}");
            ensure!(live.is_empty(), "{} credentials are still in use", live.len());
        }
        for seat in &self.edges {
            seat.check_left()?;
        }
        let left = handle.metrics().num_alive_tasks().saturating_sub(self.baseline);
        ensure!(left == 0, "{left} tasks are left");
        ensure!(self.net.sockets() == 0, "{} sockets are left", self.net.sockets());
        self.harness.stop();
        Ok(self.net.log())
    }
}

/// Users may reach all edges.
fn everything() -> Vec<Rule> {
    fn only<T: FromStr>(text: &str) -> Vec<T> {
        text.parse().ok().into_iter().collect()
    }
    vec![Rule { name: "all".into(), from: only("user/*"), to: only("edge/*"), ports: only("*") }]
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

/// The host of a kind's i-th member: shards are 10.0, edges 10.1, users 10.2.
const fn host(kind: u8, i: usize) -> IpAddr {
    let i = i + 1;
    IpAddr::V4(Ipv4Addr::new(10, kind, (i >> 8) as u8, i as u8))
}

const fn address(kind: u8, i: usize, port: u16) -> SocketAddr {
    SocketAddr::new(host(kind, i), port)
}
