//! The wire, byte by byte. A change here is a change of the protocol: what stands in these tables must be read for as
//! long as a released version sends it.
//!
//! The hexadecimal text was made from the `.proto` files by another encoder, and not printed by the code under test.
#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

use std::{fmt::Debug, str::FromStr, time::Duration};

use bytes::{Bytes, BytesMut};
use prost::Message;
use proto::{
    code::{CloseCode, RefuseCode},
    datagram,
    frame::{self, FrameError, HEADER, MAX_EDGE_TO_SHARD, MAX_SHARD_TO_EDGE, MAX_STREAM_HEAD},
    message::{
        Candidate, EdgeToShard, Hello, MAX_SERVICES, Refuse, Renew, Renewal, Service, ServiceKind, ShardToEdge, Welcome,
    },
    principal::Principal,
    standing::{Standing, Trouble},
    stream::{Answer, Open, Refusal, Trace},
    target::{HostPort, Target},
    wire,
};

/// The longest time that 32 bits of milliseconds can say.
const LONGEST: Duration = Duration::from_millis(u32::MAX as u64);

fn name<T: FromStr<Err: Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

fn place(host: &str, port: u16) -> HostPort {
    HostPort::new(host, port).unwrap()
}

fn service(what: &str, kind: ServiceKind, port: u16, labels: &[(&str, &str)]) -> Service {
    let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Service { name: name(what), kind, port, labels }
}

fn candidate(shard: &str, addresses: &[&str]) -> Candidate {
    Candidate { shard: name(shard), addresses: addresses.iter().map(ToString::to_string).collect() }
}

fn ssh() -> Open {
    Open::new(Target::Tcp { edge: name("shop-17"), to: place("localhost", 22) })
}

fn alice(groups: &[&str]) -> Principal {
    Principal::User { name: name("alice"), groups: groups.iter().map(|g| name(g)).collect() }
}

fn edge_to_shard() -> Vec<(EdgeToShard, &'static str)> {
    vec![
        (
            EdgeToShard::Hello(Hello {
                name: name("shop-17"),
                instance: 0x0123_4567_89ab_cdef,
                version: "0.1.0".into(),
                unix_ms: 1_790_000_000_000,
                epoch: 42,
                avoid: vec![],
            }),
            "00000024 0a220a0773686f702d313711efcdab89674523011a05302e312e302080d8c1a28c34282a",
        ),
        (
            EdgeToShard::Hello(Hello {
                name: name("a"),
                instance: 0,
                version: String::new(),
                unix_ms: 0,
                epoch: 0,
                avoid: vec![],
            }),
            "00000005 0a030a0161",
        ),
        (
            EdgeToShard::Hello(Hello {
                name: name("a"),
                instance: u64::MAX,
                version: String::new(),
                unix_ms: u64::MAX,
                epoch: u64::MAX,
                avoid: vec![],
            }),
            "00000024 0a220a016111ffffffffffffffff20ffffffffffffffffff0128ffffffffffffffffff01",
        ),
        (EdgeToShard::Announce(vec![]), "00000002 1200"),
        (
            EdgeToShard::Announce(vec![
                service("db", ServiceKind::Tcp, 1, &[]),
                service("web", ServiceKind::Http, 80, &[("tier", "front"), ("zone", "")]),
                service("shop", ServiceKind::Https, 443, &[]),
                service("shell", ServiceKind::Ssh, 22, &[]),
                service("dns", ServiceKind::Udp, u16::MAX, &[]),
            ]),
            "00000055 12530a080a026462100118010a200a0377656210021850220d0a0474696572120566726f6e74220 \
             60a047a6f6e650a0b0a0473686f70100318bb030a0b0a057368656c6c100418160a0b0a03646e73100518fff \
             f03",
        ),
        (EdgeToShard::Ping(0), "00000002 1a00"),
        (EdgeToShard::Ping(1), "0000000b 1a09090100000000000000"),
        (EdgeToShard::Ping(u64::MAX), "0000000b 1a0909ffffffffffffffff"),
        (
            EdgeToShard::Renew(Renew {
                csr: Bytes::from_static(&[0x30, 1, 2]),
                certificate: Bytes::from_static(&[0x30, 3]),
                signature: Bytes::from_static(&[0x30, 0x45]),
            }),
            "0000000f 220d0a03300102120230031a023045",
        ),
        (EdgeToShard::Bye { reason: "shutting down".into() }, "00000011 2a0f0a0d7368757474696e6720646f776e"),
        (EdgeToShard::Bye { reason: String::new() }, "00000002 2a00"),
        (
            EdgeToShard::Standing(Standing {
                carrier: "tcp".into(),
                why: "QUIC: timed-out".into(),
                proxy: "http://p:3128".into(),
                mtu: 1252,
                loss_percent: 5,
                skew_ms: -1500,
                away_ms: 9000,
                troubles: vec![Trouble {
                    cause: "timed-out".into(),
                    carrier: "quic".into(),
                    address: "shard-a:7400".into(),
                    detail: "no handshake within 5 s".into(),
                    times: 3,
                    first_ms: 9000,
                    last_ms: 1500,
                }],
                allows: vec!["sshd".into()],
                allows_more: true,
            }),
            "0000007c 327a0a03746370120f515549433a2074696d65642d6f75741a0d687474703a2f2f703a333132382 \
             0e40928b71730a8463a400a0974696d65642d6f75741204717569631a0c73686172642d613a3734303022176 \
             e6f2068616e647368616b652077697468696e20352073280330a84638dc0b42047373686448015005",
        ),
        (EdgeToShard::Standing(Standing::default()), "00000002 3200"),
    ]
}

fn shard_to_edge() -> Vec<(ShardToEdge, &'static str)> {
    vec![
        (
            ShardToEdge::Welcome(Welcome {
                shard: name("shard-a"),
                epoch: 42,
                candidates: vec![
                    candidate("shard-b", &["192.0.2.7:7400", "[2001:db8::7]:7400"]),
                    candidate("shard-c", &["c.example.org:7400"]),
                ],
                unix_ms: 1_790_000_000_000,
                ping: Duration::from_secs(4),
                generation: 3,
                seen_as: String::new(),
            }),
            "00000067 0a650a0773686172642d61102a1a2d0a0773686172642d62120e3139322e302e322e373a3734303 \
             012125b323030313a6462383a3a375d3a373430301a1d0a0773686172642d631212632e6578616d706c652e6 \
             f72673a373430302080d8c1a28c3428a01f3003",
        ),
        (
            ShardToEdge::Welcome(Welcome {
                shard: name("a"),
                epoch: 0,
                candidates: vec![],
                unix_ms: 0,
                ping: Duration::ZERO,
                generation: 0,
                seen_as: String::new(),
            }),
            "00000005 0a030a0161",
        ),
        (
            ShardToEdge::Welcome(Welcome {
                shard: name("a"),
                epoch: u64::MAX,
                candidates: vec![],
                unix_ms: u64::MAX,
                ping: LONGEST,
                generation: u64::MAX,
                seen_as: "192.0.2.7:4433".into(),
            }),
            "0000003c 0a3a0a016110ffffffffffffffffff0120ffffffffffffffffff0128ffffffff0f30fffffffffff \
             fffffff013a0e3139322e302e322e373a34343333",
        ),
        (
            ShardToEdge::Redirect { to: candidate("shard-b", &["192.0.2.7:7400"]), epoch: 43 },
            "0000001f 121d0a190a0773686172642d62120e3139322e302e322e373a37343030102b",
        ),
        (
            ShardToEdge::Move {
                to: candidate("shard-b", &["192.0.2.7:7400"]),
                epoch: 43,
                within: Duration::from_secs(20),
            },
            "00000023 1a210a190a0773686172642d62120e3139322e302e322e373a37343030102b18a09c01",
        ),
        (
            ShardToEdge::Drain {
                reconnect_in: Duration::from_millis(1500),
                deadline: Duration::from_secs(30),
                candidates: vec![candidate("shard-b", &["192.0.2.7:7400"])],
            },
            "00000024 222208dc0b10b0ea011a190a0773686172642d62120e3139322e302e322e373a37343030",
        ),
        (
            ShardToEdge::Drain { reconnect_in: Duration::ZERO, deadline: Duration::ZERO, candidates: vec![] },
            "00000002 2200",
        ),
        (
            ShardToEdge::Renewed(Ok(Renewal {
                chain: vec![Bytes::from_static(&[0x30, 1]), Bytes::from_static(&[0x30, 2])],
                roots: vec![Bytes::from_static(&[0x30, 3]), Bytes::from_static(&[0x30, 4])],
            })),
            "00000012 2a100a0230010a0230021202300312023004",
        ),
        (
            ShardToEdge::Renewed(Err(Refuse {
                code: CloseCode::Revoked,
                reason: "revoked yesterday".into(),
                retry_after: Some(Duration::from_secs(60)),
            })),
            "0000001d 2a1b1a19080512117265766f6b65642079657374657264617918e0d403",
        ),
        (
            ShardToEdge::Refuse(Refuse {
                code: CloseCode::DuplicateIdentity,
                reason: "two machines".into(),
                retry_after: Some(LONGEST),
            }),
            "00000018 32160804120c74776f206d616368696e657318ffffffff0f",
        ),
        (ShardToEdge::Refuse(Refuse::because(CloseCode::Done, "")), "00000002 3200"),
        (ShardToEdge::Pong(u64::MAX), "0000000b 3a0909ffffffffffffffff"),
    ]
}

fn opens() -> Vec<(Open, &'static str)> {
    vec![
        (ssh(), "0000001a 0a180a0773686f702d3137120d0a096c6f63616c686f73741016"),
        (
            Open::new(Target::Tcp { edge: name("shop-17"), to: place("10.0.0.5", 80) }),
            "00000019 0a170a0773686f702d3137120c0a0831302e302e302e351050",
        ),
        (
            Open::new(Target::Tcp { edge: name("shop-17"), to: place("fd00::5", u16::MAX) }),
            "0000001a 0a180a0773686f702d3137120d0a07666430303a3a3510ffff03",
        ),
        (
            Open::new(Target::Tcp { edge: name("shop-17"), to: place("printer.lan", 1) }),
            "0000001c 0a1a0a0773686f702d3137120f0a0b7072696e7465722e6c616e1001",
        ),
        (
            Open::new(Target::Udp { edge: name("shop-17"), to: place("10.0.0.53", 53) }),
            "0000001a 0a180a0773686f702d31372a0d0a0931302e302e302e35331035",
        ),
        (
            Open::new(Target::Service { edge: Some(name("shop-17")), name: name("web") }),
            "00000010 0a0e0a0773686f702d31371a03776562",
        ),
        (Open::new(Target::Service { edge: None, name: name("web") }), "00000007 0a051a03776562"),
        (
            Open::flow(Target::Service { edge: Some(name("shop-17")), name: name("dns") }),
            "00000012 0a0e0a0773686f702d31371a03646e733801",
        ),
        (Open::new(Target::Probe { edge: name("shop-17") }), "0000000d 0a0b0a0773686f702d31372200"),
        (
            Open { principal: Some(alice(&["ops", "dev"])), ..ssh() },
            "0000002f 0a180a0773686f702d3137120d0a096c6f63616c686f73741016121308011205616c6963651a036 \
             f70731a03646576",
        ),
        (
            Open { principal: Some(alice(&[])), ..ssh() },
            "00000025 0a180a0773686f702d3137120d0a096c6f63616c686f73741016120908011205616c696365",
        ),
        (
            Open { principal: Some(Principal::Edge { name: name("plant-3"), site: Some(name("berlin")) }), ..ssh() },
            "0000002f 0a180a0773686f702d3137120d0a096c6f63616c686f73741016121308021207706c616e742d332 \
             2066265726c696e",
        ),
        (
            Open { principal: Some(Principal::Edge { name: name("plant-3"), site: None }), ..ssh() },
            "00000027 0a180a0773686f702d3137120d0a096c6f63616c686f73741016120b08021207706c616e742d33",
        ),
        (
            Open { principal: Some(Principal::Door { name: "http".into() }), ..ssh() },
            "00000024 0a180a0773686f702d3137120d0a096c6f63616c686f7374101612080803120468747470",
        ),
        (
            Open { principal: Some(Principal::Apiserver), ..ssh() },
            "0000001e 0a180a0773686f702d3137120d0a096c6f63616c686f7374101612020804",
        ),
        (
            Open {
                principal: Some(alice(&["ops"])),
                door: "proxy".into(),
                trace: Some(Trace {
                    trace_id: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
                    parent_id: [17, 18, 19, 20, 21, 22, 23, 24],
                }),
                hops: 1,
                ..ssh()
            },
            "0000004d 0a180a0773686f702d3137120d0a096c6f63616c686f73741016120e08011205616c6963651a036 \
             f70731a0570726f787922180102030405060708090a0b0c0d0e0f1011121314151617182801",
        ),
        (Open { hops: u32::MAX, ..ssh() }, "00000020 0a180a0773686f702d3137120d0a096c6f63616c686f7374101628ffffffff0f"),
    ]
}

fn answers() -> Vec<(Answer, &'static str)> {
    vec![
        (
            Answer::Opened { edge: name("shop-17"), address: "127.0.0.1:22".into() },
            "00000019 0a170a0773686f702d3137120c3132372e302e302e313a3232",
        ),
        (Answer::Opened { edge: name("shop-17"), address: String::new() }, "0000000b 0a090a0773686f702d3137"),
        (
            Answer::Refused(Refusal::because(RefuseCode::PolicyDenied, "no rule allows this")),
            "00000019 1217080312136e6f2072756c6520616c6c6f77732074686973",
        ),
        (
            Answer::Refused(Refusal {
                code: RefuseCode::LinkLost,
                reason: "the link broke".into(),
                retry_after: Some(Duration::from_millis(250)),
            }),
            "00000017 12150812120e746865206c696e6b2062726f6b6518fa01",
        ),
        (
            Answer::Refused(Refusal { code: RefuseCode::Internal, reason: String::new(), retry_after: Some(LONGEST) }),
            "0000000a 1208080f18ffffffff0f",
        ),
    ]
}

fn bytes(hex: &str) -> Bytes {
    let digits: Vec<_> = hex.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_digit(16).unwrap()).collect();
    assert_eq!(digits.len() % 2, 0, "half a byte in {hex}");
    digits.chunks(2).map(|pair| u8::try_from(pair[0] * 16 + pair[1]).unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The body of a frame that is all of the bytes.
fn body(frame: Bytes, max: usize) -> Bytes {
    let mut buffer = BytesMut::from(frame);
    let body = frame::take(&mut buffer, max).unwrap().expect("a whole frame");
    assert!(buffer.is_empty());
    body
}

/// Every frame prints as its hex, and its hex reads as the frame; cut at any byte, it waits as a frame, and as a body
/// never says the same and never panics.
fn golden<T: Clone + Debug + PartialEq>(
    table: Vec<(T, &str)>,
    max: usize,
    encode: impl Fn(T) -> Bytes,
    decode: impl Fn(Bytes) -> Result<T, FrameError>,
) {
    for (value, text) in table {
        let frame = bytes(text);
        assert_eq!(hex(&encode(value.clone())), hex(&frame), "{value:?}");
        let whole = body(frame.clone(), max);
        assert_eq!(decode(whole.clone()).as_ref(), Ok(&value), "{text}");
        for cut in 0..frame.len() {
            let mut buffer = BytesMut::from(&frame[..cut]);
            assert_eq!(frame::take(&mut buffer, max), Ok(None), "{value:?} cut at {cut}");
            assert_eq!(buffer.len(), cut, "a frame that is not whole was touched");
        }
        for cut in 0..whole.len() {
            assert_ne!(decode(whole.slice(..cut)).as_ref(), Ok(&value), "{value:?} cut at {cut}");
        }
        let mut two = BytesMut::from([&frame[..], &frame[..]].concat().as_slice());
        assert_eq!(frame::take(&mut two, max), Ok(Some(whole)), "the next frame is left alone");
        assert_eq!(two, frame);
    }
}

#[test]
fn every_message_from_edge_to_shard() {
    let decode = |b| EdgeToShard::decode(b).map(|m| m.expect("a known message"));
    golden(
        edge_to_shard(),
        MAX_EDGE_TO_SHARD,
        |m| m.encode().unwrap(),
        |b| match b.is_empty() {
            true => Err(FrameError::Malformed("nothing".into())),
            false => decode(b),
        },
    );
}

#[test]
fn every_message_from_shard_to_edge() {
    let decode = |b| ShardToEdge::decode(b).map(|m| m.expect("a known message"));
    golden(
        shard_to_edge(),
        MAX_SHARD_TO_EDGE,
        |m| m.encode().unwrap(),
        |b| match b.is_empty() {
            true => Err(FrameError::Malformed("nothing".into())),
            false => decode(b),
        },
    );
}

#[test]
fn every_open() {
    golden(opens(), MAX_STREAM_HEAD, |open| open.encode().unwrap(), Open::decode);
}

#[test]
fn every_answer() {
    golden(answers(), MAX_STREAM_HEAD, |answer| answer.encode(), Answer::decode);
}

#[test]
fn every_code_is_one_byte_at_a_known_place() {
    for &code in RefuseCode::ALL {
        let text = format!("00000004 1202 08{:02x}", code.number());
        let answer = Answer::Refused(Refusal::because(code, ""));
        assert_eq!(hex(&answer.encode()), hex(&bytes(&text)));
        assert_eq!(Answer::decode(body(bytes(&text), MAX_STREAM_HEAD)), Ok(answer));
    }
    for &code in CloseCode::ALL.iter().filter(|c| **c != CloseCode::Done) {
        let text = format!("00000004 3202 08{:02x}", code.number());
        let refuse = ShardToEdge::Refuse(Refuse::because(code, ""));
        assert_eq!(hex(&refuse.clone().encode().unwrap()), hex(&bytes(&text)));
        assert_eq!(ShardToEdge::decode(body(bytes(&text), MAX_SHARD_TO_EDGE)), Ok(Some(refuse)));
    }
}

/// One field of each wire type under a number that nobody has taken: what a newer version may add anywhere.
const FROM_THE_FUTURE: &str = "a006 01  a106 0102030405060708  a206 03 aabbcc  a506 01020304";

#[test]
fn messages_of_a_newer_version_are_skipped() {
    // Field 15, with a body, and nothing at all.
    for text in ["7a03 0a0161", "7a00", "", FROM_THE_FUTURE] {
        assert_eq!(EdgeToShard::decode(bytes(text)), Ok(None), "{text}");
        assert_eq!(ShardToEdge::decode(bytes(text)), Ok(None), "{text}");
    }
}

#[test]
fn fields_of_a_newer_version_are_skipped() {
    let future = bytes(FROM_THE_FUTURE);
    let grown = |text: &str, outer: usize| {
        // Into the message inside the oneof, whose length is one byte; and behind it.
        let body = body(bytes(text), MAX_SHARD_TO_EDGE);
        let inner = [&body[..], &future[..]].concat();
        let length = u8::try_from(inner.len() - outer).unwrap();
        let mut inner = [&inner[..1], &[length], &inner[2..]].concat();
        inner.extend_from_slice(&future);
        Bytes::from(inner)
    };
    for (message, text) in edge_to_shard().into_iter().filter(|(_, t)| t.len() < 180) {
        assert_eq!(EdgeToShard::decode(grown(text, 2)), Ok(Some(message)), "{text}");
    }
    for (message, text) in shard_to_edge().into_iter().filter(|(_, t)| t.len() < 180) {
        assert_eq!(ShardToEdge::decode(grown(text, 2)), Ok(Some(message)), "{text}");
    }
    for (answer, text) in answers() {
        assert_eq!(Answer::decode(grown(text, 2)), Ok(answer), "{text}");
    }
    for (open, text) in opens() {
        let longer = [&body(bytes(text), MAX_STREAM_HEAD)[..], &future[..]].concat();
        assert_eq!(Open::decode(longer.into()), Ok(open), "{text}");
    }
}

#[test]
fn values_of_a_newer_version_mean_the_next_best_thing() {
    // A kind of service: still a stream of bytes.
    let announced = EdgeToShard::decode(bytes("1209 0a07 0a0161 1063 1801"));
    assert_eq!(announced, Ok(Some(EdgeToShard::Announce(vec![service("a", ServiceKind::Tcp, 1, &[])]))));
    // Codes: 999 of a refused stream, and of a refused edge. The sentence is kept.
    let answer = Answer::decode(bytes("1208 08e707 12036e6577"));
    assert_eq!(answer, Ok(Answer::Refused(Refusal::because(RefuseCode::Internal, "new"))));
    let refuse = ShardToEdge::decode(bytes("3208 08e707 12036e6577"));
    assert_eq!(refuse, Ok(Some(ShardToEdge::Refuse(Refuse::because(CloseCode::ProtocolError, "new")))));
    // A kind of target, of principal, of answer: nothing that one may guess.
    assert_eq!(field(Open::decode(bytes("0a08 0a0161 32030a0161"))), "target");
    assert_eq!(field(Open::decode(bytes("0a0a 0a0161 1205 0a0161 1001 1202 0863"))), "principal");
    assert_eq!(field(Answer::decode(bytes("2200"))), "answer");
}

/// What the first version that ever spoke may leave out.
#[test]
fn an_older_peer_that_leaves_fields_out_is_understood() {
    let hello = EdgeToShard::decode(bytes("0a 03 0a0161"));
    let expected = Hello { name: name("a"), instance: 0, version: String::new(), unix_ms: 0, epoch: 0, avoid: vec![] };
    assert_eq!(hello, Ok(Some(EdgeToShard::Hello(expected))));
    let Ok(Some(ShardToEdge::Welcome(welcome))) = ShardToEdge::decode(bytes("0a 03 0a0161")) else {
        panic!("no Welcome");
    };
    assert_eq!((welcome.ping, welcome.generation, welcome.candidates), (Duration::ZERO, 0, vec![]));
    let open = Open::decode(bytes("0a0a 0a0161 1205 0a0162 1001")).unwrap();
    assert_eq!((open.principal, open.door, open.trace, open.hops), (None, String::new(), None, 0));
}

/// Messages as an older version knows them, with half of the fields.
mod older {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct EdgeToShard {
        #[prost(message, optional, tag = "1")]
        pub(crate) hello: Option<Hello>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Hello {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
        #[prost(fixed64, tag = "2")]
        pub(crate) instance: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Open {
        #[prost(message, optional, tag = "1")]
        pub(crate) target: Option<proto::wire::Target>,
    }
}

#[test]
fn an_older_peer_understands_what_we_send() {
    for (message, text) in edge_to_shard() {
        let seen = older::EdgeToShard::decode(body(bytes(text), MAX_EDGE_TO_SHARD)).unwrap();
        let EdgeToShard::Hello(hello) = message else {
            assert_eq!(seen.hello, None, "{text}");
            continue;
        };
        let seen = seen.hello.unwrap();
        assert_eq!((seen.name.as_str(), seen.instance), (hello.name.as_str(), hello.instance));
        let back = older::EdgeToShard { hello: Some(seen) }.encode_to_vec();
        assert!(matches!(EdgeToShard::decode(back.into()), Ok(Some(EdgeToShard::Hello(h))) if h.name == hello.name));
    }
    for (open, text) in opens() {
        let seen = older::Open::decode(body(bytes(text), MAX_STREAM_HEAD)).unwrap();
        assert_eq!(Open::decode(seen.encode_to_vec().into()), Ok(Open::new(open.target)), "{text}");
    }
}

/// The field that an error names.
fn field<T: Debug>(result: Result<T, FrameError>) -> &'static str {
    match result {
        Err(FrameError::Invalid { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

fn from_edge(message: wire::edge_to_shard::Message) -> Result<Option<EdgeToShard>, FrameError> {
    EdgeToShard::decode(wire::EdgeToShard { message: Some(message) }.encode_to_vec().into())
}

fn from_shard(message: wire::shard_to_edge::Message) -> Result<Option<ShardToEdge>, FrameError> {
    ShardToEdge::decode(wire::ShardToEdge { message: Some(message) }.encode_to_vec().into())
}

fn good_service(i: usize) -> wire::Service {
    wire::Service { name: format!("s{i}"), kind: 1, port: 1, ..Default::default() }
}

fn good_candidate() -> wire::Candidate {
    wire::Candidate { shard: "a".into(), addresses: vec!["a:1".into()] }
}

#[test]
fn impossible_values_from_an_edge_are_refused_by_name() {
    use wire::edge_to_shard::Message as M;
    for bad in ["", "Shop", "a..b", &"a".repeat(254)] {
        assert_eq!(field(from_edge(M::Hello(wire::Hello { name: bad.into(), ..Default::default() }))), "name");
    }
    let announce = |services| from_edge(M::Announce(wire::Announce { services }));
    for port in [0, 65_536, u32::MAX] {
        assert_eq!(field(announce(vec![wire::Service { port, ..good_service(0) }])), "port");
    }
    for name in ["", "A", "a.b", &"a".repeat(64)] {
        assert_eq!(field(announce(vec![wire::Service { name: name.into(), ..good_service(0) }])), "service");
    }
    assert!(announce((0..MAX_SERVICES).map(good_service).collect()).is_ok());
    assert_eq!(field(announce((0..=MAX_SERVICES).map(good_service).collect())), "services");
}

#[test]
fn impossible_values_from_a_shard_are_refused_by_name() {
    use wire::shard_to_edge::Message as M;
    assert_eq!(field(from_shard(M::Welcome(wire::Welcome::default()))), "shard");
    assert_eq!(field(from_shard(M::Redirect(wire::Redirect::default()))), "to");
    assert_eq!(field(from_shard(M::Move(wire::Move::default()))), "to");
    let to = |to| from_shard(M::Redirect(wire::Redirect { to: Some(to), epoch: 1 }));
    assert_eq!(field(to(wire::Candidate { shard: "A".into(), ..good_candidate() })), "shard");
    assert!(to(wire::Candidate { addresses: vec![String::new(); 64], ..good_candidate() }).is_ok());
    assert_eq!(field(to(wire::Candidate { addresses: vec![String::new(); 65], ..good_candidate() })), "addresses");

    let drain =
        |count| from_shard(M::Drain(wire::Drain { candidates: vec![good_candidate(); count], ..Default::default() }));
    assert!(drain(64).is_ok());
    assert_eq!(field(drain(65)), "candidates");
    let welcome = wire::Welcome { shard: "a".into(), candidates: vec![good_candidate(); 65], ..Default::default() };
    assert_eq!(field(from_shard(M::Welcome(welcome))), "candidates");

    let renewed = |chain, roots| {
        let (chain, roots) = (vec![Bytes::new(); chain], vec![Bytes::new(); roots]);
        from_shard(M::Renewed(wire::Renewed { chain, roots, refused: None }))
    };
    assert!(renewed(16, 16).is_ok());
    assert_eq!(field(renewed(17, 1)), "chain");
    assert_eq!(field(renewed(1, 17)), "chain");
}

fn opening(change: impl FnOnce(&mut wire::Open)) -> Result<Open, FrameError> {
    let what = wire::target::What::Tcp(wire::HostPort { host: "localhost".into(), port: 22 });
    let target = wire::Target { edge: "a".into(), what: Some(what) };
    let mut open = wire::Open { target: Some(target), ..Default::default() };
    change(&mut open);
    Open::decode(open.encode_to_vec().into())
}

fn aiming(edge: &str, what: Option<wire::target::What>) -> Result<Open, FrameError> {
    opening(|o| o.target = Some(wire::Target { edge: edge.into(), what }))
}

#[test]
fn impossible_targets_are_refused_by_name() {
    use wire::target::What;
    let tcp = |host: &str, port| Some(What::Tcp(wire::HostPort { host: host.into(), port }));
    assert!(aiming("a", tcp("localhost", 65_535)).is_ok());
    assert_eq!(field(opening(|o| o.target = None)), "target");
    assert_eq!(field(aiming("a", None)), "target");
    assert_eq!(field(aiming("A", tcp("b", 1))), "edge");
    assert_eq!(field(aiming("", tcp("b", 1))), "edge");
    assert_eq!(field(aiming("", Some(What::Udp(wire::HostPort { host: "b".into(), port: 1 })))), "edge");
    assert_eq!(field(aiming("", Some(What::Probe(wire::Probe {})))), "edge");
    assert_eq!(field(aiming("a", Some(What::Service("A".into())))), "service");
    assert_eq!(field(aiming("a", tcp("b", 65_536))), "port");
    assert_eq!(field(aiming("a", tcp("b", 0))), "host");
    for host in ["", "a b", "[::1]", "-a", ".a", "a/b", "ü", "fe80::1%eth0", &"a".repeat(254)] {
        assert_eq!(field(aiming("a", tcp(host, 1))), "host", "{host}");
    }
}

#[test]
fn impossible_principals_doors_and_traces_are_refused_by_name() {
    use wire::principal::Kind;
    let who = |kind: Kind, name: &str, groups: Vec<String>, site: &str| {
        let principal = wire::Principal { kind: kind.into(), name: name.into(), groups, site: site.into() };
        opening(|o| o.principal = Some(principal))
    };
    let groups = |count: usize| (0..count).map(|i| format!("g{i}")).collect::<Vec<_>>();
    assert_eq!(field(who(Kind::Unspecified, "a", vec![], "")), "principal");
    assert_eq!(field(who(Kind::User, "", vec![], "")), "user");
    assert_eq!(field(who(Kind::User, "a", vec!["A".into()], "")), "group");
    assert!(who(Kind::User, "a", groups(64), "").is_ok());
    assert_eq!(field(who(Kind::User, "a", groups(65), "")), "groups");
    assert_eq!(field(who(Kind::Edge, "", vec![], "")), "edge");
    assert_eq!(field(who(Kind::Edge, "a", vec![], "a.b")), "site");
    assert!(who(Kind::Door, &"d".repeat(1024), vec![], "").is_ok());
    assert_eq!(field(who(Kind::Door, &"d".repeat(1025), vec![], "")), "door");

    assert!(opening(|o| o.door = "d".repeat(1024)).is_ok());
    assert_eq!(field(opening(|o| o.door = "d".repeat(1025))), "door");
    for len in [1, 16, 23, 25, 32] {
        assert_eq!(field(opening(|o| o.trace = vec![1; len].into())), "trace");
    }
}

#[test]
fn impossible_answers_are_refused_by_name() {
    assert_eq!(field(Answer::decode(Bytes::new())), "answer");
    assert_eq!(field(Answer::decode(bytes("0a00"))), "edge");
    assert_eq!(field(Answer::decode(bytes("0a03 0a0141"))), "edge");
}

#[test]
fn what_is_no_protobuf_is_malformed() {
    for text in [
        "0a",                      // a length is missing
        "0a05 0a01",               // the body is shorter than it says
        "0a03 0a01ff",             // a name that is no UTF-8
        "0a02 0801",               // a number where the name should be
        "0f",                      // a wire type that does not exist
        "00",                      // field 0
        "ffffffffffffffffffff01",  // a number of more than 64 bits
        "0a ffffffffffffffffff01", // a body of 2^64 - 1 bytes
        "a306 0a00",               // a group that never ends
    ] {
        let malformed = |r: Result<(), FrameError>| matches!(r, Err(FrameError::Malformed(_)));
        assert!(malformed(EdgeToShard::decode(bytes(text)).map(drop)), "{text}");
        assert!(malformed(ShardToEdge::decode(bytes(text)).map(drop)), "{text}");
        assert!(malformed(Open::decode(bytes(text)).map(drop)), "{text}");
        assert!(malformed(Answer::decode(bytes(text)).map(drop)), "{text}");
    }
}

#[test]
fn a_frame_of_the_cap_passes_and_one_byte_more_is_refused_on_both_sides() {
    // Two tags, two lengths of three bytes.
    let bye = |len| EdgeToShard::Bye { reason: "x".repeat(len) }.encode();
    let longest = bye(MAX_EDGE_TO_SHARD - 8).unwrap();
    assert_eq!(longest.len(), HEADER + MAX_EDGE_TO_SHARD);
    assert_eq!(bye(MAX_EDGE_TO_SHARD - 7), too_long(MAX_EDGE_TO_SHARD + 1, MAX_EDGE_TO_SHARD));

    let renewed = |len| {
        let chain = vec![Bytes::from(vec![0; len])];
        ShardToEdge::Renewed(Ok(Renewal { chain, roots: vec![] })).encode()
    };
    assert_eq!(renewed(MAX_SHARD_TO_EDGE - 8).unwrap().len(), HEADER + MAX_SHARD_TO_EDGE);
    assert_eq!(renewed(MAX_SHARD_TO_EDGE - 7), too_long(MAX_SHARD_TO_EDGE + 1, MAX_SHARD_TO_EDGE));

    for max in [MAX_EDGE_TO_SHARD, MAX_SHARD_TO_EDGE, MAX_STREAM_HEAD] {
        let header = |len: usize| BytesMut::from(&u32::try_from(len).unwrap().to_be_bytes()[..]);
        assert_eq!(frame::take(&mut header(max), max), Ok(None));
        assert_eq!(frame::take(&mut header(max + 1), max), too_long(max + 1, max));
        assert_eq!(frame::take(&mut header(0xffff_ffff), max), too_long(0xffff_ffff, max));
    }
    assert_eq!(frame::take(&mut BytesMut::from(&[0; 4][..]), 0), Ok(Some(Bytes::new())), "an empty body is one");
}

fn too_long<T>(len: usize, max: usize) -> Result<T, FrameError> {
    Err(FrameError::TooLong { len, max })
}

#[test]
fn a_user_of_too_many_groups_is_an_error_of_the_opener() {
    let groups = vec![name(&"g".repeat(63)); 64];
    let open = Open { principal: Some(Principal::User { name: name("alice"), groups }), ..ssh() };
    assert!(matches!(open.encode(), Err(FrameError::TooLong { max: MAX_STREAM_HEAD, .. })));
}

#[test]
fn long_texts_are_cut_between_characters() {
    use wire::{edge_to_shard::Message as E, shard_to_edge::Message as S};
    let long = "ü".repeat(2000);
    let hello = wire::Hello { name: "a".into(), version: long.clone(), ..Default::default() };
    let Ok(Some(EdgeToShard::Hello(hello))) = from_edge(E::Hello(hello)) else { panic!("no Hello") };
    assert_eq!(hello.version, "ü".repeat(64));
    let bye = from_edge(E::Bye(wire::Bye { reason: long.clone() }));
    assert_eq!(bye, Ok(Some(EdgeToShard::Bye { reason: "ü".repeat(256) })));
    let refuse = from_shard(S::Refuse(wire::Refuse { code: 7, reason: long.clone(), retry_after_ms: 0 }));
    let expected = Refuse::because(CloseCode::ProtocolError, "ü".repeat(1024));
    assert_eq!(refuse, Ok(Some(ShardToEdge::Refuse(expected))));
    let answer = Answer::Refused(Refusal::because(RefuseCode::Internal, format!("a{long}")));
    let cut = Answer::decode(body(answer.encode(), MAX_STREAM_HEAD)).unwrap();
    assert_eq!(cut, Answer::Refused(Refusal::because(RefuseCode::Internal, format!("a{}", "ü".repeat(511)))));
}

#[test]
fn a_time_that_is_too_long_to_say_becomes_the_longest_one() {
    let drain = |time| ShardToEdge::Drain { reconnect_in: time, deadline: time, candidates: vec![] };
    assert_eq!(drain(Duration::MAX).encode(), drain(LONGEST).encode());
    let refused = |time| {
        let retry_after = Some(time);
        Answer::Refused(Refusal { retry_after, ..Refusal::because(RefuseCode::Draining, "") }).encode()
    };
    assert_eq!(refused(Duration::MAX), refused(LONGEST));
    // Zero is how the wire says that the code decides.
    let at_once = Answer::decode(refused(Duration::ZERO).slice(HEADER..));
    assert_eq!(at_once, Ok(Answer::Refused(Refusal::because(RefuseCode::Draining, ""))));
}

#[test]
fn of_a_message_said_twice_the_last_counts() {
    let twice = bytes("1a09 09 0100000000000000  1a09 09 0200000000000000");
    assert_eq!(EdgeToShard::decode(twice), Ok(Some(EdgeToShard::Ping(2))));
    assert_eq!(EdgeToShard::decode(bytes("0a03 0a0161  2a00")), Ok(Some(EdgeToShard::Bye { reason: String::new() })));
}

#[test]
fn the_example_in_the_document_is_on_the_wire() {
    let document = include_str!("../../docs/protocol.md");
    let frames: Vec<Bytes> = document
        .split("```hex\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap_or_default())
        .map(|block| bytes(&block.lines().filter_map(|line| line.split('|').next()).collect::<String>()))
        .collect();
    assert_eq!(frames.len(), 5);
    let golden = |text: &str, frame: &Bytes| bytes(text) == *frame;
    assert_eq!(frames[..2], [datagram::framed(b"abc"), datagram::tagged(1032, b"abc")]);
    assert!(edge_to_shard().iter().any(|(_, text)| golden(text, &frames[2])));
    assert!(opens().iter().any(|(_, text)| golden(text, &frames[3])));
    assert!(answers().iter().any(|(_, text)| golden(text, &frames[4])));
}

#[test]
fn every_tag_of_a_datagram() {
    for (flow, tag) in [
        (0, "00"),
        (0x3f, "3f"),
        (0x40, "4040"),
        (0x3fff, "7fff"),
        (0x4000, "80004000"),
        (0x3fff_ffff, "bfffffff"),
        (0x4000_0000, "c000000040000000"),
        ((1 << 62) - 1, "ffffffffffffffff"),
    ] {
        let wire = datagram::tagged(flow, b"!");
        assert_eq!(wire, bytes(&format!("{tag} 21")));
        assert_eq!(datagram::untag(wire), Some((flow, Bytes::from_static(b"!"))));
    }
    // A number that is longer than it has to be is the same number.
    assert_eq!(datagram::untag(bytes("4001 21")), Some((1, Bytes::from_static(b"!"))));
    assert_eq!(datagram::framed(b""), bytes("0000"));
}
