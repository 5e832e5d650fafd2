//! From how an edge stands to a sentence. Pure.

use proto::standing::Trouble;
use runtime::link::EndCause;
use serde::{Deserialize, Serialize};

use super::Status;
use crate::class::Class;

/// A shard that has not answered for so long is as good as none, in milliseconds.
const STALE: u64 = 15_000;
/// Difference between two clocks that is worth a word, in milliseconds.
const SKEW: u64 = 5_000;
/// Round trip that is worth a word, in milliseconds.
const FAR: f64 = 1_000.0;

/// What is wrong, and what to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Verdict {
    /// Whether the edge is connected.
    pub connected: bool,
    /// The class of the trouble, `none` if there is none.
    pub cause: String,
    /// For people.
    pub sentence: String,
    /// What to do about it; empty if there is nothing to do.
    pub remedy: String,
}

/// A difference of clocks as people read it.
pub(super) fn skew(ms: i64) -> String {
    let (seconds, tenths) = (ms.unsigned_abs() / 1000, ms.unsigned_abs() % 1000 / 100);
    match ms {
        0 => "as the shard's".to_owned(),
        1.. => format!("{seconds}.{tenths} s behind the shard's"),
        _ => format!("{seconds}.{tenths} s ahead of the shard's"),
    }
}

fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

impl Status {
    /// Concludes.
    pub(super) fn judge(&self) -> Verdict {
        match self.state.as_str() {
            "connected" => self.connected(),
            "stopped" => Verdict {
                cause: "stopped".into(),
                sentence: format!("edge/{} is shutting down.", self.edge),
                remedy: "Start it again: systemctl start mesh-edge.".into(),
                ..Verdict::default()
            },
            _ => self.away(),
        }
    }

    fn connected(&self) -> Verdict {
        let over = match (self.carrier.as_str(), self.proxy.as_str()) {
            ("", _) => String::new(),
            (carrier, "") => format!(" over {carrier}"),
            (carrier, proxy) => format!(" over {carrier} through {proxy}"),
        };
        let mut sentence =
            format!("edge/{} is connected to {}{over} for {}", self.edge, self.shard, span(self.since_s));
        let silent = self.answered_ms.is_none_or(|ms| ms > STALE) && self.since_s > STALE / 1000;
        let skewed = self.skew_ms.filter(|ms| ms.unsigned_abs() > SKEW);
        let (cause, remedy) = if silent {
            let ago = self.answered_ms.map_or_else(|| "yet".to_owned(), |ms| format!("for {}", span(ms / 1000)));
            sentence += &format!(", but the shard has not answered {ago}");
            ("silent", "It goes elsewhere by itself in a moment; if this stays, look at the network.")
        } else if let Some(ms) = skewed {
            sentence += &format!(", and its clock is {}", skew(ms));
            (Class::Clock.slug(), Class::Clock.remedy())
        } else if self.carrier == "tcp" {
            sentence += &format!(", because QUIC did not come through: {}", self.carrier_why);
            ("udp-blocked", "Let UDP out to the shard's port; it goes back to QUIC by itself within a minute.")
        } else if let Some(ms) = self.rtt_ms.filter(|ms| *ms > FAR) {
            sentence += &format!(", and the way there and back takes {ms:.0} ms");
            ("slow", "Look at the network of this machine: who fills its link?")
        } else {
            ("none", "")
        };
        Verdict { connected: true, cause: cause.into(), sentence: sentence + ".", remedy: remedy.into() }
    }

    /// Not connected: what says most of the failures decides.
    fn away(&self) -> Verdict {
        let (begins, ends) = self.certificate;
        let next = self.next_s.map(|s| format!(" It tries again in {}.", span(s))).unwrap_or_default();
        let told = |cause: &str, what: String, remedy: &str| Verdict {
            connected: false,
            cause: cause.to_owned(),
            sentence: format!("edge/{} is not connected for {}: {what}.{next}", self.edge, span(self.since_s)),
            remedy: remedy.to_owned(),
        };
        let of = |class: Class, what| told(class.slug(), what, class.remedy());
        let by_clock = self.troubles.iter().any(|trouble| class_of(trouble) == Class::Clock);
        if self.now > ends && by_clock {
            // Of a machine that was off for long only its own certificate has ended.
            return of(Class::Clock, "by its clock its own certificate and the shard's have ended".to_owned());
        }
        if self.now > ends {
            return of(Class::Expired, format!("its certificate ended {} ago", span(self.now.abs_diff(ends))));
        }
        let Some(worst) = self.troubles.iter().max_by_key(|trouble| weight(class_of(trouble))) else {
            return told(
                "starting",
                format!("it has just begun to try {}", self.shards.join(", ")),
                "Wait for a moment.",
            );
        };
        if self.now < begins {
            let early = span(begins.abs_diff(self.now));
            return of(Class::Clock, format!("its clock stands {early} before the beginning of its own certificate"));
        }
        let class = class_of(worst);
        let alone = self.troubles.iter().all(|t| class_of(t) == class) || worst.carrier.is_empty();
        let over = if alone { String::new() } else { format!(" over {}", worst.carrier) };
        of(class, format!("{}{over}: {}", worst.address, sentence(worst)))
    }
}

/// How much a class says of the reason: what a shard says counts more than what the network says.
const fn weight(class: Class) -> u8 {
    match class {
        Class::Revoked | Class::Duplicate => 9,
        Class::Expired | Class::Distrusted => 8,
        Class::Clock => 7,
        Class::WrongCa => 6,
        Class::ProxyRefused => 5,
        Class::NameUnknown | Class::Version | Class::Broken => 4,
        Class::Busy | Class::NoRoute => 3,
        Class::Rejected => 2,
        Class::Blocked => 1,
        Class::Elsewhere | Class::Local => 0,
    }
}

fn class_of(trouble: &Trouble) -> Class {
    EndCause::from_slug(&trouble.cause).map_or(Class::Broken, Class::of)
}

fn sentence(trouble: &Trouble) -> String {
    let known = EndCause::from_slug(&trouble.cause).map(EndCause::sentence).unwrap_or_default();
    match (known.trim_end_matches('.'), trouble.detail.trim_end_matches('.')) {
        ("", detail) => detail.to_owned(),
        (known, "") => known.to_owned(),
        (known, detail) if known == detail => known.to_owned(),
        (known, detail) => format!("{known} ({detail})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(carrier: &str, cause: &str, detail: &str) -> Trouble {
        Trouble {
            cause: cause.into(),
            carrier: carrier.into(),
            address: "shard.example:7400".into(),
            detail: detail.into(),
            times: 3,
            ..Trouble::default()
        }
    }

    fn away(troubles: Vec<Trouble>) -> Status {
        Status {
            edge: "shop-1".into(),
            state: "waiting".into(),
            since_s: 90,
            next_s: Some(7),
            now: 5000,
            certificate: (1000, 9000),
            shards: vec!["shard.example:7400".into()],
            troubles,
            ..Status::default()
        }
    }

    #[test]
    fn every_trouble_has_its_sentence_and_its_remedy() {
        let silence = || trouble("quic", "timed-out", "no handshake within 5 s");
        let cases = [
            (
                vec![silence(), trouble("tcp", "timed-out", "no handshake within 5 s")],
                "blocked",
                "firewall",
                "netcheck",
            ),
            (vec![silence(), trouble("tcp", "nobody-listens", "refused")], "rejected", "nothing listens", "address"),
            (vec![trouble("quic", "wrong-ca", "unknown CA")], "wrong-ca", "another mesh", "inspection"),
            (vec![silence(), trouble("tcp", "wrong-ca", "x")], "wrong-ca", "over tcp", "inspection"),
            (vec![trouble("quic", "peer-expired", "x")], "clock", "compare the clocks", "timedatectl"),
            (vec![trouble("quic", "clock", "x")], "clock", "one of the two clocks", "timedatectl"),
            (vec![trouble("quic", "revoked", "")], "revoked", "revoked", "--replace"),
            (vec![trouble("quic", "expired", "x")], "expired", "certificate has expired", "--replace"),
            (vec![trouble("quic", "distrusted", "x")], "distrusted", "does not trust", "--replace"),
            (vec![trouble("quic", "no-route", "x"), trouble("tcp", "no-route", "x")], "no-route", "no route", "route"),
            (
                vec![silence(), trouble("tcp", "proxy-refused", "http://p:3128 answered 407")],
                "proxy-refused",
                "answered 407",
                "[proxy]",
            ),
            (vec![trouble("", "name-unknown", "no such host")], "name-unknown", "cannot be resolved", "resolv.conf"),
            (vec![trouble("quic", "duplicate-identity", "")], "duplicate-identity", "another machine", "own"),
            (vec![trouble("quic", "overloaded", "")], "busy", "full", "add a shard"),
            (vec![], "starting", "just begun", "moment"),
        ];
        for (troubles, cause, words, remedy) in cases {
            let verdict = away(troubles).judge();
            assert_eq!(verdict.cause, cause, "{verdict:?}");
            let said = verdict.sentence.to_lowercase();
            assert!(said.contains(words) && said.contains("for 90 s"), "{verdict:?}");
            assert!(verdict.remedy.contains(remedy) && !verdict.connected, "{verdict:?}");
        }
    }

    #[test]
    fn its_own_certificate_and_clock_are_looked_at_first() {
        let mut status = away(vec![trouble("quic", "timed-out", "x")]);
        status.now = 9001;
        assert_eq!(status.judge().cause, "expired");
        status.troubles.push(trouble("quic", "peer-expired", "x"));
        assert_eq!(status.judge().cause, "clock", "two certificates at once");
        status.now = 10;
        assert_eq!(status.judge().cause, "clock");
    }

    #[test]
    fn a_tunnel_that_is_there_says_how() {
        let there = Status {
            state: "connected".into(),
            shard: "shard-1".into(),
            carrier: "quic".into(),
            answered_ms: Some(900),
            rtt_ms: Some(12.0),
            since_s: 600,
            ..away(vec![])
        };
        let verdict = there.judge();
        assert_eq!(verdict.sentence, "edge/shop-1 is connected to shard-1 over quic for 10 min.");
        assert_eq!((verdict.cause.as_str(), verdict.remedy.as_str()), ("none", ""));
        let tcp = Status {
            carrier: "tcp".into(),
            proxy: "http://p:3128".into(),
            carrier_why: "QUIC: timed-out (x)".into(),
            ..there.clone()
        };
        assert_eq!(tcp.judge().cause, "udp-blocked");
        assert!(tcp.judge().sentence.contains("over tcp through http://p:3128 for 10 min, because QUIC"));
        let skewed = Status { skew_ms: Some(-90_000), ..there.clone() };
        assert!(skewed.judge().sentence.contains("90.0 s ahead of the shard's"));
        let stale = Status { answered_ms: Some(20_000), ..there };
        assert_eq!(stale.judge().cause, "silent");
    }
}
