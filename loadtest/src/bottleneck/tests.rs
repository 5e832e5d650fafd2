use super::*;

const SIZE: u64 = 1500;

/// Sends so many packets, one each `every` nanoseconds. Returns when each arrived, in the order of arrival.
fn through(lane: &mut Lane<u64>, count: u64, every: u64) -> Vec<(u64, u64)> {
    let mut arrived = Vec::new();
    for number in 0..count {
        let at = number * every;
        drain(lane, at, &mut arrived);
        lane.put(at, SIZE, number);
    }
    drain(lane, u64::MAX, &mut arrived);
    arrived
}

/// Takes out what comes until a time, each packet when it is due.
fn drain(lane: &mut Lane<u64>, until: u64, arrived: &mut Vec<(u64, u64)>) {
    while let Some(next) = lane.next().filter(|next| *next <= until) {
        while let Some(number) = lane.take(next) {
            arrived.push((next, number));
        }
    }
}

fn lane(conditions: Conditions) -> Lane<u64> {
    Lane::new(conditions, 7)
}

fn share_lost(lane: &Lane<u64>) -> f64 {
    let (counts, _) = lane.seen();
    counts.lost as f64 / counts.offered as f64
}

#[test]
fn a_wire_delays_and_loses_nothing() {
    let mut lane = lane(Conditions { delay: 50 * MILLI, ..Conditions::default() });
    let arrived = through(&mut lane, 1000, MILLI);
    assert_eq!(arrived.len(), 1000);
    assert!(arrived.iter().all(|(at, number)| at - number * MILLI == 50 * MILLI));
}

#[test]
fn a_rate_spaces_packets_however_late_they_are_asked_for() {
    let mut lane = lane(Conditions { rate: 12e6, queue: 1_500_000, ..Conditions::default() });
    (0..1000).for_each(|number| lane.put(0, SIZE, number));
    // A packet each millisecond; nobody looks for half a second.
    let mut early = 0;
    while lane.take(500 * MILLI).is_some() {
        early += 1;
    }
    assert_eq!(early, 500);
    assert_eq!(lane.next(), Some(501 * MILLI));
}

#[test]
fn a_full_queue_drops_and_its_delay_is_known() {
    // Ten packets, 10 ms.
    let mut lane = lane(Conditions { rate: 12e6, queue: 15_000, ..Conditions::default() });
    let arrived = through(&mut lane, 2000, MILLI / 2);
    let (counts, delays) = lane.seen();
    assert_eq!((counts.offered, counts.sent), (2000, arrived.len() as u64));
    assert!((980..=1010).contains(&counts.dropped), "{counts:?}");
    assert!((9.0..=11.5).contains(&delays.share_ms(0.5)), "{}", delays.share_ms(0.5));
}

#[test]
fn losses_have_their_share_and_their_length() {
    let mut chance = lane(Conditions { loss: 0.05, ..Conditions::default() });
    through(&mut chance, 100_000, MILLI);
    assert!((0.045..0.055).contains(&share_lost(&chance)));

    for rate in [f64::INFINITY, 12e6] {
        let mut bursts = lane(Conditions { loss: 0.05, burst: 10.0, rate, ..Conditions::default() });
        let arrived = through(&mut bursts, 200_000, MILLI);
        assert!((0.04..0.06).contains(&share_lost(&bursts)), "{}", share_lost(&bursts));
        let gaps = arrived.windows(2).filter(|two| two[1].1 - two[0].1 > 1).count();
        let mean = bursts.seen().0.lost as f64 / gaps as f64;
        assert!((8.0..12.0).contains(&mean), "bursts of {mean} on average");
    }
    let mut dead = lane(Conditions { loss: 1.0, burst: 10.0, ..Conditions::default() });
    assert_eq!(through(&mut dead, 100, MILLI), []);
}

#[test]
fn jitter_keeps_the_order_and_reordering_does_not() {
    let noisy = Conditions { delay: 10 * MILLI, jitter: 20 * MILLI, ..Conditions::default() };
    let arrived = through(&mut lane(noisy), 1000, MILLI);
    assert!(arrived.is_sorted_by_key(|(_, number)| *number));

    let arrived = through(&mut lane(Conditions { reorder: (0.1, 20 * MILLI), ..noisy }), 1000, MILLI);
    let late = arrived.windows(2).filter(|two| two[1].1 < two[0].1).count();
    assert!((20..=200).contains(&late), "{late} of 1000");
    assert_eq!(arrived.len(), 1000);
}

#[test]
fn a_policer_lets_its_rate_and_its_burst_through() {
    // 2000 packets in two seconds, 12 Mbit/s; a quarter of that, and 100 packets at once.
    let mut lane = lane(Conditions { policer: Some((3e6, 150_000.0)), ..Conditions::default() });
    let arrived = through(&mut lane, 2000, MILLI);
    assert!((590..=610).contains(&arrived.len()), "{}", arrived.len());
    assert_eq!(lane.seen().0.policed, 2000 - arrived.len() as u64);
}

#[test]
fn larger_packets_than_the_path_takes_vanish() {
    let mut lane = lane(Conditions { mtu: 1280, ..Conditions::default() });
    assert_eq!(through(&mut lane, 10, MILLI), []);
    assert_eq!(lane.seen().0.too_big, 10);
    lane.change(Conditions::default());
    lane.forget();
    assert_eq!(through(&mut lane, 10, MILLI).len(), 10);
    assert_eq!(lane.seen().0.sent_bytes, 10 * SIZE);
}

#[test]
fn a_change_takes_hold_in_the_middle() {
    let slow = Conditions { rate: 12e6, queue: 1_500_000, ..Conditions::default() };
    let mut lane = lane(slow);
    (0..200).for_each(|number| lane.put(0, SIZE, number));
    let mut arrived = Vec::new();
    drain(&mut lane, 100 * MILLI, &mut arrived);
    assert_eq!(arrived.len(), 100);
    lane.change(Conditions { rate: 120e6, ..slow });
    drain(&mut lane, 111 * MILLI, &mut arrived);
    assert!((197..=200).contains(&arrived.len()), "{}", arrived.len());
}

#[test]
fn the_same_seed_is_the_same_fate() {
    let rough = Conditions { loss: 0.1, burst: 3.0, jitter: MILLI, reorder: (0.1, MILLI), ..Conditions::default() };
    assert_eq!(through(&mut lane(rough), 1000, MILLI), through(&mut lane(rough), 1000, MILLI));
}
