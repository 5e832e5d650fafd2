//! From what was found to a word, a figure and a remedy. Pure.

use std::{net::SocketAddr, time::Duration};

use proto::target::HostPort;
use runtime::{
    api::TimeThere,
    cert::CertFacts,
    link::{Carrier, LinkEnd},
};
use serde::Serialize;

use super::{Resolved, Sizes, Through};
use crate::class::Class;

/// A name that takes longer is slow.
const SLOW_NAME: Duration = Duration::from_millis(500);
/// A round trip that takes longer is slow.
const SLOW_WAY: Duration = Duration::from_millis(400);
/// Difference of two clocks that is wrong, in milliseconds; half of it is slow to heal and worth a word.
const SKEW: i64 = 60_000;
/// Payloads that are so much smaller than what the interface takes are worth a word: the search stops that close.
const CLOSE: u16 = 24;
/// Less than so much of a certificate's life left is worth a word: it should have been renewed at a third.
const LITTLE_LEFT: i64 = 5;

/// A verdict in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Word {
    /// It works.
    Ok,
    /// It works, and not well.
    Slow,
    /// Nothing comes back.
    Blocked,
    /// Somebody says no.
    Rejected,
    /// Something is not as it must be: trust, time, a name.
    Wrong,
    /// It cannot be told.
    Unknown,
}

impl Word {
    /// The word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Slow => "slow",
            Self::Blocked => "blocked",
            Self::Rejected => "rejected",
            Self::Wrong => "wrong",
            Self::Unknown => "unknown",
        }
    }
}

/// One check.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// `certificate`, `dns`, `udp`, `tcp`, `proxy`, `mtu`, `clock` or `nat`.
    pub what: &'static str,
    /// Of what: a name, or an address.
    pub of: String,
    /// The verdict.
    pub verdict: Word,
    /// The class of a failure, as in [`Class::slug`]; empty if there is none.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub class: &'static str,
    /// A number with its unit, or what was found in few words.
    pub figure: String,
    /// What to do; empty if there is nothing to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

/// What the checks come to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Conclusion {
    /// Whether a shard can be reached from here.
    pub reachable: bool,
    /// The class of the worst, `none` if all is well.
    pub cause: String,
    /// For people.
    pub sentence: String,
}

fn check(what: &'static str, of: impl Into<String>, verdict: Word, figure: impl Into<String>, remedy: &str) -> Check {
    Check { what, of: of.into(), verdict, class: "", figure: figure.into(), remedy: remedy.to_owned() }
}

fn millis(span: Duration) -> String {
    format!("{:.1} ms", span.as_secs_f64() * 1000.0)
}

fn span(seconds: i64) -> String {
    match seconds.unsigned_abs() {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

/// This machine's own certificate, by its own clock.
pub(super) fn certificate(own: &CertFacts, now: i64) -> Check {
    let of = own.identity.to_string();
    let left = own.not_after - now;
    if left < 0 {
        let figure = format!("ended {} ago", span(left));
        let told = check("certificate", of, Word::Wrong, figure, Class::Expired.remedy());
        return Check { class: Class::Expired.slug(), ..told };
    }
    if now < own.not_before {
        let figure = format!("begins in {}", span(own.not_before - now));
        let told = check("certificate", of, Word::Wrong, figure, Class::Clock.remedy());
        return Check { class: Class::Clock.slug(), ..told };
    }
    let figure = format!("ends in {}", span(left));
    if left < (own.not_after - own.not_before) / LITTLE_LEFT {
        let remedy = "It should have been renewed by now: is control there, and can the shard reach it?";
        return check("certificate", of, Word::Slow, figure, remedy);
    }
    check("certificate", of, Word::Ok, figure, "")
}

pub(super) fn name(resolved: &Resolved) -> Check {
    let Resolved { host, found, took } = resolved;
    match found {
        Err(why) => {
            let told = check("dns", host, Word::Wrong, why, Class::NameUnknown.remedy());
            Check { class: Class::NameUnknown.slug(), ..told }
        }
        Ok(_) if took.is_zero() => check("dns", host, Word::Ok, "an address, not a name", ""),
        Ok(found) => {
            let v4 = found.iter().filter(|ip| ip.is_ipv4()).count();
            let figure = format!("{} ({v4} IPv4, {} IPv6)", millis(*took), found.len() - v4);
            if *took > SLOW_NAME {
                let remedy = "Look at the name servers in /etc/resolv.conf: the first one may not answer.";
                check("dns", host, Word::Slow, figure, remedy)
            } else {
                check("dns", host, Word::Ok, figure, "")
            }
        }
    }
}

/// The word for a class.
const fn word(class: Class) -> Word {
    match class {
        Class::Blocked | Class::NoRoute => Word::Blocked,
        Class::Rejected | Class::ProxyRefused | Class::Revoked | Class::Duplicate | Class::Busy | Class::Elsewhere => {
            Word::Rejected
        }
        Class::NameUnknown | Class::WrongCa | Class::Clock | Class::Distrusted | Class::Expired | Class::Version => {
            Word::Wrong
        }
        Class::Broken | Class::Local => Word::Unknown,
    }
}

fn failed(what: &'static str, of: String, end: &LinkEnd) -> Check {
    let class = Class::of(end.cause);
    let remedy = match (what, class) {
        ("udp", Class::Blocked | Class::Rejected | Class::NoRoute) => {
            "Let UDP out to this port. Until then edges go over TCP, if that passes."
        }
        ("tcp", Class::Blocked | Class::Rejected | Class::NoRoute) => {
            "Let TCP out to this port as well: it is the way when UDP is blocked. A load balancer needs both."
        }
        _ => class.remedy(),
    };
    let told = check(what, of, word(class), format!("{} ({})", end.cause, end.detail), remedy);
    Check { class: class.slug(), ..told }
}

fn passed(what: &'static str, of: String, through: &Through) -> Check {
    let Through { shard, took, rtt } = through;
    let figure = format!("{} round trip, {} for the handshake with {shard}", millis(*rtt), millis(*took));
    if *rtt > SLOW_WAY {
        return check(
            what,
            of,
            Word::Slow,
            figure,
            "The way is long or its queues are full: who fills this machine's link?",
        );
    }
    check(what, of, Word::Ok, figure, "")
}

fn at(address: &str, peer: SocketAddr) -> String {
    if address == peer.to_string() { address.to_owned() } else { format!("{address} ({})", peer.ip()) }
}

pub(super) fn handshake(
    carrier: Carrier,
    address: &str,
    peer: SocketAddr,
    through: &Result<Through, LinkEnd>,
) -> Check {
    let what = match carrier {
        Carrier::Quic => "udp",
        Carrier::Tcp => "tcp",
    };
    match through {
        Ok(through) => passed(what, at(address, peer), through),
        Err(end) => failed(what, at(address, peer), end),
    }
}

pub(super) fn proxy(proxy: &str, address: &str, through: &Result<Through, LinkEnd>) -> Check {
    let of = format!("{address} through {proxy}");
    match through {
        Ok(through) => passed("proxy", of, through),
        Err(end) => failed("proxy", of, end),
    }
}

pub(super) fn sizes(address: &str, peer: SocketAddr, sizes: Sizes) -> Check {
    let Sizes { payload, most, interface } = sizes;
    let wanted = interface.map_or(most, |interface| interface.min(most));
    let figure = match interface {
        Some(interface) => format!("{payload} bytes of UDP payload; the interface takes {interface}, {most} are tried"),
        None => format!("{payload} bytes of UDP payload; {most} are tried"),
    };
    if payload.saturating_add(CLOSE) >= wanted {
        return check("mtu", at(address, peer), Word::Ok, figure, "");
    }
    let remedy = "The path takes less than this machine's interface: large packets vanish on it. The mesh has found its \
                  size; for other programs, set the interface's MTU to that, or clamp TCP's MSS at the router.";
    check("mtu", at(address, peer), Word::Slow, figure, remedy)
}

pub(super) fn clock(control: &HostPort, time: &TimeThere) -> Check {
    let ahead = time.ahead_ms();
    // The other clock is told in whole seconds, and on the way half a round trip passed.
    let figure = match ahead {
        -1500..=1500 => "within a second or so of control's".to_owned(),
        1501.. => format!("{} ahead of control's", span(ahead / 1000)),
        _ => format!("{} behind control's", span(ahead / 1000)),
    };
    let word = match ahead.unsigned_abs() {
        0..5_000 => Word::Ok,
        ms if ms < SKEW.unsigned_abs() => Word::Slow,
        _ => Word::Wrong,
    };
    let remedy = if word == Word::Ok { "" } else { Class::Clock.remedy() };
    let told = check("clock", control.to_string(), word, figure, remedy);
    if word == Word::Wrong { Check { class: Class::Clock.slug(), ..told } } else { told }
}

pub(super) fn no_clock(why: &str) -> Check {
    check("clock", "control", Word::Unknown, why, "")
}

pub(super) fn nat(seen: SocketAddr, own: bool) -> Check {
    let figure = if own {
        format!("the shard sees this machine's own address, {}", seen.ip())
    } else {
        format!("behind NAT: the shard sees {seen}")
    };
    check("nat", seen.to_string(), Word::Ok, figure, "")
}

/// How much a class explains where nothing is reached.
const fn weight(class: &str) -> u8 {
    match class.as_bytes() {
        b"clock" => 6,
        b"revoked" | b"expired" | b"distrusted" => 5,
        b"wrong-ca" => 4,
        b"proxy-refused" | b"name-unknown" | b"version" => 3,
        b"no-route" | b"rejected" => 2,
        b"" => 0,
        _ => 1,
    }
}

pub(super) fn conclude(checks: &[Check], reachable: bool) -> Conclusion {
    let bad: Vec<&Check> = checks.iter().filter(|check| !matches!(check.verdict, Word::Ok | Word::Unknown)).collect();
    let works = |what: &str| checks.iter().any(|c| c.what == what && matches!(c.verdict, Word::Ok | Word::Slow));
    let told = |cause: &str, sentence: String| Conclusion { reachable, cause: cause.to_owned(), sentence };
    if !reachable {
        let of_ways = |check: &&&Check| !check.class.is_empty();
        let Some(worst) = bad.iter().filter(of_ways).max_by_key(|check| weight(check.class)) else {
            return told("no-shard", "No shard is known here, so there is nothing to reach.".into());
        };
        let sentence = format!("No shard can be reached from here: {} {}: {}.", worst.what, worst.of, worst.figure);
        return told(worst.class, sentence);
    }
    if !works("udp") {
        let way = if works("tcp") { "TCP" } else { "the proxy" };
        let sentence = format!("Edges work from here over {way} only: no UDP comes through.");
        return told("udp-blocked", sentence);
    }
    match bad.iter().max_by_key(|check| (weight(check.class), check.verdict == Word::Wrong)) {
        None => told("none", "Edges work from here.".into()),
        Some(worst) => {
            let cause = if worst.class.is_empty() { worst.what } else { worst.class };
            told(cause, format!("Edges work from here, but {} {}: {}.", worst.what, worst.of, worst.figure))
        }
    }
}

#[cfg(test)]
mod tests;
