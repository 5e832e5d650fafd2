//! One line for each trouble, and the words that name it.

use super::*;

const NOW: i64 = 1_000_000;

fn view(change: impl FnOnce(&mut EdgeView)) -> EdgeView {
    let mut view = EdgeView {
        name: "shop-1".parse().unwrap(),
        site: None,
        enrolled: NOW - 7200,
        not_after: NOW + 3600,
        revoked: false,
        presence: None,
        last_seen: Some(NOW - 240),
        parting: None,
    };
    change(&mut view);
    view
}

fn shards(alive: bool) -> Vec<ShardView> {
    let shard = serde_json::json!({
        "name": "shard-2", "addresses": ["192.0.2.1:7400"], "version": "1", "edges": 1, "last_seen": NOW, "alive": alive
    });
    vec![serde_json::from_value(shard).unwrap()]
}

fn known(view: Option<EdgeView>, tried: Result<Reached, Failure>) -> Known {
    let known = Some((view, shards(true)));
    Known { edge: "shop-1".parse().unwrap(), control: Ok(()), known, tried, now: NOW }
}

fn offline() -> Result<Reached, Failure> {
    Err(Failure::Unreachable("edge/shop-1 is not connected [edge-offline]".into()))
}

fn parting(cause: &str, detail: &str) -> Parting {
    Parting {
        edge: "shop-1".parse().unwrap(),
        shard: "shard-2".parse().unwrap(),
        at: NOW - 240,
        cause: cause.into(),
        detail: detail.into(),
        from: "198.51.100.7:4433".into(),
    }
}

fn presence() -> Presence {
    Presence {
        edge: "shop-1".parse().unwrap(),
        shard: "shard-2".parse().unwrap(),
        since: NOW - 7200,
        address: "198.51.100.7:4433".into(),
        version: "1".into(),
        services: vec![],
        rtt_us: 12_340,
        streams: 0,
        carrier: String::new(),
        standing: None,
        standing_at: None,
    }
}

#[test]
fn every_trouble_has_its_sentence_and_its_remedy() {
    let parted = |cause: &str, detail: &str| {
        let parting = parting(cause, detail);
        known(Some(view(|v| v.parting = Some(parting))), offline())
    };
    let cases = [
        (known(None, offline()), "edge-unknown", 1, "no machine has enrolled", "token create --edge --name shop-1"),
        (known(Some(view(|v| v.revoked = true)), offline()), "revoked", 3, "is revoked", "--replace"),
        (
            parted("bye", "the edge is shutting down"),
            "stopped",
            4,
            "was stopped on the machine 4m ago",
            "systemctl start",
        ),
        (parted("timed-out", "silence"), "silent", 4, "fell silent 4m ago", "network is cut"),
        (parted("expired", "over"), "identity", 3, "turned away 4m ago by shard-2", "mesh-edge join"),
        (parted("overloaded", "the shard is full"), "overloaded", 4, "the shard is full", "add a shard"),
        (parted("transport", "odd"), "link-ended", 4, "transport (odd", "mesh-edge's log"),
        (
            known(Some(view(|v| v.not_after = NOW - 60)), offline()),
            "certificate-ended",
            4,
            "ended 60s ago",
            "mesh-edge join",
        ),
        (
            known(Some(view(|v| v.last_seen = None)), offline()),
            "never-connected",
            4,
            "never reached a shard",
            "192.0.2.1:7400",
        ),
        (known(Some(view(|_| ())), offline()), "lost", 4, "away for 4m", "mesh-edge's log"),
    ];
    for (known, cause, status, sentence, remedy) in cases {
        let verdict = known.judge();
        assert_eq!(verdict.cause, cause, "{verdict:?}");
        assert!(!verdict.reachable && verdict.sentence.contains(sentence), "{verdict:?}");
        assert!(verdict.remedy.as_ref().is_some_and(|r| r.contains(remedy)), "{verdict:?}");
        assert!(matches!(verdict.status(), Err(Failure::Told(told)) if told == status), "{verdict:?}");
    }
}

#[test]
fn an_edge_that_came_back_since_did_not_go_for_the_old_reason() {
    let old = Parting { at: NOW - 7000, ..parting("bye", "the edge is shutting down") };
    let known = known(Some(view(|v| v.parting = Some(old))), offline());
    assert_eq!(known.judge().cause, "lost");
}

#[test]
fn what_works_and_what_only_the_target_refuses() {
    let reached = || Ok(Reached { through: "shard-1".into(), address: None });
    let verdict = known(Some(view(|v| v.presence = Some(presence()))), reached()).judge();
    assert_eq!(verdict.sentence, "edge/shop-1 is there: shard-2 holds its tunnel for 2h, 12.3 ms away.");
    assert!(verdict.reachable && verdict.remedy.is_none() && verdict.status().is_ok());
    let twin = |v: &mut EdgeView| v.parting = Some(parting("duplicate-identity", "the machine at 203.0.113.9:1 is"));
    let verdict = known(Some(view(twin)), reached()).judge();
    assert_eq!((verdict.cause, verdict.reachable), ("duplicate-identity", true));
    assert!(verdict.sentence.contains("203.0.113.9") && verdict.remedy.unwrap().contains("198.51.100.7"));

    let denied = Err(Failure::Refused("no rule allows this [policy-denied]".into()));
    let verdict = known(Some(view(|v| v.presence = Some(presence()))), denied).judge();
    assert_eq!((verdict.cause, verdict.reachable), ("way", false));
    assert!(verdict.sentence.contains("connected to shard-2") && verdict.sentence.contains("policy-denied"));
    assert!(matches!(verdict.status(), Err(Failure::Told(3))));
}

#[test]
fn an_edge_that_is_there_says_what_hampers_it() {
    let reached = || Ok(Reached { through: "shard-1".into(), address: None });
    let with = |carrier: &str, standing: serde_json::Value| {
        let mut at = presence();
        at.carrier = carrier.into();
        at.standing = Some(serde_json::from_value(standing).unwrap());
        known(Some(view(|v| v.presence = Some(at))), reached()).judge()
    };
    let why = "QUIC: timed-out (no handshake within 5 s)";
    let blocked = with("tcp", serde_json::json!({"carrier": "tcp", "why": why, "proxy": "http://p:3128"}));
    assert_eq!((blocked.cause, blocked.reachable), ("udp-blocked", true));
    assert!(
        blocked.sentence.contains("over TCP through http://p:3128") && blocked.sentence.contains(why),
        "{blocked:?}"
    );
    assert!(blocked.status().is_ok() && blocked.remedy.unwrap().contains("UDP"));
    let skewed = with("quic", serde_json::json!({"carrier": "quic", "skew_ms": -180_000}));
    assert_eq!(skewed.cause, "clock");
    assert!(skewed.sentence.contains("3m ahead of"), "{skewed:?}");
    let lossy = with("quic", serde_json::json!({"carrier": "quic", "mtu": 1452, "loss_percent": 5}));
    assert_eq!((lossy.cause, lossy.reachable), ("lossy-path", true));
    assert!(lossy.sentence.contains("lost 5 of 100 packets"), "{lossy:?}");
    let narrow = with("quic", serde_json::json!({"carrier": "quic", "mtu": 1200, "loss_percent": 1}));
    assert_eq!((narrow.cause, narrow.reachable), ("narrow-path", true));
    assert!(narrow.sentence.contains("no packets above 1200 bytes"), "{narrow:?}");
    let fine = with("quic", serde_json::json!({"carrier": "quic", "mtu": 1452, "skew_ms": 300}));
    assert_eq!(fine.cause, "none");
    assert!(fine.facts.contains(&("largest UDP payload", "1452 bytes".into())), "{fine:?}");
}

#[test]
fn without_control_or_shards_that_is_what_is_said() {
    let mut away = known(None, offline());
    (away.control, away.known) = (Err("control at a:1 does not answer".into()), None);
    let verdict = away.judge();
    assert_eq!(verdict.cause, "control-away");
    assert!(verdict.sentence.contains("edge-offline") && verdict.sentence.contains("a:1"), "{verdict:?}");

    let mut alone = known(Some(view(|_| ())), offline());
    alone.known = Some((Some(view(|_| ())), shards(false)));
    assert_eq!(alone.judge().cause, "no-shard");
}
