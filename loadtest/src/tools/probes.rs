//! Many streams through the mesh at once, as one user: each sends a few bytes every now and then to the echo of an
//! edge, and measures from the moment when they were due, so that a mesh that holds a sender back is not flattered.

use std::{collections::VecDeque, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use loadtest::probe::{self, StreamEnd, pattern};
use proto::{ALPN_MESH, code::CloseCode, id::EdgeId, identity::Role};
use runtime::{
    identity::IdentityDir,
    link::{
        Link, Stream,
        quic::{self, Dialer, LinkLimits},
    },
    shutdown::Tasks,
    tls::{self, LiveIdentity, MeshVerifier},
};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::figures::Times;
use crate::say;

/// Streams that share a link: fewer than a shard allows.
const PER_LINK: usize = 1000;
/// Streams that are being opened at once.
const OPENING: usize = 64;
/// How long opening may take, and how long an answer may be outstanding at the end.
const PATIENCE: Duration = Duration::from_secs(15);
/// Bytes that a stream sends whose reader has stopped: more than any window.
const STALL: u64 = 16 * 1024 * 1024;

/// Which streams, and how many.
#[derive(Debug, Args)]
pub(crate) struct ProbesArgs {
    /// The folder of a login, as 'meshctl login' leaves it
    #[arg(long, env = "CAUSEWAY_HOME", value_name = "FOLDER")]
    home: PathBuf,
    /// The shard to go through
    #[arg(long, value_name = "HOST:PORT")]
    shard: String,
    /// The edge; give several to take turns
    #[arg(long = "edge", required = true, value_name = "NAME")]
    edges: Vec<EdgeId>,
    /// How many streams
    #[arg(long, default_value_t = 1000)]
    count: usize,
    /// How many streams beside them whose reader stops
    #[arg(long, default_value_t = 0)]
    stall: usize,
    /// Bytes that a stream sends at a time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65536))]
    size: u64,
    /// Milliseconds between two times
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..))]
    interval_ms: u64,
    /// For how many seconds
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Prints one JSON object instead of words
    #[arg(long)]
    json: bool,
}

/// What came of one stream.
#[derive(Default)]
struct Outcome {
    opened: Option<Duration>,
    echoes: Times,
    end: Option<StreamEnd>,
}

/// What all streams share.
struct Plan {
    size: u64,
    interval: Duration,
    until: Instant,
    opening: Semaphore,
}

/// Opens the streams, keeps them busy, prints what it measured.
pub(crate) async fn run(args: ProbesArgs) -> anyhow::Result<()> {
    let dialer = dialer(&args)?;
    let address = resolve(&args.shard).await?;
    let tasks = Tasks::new();
    let plan = Arc::new(Plan {
        size: args.size,
        interval: Duration::from_millis(args.interval_ms),
        until: Instant::now() + Duration::from_secs_f64(args.seconds),
        opening: Semaphore::new(OPENING),
    });
    let (mut links, mut streams) = (Vec::new(), Vec::with_capacity(args.count));
    for number in 0..args.stall + args.count {
        if number % PER_LINK == 0 {
            links.push(dialer.dial(address, "shard").await.with_context(|| format!("shard {}", args.shard))?);
        }
        let link = links[number / PER_LINK].clone();
        let edge = args.edges[number % args.edges.len()].clone();
        let plan = Arc::clone(&plan);
        if number < args.stall {
            tasks.spawn(async move { stall(&link, &edge, &plan).await });
        } else {
            streams.push(tasks.spawn(async move { keep_busy(&link, &edge, number as u64, &plan).await }));
        }
    }
    let mut outcomes = Vec::with_capacity(streams.len());
    for stream in streams {
        outcomes.push(stream.await?);
    }
    report(&args, outcomes)?;
    for link in links {
        link.close(CloseCode::Done, "");
    }
    // The last words; what does not come through is noticed there by silence.
    let _ = timeout(Duration::from_millis(200), tasks.finished(PATIENCE)).await;
    Ok(())
}

fn dialer(args: &ProbesArgs) -> anyhow::Result<Dialer> {
    let dir = IdentityDir::open(&args.home)?;
    let Some((credentials, bundle)) = dir.load()? else {
        bail!("nobody is logged in there: {} holds no identity; use 'meshctl login'", args.home.display());
    };
    let identity = LiveIdentity::new(&credentials)?;
    let verifier = Arc::new(MeshVerifier::of_servers(bundle, Role::Shard));
    let tls = tls::client_config(Some(&identity), verifier, &[ALPN_MESH])?;
    let limits = LinkLimits { keep_alive: Some(Duration::from_secs(4)), ..LinkLimits::default() };
    Ok(Dialer::new(quic::client_config(tls, &limits)?, &limits))
}

async fn resolve(shard: &str) -> anyhow::Result<SocketAddr> {
    let mut found = tokio::net::lookup_host(shard).await.with_context(|| format!("--shard {shard}"))?;
    found.next().with_context(|| format!("--shard {shard} has no address"))
}

async fn open(link: &Link, edge: &EdgeId, plan: &Plan) -> Result<(Stream, Duration), StreamEnd> {
    // Never closed while somebody waits.
    let _permit = plan.opening.acquire().await;
    let begun = Instant::now();
    match timeout(PATIENCE, probe::open(link, edge)).await {
        Ok(stream) => Ok((stream?, begun.elapsed())),
        Err(_) => Err(StreamEnd::Broken(format!("no answer within {} s", PATIENCE.as_secs()))),
    }
}

/// Sends until nothing more fits, and reads nothing.
async fn stall(link: &Link, edge: &EdgeId, plan: &Plan) {
    let Ok((mut stream, _)) = open(link, edge, plan).await else { return };
    let fill = async {
        let mut sent = 0;
        while sent < STALL && stream.send.write_one(Bytes::from_static(&[0; 16 * 1024])).await.is_ok() {
            sent += 16 * 1024;
        }
        sleep_until(plan.until + PATIENCE).await;
    };
    let _ = tokio::time::timeout_at(plan.until, fill).await;
}

async fn keep_busy(link: &Link, edge: &EdgeId, number: u64, plan: &Plan) -> Outcome {
    let mut outcome = Outcome::default();
    match open(link, edge, plan).await {
        Ok((mut stream, took)) => {
            outcome.opened = Some(took);
            outcome.end = tick(&mut stream, number, plan, &mut outcome.echoes).await.err();
        }
        Err(end) => outcome.end = Some(end),
    }
    outcome
}

async fn tick(stream: &mut Stream, number: u64, plan: &Plan, echoes: &mut Times) -> Result<(), StreamEnd> {
    // Spread over one interval, so that not all of them speak at once.
    sleep(plan.interval.mul_f64((number % 101) as f64 / 101.0)).await;
    let (mut due, mut sent, mut seen) = (Instant::now(), 0, 0);
    let mut outstanding: VecDeque<(u64, Instant)> = VecDeque::new();
    while due < plan.until || !outstanding.is_empty() {
        let last = due >= plan.until;
        tokio::select! {
            biased;
            () = sleep_until(due), if !last => {
                sent += plan.size;
                outstanding.push_back((sent, due));
                stream.send.write_one(pattern(number, sent - plan.size, plan.size)).await?;
                due += plan.interval;
            }
            chunk = stream.recv.chunk(64 * 1024) => {
                let Some(chunk) = chunk? else { return Err(StreamEnd::Wrong("a clean end in the middle".into())) };
                if chunk != pattern(number, seen, chunk.len() as u64) {
                    return Err(StreamEnd::Wrong("other bytes came back".into()));
                }
                seen += chunk.len() as u64;
                while let Some((_, when)) = outstanding.pop_front_if(|(end, _)| *end <= seen) {
                    echoes.add(when.elapsed());
                }
            }
            () = sleep_until(plan.until + PATIENCE) => return Err(StreamEnd::Broken("echoes are missing".into())),
        }
    }
    stream.send.finish();
    Ok(())
}

fn report(args: &ProbesArgs, outcomes: Vec<Outcome>) -> anyhow::Result<()> {
    let (mut opens, mut echoes) = (Times::default(), Times::default());
    let (mut refused, mut broken, mut wrong, mut example) = (0, 0, 0, None);
    for outcome in outcomes {
        outcome.opened.into_iter().for_each(|took| opens.add(took));
        echoes.merge(outcome.echoes);
        match &outcome.end {
            None | Some(StreamEnd::Exact) => {}
            Some(StreamEnd::Refused(_)) => refused += 1,
            Some(StreamEnd::Broken(_)) => broken += 1,
            Some(StreamEnd::Wrong(_)) => wrong += 1,
        }
        example = example.or_else(|| outcome.end.map(|end| end.to_string()));
    }
    if args.json {
        let times = |times: &Times| {
            let [p50, p90, p99, max] = [500, 900, 990, 1000].map(|q| times.per_mille_ms(q));
            serde_json::json!({"count": times.len(), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "max_ms": max})
        };
        say(serde_json::json!({
            "streams": args.count, "stalled": args.stall, "opened": opens.len(), "refused": refused, "broken": broken,
            "wrong": wrong, "open": times(&opens), "echo": times(&echoes), "example": example,
        }))?;
    } else {
        say(format_args!("opens {opens}"))?;
        say(format_args!("echoes {echoes}"))?;
        say(format_args!(
            "streams={} stalled={} refused={refused} broken={broken} wrong={wrong}",
            args.count, args.stall
        ))?;
    }
    match (wrong + broken + refused, example) {
        (0, _) => Ok(()),
        (failed, Some(example)) => bail!("{failed} streams failed; one of them: {example}"),
        (failed, None) => bail!("{failed} streams failed"),
    }
}
