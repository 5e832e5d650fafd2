//! What the DNS door says: from the bytes of a query to those of its answer, and nothing of sockets.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
};

use hickory_proto::{
    op::{Edns, Header, HeaderCounts, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{CNAME, NS, SOA},
    },
    serialize::binary::{BinDecodable, BinDecoder},
};
use parking_lot::Mutex;
use proto::{
    id::{EdgeId, ServiceName},
    ring::Member,
    target::HostPort,
};

use crate::state::MeshState;

/// Seconds for which an answer may be kept, also that there is none. A shard that leaves the ring goes on for longer.
const TTL: u32 = 10;
/// Shards that an answer names, and addresses of one kind.
const MOST: usize = 4;
/// Records besides the question that a query may carry: OPT, and a signature.
const EXTRAS: u16 = 2;
/// Bytes that every resolver takes over UDP (RFC 1035, 4.2.1), and those that get through without fragments.
const PLAIN: usize = 512;
const PAYLOAD: u16 = 1232;
/// Of the SOA record, in seconds: nobody copies the zone, so these are only what is usual.
const REFRESH: i32 = 3600;
const RETRY: i32 = 600;
const EXPIRE: i32 = 86_400;
/// The name of the name servers below the domain. An edge that has it has the same addresses.
const SERVERS: &str = "ns";

/// What became of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Answered,
    NoData,
    NoName,
    Refused,
    Malformed,
    Unsupported,
    EdnsVersion,
    Unavailable,
}

impl Outcome {
    /// As metrics say it.
    pub(super) const fn slug(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::NoData => "no-data",
            Self::NoName => "no-name",
            Self::Refused => "refused",
            Self::Malformed => "malformed",
            Self::Unsupported | Self::EdnsVersion => "unsupported",
            Self::Unavailable => "unavailable",
        }
    }

    const fn code(self) -> ResponseCode {
        match self {
            Self::Answered | Self::NoData => ResponseCode::NoError,
            Self::NoName => ResponseCode::NXDomain,
            Self::Refused => ResponseCode::Refused,
            Self::Malformed => ResponseCode::FormErr,
            Self::Unsupported => ResponseCode::NotImp,
            Self::EdnsVersion => ResponseCode::BADVERS,
            Self::Unavailable => ResponseCode::ServFail,
        }
    }
}

/// Where a name leads.
enum Way {
    Addresses(Vec<IpAddr>),
    /// The shards are known by host name only: whoever asks is to look there.
    Alias(Name),
}

/// The zone: `<domain>` and all below.
#[derive(Debug)]
pub(super) struct Zone {
    domain: Name,
    /// The same without its final dot, in small letters.
    text: String,
    /// Said instead of the shards' own addresses.
    answers: Vec<IpAddr>,
    /// Names between the domain and edges whose names have dots, as of a revision: there is something below them.
    between: Mutex<(u64, HashSet<String>)>,
}

impl Zone {
    /// # Errors
    /// If `domain` is not a name.
    pub(super) fn new(domain: &str, answers: &[IpAddr]) -> anyhow::Result<Self> {
        let name = absolute(domain)?.to_lowercase();
        let text = name.to_ascii().trim_end_matches('.').to_owned();
        let answers = answers.iter().map(IpAddr::to_canonical).collect();
        Ok(Self { domain: name, text, answers, between: Mutex::default() })
    }

    /// The answer to a query, if it gets one, and what became of it. Over UDP it fits into what the client takes.
    pub(super) fn answer(&self, query: &[u8], state: &MeshState, udp: bool) -> (Option<Vec<u8>>, Outcome) {
        let mut decoder = BinDecoder::new(query);
        // An answer to an answer is how two servers talk for ever.
        let Ok(Header { metadata, counts }) = Header::read(&mut decoder) else { return (None, Outcome::Malformed) };
        if metadata.message_type == MessageType::Response {
            return (None, Outcome::Malformed);
        }
        let mut message = Message::response(metadata.id, metadata.op_code);
        message.metadata = Metadata::response_from_request(&metadata);
        let outcome = if metadata.op_code == OpCode::Query {
            question(&mut decoder, counts).map_or(Outcome::Malformed, |(query, edns)| {
                let version = edns.as_ref().map(Edns::version);
                message.edns = edns;
                let outcome = match version {
                    None | Some(0) => self.look_up(&query, state, &mut message),
                    Some(_) => Outcome::EdnsVersion,
                };
                message.queries.push(query);
                outcome
            })
        } else {
            Outcome::Unsupported
        };
        message.metadata.response_code = outcome.code();
        let room = message.edns.as_ref().map_or(PLAIN, |edns| usize::from(edns.max_payload().min(PAYLOAD)).max(PLAIN));
        if message.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(PAYLOAD);
            message.edns = Some(edns);
        }
        match message.to_vec() {
            // Only with a domain and host names near the longest that there are.
            Ok(long) if udp && long.len() > room => (message.truncate().to_vec().ok(), outcome),
            Ok(answer) => (Some(answer), outcome),
            Err(_) => (None, Outcome::Malformed),
        }
    }

    fn look_up(&self, query: &Query, state: &MeshState, message: &mut Message) -> Outcome {
        let (name, kind) = (&query.name, query.query_type);
        let copies = matches!(kind, RecordType::AXFR | RecordType::IXFR);
        if copies || query.query_class != DNSClass::IN || !self.domain.zone_of(name) {
            return Outcome::Refused;
        }
        // Before control's first word nobody knows which names there are.
        if state.revision == 0 {
            return Outcome::Unavailable;
        }
        let bare = name.to_ascii().to_ascii_lowercase();
        let below = bare.trim_end_matches('.').strip_suffix(&self.text).unwrap_or_default().trim_end_matches('.');
        let found = if below.is_empty() {
            Some(self.apex(kind, state))
        } else if let Some(edge) = edge_of(below, state) {
            self.way(state.ring.preference(&edge)).map(|way| records(name, kind, way))
        } else if below == SERVERS {
            self.way(state.ring.members()).map(|way| records(name, kind, way))
        } else {
            message.metadata.authoritative = true;
            message.authorities.push(self.soa(state));
            return if self.is_between(below, state) { Outcome::NoData } else { Outcome::NoName };
        };
        // Another shard may know more.
        let Some(found) = found else { return Outcome::Unavailable };
        message.metadata.authoritative = true;
        if found.is_empty() {
            message.authorities.push(self.soa(state));
            return Outcome::NoData;
        }
        message.answers = found;
        Outcome::Answered
    }

    /// What the domain itself has.
    fn apex(&self, kind: RecordType, state: &MeshState) -> Vec<Record> {
        if matches!(kind, RecordType::SOA | RecordType::ANY) {
            return vec![self.soa(state)];
        }
        if kind != RecordType::NS {
            return Vec::new();
        }
        // A name server is never an alias (RFC 2181, 10.3).
        let server = match self.way(state.ring.members()) {
            Some(Way::Alias(host)) => host,
            Some(Way::Addresses(_)) | None => self.server(),
        };
        vec![record(&self.domain, RData::NS(NS(server)))]
    }

    fn server(&self) -> Name {
        self.domain.prepend_label(SERVERS).unwrap_or_else(|_| self.domain.clone())
    }

    fn soa(&self, state: &MeshState) -> Record {
        let person = self.domain.prepend_label("hostmaster").unwrap_or_else(|_| self.domain.clone());
        // Serial numbers wrap around (RFC 1982).
        #[allow(clippy::cast_possible_truncation, reason = "so that they do")]
        let serial = state.revision as u32;
        let soa = SOA::new(self.server(), person, serial, REFRESH, RETRY, EXPIRE, TTL);
        record(&self.domain, RData::SOA(soa))
    }

    /// Where shards are reached, the best one first; `None` if that is not known.
    fn way<'a>(&self, shards: impl Iterator<Item = &'a Member>) -> Option<Way> {
        if !self.answers.is_empty() {
            return Some(Way::Addresses(self.answers.clone()));
        }
        let (mut addresses, mut alias) = (Vec::new(), None);
        for place in shards.take(MOST).flat_map(|member| &member.addresses) {
            if let Ok(address) = place.parse::<SocketAddr>() {
                addresses.push(address.ip().to_canonical());
            } else if alias.is_none()
                && let Ok(HostPort { host, .. }) = place.parse()
                && host.contains('.')
            {
                alias = absolute(&host).ok();
            }
        }
        if addresses.is_empty() { alias.map(Way::Alias) } else { Some(Way::Addresses(addresses)) }
    }

    fn is_between(&self, below: &str, state: &MeshState) -> bool {
        let mut between = self.between.lock();
        if between.0 != state.revision {
            let dotted = state.edges.keys().filter_map(|edge| edge.as_str().split_once('.'));
            let above = |(_, rest): (&str, &str)| rest.to_owned();
            let mut all = HashSet::new();
            for mut rest in dotted.map(above) {
                while let Some(next) = rest.split_once('.').map(above) {
                    all.insert(std::mem::replace(&mut rest, next));
                }
                all.insert(rest);
            }
            *between = (state.revision, all);
        }
        between.1.contains(below)
    }
}

/// What a query asks, and its OPT record; `None` if it is not one question and little else. The counts are looked at
/// before anything is read, so that they never decide how much memory is taken.
fn question(decoder: &mut BinDecoder<'_>, counts: HeaderCounts) -> Option<(Query, Option<Edns>)> {
    let HeaderCounts { queries, answers, authorities, additionals } = counts;
    if queries != 1 || answers != 0 || authorities != 0 || additionals > EXTRAS {
        return None;
    }
    let query = Query::read(decoder).ok()?;
    let (_, edns, _) = Message::read_records(decoder, usize::from(additionals), true, OpCode::Query).ok()?;
    Some((query, edns))
}

/// The edge that a name means, with a service in front or without.
fn edge_of(below: &str, state: &MeshState) -> Option<EdgeId> {
    let known = |name: &str| name.parse().ok().filter(|edge| state.edges.contains_key(edge));
    known(below).or_else(|| {
        let (service, edge) = below.split_once('.')?;
        service.parse::<ServiceName>().ok()?;
        known(edge)
    })
}

/// Those of a way that are of a kind. For `ANY` one kind of address is enough (RFC 8482).
fn records(name: &Name, kind: RecordType, way: Way) -> Vec<Record> {
    let addresses = match way {
        Way::Alias(host) => return vec![record(name, RData::CNAME(CNAME(host)))],
        Way::Addresses(addresses) => addresses,
    };
    let mut seen = HashSet::new();
    let any = if addresses.iter().all(IpAddr::is_ipv6) { RecordType::AAAA } else { RecordType::A };
    let kind = if kind == RecordType::ANY { any } else { kind };
    let asked = |address: &&IpAddr| kind == if address.is_ipv6() { RecordType::AAAA } else { RecordType::A };
    let data = |address: &IpAddr| match *address {
        IpAddr::V4(address) => RData::A(address.into()),
        IpAddr::V6(address) => RData::AAAA(address.into()),
    };
    let found = addresses.iter().filter(asked).filter(|address| seen.insert(**address));
    found.take(MOST).map(|address| record(name, data(address))).collect()
}

fn record(name: &Name, data: RData) -> Record {
    Record::from_rdata(name.clone(), TTL, data)
}

/// A name that does not depend on where it is asked.
fn absolute(text: &str) -> anyhow::Result<Name> {
    let mut name = Name::from_ascii(text)?;
    name.set_fqdn(true);
    Ok(name)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use proptest::prelude::*;
    use proto::{api::WatchEvent, ring::RingSpec};

    use super::*;

    fn state(edges: &[&str], members: &[(&str, &[&str])]) -> MeshState {
        let members = members.iter().map(|(shard, addresses)| Member {
            shard: shard.parse().unwrap(),
            addresses: addresses.iter().map(|&a| a.into()).collect(),
            weight: 100,
        });
        MeshState::default().after(WatchEvent {
            revision: 7,
            edges: Some(edges.iter().map(|edge| (edge.parse().unwrap(), None)).collect::<BTreeMap<_, _>>()),
            ring: Some(RingSpec { epoch: 1, members: members.collect() }),
            ..WatchEvent::default()
        })
    }

    fn zone(answers: &[&str]) -> Zone {
        Zone::new("Mesh.test", &answers.iter().map(|a| a.parse().unwrap()).collect::<Vec<_>>()).unwrap()
    }

    fn query(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(9, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    fn ask(zone: &Zone, state: &MeshState, query: &Message) -> Message {
        let query = query.to_vec().unwrap();
        let answer = Message::from_vec(&zone.answer(&query, state, true).0.unwrap()).unwrap();
        assert_eq!((answer.id, answer.message_type, answer.truncation), (9, MessageType::Response, false));
        assert!(!answer.recursion_available);
        answer
    }

    /// Code, whether authoritative, what is answered, and whether a SOA record says for how long there is nothing.
    fn said(zone: &Zone, state: &MeshState, name: &str, kind: RecordType) -> (ResponseCode, bool, Vec<String>, bool) {
        let answer = ask(zone, state, &query(name, kind));
        assert!(answer.all_sections().all(|r| r.ttl == TTL));
        let soa = answer.authorities.iter().any(|r| r.record_type() == RecordType::SOA);
        let data = answer.answers.iter().map(|r| r.data.to_string()).collect();
        (answer.response_code, answer.authoritative, data, soa)
    }

    const OK: ResponseCode = ResponseCode::NoError;

    #[test]
    fn edges_and_their_services_are_where_shards_are() {
        let state =
            state(&["shop-1"], &[("s1", &["192.0.2.1:7400", "[2001:db8::1]:7400"]), ("s2", &["192.0.2.2:7400"])]);
        let zone = zone(&[]);
        for name in ["shop-1.mesh.test.", "web.shop-1.mesh.test.", "WEB.Shop-1.MESH.test.", "ns.mesh.test."] {
            let (code, authoritative, mut found, soa) = said(&zone, &state, name, RecordType::A);
            found.sort();
            assert_eq!((code, authoritative, soa), (OK, true, false), "{name}");
            assert_eq!(found, ["192.0.2.1", "192.0.2.2"], "{name}");
            assert_eq!(said(&zone, &state, name, RecordType::AAAA), (OK, true, vec!["2001:db8::1".into()], false));
            assert_eq!(said(&zone, &state, name, RecordType::TXT), (OK, true, vec![], true), "{name}");
            assert_eq!(said(&zone, &state, name, RecordType::ANY).2.len(), 2, "{name}");
        }
        // The owner comes first, and the name comes back as it was asked.
        let owner = state.ring.owner(&"shop-1".parse().unwrap()).unwrap().addresses[0].clone();
        let answer = ask(&zone, &state, &query("Shop-1.mesh.test.", RecordType::A));
        assert!(owner.starts_with(&answer.answers[0].data.to_string()), "{owner}");
        assert_eq!(answer.answers[0].name.to_ascii(), "Shop-1.mesh.test.");
    }

    #[test]
    fn what_is_nobodys_is_said_to_be_so_and_what_is_others_is_refused() {
        let state = state(&["shop-1", "node.rack.site"], &[("s1", &["192.0.2.1:7400"])]);
        let zone = zone(&[]);
        let one = || vec!["192.0.2.1".to_owned()];
        for name in ["shop-2.mesh.test.", "a.b.shop-1.mesh.test.", "_x.shop-1.mesh.test.", "a\\.b.mesh.test."] {
            let none = (ResponseCode::NXDomain, true, vec![], true);
            assert_eq!(said(&zone, &state, name, RecordType::A), none, "{name}");
        }
        for name in ["node.rack.site.mesh.test.", "web.node.rack.site.mesh.test."] {
            assert_eq!(said(&zone, &state, name, RecordType::A), (OK, true, one(), false), "{name}");
        }
        // Resolvers that ask from the top downwards must not be told that there is nothing further down.
        for name in ["site.mesh.test.", "rack.site.mesh.test.", "mesh.test."] {
            assert_eq!(said(&zone, &state, name, RecordType::A), (OK, true, vec![], true), "{name}");
        }
        for name in ["example.org.", "xmesh.test.", "test.", ".", "a\\.mesh.test."] {
            assert_eq!(
                said(&zone, &state, name, RecordType::A),
                (ResponseCode::Refused, false, vec![], false),
                "{name}"
            );
        }
        assert_eq!(said(&zone, &state, "mesh.test.", RecordType::AXFR).0, ResponseCode::Refused);
        assert_eq!(said(&zone, &state, "mesh.test.", RecordType::NS).2, ["ns.mesh.test."]);
        let soa = said(&zone, &state, "mesh.test.", RecordType::SOA).2;
        assert!(soa[0].starts_with("ns.mesh.test. hostmaster.mesh.test. 7 "), "{soa:?}");
    }

    #[test]
    fn shards_without_addresses_are_named_and_those_that_are_not_known_are_asked_elsewhere() {
        let named = state(&["shop-1"], &[("s1", &["s1.example.org:7400"])]);
        let host = || (OK, true, vec!["s1.example.org.".to_owned()], false);
        for kind in [RecordType::A, RecordType::AAAA, RecordType::TXT] {
            assert_eq!(said(&zone(&[]), &named, "shop-1.mesh.test.", kind), host());
        }
        assert_eq!(said(&zone(&[]), &named, "mesh.test.", RecordType::NS), host());
        let given = ["198.51.100.7", "::ffff:198.51.100.7", "2001:db8::7"];
        assert_eq!(said(&zone(&given), &named, "shop-1.mesh.test.", RecordType::A).2, ["198.51.100.7"]);
        for unknown in [state(&["shop-1"], &[]), state(&["shop-1"], &[("s1", &["pod-7:7400"])]), MeshState::default()] {
            let code = said(&zone(&[]), &unknown, "shop-1.mesh.test.", RecordType::A).0;
            assert_eq!(code, ResponseCode::ServFail);
        }
    }

    #[test]
    fn edns_is_understood_and_other_requests_are_not() {
        let state = state(&["shop-1"], &[("s1", &["192.0.2.1:7400"])]);
        let zone = zone(&[]);
        let mut message = query("shop-1.mesh.test.", RecordType::A);
        assert!(ask(&zone, &state, &message).edns.is_none());
        message.edns = Some(Edns::new());
        assert_eq!(ask(&zone, &state, &message).edns.unwrap().max_payload(), PAYLOAD);
        message.edns.as_mut().unwrap().set_version(1);
        let answer = ask(&zone, &state, &message);
        // TSIG gives the same number another name.
        let [said, wanted] = [answer.response_code, ResponseCode::BADVERS].map(u16::from);
        assert_eq!((said, answer.edns.unwrap().version()), (wanted, 0));
        message.edns = None;
        message.metadata.op_code = OpCode::Update;
        assert_eq!(ask(&zone, &state, &message).response_code, ResponseCode::NotImp);
        message.metadata.op_code = OpCode::Query;
        message.queries.push(message.queries[0].clone());
        assert_eq!(ask(&zone, &state, &message).response_code, ResponseCode::FormErr);
        message.metadata.message_type = MessageType::Response;
        assert_eq!(zone.answer(&message.to_vec().unwrap(), &state, true), (None, Outcome::Malformed));
        // A count that lies costs nothing, and no piece of a query is more than malformed.
        let whole = query("shop-1.mesh.test.", RecordType::A).to_vec().unwrap();
        let mut liar = whole.clone();
        liar[4..6].fill(0xff);
        assert_eq!(zone.answer(&liar, &state, true).1, Outcome::Malformed);
        for end in 0..whole.len() {
            assert_eq!(zone.answer(&whole[..end], &state, true).1, Outcome::Malformed, "{end}");
        }
    }

    #[test]
    fn answers_are_small() {
        let places: Vec<_> = (1..9).map(|i| [format!("[2001:db8::{i}]:1"), format!("192.0.2.{i}:1")]).collect();
        let places: Vec<_> = places.iter().map(|p| [p[0].as_str(), p[1].as_str()]).collect();
        let names: Vec<_> = (0..places.len()).map(|i| format!("s{i}")).collect();
        let members: Vec<_> = names.iter().zip(&places).map(|(n, p)| (n.as_str(), &p[..])).collect();
        let edge = ["x".repeat(60).as_str(), &"y".repeat(60), &"z".repeat(60)].join(".");
        let state = state(&[&edge], &members);
        for kind in [RecordType::AAAA, RecordType::TXT] {
            let query = query(&format!("web.{edge}.mesh.test."), kind).to_vec().unwrap();
            let (answer, outcome) = zone(&[]).answer(&query, &state, true);
            let answer = answer.unwrap();
            assert!(answer.len() <= query.len() + 150 && answer[2] & 2 == 0, "{outcome:?}: {} bytes", answer.len());
        }
        let whole = Arc::new(state);
        assert_eq!(said(&zone(&[]), &whole, &format!("{edge}.mesh.test."), RecordType::A).2.len(), MOST);
    }

    proptest! {
        #[test]
        fn whatever_comes_gets_a_small_answer_or_none(
            noise in prop::collection::vec(any::<u8>(), 0..700),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let (zone, state) = (zone(&[]), state(&["shop-1"], &[("s1", &["192.0.2.1:7400"])]));
            let mut changed = query("shop-1.mesh.test.", RecordType::A).to_vec().unwrap();
            changed.extend(&noise);
            for (at, to) in changes {
                let at = at.index(changed.len());
                changed[at] = to;
            }
            for query in [&noise, &changed] {
                let (answer, outcome) = zone.answer(query, &state, true);
                let length = answer.map_or(0, |answer| answer.len());
                prop_assert!(length <= query.len().max(PLAIN), "{outcome:?}: {length} bytes");
            }
        }
    }
}
