//! Every case that is in the documentation.

use super::{
    flow::{App, Flow},
    link::{MILLI, Path, SECOND},
    rival::Kind,
    run::Run,
};

fn cubic() -> Flow {
    Flow::rival(Kind::Cubic)
}

fn ours(count: u64) -> Vec<Flow> {
    (0..count).map(Flow::ours).collect()
}

/// All cases with their names.
pub(crate) fn all() -> Vec<(String, Run)> {
    [single(), queues(), policers(), noise(), shared(), changes()].into_iter().flatten().collect()
}

fn usual() -> Path {
    Path::new(100.0, 50, 1.0)
}

fn alone(name: impl Into<String>, path: Path) -> (String, Run) {
    (name.into(), Run::new(path, ours(1), 20))
}

fn single() -> Vec<(String, Run)> {
    let mut all: Vec<_> = [0.0, 0.01, 0.03, 0.05, 0.1]
        .into_iter()
        .map(|loss| alone(format!("{} % loss", loss * 100.0), usual().lossy(loss)))
        .collect();
    for (loss, burst) in [(0.01, 10.0), (0.01, 50.0), (0.03, 20.0), (0.05, 100.0)] {
        let path = Path { burst, ..usual().lossy(loss) };
        all.push(alone(format!("{} % loss in bursts of {burst}", loss * 100.0), path));
    }
    all.push(alone("500 Mbit/s, 10 ms", Path::new(500.0, 10, 1.0)));
    all.push(alone("1000 Mbit/s, 1 ms", Path::new(1000.0, 1, 1.0)));
    all.push(alone("20 Mbit/s, 200 ms, 2 % loss", Path::new(20.0, 200, 1.0).lossy(0.02)));
    let far = Run::new(Path::new(10.0, 600, 1.0).lossy(0.01), ours(1), 60).from(10 * SECOND);
    all.push(("10 Mbit/s, 600 ms, 1 % loss".into(), far));
    all.push(alone("1 Mbit/s, 30 ms, queue 4 BDP", Path::new(1.0, 30, 4.0)));
    all.push(alone("the same with 3 % loss", Path::new(1.0, 30, 4.0).lossy(0.03)));
    all.push(("CUBIC, 0 % loss".into(), Run::new(usual(), vec![cubic()], 20)));
    all.push(("CUBIC, 1 % loss".into(), Run::new(usual().lossy(0.01), vec![cubic()], 20)));
    all
}

fn queues() -> Vec<(String, Run)> {
    let mut all = Vec::new();
    for queue in [0.1, 0.2, 0.5, 2.0, 4.0] {
        let path = Path::new(100.0, 50, queue);
        all.push(alone(format!("queue {queue} BDP"), path));
        if queue < 1.0 {
            all.push(alone(format!("queue {queue} BDP, 1 % loss"), path.lossy(0.01)));
            all.push((format!("queue {queue} BDP, two of ours"), Run::new(path, ours(2), 30)));
        }
    }
    all
}

fn policers() -> Vec<(String, Run)> {
    let path = |mbit: f64, bytes| Path { policer: Some((mbit * 1e6, bytes)), ..usual() };
    let mut all: Vec<_> = [(20.0, 1e5), (20.0, 1e6), (50.0, 1e6), (5.0, 5e5)]
        .into_iter()
        .map(|(mbit, bytes)| alone(format!("policer {mbit} Mbit/s, {} kB", bytes / 1e3), path(mbit, bytes)))
        .collect();
    all.push(("policer 20 Mbit/s, 200 kB, two of ours".into(), Run::new(path(20.0, 2e5), ours(2), 30)));
    all.push(("policer 20 Mbit/s, 100 kB, CUBIC".into(), Run::new(path(20.0, 1e5), vec![cubic()], 20)));
    all
}

fn noise() -> Vec<(String, Run)> {
    vec![
        alone("1 % of packets up to 5 ms late", Path { reorder: (0.01, 5 * MILLI), ..usual() }),
        alone("10 % of packets up to 5 ms late", Path { reorder: (0.1, 5 * MILLI), ..usual() }),
        alone("jitter 5 ms", Path { jitter: 5 * MILLI, ..usual() }),
        alone("jitter 20 ms", Path { jitter: 20 * MILLI, ..usual() }),
        alone("acknowledgements every 5 ms", Path { ack_every: 5 * MILLI, ..usual() }),
        alone("acknowledgements every 20 ms", Path { ack_every: 20 * MILLI, ..usual() }),
        alone("30 % of acknowledgements lost", Path { ack_loss: 0.3, ..usual() }),
    ]
}

fn shared() -> Vec<(String, Run)> {
    let mut all = Vec::new();
    for seed in 1..=3 {
        let flows = || vec![Flow::ours(1), cubic()];
        let late = |flow: Flow| flow.between(5 * SECOND, u64::MAX);
        let mut add = |name: &str, run: Run| all.push((format!("{name} (seed {seed})"), run.seed(seed)));
        add("two of ours", Run::new(usual(), ours(2), 60));
        let joins = vec![Flow::ours(1), late(Flow::ours(2))];
        add("two of ours, one 5 s later", Run::new(usual(), joins, 65).from(5 * SECOND));
        add("two of ours, 1 % loss", Run::new(usual().lossy(0.01), ours(2), 60));
        add("ours, CUBIC", Run::new(usual(), flows(), 60));
        let joins = vec![Flow::ours(1), late(cubic())];
        add("ours, CUBIC 5 s later", Run::new(usual(), joins, 65).from(5 * SECOND));
        let joins = vec![late(Flow::ours(1)), cubic()];
        add("ours 5 s later, CUBIC", Run::new(usual(), joins, 65).from(5 * SECOND));
        add("ours, CUBIC, queue 0.5 BDP", Run::new(Path::new(100.0, 50, 0.5), flows(), 60));
        add("ours, CUBIC, queue 4 BDP", Run::new(Path::new(100.0, 50, 4.0), flows(), 60));
        add("ours, CUBIC, 20 Mbit/s, 30 ms, queue 2 BDP", Run::new(Path::new(20.0, 30, 2.0), flows(), 60));
    }
    all.push(("ours, Reno".into(), Run::new(usual(), vec![Flow::ours(1), Flow::rival(Kind::Reno)], 60)));
    let mut four = ours(4);
    four.extend((0..4).map(|_| cubic()));
    all.push(("four of ours, four CUBIC".into(), Run::new(usual(), four, 60)));
    all.push(("sixteen of ours".into(), Run::new(usual(), ours(16), 60)));
    all.push(("sixteen of ours, 1 % loss".into(), Run::new(usual().lossy(0.01), ours(16), 60)));
    all.push(("sixteen of ours, queue 0.5 BDP".into(), Run::new(Path::new(100.0, 50, 0.5), ours(16), 60)));
    let join = (0..16).map(|i| Flow::ours(i).between(i * SECOND, u64::MAX)).collect();
    all.push(("sixteen of ours, a second apart".into(), Run::new(usual(), join, 60).from(20 * SECOND)));
    all.push(("sixteen CUBIC".into(), Run::new(usual(), (0..16).map(|_| cubic()).collect(), 60)));
    let near = Path::new(100.0, 20, 2.0);
    let far = vec![Flow::ours(1), Flow::ours(2).with_extra(30 * MILLI), Flow::ours(3).with_extra(80 * MILLI)];
    all.push(("three of ours: 20, 50, 100 ms".into(), Run::new(near, far, 60)));
    let trickle = vec![Flow::ours(1).with_app(App::Trickle(5e6)), Flow::ours(2)];
    all.push(("5 Mbit/s of an application, and bulk".into(), Run::new(usual(), trickle, 20)));
    all
}

fn changes() -> Vec<(String, Run)> {
    let change = |name: &str, from: Path, to: Path, back: Option<Path>| {
        let run = Run::new(from, ours(1), 30).change(10 * SECOND, to);
        (name.to_owned(), back.into_iter().fold(run, |run, path| run.change(20 * SECOND, path)))
    };
    let slow = |mbit: f64| Path { rate: mbit * 1e6, ..usual() };
    let length = |ms: u64| Path { rtt: ms * MILLI, ..usual() };
    let lossy = usual().lossy(0.01);
    let cut = Run::new(usual(), ours(1), 20).change(8 * SECOND, usual().lossy(1.0)).change(11 * SECOND, usual());
    vec![
        change("100 to 10 to 100 Mbit/s", usual(), slow(10.0), Some(usual())),
        change("100 to 20 to 100 Mbit/s", usual(), slow(20.0), Some(usual())),
        change("100 to 10 to 100 Mbit/s, 1 % loss", lossy, slow(10.0).lossy(0.01), Some(lossy)),
        change("round trip 50 to 150 ms", length(50), length(150), None),
        change("round trip 150 to 20 ms", length(150), length(20), None),
        ("nothing arrives for 3 s".into(), cut),
    ]
}
