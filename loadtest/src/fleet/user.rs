//! People of the mesh: enrolled at control, with one link to each shard, and a stream opener that goes on with another
//! shard when one drains or is lost, as `meshctl` does.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use loadtest::probe::{self, StreamEnd, pattern};
use parking_lot::Mutex;
use proto::{
    ALPN_MESH,
    api::{EnrolRequest, Enrolled},
    code::{CloseCode, Retry},
    id::EdgeId,
    identity::Role,
    join::JoinLine,
};
use runtime::{
    api::ApiClient,
    identity::{Credentials, NodeKey, certificates},
    link::{
        Link, Stream,
        quic::{self, Dialer, LinkLimits},
    },
    shutdown::Tasks,
    tls::{self, LiveIdentity, MeshVerifier, TrustBundle},
};
use tokio::time::{Instant, sleep, timeout_at};

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Pause between two tries to reach a shard again.
const AGAIN: Duration = Duration::from_millis(250);
/// A request without an answer after this long hangs; the mesh answers within ten seconds by its own deadlines.
pub(crate) const HUNG: Duration = Duration::from_secs(11);
/// Bytes of a request.
const REQUEST: u64 = 64;

/// Who can ask control and open streams.
#[derive(Debug)]
pub(crate) struct User {
    /// Control's API, as this user.
    pub(crate) api: ApiClient,
    dialer: Dialer,
}

impl User {
    /// Enrols with a join line; the identity is in memory only. After this long a silence a shard is taken for lost,
    /// and with it the requests that go through it.
    pub(crate) async fn enrol(line: &JoinLine, silence: Duration) -> anyhow::Result<Self> {
        let key = NodeKey::generate()?;
        let request = EnrolRequest { token: line.token.clone(), name: None, csr: key.csr_pem(&[])? };
        let enrolled: Enrolled = ApiClient::enrol(line, &request).await?;
        let credentials = Credentials::new(key, certificates(&enrolled.chain)?)?;
        let bundle = TrustBundle::from_pem(&enrolled.bundle)?;
        let identity = LiveIdentity::new(&credentials)?;
        let api = ApiClient::new(line.control.clone(), &identity, bundle.clone())?;
        let limits = LinkLimits {
            idle: silence,
            keep_alive: Some(silence / 3),
            handshake: HANDSHAKE,
            streams: 0,
            ..LinkLimits::default()
        };
        let verifier = Arc::new(MeshVerifier::of_servers(bundle, Role::Shard));
        let tls = tls::client_config(Some(&identity), verifier, &[ALPN_MESH])?;
        Ok(Self { api, dialer: Dialer::new(quic::client_config(tls, &limits)?, &limits) })
    }
}

/// A user's way to one shard.
#[derive(Debug)]
struct Way {
    dialer: Dialer,
    shard: String,
    address: SocketAddr,
    link: Mutex<Option<Link>>,
    dialling: AtomicBool,
    /// It said that it drains, so it is asked last until then.
    last_until: Mutex<Option<Instant>>,
}

impl Way {
    fn live(&self) -> Option<Link> {
        self.link.lock().clone().filter(|link| link.end().is_none())
    }

    fn is_last(&self) -> bool {
        self.last_until.lock().is_some_and(|until| Instant::now() < until)
    }

    /// Tries until there is a link.
    async fn dial(&self) {
        loop {
            match self.dialer.dial(self.address, &self.shard).await {
                Ok(link) => {
                    *self.link.lock() = Some(link);
                    return;
                }
                Err(end) => tracing::debug!(shard = self.shard, %end, "not reached"),
            }
            sleep(AGAIN).await;
        }
    }
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With the right bytes and the clean end.
    Served,
    /// With neither an answer nor a refusal in time.
    Hung,
    /// Otherwise.
    Failed(StreamEnd),
}

/// What to do with a link.
#[derive(Clone, Copy, Debug)]
enum Work {
    Open,
    Exchange,
}

impl Work {
    async fn with(self, link: &Link, edge: &EdgeId) -> Result<Option<Stream>, StreamEnd> {
        match self {
            Self::Open => probe::open(link, edge).await.map(Some),
            Self::Exchange => exchange(link, edge).await.map(|()| None),
        }
    }
}

/// The links of all users to all shards. Links that were lost are dialled anew beside what goes on.
#[derive(Clone, Debug)]
pub(crate) struct Ways {
    users: Arc<Vec<User>>,
    /// By shard, then by user.
    all: Arc<Mutex<Vec<Vec<Arc<Way>>>>>,
    tasks: Tasks,
}

impl Ways {
    /// No way yet.
    pub(crate) fn new(users: Vec<User>, tasks: Tasks) -> Self {
        Self { users: Arc::new(users), all: Arc::default(), tasks }
    }

    /// Adds a shard, and waits for the links to it. Returns its number.
    pub(crate) async fn add(&self, shard: &str, address: SocketAddr) -> usize {
        let way = |user: &User| {
            Arc::new(Way {
                dialer: user.dialer.clone(),
                shard: shard.to_owned(),
                address,
                link: Mutex::default(),
                dialling: AtomicBool::new(false),
                last_until: Mutex::default(),
            })
        };
        let ways: Vec<_> = self.users.iter().map(way).collect();
        for way in &ways {
            way.dial().await;
        }
        let mut all = self.all.lock();
        all.push(ways);
        all.len() - 1
    }

    /// How many shards there are.
    fn shards(&self) -> usize {
        self.all.lock().len()
    }

    /// A link of some user to a shard, if there is one now; if not, it is being dialled.
    fn link(&self, shard: usize, user: usize) -> Option<(Arc<Way>, Link)> {
        let way = Arc::clone(self.all.lock().get(shard)?.get(user)?);
        if let Some(link) = way.live() {
            return Some((way, link));
        }
        if !way.dialling.swap(true, Ordering::Relaxed) {
            self.tasks.spawn(self.tasks.token().run_until_cancelled_owned(async move {
                way.dial().await;
                way.dialling.store(false, Ordering::Relaxed);
            }));
        }
        None
    }

    /// Opens a stream to the echo of an edge, through that shard if one is named, and else through any, and another one
    /// if that drains or is lost. Also says whose link it is in.
    pub(crate) async fn open(
        &self,
        edge: &EdgeId,
        through: Option<&[usize]>,
        deadline: Instant,
    ) -> Result<(Stream, Link), Outcome> {
        match self.over_some(edge, Work::Open, through, deadline).await? {
            (Some(stream), link) => Ok((stream, link)),
            (None, _) => Err(Outcome::Failed(StreamEnd::Wrong("there is no stream".into()))),
        }
    }

    /// Opens a stream, has it echo a few bytes, and ends it.
    pub(crate) async fn request(&self, edge: &EdgeId, through: Option<&[usize]>) -> Outcome {
        match self.over_some(edge, Work::Exchange, through, Instant::now() + HUNG).await {
            Ok(_) => Outcome::Served,
            Err(outcome) => outcome,
        }
    }

    async fn over_some(
        &self,
        edge: &EdgeId,
        work: Work,
        through: Option<&[usize]>,
        deadline: Instant,
    ) -> Result<(Option<Stream>, Link), Outcome> {
        let shards = through.map_or_else(|| (0..self.shards()).collect::<Vec<_>>(), <[usize]>::to_vec);
        let user = rand::random_range(0..self.users.len().max(1));
        let from = rand::random_range(0..shards.len().max(1));
        let mut draining = None;
        while Instant::now() < deadline {
            let in_turn = (0..shards.len()).map(|i| shards[(from + i) % shards.len()]);
            let (mut links, later): (Vec<_>, Vec<_>) =
                in_turn.filter_map(|shard| self.link(shard, user)).partition(|(way, _)| !way.is_last());
            links.extend(later);
            for (way, link) in links {
                match timeout_at(deadline, work.with(&link, edge)).await {
                    Ok(Ok(done)) => return Ok((done, link)),
                    Ok(Err(end)) if link.end().is_some() => tracing::debug!(%end, "another shard"),
                    Ok(Err(StreamEnd::Refused(code))) if code.retry() == Retry::Now => {
                        *way.last_until.lock() = Some(Instant::now() + AGAIN);
                        draining = Some(StreamEnd::Refused(code));
                    }
                    Ok(Err(end)) => return Err(Outcome::Failed(end)),
                    Err(_) => return Err(Outcome::Hung),
                }
            }
            sleep(Duration::from_millis(20)).await;
        }
        // Somebody answered all the time.
        Err(draining.map_or(Outcome::Hung, Outcome::Failed))
    }

    /// Closes all links.
    pub(crate) fn close(&self) {
        for way in self.all.lock().iter().flatten() {
            if let Some(link) = way.live() {
                link.close(CloseCode::Done, "");
            }
        }
    }
}

async fn exchange(link: &Link, edge: &EdgeId) -> Result<(), StreamEnd> {
    let seed = rand::random();
    let mut stream = probe::open(link, edge).await?;
    stream.send.write_one(pattern(seed, 0, REQUEST)).await?;
    stream.send.finish();
    let mut back = Vec::new();
    while let Some(chunk) = stream.recv.chunk(1024).await? {
        back.extend_from_slice(&chunk);
    }
    if back == pattern(seed, 0, REQUEST) {
        return Ok(());
    }
    Err(StreamEnd::Wrong("other bytes came back".into()))
}
