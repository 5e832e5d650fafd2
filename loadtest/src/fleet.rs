//! A fleet: control, shards and edges as real processes on loopback, in a temporary folder, and people who load them
//! from this process. Everything that was started ends with the run, whatever becomes of it.

use std::{
    collections::BTreeMap, net::SocketAddr, os::unix::fs::PermissionsExt, process::ExitCode, sync::Arc, time::Duration,
};

use anyhow::{Context, anyhow, bail, ensure};
use parking_lot::Mutex;
use proto::{
    api::{ADMIN_GROUP, EdgeView, TokenCreated, TokenKind, TokenRequest},
    id::{EdgeId, ShardId},
    join::JoinLine,
    policy::{Ports, Rule},
    ring::{Ring, RingSpec},
};
use runtime::shutdown::{self, Tasks};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

pub(crate) mod control;
pub(crate) mod edges;
pub(crate) mod http;
pub(crate) mod load;
pub(crate) mod postgres;
pub(crate) mod process;
pub(crate) mod report;
pub(crate) mod shard;
pub(crate) mod user;
pub(crate) mod way;

use self::{
    control::Control,
    edges::Edges,
    postgres::Postgres,
    report::Report,
    shard::Shard,
    user::{User, Ways},
};

/// How often it is looked whether something has come to pass.
const LOOK: Duration = Duration::from_millis(50);
/// How often control is asked where all edges are, which costs it something.
const ASK: Duration = Duration::from_millis(300);
/// How long an edge may keep an old tunnel after its last stream there has ended.
pub(crate) const RETIRED: Duration = Duration::from_secs(15);
/// How long a process may take to start.
const START: Duration = Duration::from_secs(30);
/// Fewer edges than this are not worth another process.
const MANY: usize = 50;
/// Edges with a new tunnel that are not yet listened to.
const UPS: usize = 65_536;
/// How long tokens are good, in seconds.
const TOKEN_LIFE: u32 = 3600;

/// What to start.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Shards at the beginning.
    pub(crate) shards: usize,
    /// Edges, those of each shard in processes of their own.
    pub(crate) edges: usize,
    /// Users who share the load.
    pub(crate) users: usize,
    /// Silence after which a user takes a shard for lost.
    pub(crate) silence: Duration,
    /// Replicas of control; more than one share a PostgreSQL.
    pub(crate) controls: usize,
    /// Time that streams have when a shard stops.
    pub(crate) drain: Duration,
    /// Keeps the folder with configurations and logs.
    pub(crate) keep: bool,
}

impl Plan {
    /// So many shards and edges, everything else as usual.
    pub(crate) fn of(shards: u16, edges: u32, keep: bool) -> Self {
        Self {
            shards: shards.into(),
            edges: usize::try_from(edges).unwrap_or(usize::MAX),
            users: 4,
            silence: Duration::from_secs(12),
            controls: 1,
            drain: Duration::from_secs(25),
            keep,
        }
    }
}

/// A fleet that runs.
#[derive(Debug)]
pub(crate) struct Fleet {
    folder: TempDir,
    plan: Plan,
    begun: Instant,
    admin: Option<User>,
    /// For what is done beside.
    pub(crate) tasks: Tasks,
    /// The database, if it is PostgreSQL.
    pub(crate) postgres: Option<Postgres>,
    /// The replicas of control.
    pub(crate) controls: Vec<Control>,
    /// The shards; their numbers are those in [`Fleet::ways`].
    pub(crate) shards: Vec<Shard>,
    /// The processes with the edges.
    pub(crate) edges: Vec<Edges>,
    /// The edges.
    pub(crate) names: Vec<EdgeId>,
    /// Edges that have a new tunnel, for whoever listens from the beginning.
    pub(crate) up: mpsc::Receiver<EdgeId>,
    say_up: mpsc::Sender<EdgeId>,
    /// Names and admin pages of the shards, for whoever looks at them meanwhile.
    pub(crate) admins: Admins,
    /// The users' ways to the shards.
    pub(crate) ways: Ways,
}

/// Names and admin pages of shards.
pub(crate) type Admins = Arc<Mutex<Vec<(String, SocketAddr)>>>;

/// Starts a fleet, does the work with it, ends everything, and prints what came of it. If that is no success, the
/// folder with the logs stays, and is named.
pub(crate) async fn run(
    plan: Plan,
    json: bool,
    work: impl AsyncFnOnce(&mut Fleet) -> anyhow::Result<Report>,
) -> anyhow::Result<ExitCode> {
    let mut fleet = Fleet::new(plan)?;
    let whole = async {
        fleet.start().await?;
        work(&mut fleet).await
    };
    let done = tokio::select! {
        biased;
        signal = shutdown::signal() => Err(anyhow!("ended by {}", signal?)),
        done = whole => done,
    };
    fleet.end().await;
    let printed = done.and_then(|report| report.print(json));
    let failed = !printed.as_ref().is_ok_and(|code| *code == ExitCode::SUCCESS);
    if failed || fleet.plan.keep {
        let kept = fleet.folder.keep();
        eprintln!("configurations and logs are in {}", kept.display());
    }
    printed
}

impl Fleet {
    fn new(plan: Plan) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("causeway-fleet-").tempdir().context("no temporary folder")?;
        // PostgreSQL's own user has to get to its folder below.
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755))?;
        let tasks = Tasks::new();
        let (say_up, up) = mpsc::channel(UPS);
        Ok(Self {
            up,
            say_up,
            admins: Admins::default(),
            folder,
            plan,
            begun: Instant::now(),
            admin: None,
            ways: Ways::new(Vec::new(), tasks.clone()),
            tasks,
            postgres: None,
            controls: Vec::new(),
            shards: Vec::new(),
            edges: Vec::new(),
            names: Vec::new(),
        })
    }

    async fn start(&mut self) -> anyhow::Result<()> {
        self.start_controls().await?;
        let first = self.controls.first().context("there is no control")?;
        let admin = User::enrol(&first.admin_line()?, self.plan.silence).await?;
        self.admin = Some(admin);
        let rule = Rule {
            name: "fleet".into(),
            from: vec![format!("group/{ADMIN_GROUP}").parse()?],
            to: vec!["edge/*".parse()?],
            ports: vec![Ports::ALL],
        };
        self.api()?.put::<serde_json::Value>("/v1/policy/fleet", &rule).await?;
        let mut users = Vec::new();
        for number in 0..self.plan.users {
            let line = self.join_line(TokenKind::User, Some(&format!("load-{number}")), 1).await?;
            users.push(User::enrol(&line, self.plan.silence).await?);
        }
        self.ways = Ways::new(users, self.tasks.clone());
        for _ in 0..self.plan.shards {
            self.add_shard().await?;
        }
        self.note(format_args!("control and {} shards serve", self.shards.len()));
        self.add_edges("edge", self.plan.edges).await?;
        self.note(format_args!("{} edges are connected", self.names.len()));
        Ok(())
    }

    async fn start_controls(&mut self) -> anyhow::Result<()> {
        let folder = self.folder.path().to_owned();
        if self.plan.controls > 1 {
            self.postgres = Some(Postgres::start(&folder).await?);
        }
        for number in 0..self.plan.controls {
            let database = match &self.postgres {
                Some(postgres) => Some(postgres.way(&self.tasks).await?),
                None => None,
            };
            let control = Control::start(number, database, &folder)?;
            self.controls.push(control);
            // The first one makes the CA that the others share.
            let admin = self.controls[number].admin;
            until("control is ready", START, async || Ok(http::page(admin, "/readyz").await.is_ok())).await?;
        }
        Ok(())
    }

    /// Control's API, as an administrator.
    pub(crate) fn api(&self) -> anyhow::Result<&runtime::api::ApiClient> {
        Ok(&self.admin.as_ref().context("nobody has enrolled yet")?.api)
    }

    async fn join_line(&self, kind: TokenKind, name: Option<&str>, uses: usize) -> anyhow::Result<JoinLine> {
        let request = TokenRequest {
            kind,
            name: name.map(str::parse).transpose()?,
            uses: u32::try_from(uses)?,
            ttl_secs: TOKEN_LIFE,
            groups: if kind == TokenKind::User { vec![ADMIN_GROUP.parse()?] } else { vec![] },
            site: None,
            replace: false,
        };
        let created: TokenCreated = self.api()?.post("/v1/tokens", &request).await?;
        Ok(created.join.context("control gave no join line")?.reveal().parse()?)
    }

    /// Starts one more shard, and links the users to it. Returns its number.
    pub(crate) async fn add_shard(&mut self) -> anyhow::Result<usize> {
        let name = format!("shard-{}", self.shards.len() + 1);
        let line = self.join_line(TokenKind::Shard, Some(&name), 1).await?;
        let controls: Vec<_> = self.controls.iter().map(|c| c.api).collect();
        let shard = Shard::start(&name, &line, &controls, (self.folder.path(), self.plan.drain))?;
        let (admin, mesh) = (shard.admin, shard.mesh);
        self.admins.lock().push((name.clone(), admin));
        self.shards.push(shard);
        until("the new shard is ready", START, async || Ok(http::page(admin, "/readyz").await.is_ok())).await?;
        let number = self.ways.add(&name, mesh).await;
        ensure!(number + 1 == self.shards.len(), "shards and ways are counted alike");
        Ok(number)
    }

    /// Starts so many more edges, and waits until all of them are connected.
    pub(crate) async fn add_edges(&mut self, prefix: &str, count: usize) -> anyhow::Result<()> {
        let line = self.join_line(TokenKind::Edge, None, count.max(1)).await?;
        let names =
            (0..count).map(|number| format!("{prefix}-{number}").parse()).collect::<Result<Vec<EdgeId>, _>>()?;
        // Edges are machines of their own: those that lose their shard must not take time from those that do not, so
        // that the edges of each shard are in processes of their own.
        let mut homes: BTreeMap<ShardId, Vec<EdgeId>> = BTreeMap::new();
        let ring = self.whole_ring().await?;
        for edge in &names {
            let owner = ring.owner(edge).context("the ring has no members")?;
            homes.entry(owner.shard.clone()).or_default().push(edge.clone());
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let each = processors.div_ceil(homes.len().max(1));
        for (shard, home) in homes {
            for (number, part) in home.chunks(home.len().div_ceil(each).max(MANY)).enumerate() {
                let name = format!("{prefix}s-{shard}-{number}");
                let beside = (self.folder.path(), &self.tasks);
                self.edges.push(Edges::start(&name, part, &line, self.say_up.clone(), beside)?);
            }
        }
        self.names.extend(names);
        let within = START + Duration::from_millis(20) * u32::try_from(count)?;
        until("all edges are connected", within, async || {
            self.edges.iter_mut().try_for_each(Edges::check)?;
            Ok(self.connected() == self.names.len())
        })
        .await?;
        Ok(())
    }

    /// The ring, once all shards are in it.
    async fn whole_ring(&self) -> anyhow::Result<Ring> {
        let (mut ring, members) = (Ring::default(), self.shards.len());
        until("all shards are in the ring", START, async || {
            ring = Ring::new(self.api()?.get("/v1/ring").await?);
            Ok(ring.len() == members)
        })
        .await?;
        Ok(ring)
    }

    /// How many edges say that they are connected.
    pub(crate) fn connected(&self) -> usize {
        self.edges.iter().map(Edges::connected).sum()
    }

    /// How many edges are not at their owner, as control says; `None` while the ring has not so many members.
    pub(crate) async fn misplaced(&self, members: usize) -> anyhow::Result<Option<usize>> {
        let spec: RingSpec = self.api()?.get("/v1/ring").await?;
        if spec.members.len() != members {
            return Ok(None);
        }
        let ring = Ring::new(spec);
        let edges: Vec<EdgeView> = self.api()?.get("/v1/edges").await?;
        let at_home = |edge: &&EdgeView| {
            let there = edge.presence.as_ref().map(|p| &p.shard);
            there.is_some() && there == ring.owner(&edge.name).map(|owner| &owner.shard)
        };
        Ok(Some(self.names.len().saturating_sub(edges.iter().filter(at_home).count())))
    }

    /// Waits until every edge is at its owner, as control says, in a ring of so many members. Returns how long that
    /// took. An edge may still have an old tunnel for streams that have not ended.
    pub(crate) async fn settled(&self, members: usize, deadline: Duration) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let mut last = None;
        let done = until("every edge is at its owner", deadline, async || {
            sleep(ASK).await;
            // Shards are cheap to ask, and tell when control is worth asking.
            if self.may_be_settled(members).await {
                last = self.misplaced(members).await?;
            }
            Ok(last == Some(0))
        })
        .await;
        done.with_context(|| match last {
            Some(misplaced) => format!("{misplaced} of {} edges are elsewhere", self.names.len()),
            None => format!("the ring has not {members} members"),
        })?;
        Ok(begun.elapsed())
    }

    /// Whether all shards go by a ring of so many members, and none has an edge that is yet to be sent away.
    async fn may_be_settled(&self, members: usize) -> bool {
        for shard in &self.shards {
            let Ok(figures) = shard.figures().await else { return false };
            let followed = figures.count("mesh_shard_ring_members") == Some(members as u64);
            if !followed || figures.count("mesh_shard_moves_pending").is_some_and(|pending| pending > 0) {
                return false;
            }
        }
        true
    }

    /// Waits until every edge has one tunnel, and returns how many there are for each in the end.
    pub(crate) async fn tunnels_per_edge(&self, deadline: Duration) -> anyhow::Result<f64> {
        let wanted = self.names.len() as u64;
        // How many there are is what is asked for, whether it came to pass or not.
        let _ = until("every edge has one tunnel", deadline, async || Ok(self.tunnels(false).await? == wanted)).await;
        #[allow(clippy::cast_precision_loss, reason = "some thousands")]
        let each = self.tunnels(false).await? as f64 / wanted.max(1) as f64;
        Ok(each)
    }

    /// Tunnels of all shards that run; shards that cannot be asked count as none if that may be.
    pub(crate) async fn tunnels(&self, lenient: bool) -> anyhow::Result<u64> {
        let mut sum = 0;
        for shard in &self.shards {
            match shard.figures().await {
                Ok(figures) => sum += figures.count("mesh_shard_tunnels").unwrap_or_default(),
                Err(_) if lenient => {}
                Err(e) => return Err(e),
            }
        }
        Ok(sum)
    }

    /// Says how far the run is, on standard error.
    pub(crate) fn note(&self, what: impl std::fmt::Display) {
        eprintln!("{:6.1} s  {what}", self.begun.elapsed().as_secs_f64());
    }

    /// Processor time of each kind of process so far, in seconds.
    pub(crate) fn cpu(&self) -> Cpu {
        Cpu {
            at: Instant::now(),
            control: self.controls.iter().filter_map(Control::cpu_seconds).sum(),
            shards: self.shards.iter().filter_map(Shard::cpu_seconds).sum(),
            edges: self.edges.iter().filter_map(Edges::cpu_seconds).sum(),
            load: process::cpu_seconds(std::process::id()).unwrap_or_default(),
        }
    }

    async fn end(&mut self) {
        self.ways.close();
        for edges in &self.edges {
            // All of them at once; who has ended already is waited for below.
            let _ = edges.signal(Signal::TERM);
        }
        for edges in &mut self.edges {
            edges.end().await;
        }
        for shard in &mut self.shards {
            // Nobody is left whose streams could be lost.
            let _ = shard.kill().await;
        }
        for control in &mut self.controls {
            control.end().await;
        }
        if let Some(postgres) = &mut self.postgres {
            postgres.end().await;
        }
        self.tasks.drained(Duration::from_secs(1)).await;
    }
}

/// Processor time, to see what a run was short of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpu {
    at: Instant,
    control: f64,
    shards: f64,
    edges: f64,
    load: f64,
}

impl Cpu {
    /// What was used since then, in percent of one processor.
    pub(crate) fn since(&self, then: &Self) -> String {
        let over = self.at.duration_since(then.at).as_secs_f64().max(1e-3);
        let percent = |now: f64, then: f64| (now - then) / over * 100.0;
        format!(
            "control {:.0} %, shards {:.0} %, edges {:.0} %, load {:.0} %",
            percent(self.control, then.control),
            percent(self.shards, then.shards),
            percent(self.edges, then.edges),
            percent(self.load, then.load)
        )
    }
}

/// Waits until something has come to pass. An error of the look is one of the wait.
pub(crate) async fn until(
    what: &str,
    deadline: Duration,
    mut look: impl AsyncFnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    while !look().await? {
        if begun.elapsed() > deadline {
            bail!("waited {} s in vain until {what}", deadline.as_secs());
        }
        sleep(LOOK).await;
    }
    Ok(())
}
