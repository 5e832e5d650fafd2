//! What holds for every message, not only for the examples of `golden.rs`.
#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

use std::{collections::BTreeMap, fmt::Debug, str::FromStr, time::Duration};

use bytes::{Bytes, BytesMut};
use proptest::{collection::vec, option, prelude::*, sample::select};
use proto::{
    api::{ShardReport, WatchEvent},
    code::{CloseCode, RefuseCode},
    frame::{self, FrameError, HEADER, MAX_EDGE_TO_SHARD, MAX_SHARD_TO_EDGE, MAX_STREAM_HEAD},
    hostname,
    id::{EdgeId, GroupName, ServiceName, ShardId, SiteName, UserId},
    identity::{Identity, Role},
    join::{CaHash, JoinLine},
    message::{
        Candidate, EdgeToShard, Hello, MAX_SERVICES, Refuse, Renew, Renewal, Service, ServiceKind, ShardToEdge, Welcome,
    },
    policy::{Decision, Object, Place, Policy, Ports, Rule, Subject},
    principal::Principal,
    secret::Secret,
    standing::{MAX_ALLOWS, MAX_TROUBLES, Standing, Trouble},
    stream::{Answer, Open, Refusal, Routed, Trace},
    target::{HostPort, Target},
};

/// One DNS label.
fn label<T: FromStr<Err: Debug> + Debug>() -> impl Strategy<Value = T> {
    "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?".prop_map(|text| text.parse().unwrap())
}

/// One to four DNS labels with dots between.
fn dotted<T: FromStr<Err: Debug> + Debug>() -> impl Strategy<Value = T> {
    vec("[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", 1..=4).prop_map(|labels| labels.join(".").parse().unwrap())
}

/// Times that the wire can say.
fn millis() -> impl Strategy<Value = Duration> {
    any::<u32>().prop_map(|ms| Duration::from_millis(ms.into()))
}

/// Times to come again; zero is how the wire says "none".
fn retry() -> impl Strategy<Value = Option<Duration>> {
    option::of((1..=u32::MAX).prop_map(|ms| Duration::from_millis(ms.into())))
}

fn blob(max: usize) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..max).prop_map(Into::into)
}

fn service() -> impl Strategy<Value = Service> {
    let kinds = [ServiceKind::Tcp, ServiceKind::Http, ServiceKind::Https, ServiceKind::Ssh, ServiceKind::Udp];
    let labels = proptest::collection::btree_map("\\PC{0,8}", "\\PC{0,8}", 0..4);
    (label(), select(kinds.to_vec()), 1..=u16::MAX, labels).prop_map(|(name, kind, port, labels)| Service {
        name,
        kind,
        port,
        labels,
    })
}

fn candidate() -> impl Strategy<Value = Candidate> {
    (dotted(), vec("\\PC{0,30}", 0..5)).prop_map(|(shard, addresses)| Candidate { shard, addresses })
}

fn edge_to_shard() -> impl Strategy<Value = EdgeToShard> {
    let hello = (dotted(), any::<u64>(), "\\PC{0,64}", any::<u64>(), any::<u64>(), vec(dotted(), 0..4)).prop_map(
        |(name, instance, version, unix_ms, epoch, avoid)| Hello { name, instance, version, unix_ms, epoch, avoid },
    );
    let renew = (blob(600), blob(900), blob(100));
    prop_oneof![
        hello.prop_map(EdgeToShard::Hello),
        vec(service(), 0..20).prop_map(EdgeToShard::Announce),
        any::<u64>().prop_map(EdgeToShard::Ping),
        renew.prop_map(|(csr, certificate, signature)| EdgeToShard::Renew(Renew { csr, certificate, signature })),
        "\\PC{0,256}".prop_map(|reason| EdgeToShard::Bye { reason }),
        standing().prop_map(EdgeToShard::Standing),
    ]
}

fn standing() -> impl Strategy<Value = Standing> {
    let trouble = ("\\PC{0,120}", "\\PC{0,120}", any::<u32>(), any::<u64>(), any::<u64>()).prop_map(
        |(address, detail, times, first_ms, last_ms)| {
            let (cause, carrier) = ("timed-out".to_owned(), "quic".to_owned());
            Trouble { cause, carrier, address, detail, times, first_ms, last_ms }
        },
    );
    let text = || "\\PC{0,120}";
    let numbers = (any::<u32>(), 0..=100_u32, any::<i64>(), any::<u64>(), any::<bool>());
    (text(), text(), numbers, vec(trouble, 0..=MAX_TROUBLES), vec(text(), 0..=MAX_ALLOWS)).prop_map(
        |(why, proxy, (mtu, loss_percent, skew_ms, away_ms, allows_more), troubles, allows)| {
            let carrier = "tcp".to_owned();
            Standing { carrier, why, proxy, mtu, loss_percent, skew_ms, away_ms, troubles, allows, allows_more }
        },
    )
}

fn refuse() -> impl Strategy<Value = Refuse> {
    (select(CloseCode::ALL), "\\PC{0,100}", retry()).prop_map(|(code, reason, retry_after)| Refuse {
        code,
        reason,
        retry_after,
    })
}

fn shard_to_edge() -> impl Strategy<Value = ShardToEdge> {
    let welcome = (dotted(), any::<u64>(), vec(candidate(), 0..10), any::<u64>(), millis(), any::<u64>()).prop_map(
        |(shard, epoch, candidates, unix_ms, ping, generation)| {
            let seen_as = format!("192.0.2.1:{}", generation % 65_536);
            ShardToEdge::Welcome(Welcome { shard, epoch, candidates, unix_ms, ping, generation, seen_as })
        },
    );
    let certificates = || vec(blob(700), 0..=16);
    prop_oneof![
        welcome,
        (candidate(), any::<u64>()).prop_map(|(to, epoch)| ShardToEdge::Redirect { to, epoch }),
        (candidate(), any::<u64>(), millis()).prop_map(|(to, epoch, within)| ShardToEdge::Move { to, epoch, within }),
        (millis(), millis(), vec(candidate(), 0..10)).prop_map(|(reconnect_in, deadline, candidates)| {
            ShardToEdge::Drain { reconnect_in, deadline, candidates }
        }),
        (certificates(), certificates()).prop_map(|(chain, roots)| ShardToEdge::Renewed(Ok(Renewal { chain, roots }))),
        refuse().prop_map(|refused| ShardToEdge::Renewed(Err(refused))),
        refuse().prop_map(ShardToEdge::Refuse),
        any::<u64>().prop_map(ShardToEdge::Pong),
    ]
}

fn host_port() -> impl Strategy<Value = HostPort> {
    let host = prop_oneof![
        any::<std::net::IpAddr>().prop_map(|ip| ip.to_string()),
        "[a-z0-9_][a-z0-9_.-]{0,40}",
        Just("localhost".to_owned()),
    ];
    (host, 1..=u16::MAX).prop_map(|(host, port)| HostPort::new(&host, port).unwrap())
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![
        (dotted(), host_port()).prop_map(|(edge, to)| Target::Tcp { edge, to }),
        (dotted(), host_port()).prop_map(|(edge, to)| Target::Udp { edge, to }),
        (option::of(dotted()), label()).prop_map(|(edge, name)| Target::Service { edge, name }),
        dotted().prop_map(|edge| Target::Probe { edge }),
    ]
}

fn principal() -> impl Strategy<Value = Principal> {
    prop_oneof![
        (dotted(), vec(label(), 0..=64)).prop_map(|(name, groups)| Principal::User { name, groups }),
        (dotted(), option::of(label())).prop_map(|(name, site)| Principal::Edge { name, site }),
        "\\PC{0,40}".prop_map(|name| Principal::Door { name }),
        Just(Principal::Apiserver),
    ]
}

fn open() -> impl Strategy<Value = Open> {
    let trace = any::<([u8; 16], [u8; 8])>().prop_map(|(trace_id, parent_id)| Trace { trace_id, parent_id });
    (target(), option::of(principal()), "\\PC{0,40}", option::of(trace), any::<u32>(), vec(label::<ShardId>(), 0..3))
        .prop_map(|(target, principal, door, trace, hops, via)| Open {
            datagrams: via.len() == 1 || matches!(target, Target::Udp { .. }),
            target,
            principal,
            door,
            trace,
            hops,
            via,
        })
}

fn answer(reason: impl Strategy<Value = String>) -> impl Strategy<Value = Answer> {
    (reason, option::of(dotted::<EdgeId>()), select(RefuseCode::ALL), retry()).prop_map(
        |(text, edge, code, retry_after)| match edge {
            Some(edge) if retry_after.is_some() => {
                Answer::Routed(Routed { shard: edge.as_str().parse().unwrap(), edge, rule: text })
            }
            Some(edge) => Answer::Opened { edge, address: text },
            None => Answer::Refused(Refusal { code, reason: text, retry_after }),
        },
    )
}

fn body(frame: Bytes, max: usize) -> Bytes {
    let mut buffer = BytesMut::from(frame);
    let body = frame::take(&mut buffer, max).unwrap().expect("a whole frame");
    assert!(buffer.is_empty());
    body
}

/// Bytes that are nearly a message: a good frame's body with a byte changed, bytes cut off, and bytes behind.
fn damaged(good: Bytes, at: usize, byte: u8, keep: usize, tail: &[u8]) -> Bytes {
    let mut bytes = good.to_vec();
    if !bytes.is_empty() {
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(keep % (bytes.len() + 1));
    }
    bytes.extend_from_slice(tail);
    bytes.into()
}

proptest! {
    #[test]
    fn messages_from_edge_to_shard_come_back(message in edge_to_shard()) {
        let frame = message.clone().encode().unwrap();
        prop_assert_eq!(EdgeToShard::decode(body(frame, MAX_EDGE_TO_SHARD)), Ok(Some(message)));
    }

    #[test]
    fn messages_from_shard_to_edge_come_back(message in shard_to_edge()) {
        let frame = message.clone().encode().unwrap();
        prop_assert_eq!(ShardToEdge::decode(body(frame, MAX_SHARD_TO_EDGE)), Ok(Some(message)));
    }

    #[test]
    fn opens_come_back(open in open()) {
        let frame = open.encode().unwrap();
        prop_assert_eq!(Open::decode(body(frame, MAX_STREAM_HEAD)), Ok(open));
    }

    #[test]
    fn answers_come_back(answer in answer("\\PC{0,200}")) {
        prop_assert_eq!(Answer::decode(body(answer.encode(), MAX_STREAM_HEAD)), Ok(answer));
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..600)) {
        let bytes = Bytes::from(bytes);
        let _ = EdgeToShard::decode(bytes.clone());
        let _ = ShardToEdge::decode(bytes.clone());
        let _ = Open::decode(bytes.clone());
        let _ = Answer::decode(bytes);
    }

    #[test]
    fn damaged_messages_never_panic_and_stay_within_the_limits(
        up in edge_to_shard(), down in shard_to_edge(), open in open(), answer in answer("\\PC{0,200}"),
        at: usize, byte: u8, keep: usize, tail in vec(any::<u8>(), 0..20),
    ) {
        let hurt = |frame: Bytes| damaged(frame.slice(HEADER..), at, byte, keep, &tail);
        if let Ok(Some(EdgeToShard::Announce(services))) = EdgeToShard::decode(hurt(up.encode().unwrap())) {
            prop_assert!(services.iter().all(|s| s.port != 0));
        }
        let _ = ShardToEdge::decode(hurt(down.encode().unwrap()));
        let _ = Answer::decode(hurt(answer.encode()));
        if let Ok(open) = Open::decode(hurt(open.encode().unwrap())) {
            prop_assert!(open.door.len() <= 1024);
        }
    }

    #[test]
    fn a_list_is_taken_up_to_its_limit_and_refused_beyond(
        service in service(), to in candidate(), count in 0_usize..600, few in 0_usize..130,
    ) {
        let services = vec![service; count];
        if let Ok(frame) = EdgeToShard::Announce(services).encode() {
            let back = EdgeToShard::decode(body(frame, MAX_EDGE_TO_SHARD));
            prop_assert_eq!(back.is_ok(), count <= MAX_SERVICES);
        }
        let zero = Duration::ZERO;
        let drain = ShardToEdge::Drain { reconnect_in: zero, deadline: zero, candidates: vec![to.clone(); few] };
        if let Ok(frame) = drain.encode() {
            prop_assert_eq!(ShardToEdge::decode(body(frame, MAX_SHARD_TO_EDGE)).is_ok(), few <= 64);
        }
        let to = Candidate { addresses: vec![String::new(); few], ..to };
        let frame = ShardToEdge::Redirect { to, epoch: 0 }.encode().unwrap();
        prop_assert_eq!(ShardToEdge::decode(body(frame, MAX_SHARD_TO_EDGE)).is_ok(), few <= 64);
        let renewal = Renewal { chain: vec![Bytes::new(); few], roots: vec![] };
        let frame = ShardToEdge::Renewed(Ok(renewal)).encode().unwrap();
        prop_assert_eq!(ShardToEdge::decode(body(frame, MAX_SHARD_TO_EDGE)).is_ok(), few <= 16);
    }

    #[test]
    fn groups_are_taken_up_to_their_limit_and_refused_beyond(open in open(), count in 0_usize..130) {
        let groups = vec!["g".parse::<GroupName>().unwrap(); count];
        let user = Principal::User { name: "alice".parse().unwrap(), groups };
        let frame = Open { principal: Some(user), ..open }.encode().unwrap();
        prop_assert_eq!(Open::decode(body(frame, MAX_STREAM_HEAD)).is_ok(), count <= 64);
    }

    #[test]
    fn an_answer_with_any_text_stays_below_the_cap_and_keeps_its_beginning(
        answer in answer(prop_oneof!["\\PC{0,3000}", "(?s).{0,3000}", "[\u{10000}-\u{10ffff}]{0,2000}"]),
    ) {
        let frame = answer.encode();
        prop_assert!(frame.len() <= HEADER + MAX_STREAM_HEAD);
        let back = Answer::decode(body(frame, MAX_STREAM_HEAD)).unwrap();
        let texts = match (&answer, &back) {
            (Answer::Opened { address: sent, .. }, Answer::Opened { address: got, .. }) => (sent, got),
            (Answer::Refused(sent), Answer::Refused(got)) => (&sent.reason, &got.reason),
            (Answer::Routed(sent), Answer::Routed(got)) => (&sent.rule, &got.rule),
            (Answer::Opened { .. } | Answer::Refused(_) | Answer::Routed(_), _) => panic!("{answer:?} became {back:?}"),
        };
        prop_assert!(texts.0.starts_with(texts.1.as_str()));
        prop_assert!(texts.1.len() > 1020 || texts.0 == texts.1);
    }

    #[test]
    fn a_frame_is_never_longer_than_its_cap(len in 0_usize..9000, max in 0_usize..9000) {
        let message = proto::wire::Bye { reason: "x".repeat(len) };
        match frame::encode(&message, max) {
            Ok(frame) => prop_assert!(frame.len() <= HEADER + max),
            Err(FrameError::TooLong { len, max: cap }) => prop_assert!(len > cap && cap == max),
            Err(error) => prop_assert!(false, "{}", error),
        }
    }

    #[test]
    fn identities_come_back(domain in dotted(), role: u8, name in dotted()) {
        let role = [Role::Edge, Role::Shard, Role::Control, Role::User][usize::from(role % 4)];
        let identity = Identity::new(domain, role, name);
        prop_assert_eq!(identity.to_string().parse::<Identity>(), Ok(identity));
    }

    #[test]
    fn join_lines_come_back_and_never_show_their_token(
        control in host_port(), ca: [u8; 32], token in "[A-Za-z0-9_.-]{1,80}", name in option::of(dotted()),
    ) {
        let line = JoinLine { control, ca: CaHash(ca), token: Secret::new(token), name };
        prop_assert_eq!(line.reveal().parse::<JoinLine>(), Ok(line.clone()));
        prop_assert_eq!(format!("\n {} \r\n", line.reveal()).parse::<JoinLine>(), Ok(line.clone()));
        let hidden = JoinLine { token: Secret::new("other".into()), ..line.clone() };
        prop_assert_eq!(format!("{line:?}"), format!("{hidden:?}"), "the print depends on the token");
    }

    #[test]
    fn what_is_no_join_line_is_refused_without_showing_it(text in "causeway://[ -~]{0,60}") {
        if let Err(error) = text.parse::<JoinLine>() {
            let token = text.trim_start_matches("causeway://").split('@').next().unwrap_or_default();
            let shown = format!("{error} {error:?}");
            prop_assert!(token.len() < 12 || !shown.contains(token), "{}", shown);
        }
    }

    #[test]
    fn targets_that_people_can_write_come_back(target in target()) {
        let writable = !matches!(target, Target::Probe { .. });
        prop_assert_eq!(target.to_string().parse::<Target>().ok(), writable.then_some(target));
    }

    #[test]
    fn host_names_lead_to_their_service(service in label::<ServiceName>(), edge in dotted::<EdgeId>(), port: u16) {
        let door = "https".parse().unwrap();
        let expected = Target::Service { edge: Some(edge.clone()), name: service.clone() };
        for host in [format!("{service}.{edge}.mesh.test"), format!("{service}.{edge}.Mesh.TEST.:{port}")] {
            prop_assert_eq!(hostname::target_of(&host, "mesh.test", &door), Ok(expected.clone()));
        }
    }
}

/// Few names, so that rules and streams often fit each other.
fn few() -> impl Strategy<Value = &'static str> {
    select(vec!["a", "ab", "abc", "b"])
}

fn pattern() -> impl Strategy<Value = String> {
    (few(), any::<bool>()).prop_map(|(name, open)| if open { format!("{name}*") } else { name.to_owned() })
}

fn subject() -> impl Strategy<Value = Subject> {
    let named = (select(vec!["user", "group", "edge", "site", "door"]), prop_oneof![pattern(), Just("*".to_owned())]);
    prop_oneof![
        4 => named.prop_map(|(kind, name)| format!("{kind}/{name}").parse().unwrap()),
        1 => Just(Subject::Apiserver),
    ]
}

fn object() -> impl Strategy<Value = Object> {
    let named = (select(vec!["edge", "site", "service"]), prop_oneof![pattern(), Just("*".to_owned())]);
    prop_oneof![
        3 => named.prop_map(|(kind, name)| format!("{kind}/{name}").parse().unwrap()),
        1 => (few(), few()).prop_map(|(key, value)| Object::Label { key: key.into(), value: value.into() }),
    ]
}

fn ports() -> impl Strategy<Value = Ports> {
    prop_oneof![
        Just(Ports::ALL),
        (1_u16..30).prop_map(|p| p.to_string().parse().unwrap()),
        (1_u16..30, 0_u16..10).prop_map(|(from, more)| format!("{from}-{}", from + more).parse().unwrap()),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    ("[a-z]{1,5}", vec(subject(), 0..3), vec(object(), 0..3), vec(ports(), 0..3))
        .prop_map(|(name, from, to, ports)| Rule { name, from, to, ports })
}

/// A stream as a shard sees it, in parts that own what a [`Place`] borrows.
#[derive(Clone, Debug)]
struct Asked {
    who: Principal,
    edge: EdgeId,
    site: Option<SiteName>,
    service: Option<ServiceName>,
    port: Option<u16>,
    labels: BTreeMap<String, String>,
}

impl Asked {
    fn decide(&self, policy: &Policy) -> Decision {
        let target = match (&self.service, self.port) {
            (Some(name), _) => Target::Service { edge: Some(self.edge.clone()), name: name.clone() },
            (None, Some(port)) => {
                Target::Tcp { edge: self.edge.clone(), to: HostPort::new("localhost", port).unwrap() }
            }
            (None, None) => Target::Probe { edge: self.edge.clone() },
        };
        let (site, service) = (self.site.as_ref(), self.service.as_ref());
        let place = Place { edge: &self.edge, site, service, port: self.port, labels: Some(&self.labels) };
        policy.decide(&self.who, &target, &place)
    }
}

fn asked() -> impl Strategy<Value = Asked> {
    let site = || option::of(few().prop_map(|s| s.parse::<SiteName>().unwrap()));
    let who = prop_oneof![
        (few(), vec(few(), 0..3)).prop_map(|(name, groups)| Principal::User {
            name: name.parse::<UserId>().unwrap(),
            groups: groups.iter().map(|g| g.parse().unwrap()).collect(),
        }),
        (few(), site()).prop_map(|(name, site)| Principal::Edge { name: name.parse().unwrap(), site }),
        few().prop_map(|name| Principal::Door { name: name.into() }),
        Just(Principal::Apiserver),
    ];
    let labels = proptest::collection::btree_map(few().prop_map(str::to_owned), few().prop_map(str::to_owned), 0..3);
    (who, few(), site(), option::of(few()), option::of(1_u16..30), labels).prop_map(
        |(who, edge, site, service, port, labels)| Asked {
            who,
            edge: edge.parse().unwrap(),
            site,
            service: service.map(|s| s.parse().unwrap()),
            port,
            labels,
        },
    )
}

fn allowed(decision: &Decision) -> bool {
    matches!(decision, Decision::Allow { .. })
}

proptest! {
    #[test]
    fn a_rule_more_never_allows_less(
        rules in vec(rule(), 0..6), more in rule(), at: proptest::sample::Index, asked in asked(),
    ) {
        let mut grown = rules.clone();
        grown.insert(at.index(rules.len() + 1), more.clone());
        let before = allowed(&asked.decide(&Policy { rules }));
        let alone = allowed(&asked.decide(&Policy { rules: vec![more] }));
        prop_assert_eq!(allowed(&asked.decide(&Policy { rules: grown })), before || alone);
    }

    #[test]
    fn a_decision_names_a_rule_that_allows_it_by_itself(rules in vec(rule(), 0..6), asked in asked()) {
        match asked.decide(&Policy { rules: rules.clone() }) {
            Decision::Allow { rule } => {
                let by_itself = |r: &Rule| allowed(&asked.decide(&Policy { rules: vec![r.clone()] }));
                prop_assert!(rules.iter().any(|r| r.name == rule && by_itself(r)));
            }
            Decision::Deny { missing } => prop_assert!(missing.contains("meshctl policy allow --from"), "{}", missing),
        }
    }

    #[test]
    fn nothing_is_allowed_without_a_rule_or_by_a_rule_without_parts(rule in rule(), asked in asked()) {
        prop_assert!(!allowed(&asked.decide(&Policy::default())));
        for empty in [Rule { from: vec![], ..rule.clone() }, Rule { to: vec![], ..rule }] {
            prop_assert!(empty.check().is_err());
            let decision = asked.decide(&Policy { rules: vec![empty] });
            prop_assert!(!allowed(&decision));
        }
    }

    #[test]
    fn rules_come_back_from_json(rules in vec(rule(), 0..4)) {
        let json = serde_json::to_string(&rules).unwrap();
        prop_assert_eq!(serde_json::from_str::<Vec<Rule>>(&json).unwrap(), rules);
    }

    #[test]
    fn watch_events_come_back_and_leave_out_what_did_not_change(
        revision: u64, policy in option::of(vec(rule(), 0..3)), shards in option::of(vec(candidate(), 0..3)),
    ) {
        let event = WatchEvent { revision, policy, shards, ..WatchEvent::default() };
        let json = serde_json::to_string(&event).unwrap();
        prop_assert!(!json.contains("null"));
        prop_assert_eq!(serde_json::from_str::<WatchEvent>(&json).unwrap(), event);
    }

    #[test]
    fn random_json_never_panics(text in "[\\[\\]{}\",:a-z0-9 \\\\/*-]{0,80}") {
        let _ = serde_json::from_str::<Rule>(&text);
        let _ = serde_json::from_str::<WatchEvent>(&text);
        let _ = serde_json::from_str::<ShardReport>(&text);
    }

    #[test]
    fn shard_names_follow_the_grammar_of_edge_names(text in "[a-zA-Z0-9._-]{0,80}") {
        prop_assert_eq!(text.parse::<ShardId>().is_ok(), text.parse::<EdgeId>().is_ok());
    }
}
