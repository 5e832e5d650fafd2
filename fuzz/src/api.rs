//! JSON from the network: bodies of control's API, and policy rules.

use std::{collections::BTreeMap, fmt::Debug};

use proto::{
    api::{
        AccessToken, ApiError, EdgeView, EnrolRequest, Enrolled, Presence, RenewFor, RenewRequest, Revoked, ShardOrder,
        ShardReport, ShardView, TokenCreated, TokenRequest, TokenView, WatchEvent, WhoAmI,
    },
    audit::{AccessBatch, AccessPage},
    id::EdgeId,
    policy::{Decision, Place, Policy, Rule},
    principal::Principal,
    ring::{Ring, RingSpec},
    target::{HostPort, Target},
};
use serde::{Serialize, de::DeserializeOwned};

/// What was accepted prints and parses again alike.
fn comes_back<T: Serialize + DeserializeOwned + Debug>(data: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(data).ok()?;
    let printed = match serde_json::to_string(&value) {
        Ok(printed) => printed,
        Err(error) => panic!("{value:?} does not print: {error}"),
    };
    let again = serde_json::from_str::<T>(&printed).map(|v| serde_json::to_string(&v).ok());
    assert_eq!(again.ok().flatten().as_ref(), Some(&printed), "{value:?}");
    Some(value)
}

/// Bodies of requests and answers of control's API.
pub fn api(data: &[u8]) {
    if let Some(request) = comes_back::<EnrolRequest>(data) {
        assert!(format!("{request:?}").contains("[secret]"), "the token shows");
    }
    comes_back::<RenewRequest>(data);
    comes_back::<RenewFor>(data);
    comes_back::<TokenRequest>(data);
    comes_back::<ShardReport>(data);
    comes_back::<Presence>(data);
    comes_back::<Enrolled>(data);
    comes_back::<WatchEvent>(data);
    comes_back::<TokenCreated>(data);
    comes_back::<TokenView>(data);
    comes_back::<EdgeView>(data);
    comes_back::<ShardView>(data);
    comes_back::<ShardOrder>(data);
    comes_back::<Revoked>(data);
    comes_back::<AccessToken>(data);
    comes_back::<WhoAmI>(data);
    comes_back::<ApiError>(data);
    comes_back::<AccessBatch>(data);
    comes_back::<AccessPage>(data);
}

/// The ring, as it is kept and sent. Whatever it says, each of its shards is asked once, in an order that two processes
/// agree on, and the shares of all make up the whole.
pub fn ring(data: &[u8]) {
    let Some(spec) = comes_back::<RingSpec>(data) else { return };
    // A ring of thousands is built as well as one of a few, only slowly.
    let spec = RingSpec { members: spec.members.into_iter().take(4).collect(), ..spec };
    let ring = Ring::new(spec.clone());
    let again = Ring::new(ring.spec());
    assert_eq!(ring.spec(), again.spec(), "a ring that is sent on becomes another one");
    assert_eq!(ring.epoch(), spec.epoch);
    for name in ["a", "shop-1", "edge-0000"] {
        let Ok(edge) = name.parse::<EdgeId>() else { continue };
        let order: Vec<_> = ring.preference(&edge).map(|m| &m.shard).collect();
        assert_eq!(order, again.preference(&edge).map(|m| &m.shard).collect::<Vec<_>>(), "two processes disagree");
        assert_eq!(order.len(), ring.len(), "a shard is left out, or asked twice: {order:?}");
        assert!(order.iter().all(|shard| ring.member(shard).is_some()));
        assert_eq!(ring.owner(&edge).map(|m| &m.shard), order.first().copied());
    }
    let whole: f64 = ring.shares().values().sum();
    assert!(ring.is_empty() || (whole - 1.0).abs() < 1e-6, "the shares make {whole}");
}

/// A policy, or one rule of it. It decides on any stream without a panic, and a rule more never allows less.
pub fn rule(data: &[u8]) {
    let one = comes_back::<Rule>(data).map(|rule| vec![rule]);
    let Some(rules) = one.or_else(|| comes_back::<Vec<Rule>>(data)) else { return };
    for rule in &rules {
        let _ = rule.check();
    }
    let Some(streams) = streams() else { return };
    for (who, target, place) in &streams {
        let mut allowed = false;
        for end in 0..=rules.len().min(8) {
            let policy = Policy { rules: rules[..end].to_vec() };
            let now = matches!(policy.decide(who, target, &place.as_place()), Decision::Allow { .. });
            assert!(now || !allowed, "a rule more allows less: {who} to {target}");
            allowed = now;
        }
    }
}

/// Owned parts of a [`Place`].
struct At {
    target: Target,
    site: proto::id::SiteName,
    labels: BTreeMap<String, String>,
}

impl At {
    fn as_place(&self) -> Place<'_> {
        let edge = match &self.target {
            Target::Tcp { edge, .. } | Target::Udp { edge, .. } | Target::Probe { edge } => edge,
            Target::Service { edge: Some(edge), .. } => edge,
            Target::Service { edge: None, .. } => panic!("streams() names an edge in every target"),
        };
        let (service, port) = match &self.target {
            Target::Tcp { to, .. } | Target::Udp { to, .. } => (None, Some(to.port)),
            Target::Service { name, .. } => (Some(name), Some(8080)),
            Target::Probe { .. } => (None, None),
        };
        Place { edge, site: Some(&self.site), service, port, labels: Some(&self.labels) }
    }
}

/// One stream of each kind; `None` never, since all names are good.
fn streams() -> Option<Vec<(Principal, Target, At)>> {
    let edge = "shop-1".parse::<EdgeId>().ok()?;
    let site = "berlin".parse::<proto::id::SiteName>().ok()?;
    let to = HostPort::new("10.0.0.5", 22).ok()?;
    let who = [
        Principal::User { name: "alice".parse().ok()?, groups: vec!["ops".parse().ok()?] },
        Principal::Edge { name: "shop-2".parse().ok()?, site: Some(site.clone()) },
        Principal::Door { name: "http".to_owned() },
        Principal::Apiserver,
    ];
    let what = [
        Target::Tcp { edge: edge.clone(), to: to.clone() },
        Target::Udp { edge: edge.clone(), to },
        Target::Service { edge: Some(edge.clone()), name: "web".parse().ok()? },
        Target::Probe { edge },
    ];
    let labels = BTreeMap::from([("tier".to_owned(), "front".to_owned())]);
    let at = |target: &Target| At { target: target.clone(), site: site.clone(), labels: labels.clone() };
    Some(what.iter().flat_map(|t| who.iter().map(|w| (w.clone(), t.clone(), at(t)))).collect())
}
