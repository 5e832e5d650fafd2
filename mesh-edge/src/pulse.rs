//! Whether the shard behind a tunnel still lives. Pure: what was heard and the time in; what to do, and when to look
//! again, out.
//!
//! Anything that arrives is a sign of life. A ping that waits too long makes the edge ask every second, and try a new
//! socket, since a NAT that has forgotten the tunnel looks the same from here as a shard that is dead. What the network
//! says (ICMP) can be forged: it makes the edge ask at once, and only silence behind it is the end.

use std::{collections::VecDeque, time::Duration};

use runtime::link::{EndCause, LinkEnd, Signs};
use tokio::time::Instant;

/// How long a ping may wait for its answer, at least, and in round trips.
const ANSWER: (Duration, u32) = (Duration::from_secs(1), 4);
/// How often an edge asks that waits for an answer.
const ASK: Duration = Duration::from_secs(1);
/// How long an edge is suspicious before it tries a new socket, and how long before the end at the latest: the new one
/// is to have its chance.
const REBIND: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(2));
/// Silence after which the shard counts as dead: so much more than the period, and the bounds of the sum.
const SILENCE: (Duration, Duration, Duration) =
    (Duration::from_secs(5), Duration::from_secs(8), Duration::from_secs(12));
/// How long a shard may give no answer whose link lives, as one does whose way back alone is good: so many periods, at
/// least; at most so long, or so much more than the period.
const DEAF: (u32, Duration, Duration, Duration) =
    (5, Duration::from_secs(2), Duration::from_secs(12), Duration::from_secs(6));
/// How much more of that it may take while the other side acknowledges what is sent, as far as it arrives: the path has
/// become one on which answers are lost, such as one that takes no large packets any more, and is being learnt anew.
const DEAF_AND_ACKNOWLEDGED: u32 = 2;
/// Times that the edge looked in vain, or asked, before it believes: a process that was stopped itself heard nothing
/// either.
const IN_VAIN: usize = 3;
/// The least time between two such looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// How long a shard may take to contradict what the network says, at least, and in round trips.
const CONTRADICT: (Duration, u32) = (Duration::from_millis(250), 2);
/// Times that the network must say that nobody listens.
const REFUSALS: u64 = 2;
/// How often a link that is in use is looked at, and how many bytes in such a time make it busy: when a busy one falls
/// silent, the edge asks at once. A NAT that has forgotten the tunnel swallows what comes in, and only what goes out makes
/// a new mapping.
const BUSY: (Duration, u64) = (Duration::from_millis(500), 16 * 1024);
/// Pings that are remembered.
const REMEMBERED: usize = 32;

/// What the carrier knows at the time of a look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) now: Instant,
    /// Bytes that have arrived in the life of the link.
    pub(crate) received: u64,
    /// Packets that were taken for lost, since others behind them were acknowledged.
    pub(crate) lost: u64,
    /// Whether there are streams in it.
    pub(crate) in_use: bool,
    /// The round trip.
    pub(crate) rtt: Duration,
    /// What the network has said.
    pub(crate) signs: Signs,
}

impl Seen {
    fn patience(&self, (least, round_trips): (Duration, u32)) -> Duration {
        least.max(self.rtt.saturating_mul(round_trips))
    }
}

/// What the one who keeps the tunnel is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    /// Nothing.
    Serving,
    /// Writing, so that no ping can be sent.
    Blocked,
    /// It leaves: it keeps the path open and waits for no answer.
    Leaving,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Beat {
    /// Send a ping with this token.
    Ping(u64),
    /// Go on from a new socket, and tell [`Pulse::rebound`].
    Rebind(Reason),
    /// Look again at this time, or when the network says something.
    Wait(Instant),
    /// The shard is gone.
    Dead(LinkEnd),
}

/// Why a new socket is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Nothing comes, or nothing can be sent.
    Silence,
    /// This host has another address now.
    Moved,
}

impl Reason {
    /// For the log.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Silence => "nothing comes from the shard",
            Self::Moved => "this machine has another address",
        }
    }
}

/// The pulse of one tunnel.
#[derive(Debug)]
pub(crate) struct Pulse {
    period: Duration,
    /// The time from the last ping to the next one: at first so much that edges which came together do not go on in
    /// step, then the period.
    pause: Duration,
    next_token: u64,
    /// Pings without an answer, oldest first.
    unanswered: VecDeque<(u64, Instant)>,
    pinged: Option<Instant>,
    /// Something makes a ping worth sending now.
    wanted: bool,
    answered: Instant,
    /// When something was last seen to be acknowledged behind packets that were lost, and how many those were.
    acknowledged: (Instant, u64),
    /// When something came: not before this. It is known only from look to look.
    heard: Instant,
    looked: Instant,
    received: u64,
    /// Looks in vain since something came, and the last of them.
    in_vain: (usize, Instant),
    signs: Signs,
    /// Since when, and how often, the network has said that nobody listens; over when something comes.
    refused: Option<(Instant, u64)>,
    /// Since when nothing can be sent; over when something comes.
    unsent: Option<Instant>,
    /// When a new socket was taken; over when something comes.
    rebound: Option<Instant>,
    /// This host has another address than the socket.
    moved: bool,
    /// When the link was last looked at while in use, what had come then, and how much of it since the look before.
    flow: Option<(Instant, u64, u64)>,
    /// A new socket could not be had; the next try is not before this.
    rebind_again: Instant,
}

impl Pulse {
    /// One that pings now, then after the `phase`, a share of the period from 0 to 1, and then in each period.
    pub(crate) fn new(period: Duration, phase: f64, now: Instant) -> Self {
        Self {
            period,
            pause: period.mul_f64(phase.clamp(0.0, 1.0)),
            next_token: 1,
            unanswered: VecDeque::new(),
            pinged: None,
            wanted: true,
            answered: now,
            acknowledged: (now, 0),
            heard: now,
            looked: now,
            received: 0,
            in_vain: (0, now),
            signs: Signs::default(),
            refused: None,
            unsent: None,
            rebound: None,
            moved: false,
            flow: None,
            rebind_again: now,
        }
    }

    /// Takes note of an answer. Returns the round trip if it was one.
    pub(crate) fn answered(&mut self, token: u64, now: Instant) -> Option<Duration> {
        let at = self.unanswered.iter().position(|(t, _)| *t == token)?;
        let (_, sent) = self.unanswered.drain(..=at).next_back()?;
        self.answered = now;
        self.alive(now);
        Some(now - sent)
    }

    /// What to do now. A ping that is asked for counts as sent.
    pub(crate) fn beat(&mut self, seen: &Seen, mood: Mood) -> Beat {
        self.look(seen);
        if self.moved && self.rebind_again <= seen.now {
            return Beat::Rebind(Reason::Moved);
        }
        let (deadlines, ping) = (self.deadlines(seen), self.ping_at(seen, mood));
        if mood != Mood::Leaving {
            if let Some(end) = self.verdict(seen) {
                return Beat::Dead(end);
            }
            if deadlines.rebind.is_some_and(|at| at <= seen.now) {
                return Beat::Rebind(Reason::Silence);
            }
        }
        match mood {
            Mood::Serving | Mood::Leaving if ping <= seen.now => Beat::Ping(self.ping(seen.now)),
            Mood::Leaving => Beat::Wait(ping),
            Mood::Serving => Beat::Wait(deadlines.next(seen.now, ping)),
            Mood::Blocked => Beat::Wait(deadlines.next(seen.now, seen.now + ASK)),
        }
    }

    /// How often the network has said that nobody listens, since the last look.
    pub(crate) const fn refusals(&self, seen: &Seen) -> u64 {
        seen.signs.refused.saturating_sub(self.signs.refused)
    }

    /// Since when nothing at all has come although a ping should have been answered.
    pub(crate) fn doubt(&self, seen: &Seen) -> Option<Instant> {
        self.unheard().map(|sent| sent + seen.patience(ANSWER)).filter(|since| *since <= seen.now)
    }

    /// A new socket was taken, or there is none to be had for a link of this kind. `false`: not just now.
    pub(crate) fn rebound(&mut self, now: Instant, done: bool) {
        if done {
            (self.rebound, self.wanted, self.moved) = (Some(now), true, false);
        } else {
            self.rebind_again = now + ASK;
        }
    }

    fn look(&mut self, seen: &Seen) {
        if seen.received > self.received {
            self.received = seen.received;
            self.alive(self.heard.max(self.looked));
        } else if seen.now >= self.in_vain.1 + BETWEEN_LOOKS {
            self.in_vain = (self.in_vain.0 + 1, seen.now);
        }
        if seen.lost > self.acknowledged.1 {
            self.acknowledged = (seen.now, seen.lost);
        }
        self.looked = seen.now;
        self.look_at_flow(seen);
        let refusals = self.refusals(seen);
        let unsent = seen.signs.unsent > self.signs.unsent;
        self.moved |= seen.signs.moved > self.signs.moved;
        self.signs = seen.signs;
        if refusals > 0 {
            // The answer decides, so it is asked for now, and once.
            self.wanted |= self.refused.is_none();
            let (since, count) = self.refused.unwrap_or((seen.now, 0));
            self.refused = Some((since, count + refusals));
        }
        if unsent && self.unsent.is_none() {
            (self.unsent, self.wanted) = (Some(seen.now), true);
        }
    }

    /// Asks at once when a link falls silent over which much came.
    fn look_at_flow(&mut self, seen: &Seen) {
        let Some((at, received, before)) = self.flow.filter(|_| seen.in_use) else {
            self.flow = seen.in_use.then_some((seen.now, seen.received, 0));
            return;
        };
        if seen.now < at + BUSY.0 {
            return;
        }
        let came = seen.received.saturating_sub(received);
        self.wanted |= came == 0 && before >= BUSY.1;
        self.flow = Some((seen.now, seen.received, came));
    }

    /// Something came, at this time or later.
    fn alive(&mut self, at: Instant) {
        self.heard = at;
        self.in_vain.0 = 0;
        self.refused = self.refused.filter(|(since, _)| *since > at);
        self.unsent = self.unsent.filter(|since| *since > at);
        self.rebound = self.rebound.filter(|since| *since > at);
    }

    fn verdict(&self, seen: &Seen) -> Option<LinkEnd> {
        let now = seen.now;
        if let Some((since, count)) = self.refused
            && count >= REFUSALS
            && now >= since + seen.patience(CONTRADICT)
        {
            let why = format!("ICMP port unreachable, {count} times, and nothing else came");
            return Some(LinkEnd::new(EndCause::NobodyListens, why));
        }
        let (silence, deaf) = (now - self.heard, now.saturating_duration_since(self.deaf_since()));
        let vain = self.in_vain.0 >= IN_VAIN;
        if vain && silence >= self.silence() && self.unheard().is_some() {
            let why = format!("nothing has come from the shard for {:.1} s", silence.as_secs_f32());
            return Some(LinkEnd::new(EndCause::TimedOut, why));
        }
        let link_lives = self.unanswered.front().is_some_and(|(_, sent)| *sent <= self.heard);
        if link_lives && deaf >= self.deaf() && self.unanswered.len() >= IN_VAIN {
            let why = format!(
                "the shard has not answered for {:.1} s, and yet its link lives",
                (now - self.answered).as_secs_f32()
            );
            return Some(LinkEnd::new(EndCause::TimedOut, why));
        }
        None
    }

    fn silence(&self) -> Duration {
        (self.period + SILENCE.0).clamp(SILENCE.1, SILENCE.2)
    }

    fn deaf(&self) -> Duration {
        (self.period * DEAF.0).clamp(DEAF.1, DEAF.2.max(self.period + DEAF.3))
    }

    /// From when on it counts that there is no answer.
    fn deaf_since(&self) -> Instant {
        let more = self.deaf() * (DEAF_AND_ACKNOWLEDGED - 1);
        self.acknowledged.0.clamp(self.answered, self.answered + more)
    }

    /// The oldest ping behind which nothing at all has come.
    fn unheard(&self) -> Option<Instant> {
        self.unanswered.iter().map(|(_, sent)| *sent).find(|sent| *sent > self.heard)
    }

    fn deadlines(&self, seen: &Seen) -> Deadlines {
        let patience = seen.patience(ANSWER);
        let late = self.unanswered.front().map(|(_, sent)| *sent + patience);
        let dead = self.heard + self.silence();
        let suspicious = self.unheard().map(|sent| {
            let since = sent + patience;
            (since + REBIND.0).min(since.max(dead - REBIND.1))
        });
        let unsent = self.unsent.map(|since| since + seen.patience(CONTRADICT));
        let rebind = unsent.into_iter().chain(suspicious).min().filter(|_| self.rebound.is_none());
        Deadlines {
            late,
            rebind: rebind.map(|at| at.max(self.rebind_again)),
            refused: self.refused.map(|(since, _)| since + seen.patience(CONTRADICT)),
            silence: self.unheard().map(|_| dead),
            deaf: late.map(|_| self.deaf_since() + self.deaf()),
            flow: self.flow.map(|(at, ..)| at + BUSY.0),
            moved: self.moved.then_some(self.rebind_again),
        }
    }

    fn ping_at(&self, seen: &Seen, mood: Mood) -> Instant {
        let Some(pinged) = self.pinged.filter(|_| !self.wanted) else { return seen.now };
        let late = self.unanswered.front().is_some_and(|(_, sent)| *sent + seen.patience(ANSWER) <= seen.now);
        let asks = late && mood != Mood::Leaving;
        pinged + if asks { ASK.min(self.pause) } else { self.pause }
    }

    fn ping(&mut self, now: Instant) -> u64 {
        if self.unanswered.len() >= REMEMBERED {
            // The first tells since when there is no answer; the one behind it is missed least.
            self.unanswered.remove(1);
        }
        if self.pinged.is_some() {
            self.pause = self.period;
        }
        let token = self.next_token;
        self.next_token += 1;
        self.unanswered.push_back((token, now));
        (self.pinged, self.wanted) = (Some(now), false);
        token
    }
}

/// When something may be due.
#[derive(Debug)]
struct Deadlines {
    late: Option<Instant>,
    rebind: Option<Instant>,
    refused: Option<Instant>,
    silence: Option<Instant>,
    deaf: Option<Instant>,
    flow: Option<Instant>,
    moved: Option<Instant>,
}

impl Deadlines {
    /// The first one that is still to come, or `else_at`.
    fn next(&self, now: Instant, else_at: Instant) -> Instant {
        let all = [self.late, self.rebind, self.refused, self.silence, self.deaf, self.flow, self.moved];
        all.into_iter().flatten().filter(|at| *at > now).fold(else_at, Instant::min)
    }
}

#[cfg(test)]
mod tests;
