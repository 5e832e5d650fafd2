//! What shards say, with time by hand.

use proto::api::ShardState;

use super::*;

fn shard(name: &str) -> ShardId {
    name.parse().unwrap()
}

fn held(edge: &str, by: &str, since: i64) -> api::Presence {
    api::Presence {
        edge: edge.parse().unwrap(),
        shard: shard(by),
        since,
        address: "192.0.2.1:4000".into(),
        version: "1".into(),
        services: vec![],
        rtt_us: 1,
        streams: 0,
        carrier: String::new(),
        standing: None,
        standing_at: None,
    }
}

fn report(full: bool, online: Vec<api::Presence>, offline: &[&str]) -> ShardReport {
    let offline = offline.iter().map(|e| e.parse().unwrap()).collect();
    let (addresses, version, state) = (vec!["a:1".into()], "1".into(), ShardState::Serving);
    ShardReport {
        started: 0,
        number: 0,
        addresses,
        version,
        state,
        weight: 100,
        epoch: 0,
        streams: 0,
        bytes: 0,
        handshakes: 0,
        full,
        online,
        offline,
        partings: vec![],
    }
}

fn where_is(presence: &Presence, edge: &str, now: Instant) -> Option<String> {
    presence.of(&edge.parse().unwrap(), now).0.map(|p| p.shard.to_string())
}

#[test]
fn edges_come_move_and_go() {
    let presence = Presence::default();
    let now = Instant::now();
    presence.report(&shard("s1"), report(true, vec![held("a", "s1", 1), held("b", "s1", 1)], &[]), now, 10).unwrap();
    presence.report(&shard("s2"), report(true, vec![held("a", "s2", 5)], &[]), now, 10).unwrap();
    assert_eq!(where_is(&presence, "a", now).unwrap(), "s2", "the newer tunnel counts while an edge moves");
    assert_eq!(presence.all(now).len(), 2);
    presence.report(&shard("s1"), report(false, vec![], &["b"]), now, 12).unwrap();
    assert_eq!(where_is(&presence, "b", now), None);
    assert_eq!(presence.take_seen(false, now), [("b".parse().unwrap(), 12)]);
    presence.report(&shard("s2"), report(true, vec![], &[]), now, 13).unwrap();
    assert_eq!(where_is(&presence, "a", now).unwrap(), "s1");
}

#[test]
fn a_silent_shard_dies_with_all_that_it_held() {
    let presence = Presence::default();
    let start = Instant::now();
    presence.report(&shard("s1"), report(true, vec![held("a", "s1", 1)], &[]), start, 10).unwrap();
    let later = start + LEASE + Duration::from_millis(1);
    assert_eq!(presence.alive(start + LEASE).len(), 1);
    assert!(presence.alive(later).is_empty());
    assert_eq!(where_is(&presence, "a", later), None);
    presence.expire(later);
    assert_eq!(presence.of(&"a".parse().unwrap(), later).1, Some(10));
    assert!(!presence.shards(later)[0].alive, "still shown to people");
    presence.report(&shard("s1"), report(false, vec![], &[]), later, 20).unwrap();
    assert_eq!(where_is(&presence, "a", later).unwrap(), "s1", "it had only been silent");
    let start = later;
    presence.expire(start + REMEMBERED);
    assert!(presence.shards(later).is_empty(), "forgotten after an hour");
}

#[test]
fn a_shard_speaks_for_itself_only() {
    let presence = Presence::default();
    let now = Instant::now();
    assert!(presence.report(&shard("s1"), report(true, vec![held("a", "s2", 1)], &[]), now, 10).is_err());
    assert!(presence.shards(now).is_empty());
}

#[test]
fn what_another_replica_hears_counts_as_long_as_its_beat_moves() {
    let presence = Presence::default();
    let start = Instant::now();
    let kept = |beat| StoredLease {
        name: shard("s1"),
        addresses: vec!["a:1".into()],
        version: "1".into(),
        edges: 7,
        last_seen: 10,
        beat,
        state: ShardState::Serving,
        weight: 100,
        epoch: 0,
        streams: 0,
        started: 0,
        number: 0,
    };
    presence.adopt(vec![kept(1)], start);
    let at = |secs| start + Duration::from_secs(secs);
    assert_eq!(presence.shards(at(1))[0].edges, 7);
    presence.adopt(vec![kept(1)], at(5));
    assert!(presence.alive(at(7)).is_empty(), "the same beat is no sign of life");
    presence.adopt(vec![kept(2)], at(7));
    assert_eq!(presence.alive(at(13)).len(), 1);
}

#[test]
fn a_shard_without_an_address_is_leaving() {
    let presence = Presence::default();
    let now = Instant::now();
    let leaving = ShardReport { addresses: vec![], ..report(true, vec![], &[]) };
    presence.report(&shard("s1"), leaving, now, 10).unwrap();
    assert!(presence.alive(now).is_empty());
    assert!(presence.shards(now)[0].alive);
}

/// A report with a number, of a process that started then.
fn numbered(started: u64, number: u64, state: ShardState) -> ShardReport {
    ShardReport { started, number, state, ..report(false, vec![], &[]) }
}

fn state_of(presence: &Presence, now: Instant) -> ShardState {
    presence.shards(now)[0].state
}

#[test]
fn an_older_report_that_comes_later_changes_nothing() {
    use ShardState::{Draining, Serving};
    let (presence, now, s1) = (Presence::default(), Instant::now(), shard("s1"));
    let tell = |report| presence.report(&s1, report, now, 10).unwrap();
    assert!(tell(numbered(1000, 7, Serving)).is_some());
    assert!(tell(numbered(1000, 9, Draining)).unwrap().stirs);
    assert_eq!(tell(numbered(1000, 8, Serving)), None, "it was under way for longer");
    assert_eq!(tell(numbered(1000, 9, Serving)), None, "the same number again");
    assert_eq!(state_of(&presence, now), Draining);
    // The next process counts anew, and what is left of the one before does not reach it.
    assert!(tell(numbered(2000, 1, Serving)).unwrap().stirs);
    assert_eq!(tell(numbered(1000, 10, Draining)), None);
    assert_eq!(state_of(&presence, now), Serving);
    let late = ShardReport { online: vec![held("a", "s1", 1)], ..numbered(1000, 11, Serving) };
    assert_eq!(tell(late), None);
    assert_eq!(where_is(&presence, "a", now), None, "nor do its edges");
}

#[test]
fn a_shard_whose_clock_was_set_back_is_heard_when_its_last_process_is_silent() {
    let (presence, start, s1) = (Presence::default(), Instant::now(), shard("s1"));
    presence.report(&s1, numbered(5000, 70, ShardState::Serving), start, 10).unwrap();
    let soon = start + Duration::from_secs(2);
    assert_eq!(presence.report(&s1, numbered(1000, 1, ShardState::Serving), soon, 10).unwrap(), None);
    let later = start + LEASE + Duration::from_millis(1);
    let heard = presence.report(&s1, numbered(1000, 2, ShardState::Serving), later, 10).unwrap().unwrap();
    assert_eq!((heard.silent, heard.stirs, heard.lease.number), (Some(0), true, 2));
    assert!(presence.report(&s1, numbered(1000, 3, ShardState::Serving), later, 10).unwrap().is_some());
}

#[test]
fn what_another_replica_heard_later_counts_and_edges_are_told_here_all_the_same() {
    let (presence, now, s1) = (Presence::default(), Instant::now(), shard("s1"));
    let mine = presence.report(&s1, numbered(1000, 1, ShardState::Serving), now, 10).unwrap().unwrap().lease;
    let theirs = StoredLease { beat: 2, number: 3, state: ShardState::Draining, ..mine.clone() };
    presence.adopt(vec![theirs], now);
    assert_eq!(state_of(&presence, now), ShardState::Draining);
    presence.adopt(vec![StoredLease { beat: 3, ..mine }], now);
    assert_eq!(state_of(&presence, now), ShardState::Draining, "an older word in the row of a database put back");
    let report = ShardReport { online: vec![held("a", "s1", 1)], ..numbered(1000, 2, ShardState::Serving) };
    assert_eq!(presence.report(&s1, report, now, 10).unwrap(), None, "nothing to write down");
    assert_eq!(where_is(&presence, "a", now).unwrap(), "s1");
    assert_eq!(state_of(&presence, now), ShardState::Draining);
}
