//! Runs a story in a simulated mesh: one thread, paused time, no I/O, a watchdog, and the seed on failure.

use std::{
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use loadtest::{
    cluster::{Cluster, Layout},
    simnet::Log,
};
use runtime::telemetry::{self, LogConfig};

/// How long a story may take in its own time.
const SIMULATED: Duration = Duration::from_secs(3 * 3600);
/// How long it may take in ours: a task that wakes itself stands time still. Generous, since the machine may have others
/// to serve.
const REAL: Duration = Duration::from_secs(600);

/// The seeds to go through: `SEED` from the environment, 1 to `SEEDS` from there, or these.
pub(crate) fn seeds(usual: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("seeds are numbers"));
    match (number("SEED"), number("SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, Some(last)) => (1..=last).collect(),
        (None, None) => usual.into_iter().collect(),
    }
}

/// Tells the seed of a story that fails or hangs.
struct Watch {
    title: String,
    _over: mpsc::Sender<()>,
}

impl Watch {
    fn over(title: String) -> Self {
        let (sender, receiver) = mpsc::channel();
        let name = title.clone();
        thread::spawn(move || {
            if receiver.recv_timeout(REAL) == Err(mpsc::RecvTimeoutError::Timeout) {
                // Not by a macro, whose output the test's harness keeps for when the test has ended.
                let _ = writeln!(std::io::stderr(), "{name}: no end within {} real seconds", REAL.as_secs());
                std::process::exit(101);
            }
        });
        Self { title, _over: sender }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("failed: {}", self.title);
        }
    }
}

/// Plays a story with a seed. Returns the log of the network.
///
/// # Panics
/// If the story fails, or leaves something behind.
pub(crate) fn play(
    name: &str,
    seed: u64,
    layout: Layout,
    story: impl AsyncFnOnce(&mut Cluster) -> anyhow::Result<()>,
) -> Log {
    if let Ok(level) = std::env::var("SIM_LOG") {
        // Installed once; a second story finds it there.
        let _ = std::panic::catch_unwind(|| telemetry::init(&LogConfig { level, ..LogConfig::default() }));
    }
    let title = format!("{name}; replay with SEED={seed} cargo test -p loadtest {name}");
    let watch = Watch::over(title.clone());
    let threads = Arc::new(AtomicUsize::new(0));
    let started = Arc::clone(&threads);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .on_thread_start(move || {
            started.fetch_add(1, Ordering::Relaxed);
        })
        .build()
        .expect("a runtime can be made");
    let outcome = runtime.block_on(async {
        let whole = async {
            let mut cluster = Cluster::new(seed, layout)?;
            if let Err(e) = story(&mut cluster).await {
                return Err(e.context(cluster.picture()));
            }
            cluster.finish().await
        };
        tokio::time::timeout(SIMULATED, whole).await
    });
    let log = match outcome {
        Ok(Ok(log)) => log,
        Ok(Err(e)) => panic!("{title}\n{e:#}"),
        Err(_) => panic!("{title}\nno end within {} simulated seconds", SIMULATED.as_secs()),
    };
    assert_eq!(threads.load(Ordering::Relaxed), 0, "{title}\nsomething blocks, on a thread of its own");
    drop(watch);
    log
}
