//! One line for each thing that may be found, and the word for it.

use runtime::link::EndCause;

use super::*;

fn own() -> CertFacts {
    CertFacts {
        identity: "spiffe://mesh.test/edge/shop-1".parse().unwrap(),
        serial: "1".into(),
        not_before: 0,
        not_after: 90_000,
        groups: vec![],
        site: None,
    }
}

fn peer() -> SocketAddr {
    "192.0.2.1:7400".parse().unwrap()
}

fn ended(cause: EndCause) -> Result<Through, LinkEnd> {
    Err(LinkEnd::new(cause, "why"))
}

fn through(rtt: u64) -> Result<Through, LinkEnd> {
    let [took, rtt] = [2 * rtt, rtt].map(Duration::from_millis);
    Ok(Through { shard: "shard-1".into(), took, rtt })
}

#[test]
fn every_end_of_a_handshake_has_its_word() {
    use EndCause as E;
    use proto::code::CloseCode as C;
    for (cause, word, class) in [
        (E::TimedOut, Word::Blocked, "blocked"),
        (E::NoRoute, Word::Blocked, "no-route"),
        (E::NobodyListens, Word::Rejected, "rejected"),
        (E::Transport, Word::Rejected, "rejected"),
        (E::ProxyRefused, Word::Rejected, "proxy-refused"),
        (E::WrongCa, Word::Wrong, "wrong-ca"),
        (E::PeerExpired, Word::Wrong, "clock"),
        (E::Clock, Word::Wrong, "clock"),
        (E::Expired, Word::Wrong, "expired"),
        (E::Distrusted, Word::Wrong, "distrusted"),
        (E::Closed(C::Revoked), Word::Rejected, "revoked"),
        (E::Closed(C::Overloaded), Word::Rejected, "busy"),
    ] {
        let check = handshake(Carrier::Quic, "s:7400", peer(), &ended(cause));
        assert_eq!((check.what, check.verdict, check.class), ("udp", word, class), "{cause}");
        assert!(check.figure.contains(cause.slug()) && check.remedy.ends_with('.'), "{check:?}");
    }
    let good = handshake(Carrier::Tcp, "192.0.2.1:7400", peer(), &through(12));
    assert_eq!((good.what, good.verdict, good.of.as_str()), ("tcp", Word::Ok, "192.0.2.1:7400"));
    assert_eq!(good.figure, "12.0 ms round trip, 24.0 ms for the handshake with shard-1");
    assert_eq!(handshake(Carrier::Tcp, "s:7400", peer(), &through(600)).verdict, Word::Slow);
}

#[test]
fn names_certificates_and_sizes() {
    let of = |found, ms| Resolved { host: "s".into(), found, took: Duration::from_millis(ms) };
    let both = || Ok(vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()]);
    assert_eq!(name(&of(both(), 3)).figure, "3.0 ms (1 IPv4, 1 IPv6)");
    assert_eq!(name(&of(both(), 900)).verdict, Word::Slow);
    assert_eq!(name(&of(Err("no such host".into()), 1)).verdict, Word::Wrong);

    assert_eq!(certificate(&own(), 1000).verdict, Word::Ok);
    assert_eq!(certificate(&own(), 80_000).verdict, Word::Slow);
    assert_eq!(certificate(&own(), 90_001).class, "expired");
    assert_eq!(certificate(&own(), -5).class, "clock");

    let size = |payload, interface| sizes("s:1", peer(), Sizes { payload, most: 1452, interface });
    assert_eq!(size(1452, Some(1472)).verdict, Word::Ok);
    assert_eq!(size(1380, Some(1392)).verdict, Word::Ok, "a tunnel whose interface says so");
    assert_eq!(size(1232, Some(1472)).verdict, Word::Slow, "and one whose interface does not");
    assert_eq!(size(1440, None).verdict, Word::Ok);
}

#[test]
fn clocks_are_compared() {
    let control: HostPort = "control:7443".parse().unwrap();
    let told =
        |here: u64, there: i64| clock(&control, &TimeThere { here_ms: here, there, took: Duration::from_millis(20) });
    assert_eq!(told(1_000_000, 1000).verdict, Word::Ok);
    let behind = told(1_000_000, 1030);
    assert_eq!((behind.verdict, behind.figure.as_str()), (Word::Slow, "30 s behind control's"));
    let wrong = told(90_000_000, 1000);
    assert_eq!((wrong.verdict, wrong.class), (Word::Wrong, "clock"));
    assert!(wrong.figure.contains("ahead"), "{wrong:?}");
}

#[test]
fn one_sentence_says_what_it_comes_to() {
    let udp = |end| handshake(Carrier::Quic, "s:7400", peer(), &end);
    let tcp = |end| handshake(Carrier::Tcp, "s:7400", peer(), &end);
    let all_is_well = conclude(&[udp(through(5)), tcp(through(5))], true);
    assert_eq!((all_is_well.cause.as_str(), all_is_well.sentence.as_str()), ("none", "Edges work from here."));
    let no_udp = conclude(&[udp(ended(EndCause::TimedOut)), tcp(through(5))], true);
    assert_eq!(no_udp.cause, "udp-blocked");
    let nothing = conclude(&[udp(ended(EndCause::TimedOut)), tcp(ended(EndCause::TimedOut))], false);
    assert_eq!((nothing.cause.as_str(), nothing.reachable), ("blocked", false));
    let opened = conclude(&[udp(ended(EndCause::TimedOut)), tcp(ended(EndCause::WrongCa))], false);
    assert_eq!(opened.cause, "wrong-ca", "what somebody says explains more than silence");
    let no_tcp = conclude(&[udp(through(5)), tcp(ended(EndCause::NobodyListens))], true);
    assert_eq!(no_tcp.cause, "rejected");
    assert!(no_tcp.sentence.starts_with("Edges work from here, but tcp"), "{no_tcp:?}");
    assert_eq!(conclude(&[], false).cause, "no-shard");
}
