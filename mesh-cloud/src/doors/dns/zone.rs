//! The zone of the mesh: what is answered to a question. Pure, and fuzzed as a file of its own (`fuzz/src/door.rs`).

use std::net::IpAddr;

use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, OpCode, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{CNAME, NS, SOA},
    },
};

/// Most bytes of an answer over UDP, whatever the client takes: it fits into every path's packets (DNS flag day 2020).
pub(super) const MOST: u16 = 1232;
/// What a client takes that says nothing (RFC 1035, 4.2.1).
const LEAST: u16 = 512;
/// Most addresses in an answer.
const ADDRESSES: usize = 16;

/// What is known of a name below the domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// There is nobody of that name.
    Nobody,
    /// It leads there.
    Hosts(Vec<Host>),
    /// It cannot be said now.
    NotYet,
}

/// Where a shard is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    /// At an address.
    Ip(IpAddr),
    /// At what has this name.
    Name(String),
}

/// The zone.
#[derive(Clone, Debug)]
pub(super) struct Zone {
    /// Its name.
    apex: Name,
    /// Who answers for it.
    server: Name,
    /// For how long, in seconds, an answer may be kept.
    ttl: u32,
}

impl Zone {
    /// The zone of a domain.
    ///
    /// # Errors
    /// If that is no name.
    pub(super) fn new(domain: &str, ttl: u32) -> Result<Self, String> {
        let name = |text: &str| Name::from_ascii(text).map_err(|e| format!("{text:?} is no domain: {e}"));
        let mut apex = name(domain)?.to_lowercase();
        apex.set_fqdn(true);
        let server = name(&format!("ns.{apex}"))?;
        Ok(Self { apex, server, ttl })
    }

    /// Answers a question with at most as many bytes as the client takes, or as fit into a message over TCP. `look` knows
    /// the names below the domain, in lower case and without it. `None` if there is nothing to say.
    #[must_use]
    pub(super) fn answer(
        &self,
        question: &[u8],
        tcp: bool,
        serial: u32,
        look: impl Fn(&str) -> Found,
    ) -> Option<Vec<u8>> {
        let asked = match Message::from_vec(question) {
            Ok(asked) => asked,
            // Of what cannot be read there may still be a number to answer to.
            Err(_) => return malformed(question),
        };
        if asked.metadata.message_type != MessageType::Query {
            return None;
        }
        let mut answer = self.respond(&asked, serial, look);
        let most = asked.edns.as_ref().map_or(LEAST, |edns| edns.max_payload().clamp(LEAST, MOST));
        if asked.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(MOST).set_version(0);
            answer.set_edns(edns);
        }
        let bytes = answer.to_vec().ok()?;
        if tcp || bytes.len() <= usize::from(most) {
            return Some(bytes);
        }
        answer.truncate().to_vec().ok()
    }

    /// The answer that has no room, so that the client comes over TCP: for those who ask too often, too.
    #[must_use]
    pub(super) fn come_by_tcp(question: &[u8]) -> Option<Vec<u8>> {
        let asked = Message::from_vec(question).ok()?;
        if asked.metadata.message_type != MessageType::Query || asked.queries.len() != 1 {
            return None;
        }
        let mut answer = reply(&asked);
        answer.metadata.truncation = true;
        answer.to_vec().ok()
    }

    fn respond(&self, asked: &Message, serial: u32, look: impl Fn(&str) -> Found) -> Message {
        let mut answer = reply(asked);
        let mut refuse = |code| {
            answer.metadata.response_code = code;
            answer.clone()
        };
        if asked.metadata.op_code != OpCode::Query {
            return refuse(ResponseCode::NotImp);
        }
        if asked.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return refuse(ResponseCode::BADVERS);
        }
        let [query] = &asked.queries[..] else { return refuse(ResponseCode::FormErr) };
        let transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
        if query.query_class() != DNSClass::IN || !self.apex.zone_of(query.name()) || transfer {
            return refuse(ResponseCode::Refused);
        }
        answer.metadata.authoritative = true;
        let (name, kind) = (query.name().clone(), query.query_type());
        let record = |data| Record::from_rdata(name.clone(), self.ttl, data);
        let soa = Record::from_rdata(self.apex.clone(), self.ttl, RData::SOA(self.soa(serial)));
        let below = self.below(&name);
        if below.is_empty() {
            match kind {
                RecordType::SOA | RecordType::ANY => answer.answers.push(soa),
                RecordType::NS => answer.answers.push(record(RData::NS(NS(self.server.clone())))),
                _ => answer.authorities.push(soa),
            }
            return answer;
        }
        let hosts = match look(&below) {
            Found::Hosts(hosts) => hosts,
            Found::Nobody => {
                answer.metadata.response_code = ResponseCode::NXDomain;
                answer.authorities.push(soa);
                return answer;
            }
            Found::NotYet => {
                answer.metadata.authoritative = false;
                answer.metadata.response_code = ResponseCode::ServFail;
                return answer;
            }
        };
        answer.answers = addresses(&hosts, kind).into_iter().map(record).collect();
        if answer.answers.is_empty() {
            answer.authorities.push(soa);
        }
        answer
    }

    /// What stands before the domain, in lower case; a byte that no name has becomes one that none has either.
    fn below(&self, name: &Name) -> String {
        let count = usize::from(name.num_labels().saturating_sub(self.apex.num_labels()));
        let labels: Vec<_> =
            name.iter().take(count).map(|label| String::from_utf8_lossy(label).to_lowercase()).collect();
        labels.join(".")
    }

    fn soa(&self, serial: u32) -> SOA {
        let contact = Name::from_ascii("hostmaster").and_then(|name| name.append_domain(&self.apex));
        let contact = contact.unwrap_or_else(|_| self.apex.clone());
        SOA::new(self.server.clone(), contact, serial, 60, 30, 3600, self.ttl)
    }
}

/// An answer that says nothing yet.
fn reply(asked: &Message) -> Message {
    let mut answer = Message::response(asked.metadata.id, asked.metadata.op_code);
    answer.metadata = Metadata::response_from_request(&asked.metadata);
    answer.queries.clone_from(&asked.queries);
    answer
}

/// The records of a kind. If all that is known of a shard is its name, that is the answer whatever was asked for.
fn addresses(hosts: &[Host], kind: RecordType) -> Vec<RData> {
    let (wants4, wants6) = match kind {
        RecordType::A => (true, false),
        RecordType::AAAA => (false, true),
        RecordType::ANY => (true, true),
        _ => (false, false),
    };
    let mut known = false;
    let mut data = Vec::new();
    for host in hosts {
        let one = match host {
            Host::Ip(ip) => {
                known = true;
                match ip.to_canonical() {
                    IpAddr::V4(ip) => wants4.then(|| RData::A(ip.into())),
                    IpAddr::V6(ip) => wants6.then(|| RData::AAAA(ip.into())),
                }
            }
            Host::Name(_) => None,
        };
        data.extend(one.filter(|one| !data.contains(one)));
    }
    data.truncate(ADDRESSES);
    if known {
        return data;
    }
    let name = hosts.iter().find_map(|host| match host {
        Host::Name(name) => Name::from_ascii(name).ok(),
        Host::Ip(_) => None,
    });
    name.map(|mut name| {
        name.set_fqdn(true);
        RData::CNAME(CNAME(name))
    })
    .into_iter()
    .collect()
}

/// `FORMERR`, if what came is a question by its header.
fn malformed(question: &[u8]) -> Option<Vec<u8>> {
    let [high, low, flags, ..] = *question.first_chunk::<12>()?;
    let id = u16::from_be_bytes([high, low]);
    (flags & 0x80 == 0).then(|| Message::error_msg(id, OpCode::Query, ResponseCode::FormErr).to_vec().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Query;

    use super::*;

    fn look(name: &str) -> Found {
        match name {
            "shop-1" | "web.shop-1" => Found::Hosts(vec![
                Host::Ip("192.0.2.1".parse().unwrap()),
                Host::Ip("::ffff:192.0.2.1".parse().unwrap()),
                Host::Ip("2001:db8::1".parse().unwrap()),
            ]),
            "named" => Found::Hosts(vec![Host::Name("shard-1.example.org".into())]),
            "many" => Found::Hosts((0..=255).map(|i| Host::Ip([192, 0, 2, i].into())).collect()),
            "later" => Found::NotYet,
            _ => Found::Nobody,
        }
    }

    fn question(name: &str, kind: RecordType) -> Message {
        let mut asked = Message::new(4711, MessageType::Query, OpCode::Query);
        asked.metadata.recursion_desired = true;
        asked.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        asked
    }

    fn ask(asked: &Message) -> Message {
        let zone = Zone::new("mesh.local", 5).unwrap();
        Message::from_vec(&zone.answer(&asked.to_vec().unwrap(), false, 7, look).unwrap()).unwrap()
    }

    fn told(name: &str, kind: RecordType) -> (ResponseCode, Vec<String>, usize) {
        let answer = ask(&question(name, kind));
        assert_eq!((answer.metadata.id, answer.metadata.recursion_available), (4711, false));
        let records = answer.answers.iter().map(|r| format!("{} {}", r.record_type(), r.data)).collect();
        (answer.metadata.response_code, records, answer.authorities.len())
    }

    #[test]
    fn edges_lead_to_shards() {
        use RecordType as T;
        use ResponseCode as C;
        for (name, kind, code, records) in [
            ("shop-1.mesh.local.", T::A, C::NoError, vec!["A 192.0.2.1"]),
            ("SHOP-1.Mesh.LOCAL.", T::AAAA, C::NoError, vec!["AAAA 2001:db8::1"]),
            ("web.shop-1.mesh.local.", T::A, C::NoError, vec!["A 192.0.2.1"]),
            ("shop-1.mesh.local.", T::TXT, C::NoError, vec![]),
            ("named.mesh.local.", T::A, C::NoError, vec!["CNAME shard-1.example.org."]),
            ("nobody.mesh.local.", T::A, C::NXDomain, vec![]),
            ("later.mesh.local.", T::A, C::ServFail, vec![]),
            ("mesh.local.", T::NS, C::NoError, vec!["NS ns.mesh.local."]),
            ("mesh.local.", T::A, C::NoError, vec![]),
            ("example.org.", T::A, C::Refused, vec![]),
            ("notmesh.local.", T::A, C::Refused, vec![]),
            ("local.", T::A, C::Refused, vec![]),
            ("mesh.local.", T::AXFR, C::Refused, vec![]),
        ] {
            let (got, got_records, authorities) = told(name, kind);
            assert_eq!((got, got_records), (code, records.iter().map(ToString::to_string).collect()), "{name} {kind}");
            let says_nothing = records.is_empty() && matches!(code, C::NoError | C::NXDomain);
            assert_eq!(authorities, usize::from(says_nothing), "{name} {kind}: a SOA tells how long that holds");
        }
        let (_, soa, _) = told("mesh.local.", T::SOA);
        assert!(soa[0].starts_with("SOA ns.mesh.local. hostmaster.mesh.local. 7 "), "{soa:?}");
    }

    #[test]
    fn what_is_too_long_for_udp_is_asked_for_again() {
        let zone = Zone::new("mesh.local", 5).unwrap();
        let asked = question("many.mesh.local.", RecordType::A).to_vec().unwrap();
        assert!(zone.answer(&asked, false, 7, look).unwrap().len() <= 512, "sixteen addresses fit");
        let long = |_: &str| Found::Hosts(vec![Host::Name(vec!["a".repeat(60); 4].join("."))]);
        let mut asked = question(&format!("{}.mesh.local.", vec!["b".repeat(60); 3].join(".")), RecordType::A);
        for _ in 0..2 {
            let udp = Message::from_vec(&zone.answer(&asked.to_vec().unwrap(), false, 7, long).unwrap()).unwrap();
            let tcp = Message::from_vec(&zone.answer(&asked.to_vec().unwrap(), true, 7, long).unwrap()).unwrap();
            assert_eq!((tcp.answers.len(), tcp.metadata.truncation), (1, false));
            assert_eq!(udp.edns.is_some(), asked.edns.is_some());
            let fits = zone.answer(&asked.to_vec().unwrap(), true, 7, long).unwrap().len() <= 512;
            assert!(fits || asked.edns.is_some() || udp.metadata.truncation);
            let mut edns = Edns::new();
            edns.set_max_payload(4096);
            asked.set_edns(edns);
        }
        let short = Zone::come_by_tcp(&asked.to_vec().unwrap()).unwrap();
        assert!(short.len() <= asked.to_vec().unwrap().len());
        assert!(Message::from_vec(&short).unwrap().metadata.truncation);
    }

    #[test]
    fn what_is_no_question_gets_no_answer_or_says_what_is_wrong() {
        let zone = Zone::new("mesh.local", 5).unwrap();
        let answer = |bytes: &[u8]| zone.answer(bytes, false, 7, look);
        assert_eq!(answer(b""), None);
        assert_eq!(answer(&[0; 11]), None);
        let mut response = question("shop-1.mesh.local.", RecordType::A);
        response.metadata.message_type = MessageType::Response;
        assert_eq!(answer(&response.to_vec().unwrap()), None, "two servers would talk for ever");
        let code = |asked: &Message| ask(asked).metadata.response_code;
        let mut update = question("shop-1.mesh.local.", RecordType::A);
        update.metadata.op_code = OpCode::Status;
        assert_eq!(code(&update), ResponseCode::NotImp);
        let mut none = question("shop-1.mesh.local.", RecordType::A);
        none.queries.clear();
        assert_eq!(code(&none), ResponseCode::FormErr);
        let cut = question("shop-1.mesh.local.", RecordType::A).to_vec().unwrap();
        let error = Message::from_vec(&answer(&cut[..cut.len() - 3]).unwrap()).unwrap();
        assert_eq!((error.metadata.id, error.metadata.response_code), (4711, ResponseCode::FormErr));
    }
}
