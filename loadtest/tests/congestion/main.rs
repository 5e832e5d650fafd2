//! The congestion controller's model on simulated links: one bottleneck with a rate, a queue, losses and a length, and
//! flows as quinn sends them. Everything follows from seeds. `--nocapture` shows the figures; `matrix` prints all that
//! are in `docs/benchmarks/congestion.md`.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test stops where something is wrong, and these ones are there to print figures"
)]

mod flow;
mod link;
mod matrix;
mod rival;
mod run;

use flow::{App, Flow};
use link::{MILLI, Path, SECOND};
use rival::Kind;
use run::{Report, Run};

/// 100 Mbit/s, 50 ms, and a queue of one bandwidth-delay product.
fn usual() -> Path {
    Path::new(100.0, 50, 1.0)
}

fn go(name: &str, run: Run) -> Report {
    let report = run.go();
    println!("{}", report.line(name));
    report
}

fn one(name: &str, path: Path) -> Report {
    go(name, Run::new(path, vec![Flow::ours(1)], 20))
}

fn ours(count: u64) -> Vec<Flow> {
    (0..count).map(Flow::ours).collect()
}

#[test]
fn a_clean_link_is_full_and_its_queue_is_short() {
    let report = one("clean", usual());
    assert!(report.used >= 0.95 && report.used_all >= 0.95, "used");
    assert!(report.queue[1] <= 25.0, "the 99th percentile of the queue is half of it at most");
    for path in [Path::new(500.0, 10, 1.0), Path::new(20.0, 200, 1.0), Path::new(1.0, 30, 4.0)] {
        let report = one("another clean link", path);
        assert!(report.used >= 0.95 && report.dropped <= 0.02, "used, and not at the price of others");
    }
}

#[test]
fn losses_by_chance_do_not_make_it_slow() {
    for loss in [0.01, 0.03, 0.05] {
        let report = one("random loss", usual().lossy(loss));
        assert!(report.used >= 0.9 && report.dropped <= 0.02, "at {loss}");
    }
    let cubic = go("cubic for comparison", Run::new(usual().lossy(0.01), vec![Flow::rival(Kind::Cubic)], 20));
    assert!(cubic.used < 0.1, "the simulation is one in which CUBIC does what it does elsewhere");
}

#[test]
fn losses_in_bursts_do_not_make_it_slow() {
    for (loss, burst) in [(0.01, 10.0), (0.01, 50.0), (0.03, 20.0)] {
        let report = one("burst loss", Path { burst, ..usual().lossy(loss) });
        assert!(report.used >= 0.8, "at {loss} in bursts of {burst}");
    }
}

#[test]
fn a_shallow_queue_is_not_flooded() {
    for queue in [0.1, 0.2, 0.5] {
        let report = one("shallow queue", Path::new(100.0, 50, queue));
        assert!(report.used >= 0.9 && report.dropped <= 0.02, "at {queue}");
    }
}

#[test]
fn a_policer_is_believed() {
    for (mbit, bytes) in [(20.0, 1e5), (50.0, 1e6)] {
        let report = one("policer", Path { policer: Some((mbit * 1e6, bytes)), ..usual() });
        assert!(report.used >= 0.9 && report.policed <= 0.1, "at {mbit}");
    }
}

#[test]
fn two_of_ours_share_a_link_evenly() {
    for seed in 1..=3 {
        let report = go("two of ours", Run::new(usual(), ours(2), 60).seed(seed));
        assert!(report.jain() >= 0.95 && report.used >= 0.95);
        let late = vec![Flow::ours(1), Flow::ours(2).between(5 * SECOND, u64::MAX)];
        let report = go("one of them later", Run::new(usual(), late, 65).from(5 * SECOND).seed(seed));
        assert!(report.jain() >= 0.95);
    }
}

#[test]
fn next_to_cubic_both_get_their_share() {
    for seed in 1..=3 {
        let flows = vec![Flow::ours(1), Flow::rival(Kind::Cubic)];
        let report = go("against CUBIC", Run::new(usual(), flows, 60).seed(seed));
        assert!((0.35..=0.6).contains(&report.share(0)), "{}", report.share(0));
    }
}

#[test]
fn many_flows_share_a_link() {
    let report = go("sixteen of ours", Run::new(usual(), ours(16), 60));
    assert!(report.jain() >= 0.9 && report.used >= 0.95 && report.dropped <= 0.02);
}

#[test]
fn a_link_that_changes_is_followed() {
    let slow = Path { rate: 10e6, ..usual() };
    let run = Run::new(usual(), ours(1), 30).change(10 * SECOND, slow).change(20 * SECOND, usual());
    let report = go("100 to 10 Mbit/s and back", run);
    let seconds = &report.seconds[0];
    assert!(seconds[13..19].iter().all(|mbit| (9.0..=11.0).contains(mbit)), "{seconds:?}");
    assert!(seconds[22..].iter().all(|mbit| *mbit >= 90.0), "{seconds:?}");

    for (before, after) in [(50, 150), (150, 20)] {
        let (from, to) = (Path { rtt: before * MILLI, ..usual() }, Path { rtt: after * MILLI, ..usual() });
        let report = go("another way", Run::new(from, ours(1), 30).change(10 * SECOND, to));
        assert!(report.seconds[0][14..].iter().all(|mbit| *mbit >= 85.0), "{:?}", report.seconds[0]);
    }
    let run = Run::new(usual(), ours(1), 20).change(8 * SECOND, usual().lossy(1.0)).change(11 * SECOND, usual());
    let report = go("cut off for three seconds", run);
    assert!(report.seconds[0][15..].iter().all(|mbit| *mbit >= 90.0), "{:?}", report.seconds[0]);
}

#[test]
fn uneven_packets_and_acknowledgements_are_endured() {
    for (name, path, least) in [
        ("overtaking", Path { reorder: (0.01, 5 * MILLI), ..usual() }, 0.9),
        ("jitter", Path { jitter: 5 * MILLI, ..usual() }, 0.9),
        ("acknowledgements in heaps", Path { ack_every: 5 * MILLI, ..usual() }, 0.9),
        ("lost acknowledgements", Path { ack_loss: 0.3, ..usual() }, 0.9),
    ] {
        let report = one(name, path);
        assert!(report.used >= least && report.queue[1] <= 50.0, "{name}");
    }
}

#[test]
fn who_has_little_to_send_does_not_forget_the_bandwidth_nor_grow_without_bound() {
    let trickle = Flow::ours(1).with_app(App::Trickle(5e6));
    let report = go("a trickle", Run::new(usual(), vec![trickle], 20));
    assert!((4.9..=5.2).contains(&report.mbit[0]) && report.queue[1] <= 5.0);
    let trickle = Flow::ours(1).with_app(App::Trickle(5e6));
    let report = go("a trickle next to bulk", Run::new(usual(), vec![trickle, Flow::ours(2)], 20));
    assert!((4.9..=5.2).contains(&report.mbit[0]) && report.used >= 0.95);
}

#[test]
fn the_same_seed_is_the_same_story() {
    let story = || Run::new(usual().lossy(0.02), ours(3), 5).seed(7).go().line("");
    assert_eq!(story(), story());
}

/// A part of the matrix; with `CONGESTION=all` in the environment all of it, which takes a minute.
#[test]
fn matrix() {
    let every = if std::env::var_os("CONGESTION").is_some() { 1 } else { 20 };
    for (name, run) in matrix::all().into_iter().step_by(every) {
        let report = run.go();
        println!("{}", report.row(&name));
        assert!(report.mbit.iter().all(|mbit| *mbit > 0.0), "{name}: a flow starved");
    }
}
