//! From what is known to a sentence. Pure.

use proto::{
    api::{EdgeView, Parting, Presence, ShardView},
    id::EdgeId,
};
use serde::Serialize;

use crate::{commands::edge::standing, failure::Failure, text};

/// A last sight that is so much younger than a parting shows that the edge came back since. In seconds.
const LATER: i64 = 15;
/// Difference between an edge's clock and its shard's that is worth a word. In milliseconds.
const SKEW: u64 = 60_000;
/// Share of packets lost on the way that is worth a word, in percent.
const LOSSY: u32 = 2;
/// What larger UDP payloads than this ought to pass; fewer bytes are worth a word.
const NARROW: u32 = 1300;
/// How old a tunnel is, in seconds, whose edge has found out what its path takes.
const SETTLED: i64 = 10;
/// For how long a second machine with the same identity is worth a word. In seconds.
const LATELY: i64 = 600;

/// How an attempt to reach it went well.
#[derive(Debug)]
pub(super) struct Reached {
    /// The shard that was asked.
    pub(super) through: String,
    /// What the edge connected with, if it was asked to.
    pub(super) address: Option<String>,
}

/// What hampers an edge that is there, as it says itself: cause, words, remedy.
fn hampered(at: &Presence, now: i64) -> Option<(&'static str, String, &'static str)> {
    let standing = at.standing.as_ref()?;
    if standing.skew_ms.unsigned_abs() > SKEW {
        let skew = text::span(std::time::Duration::from_millis(standing.skew_ms.unsigned_abs()));
        let side = if standing.skew_ms > 0 { "behind" } else { "ahead of" };
        let what = format!("its clock is {skew} {side} the shard's");
        return Some(("clock", what, "Set the machine's clock and let it follow a time server: certificates need it."));
    }
    if at.carrier == "tcp" {
        let through = if standing.proxy.is_empty() { String::new() } else { format!(" through {}", standing.proxy) };
        let why = if standing.why.is_empty() { String::new() } else { format!(": {}", standing.why) };
        let what = format!("over TCP{through}, since QUIC did not come through{why}");
        return Some((
            "udp-blocked",
            what,
            "Let UDP out to the shard's port where the machine is; it goes back to QUIC by itself.",
        ));
    }
    if standing.loss_percent >= LOSSY {
        return Some((
            "lossy-path",
            format!("its path lost {} of 100 packets that it sent lately", standing.loss_percent),
            "Streams go on, and lost packets cost a round trip each. Look at the machine's radio or line, at what \
             else fills it, and whether somebody limits UDP.",
        ));
    }
    if (1..NARROW).contains(&standing.mtu) && at.since + SETTLED <= now {
        return Some((
            "narrow-path",
            format!("its path takes no packets above {} bytes", standing.mtu),
            "It goes on with small packets by itself. Something on the way drops larger ones without a word: look for \
             a tunnel, or a router whose MTU is too small, or that drops ICMP.",
        ));
    }
    None
}

/// Everything that could be found out.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) edge: EdgeId,
    /// Whether control could be asked, and why not.
    pub(super) control: Result<(), String>,
    /// What it said: the edge, if it knows one of that name, and the shards.
    pub(super) known: Option<(Option<EdgeView>, Vec<ShardView>)>,
    /// What came of trying.
    pub(super) tried: Result<Reached, Failure>,
    /// Seconds since 1970.
    pub(super) now: i64,
}

/// What is wrong, and what to do.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    /// The edge.
    pub(super) edge: EdgeId,
    /// Whether it could be reached.
    pub(super) reachable: bool,
    /// The kind of trouble, `none` if there is none.
    pub(super) cause: &'static str,
    /// For people.
    pub(super) sentence: String,
    /// What to do about it.
    pub(super) remedy: Option<String>,
    /// What it was concluded from.
    pub(super) facts: Vec<(&'static str, String)>,
    #[serde(skip)]
    kind: Kind,
}

/// The status to end with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    There,
    Unknown,
    Refused,
    Away,
}

/// A cause with its words.
type Cause = (Kind, &'static str, String, Option<String>);

impl Verdict {
    /// The status of the process.
    pub(super) fn status(&self) -> Result<(), Failure> {
        match self.kind {
            Kind::There => Ok(()),
            Kind::Unknown => Err(Failure::Told(1)),
            Kind::Refused => Err(Failure::Told(3)),
            Kind::Away => Err(Failure::Told(4)),
        }
    }
}

impl Known {
    /// Concludes.
    pub(super) fn judge(&self) -> Verdict {
        let (kind, cause, sentence, remedy) = self.cause();
        Verdict {
            edge: self.edge.clone(),
            reachable: kind == Kind::There,
            cause,
            sentence,
            remedy,
            facts: self.facts(),
            kind,
        }
    }

    fn cause(&self) -> Cause {
        let name = &self.edge;
        let failure = match &self.tried {
            Ok(reached) => return self.there(reached),
            Err(failure) => failure,
        };
        let Some((view, shards)) = &self.known else {
            let why = self.control.as_ref().err().map_or("", String::as_str);
            let sentence = format!("edge/{name} cannot be reached ({failure}), and control cannot say more: {why}.");
            let remedy = "Look at control first: its /readyz, its database, and the way from here to it.";
            return (Kind::Away, "control-away", sentence, Some(remedy.into()));
        };
        let Some(view) = view else {
            let sentence = format!("edge/{name} is unknown: no machine has enrolled by that name.");
            let remedy =
                format!("'meshctl edge ls' shows the names. To let it join: meshctl token create --edge --name {name}");
            return (Kind::Unknown, "edge-unknown", sentence, Some(remedy));
        };
        if view.revoked {
            let sentence = format!("edge/{name} is revoked: every shard turns it away.");
            let remedy = format!("To let it come back: meshctl token create --edge --name {name} --replace");
            return (Kind::Refused, "revoked", sentence, Some(remedy));
        }
        if !shards.iter().any(|shard| shard.alive) {
            let sentence = format!("edge/{name} is away because no shard is alive.");
            let remedy = "Start a shard (mesh-cloud), or look why those that run cannot report to control.";
            return (Kind::Away, "no-shard", sentence, Some(remedy.into()));
        }
        match &view.presence {
            Some(at) => {
                let kind = if matches!(failure, Failure::Refused(_)) { Kind::Refused } else { Kind::Away };
                let sentence = format!(
                    "edge/{name} is connected to {}, but what you ask for is not to be had: {failure}.",
                    at.shard
                );
                (kind, "way", sentence, None)
            }
            None => self.away(view, shards),
        }
    }

    fn there(&self, reached: &Reached) -> Cause {
        let at = self.known.as_ref().and_then(|(view, _)| view.as_ref()?.presence.as_ref());
        let mut sentence = format!("edge/{} is there", self.edge);
        if let Some(at) = at {
            let rtt = text::millis(std::time::Duration::from_micros(at.rtt_us));
            sentence += &format!(": {} holds its tunnel for {}, {rtt} away", at.shard, text::age(at.since, self.now));
        }
        if let Some(address) = &reached.address {
            sentence += &format!(", and {address} answers it");
        }
        if let Some((what, remedy)) = self.known.as_ref().and_then(|(view, _)| self.turned_away(view.as_ref()?)) {
            return (Kind::There, "duplicate-identity", format!("{sentence}, but {what}."), Some(remedy));
        }
        match at.and_then(|at| hampered(at, self.now)) {
            Some((cause, what, remedy)) => {
                (Kind::There, cause, format!("{sentence}, but {what}."), Some(remedy.to_owned()))
            }
            None => (Kind::There, "none", sentence + ".", None),
        }
    }

    /// Another machine with the same identity that wanted in lately: what happened, and what to do.
    fn turned_away(&self, view: &EdgeView) -> Option<(String, String)> {
        let parting = view.parting.as_ref().filter(|p| p.cause == "duplicate-identity" && p.at + LATELY > self.now)?;
        let Parting { shard, detail, from, .. } = parting;
        let ago = text::age(parting.at, self.now);
        let what = format!("{shard} turned a second machine with its identity away {ago} ago: {detail}");
        let remedy = format!(
            "On one of the two machines: mesh-edge join with a line from 'meshctl token create --edge' under a name of \
             its own. The one that was turned away came from {from}."
        );
        Some((what, remedy))
    }

    /// Enrolled, in good standing, and on no shard.
    fn away(&self, view: &EdgeView, shards: &[ShardView]) -> Cause {
        let name = &self.edge;
        let parting = view.parting.as_ref().filter(|p| view.last_seen.is_none_or(|seen| seen <= p.at + LATER));
        if let Some(parting) = parting
            && let Some(cause) = self.parted(parting)
        {
            return cause;
        }
        if view.not_after <= self.now {
            let ago = text::age(view.not_after, self.now);
            let sentence =
                format!("edge/{name} is away, and its certificate ended {ago} ago: no shard lets it in any more.");
            let remedy = format!(
                "On the machine: mesh-edge join with a line from 'meshctl token create --edge --name {name} --replace'"
            );
            return (Kind::Away, "certificate-ended", sentence, Some(remedy));
        }
        let Some(seen) = view.last_seen else {
            let ago = text::age(view.enrolled, self.now);
            let sentence = format!("edge/{name} enrolled {ago} ago, and has never reached a shard.");
            let addresses: Vec<_> =
                shards.iter().filter(|s| s.alive).flat_map(|s| s.addresses.iter().map(String::as_str)).collect();
            let remedy = format!(
                "Its network must let it go out to {}: look at mesh-edge's log on the machine, and at /readyz there.",
                addresses.join(", ")
            );
            return (Kind::Away, "never-connected", sentence, Some(remedy));
        };
        let sentence = format!("edge/{name} is away for {}: no shard says why it went.", text::age(seen, self.now));
        let remedy = "Its shard was lost, or control was started since. Look at the machine: its power, its network, \
                      and mesh-edge's log there.";
        (Kind::Away, "lost", sentence, Some(remedy.into()))
    }

    /// What a shard said of the end.
    fn parted(&self, parting: &Parting) -> Option<Cause> {
        let (name, ago) = (&self.edge, text::age(parting.at, self.now));
        let Parting { shard, from, detail, .. } = parting;
        let away = |cause, what: String, remedy: &str| {
            Some((Kind::Away, cause, format!("edge/{name} is away: {what}."), Some(remedy.to_owned())))
        };
        match parting.cause.as_str() {
            "bye" => away(
                "stopped",
                format!("mesh-edge was stopped on the machine {ago} ago ({detail})"),
                "Start it there: systemctl start mesh-edge",
            ),
            "timed-out" => away(
                "silent",
                format!("it fell silent {ago} ago, and {shard} gave it up ({from})"),
                "The machine is off, or its network is cut or lets no UDP through any more. It dials again by itself, \
                 at most 30 s after it can.",
            ),
            "expired" | "revoked" | "name-mismatch" | "wrong-role" => Some((
                Kind::Refused,
                "identity",
                format!("edge/{name} was turned away {ago} ago by {shard}: {detail} ({from})."),
                Some(format!(
                    "On the machine: mesh-edge join with a line from 'meshctl token create --edge --name {name} --replace'"
                )),
            )),
            "overloaded" => away(
                "overloaded",
                format!("{shard} turned it away {ago} ago: {detail}"),
                "It tries again by itself. If this stays: 'meshctl shard ls' shows who is full; add a shard.",
            ),
            _ => away(
                "link-ended",
                format!("its link to {shard} ended {ago} ago: {} ({detail}; {from})", parting.cause),
                "It dials again by itself within 30 s. If it does not: mesh-edge's log on the machine says why.",
            ),
        }
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = Vec::new();
        match &self.tried {
            Ok(reached) => facts.push(("a stream to it", format!("opened, through {}", reached.through))),
            Err(failure) => facts.push(("a stream to it", failure.to_string())),
        }
        let Some((view, shards)) = &self.known else {
            facts.push(("control", self.control.as_ref().err().cloned().unwrap_or_default()));
            return facts;
        };
        if let Some(view) = view {
            facts.push(("enrolled", format!("{} ago", text::age(view.enrolled, self.now))));
            facts.push(("certificate ends", text::until(view.not_after, self.now)));
            let seen =
                view.last_seen.map_or_else(|| "never".to_owned(), |seen| format!("{} ago", text::age(seen, self.now)));
            facts.push(("seen by a shard", seen));
            if let Some(at) = &view.presence {
                if !at.carrier.is_empty() {
                    facts.push(("carrier", at.carrier.clone()));
                }
                facts.extend(at.standing.iter().flat_map(standing));
            }
            if let Some(p) = &view.parting {
                let ago = text::age(p.at, self.now);
                facts
                    .push(("left last", format!("{} {ago} ago: {} ({}, from {})", p.shard, p.cause, p.detail, p.from)));
            }
        }
        let alive = shards.iter().filter(|shard| shard.alive).count();
        facts.push(("shards alive", format!("{alive} of {}", shards.len())));
        facts
    }
}

#[cfg(test)]
mod tests;
