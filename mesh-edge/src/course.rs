//! Where an edge goes next, and when. Pure: an outcome, the time and a random number in; an address and a delay out.
//!
//! All known addresses are tried in turn, one right after the other; only a whole round without luck makes a pause,
//! which grows. A shard that asked to be left alone for a while is left alone for that while.
//!
//! Where the shard behind an address is known, it is also noted which shards are of no use for a while (`Avoid`). They
//! are asked last, and every shard that is asked is told of them, so that it does not send the edge there.

use std::{collections::VecDeque, time::Duration};

use proto::{
    backoff::Backoff,
    code::{CloseCode, Retry},
    id::ShardId,
    message::{Candidate, Refuse},
};
use runtime::link::{EndCause, LinkEnd};
use tokio::time::Instant;

use self::avoid::{Avoid, Why};
use crate::class::Class;

mod avoid;

/// Redirects that are followed in a row.
const MAX_REDIRECTS: u8 = 3;
/// Pauses between rounds over all addresses.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Pause after a problem that only people can solve.
const SLOW: Duration = Duration::from_secs(60);
/// Bounds of the pause after a shard had no time for a handshake. It does not grow: the shard lives, and works off a
/// crowd that should come back as a stream.
const BUSY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(7));
/// How long a shard is avoided none of whose addresses could be reached.
const UNREACHED: Duration = Duration::from_secs(60);
/// How long a shard is avoided whose link died without a word.
const DIED: Duration = Duration::from_secs(15);
/// Spread of the edges that all lost the same shard, and know where to go.
const AT_ONCE: Duration = Duration::from_millis(200);
/// How long a shard that fell silent has for one more try: it may only have been the path, or an address of ours.
const QUICK: Duration = Duration::from_secs(2);
/// Losses within a time that are followed without the pause that grows: a shard that takes an edge and loses it at once
/// must not make it run in circles.
const HASTE: (usize, Duration) = (3, Duration::from_secs(30));

/// What became of a step.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// No tunnel, by this end.
    Failed(LinkEnd),
    /// Another shard serves.
    Redirected(Candidate),
    /// The shard said no.
    Refused(Refuse),
    /// A tunnel that lived this long has ended.
    Lost(LinkEnd, Duration),
}

/// The next thing to do: wait, then dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// `host:port`.
    pub address: String,
    /// How long to wait before.
    pub delay: Duration,
    /// How long the whole attempt may take; `None` leaves it to its parts.
    pub within: Option<Duration>,
}

/// An address, with the shard behind it where it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    address: String,
    shard: Option<ShardId>,
}

fn places_of(candidates: &[Candidate]) -> impl Iterator<Item = Place> {
    candidates.iter().flat_map(|c| {
        c.addresses.iter().map(|address| Place { address: address.clone(), shard: Some(c.shard.clone()) })
    })
}

/// Where to go next, and when; what it goes by is in the head of this module.
#[derive(Clone, Debug)]
pub struct Course {
    bootstrap: Vec<Place>,
    places: Vec<Place>,
    next: usize,
    tried: usize,
    /// Passed over in this round, because their shards are avoided.
    spare: VecDeque<Place>,
    /// To be tried before the round goes on, and all that there were.
    detour: VecDeque<Place>,
    detour_was: Vec<Place>,
    redirects: u8,
    resting: Vec<(Place, Instant)>,
    avoid: Avoid,
    /// Addresses that could not be reached in this round.
    unreached: Vec<String>,
    /// Somebody answered in this round.
    answered: bool,
    /// A shard of this round had no time.
    busy: bool,
    floor: Duration,
    last: Place,
    /// Where the tunnel is.
    present: Option<Place>,
    /// The present step is the one more try.
    quick: bool,
    hasty: VecDeque<Instant>,
    backoff: Backoff,
}

impl Course {
    /// Begins with these addresses; `None` if there is none.
    #[must_use]
    pub fn new(bootstrap: Vec<String>) -> Option<Self> {
        Self::through(bootstrap.into_iter().map(|address| Place { address, shard: None }).collect())
    }

    fn through(bootstrap: Vec<Place>) -> Option<Self> {
        let last = bootstrap.first()?.clone();
        Some(Self {
            places: bootstrap.clone(),
            bootstrap,
            next: 0,
            tried: 0,
            spare: VecDeque::new(),
            detour: VecDeque::new(),
            detour_was: Vec::new(),
            redirects: 0,
            resting: Vec::new(),
            avoid: Avoid::default(),
            unreached: Vec::new(),
            answered: false,
            busy: false,
            floor: Duration::ZERO,
            last,
            present: None,
            quick: false,
            hasty: VecDeque::new(),
            backoff: Backoff::new(BACKOFF.0, BACKOFF.1),
        })
    }

    /// The first step, after a delay.
    pub fn first(&mut self, delay: Duration, now: Instant) -> Step {
        let step = self.advance(now, 0.0);
        Step { delay: step.delay.max(delay), ..step }
    }

    /// The shards that the next one is to be told of, because this edge has no use for them.
    #[must_use]
    pub fn avoided(&self, now: Instant) -> Vec<ShardId> {
        self.avoid.list(now)
    }

    /// A tunnel to this shard serves, at the address of the last step: from now on its candidates come first.
    pub fn arrived(&mut self, shard: &ShardId, candidates: &[Candidate]) {
        self.avoid.take_off(shard);
        self.last.shard = Some(shard.clone());
        let present = self.last.clone();
        self.learn(&present);
        let mut places: Vec<Place> = Vec::new();
        for place in places_of(candidates).chain(self.bootstrap.iter().cloned()) {
            if !places.iter().any(|p| p.address == place.address) {
                places.push(place);
            }
        }
        self.places = places;
        self.present = Some(present);
        (self.redirects, self.floor, self.quick) = (0, Duration::ZERO, false);
        self.detour.clear();
        self.detour_was.clear();
        self.begin();
    }

    /// A course for leaving the present tunnel towards these candidates, or, if there are none, towards whoever else is
    /// known; `None` if nobody is.
    #[must_use]
    pub fn aside(&self, to: &[Candidate]) -> Option<Self> {
        let mut places: Vec<_> = places_of(to).collect();
        if places.is_empty() {
            let here = self.present.as_ref().map(|present| &present.address);
            places = self.places.iter().filter(|place| Some(&place.address) != here).cloned().collect();
        }
        let aside = Self::through(places)?;
        Some(Self { avoid: self.avoid.clone(), resting: self.resting.clone(), ..aside })
    }

    /// The edge left a tunnel for the one that this course found: what was known before stays known.
    pub fn returned(&mut self, aside: Self) {
        let (bootstrap, hasty) = (std::mem::take(&mut self.bootstrap), std::mem::take(&mut self.hasty));
        let known = |place: &&Place| aside.places.iter().any(|p| p.address == place.address);
        let others: Vec<_> = bootstrap.iter().filter(|b| !known(b)).cloned().collect();
        *self = Self { bootstrap, hasty, ..aside };
        self.places.extend(others);
    }

    /// The edge stays, because nobody on that course took it. Those who were `missed` had all the time there was.
    pub fn stayed(&mut self, aside: Self, missed: &[Candidate], now: Instant) {
        (self.avoid, self.resting) = (aside.avoid, aside.resting);
        for candidate in missed {
            self.avoid.add(&candidate.shard, Why::Unreached, now, UNREACHED);
        }
    }

    /// A shard asked to be left, and is gone after this time; `epoch` is that of the newest ring that is known.
    pub fn leaves(&mut self, shard: &ShardId, epoch: u64, now: Instant, time: Duration) {
        self.avoid.add(shard, Why::Stopping(epoch), now, time);
    }

    /// The newest ring that is known has this epoch. Shards that were about to stop before it are not avoided any more:
    /// they are not in it, or serve again.
    pub fn heard_of(&mut self, epoch: u64) {
        self.avoid.heard_of(epoch);
    }

    /// Tries these first at the next step: the tunnel broke while the edge was on its way to them.
    pub fn prefer(&mut self, to: &[Candidate], now: Instant) {
        self.detour = places_of(to).filter(|place| !self.avoids(place, now)).collect();
        self.detour_was = self.detour.iter().cloned().collect();
    }

    /// The refusal that is told next came from the tunnel that served.
    pub fn was_present(&mut self) {
        if let Some(present) = &self.present {
            self.last.clone_from(present);
        }
    }

    /// What to do next; `random` is uniform in `[0, 1)`.
    pub fn step(&mut self, outcome: &Outcome, now: Instant, random: f64) -> Step {
        let quick = std::mem::take(&mut self.quick);
        match outcome {
            Outcome::Redirected(to) if self.redirects < MAX_REDIRECTS && !to.addresses.is_empty() => {
                self.answered = true;
                self.redirects += 1;
                self.detour_was = places_of(std::slice::from_ref(to)).collect();
                self.detour = self.detour_was.iter().cloned().collect();
                for place in self.detour_was.clone() {
                    self.learn(&place);
                }
            }
            Outcome::Redirected(_) => {
                // The shards disagree. A pause gives them time, and the search begins anew.
                self.answered = true;
                self.end_round();
            }
            Outcome::Failed(end) => {
                self.mind(end.cause);
                if end.cause == EndCause::Closed(CloseCode::Overloaded) {
                    self.had_no_time(now, random);
                } else if !Class::of(end.cause).is_unreached() {
                    self.answered = true;
                } else if !quick {
                    self.could_not_reach_last(now);
                }
            }
            Outcome::Refused(refuse) => {
                self.mind(EndCause::Closed(refuse.code));
                self.refused(refuse.code, refuse.retry_after, now, random);
            }
            Outcome::Lost(end, lived) => return self.lost(end.cause, *lived, now, random),
        }
        self.advance(now, random)
    }

    fn lost(&mut self, cause: EndCause, lived: Duration, now: Instant, random: f64) -> Step {
        self.backoff.link_lived(lived);
        self.begin();
        self.mind(cause);
        let (present, loss) = (self.present.take(), Loss::of(cause));
        let why = match loss {
            Loss::Dead => Some(Why::Died),
            // It may be this machine that nothing reaches.
            Loss::Silent => Some(Why::Unreached),
            Loss::Ordered | Loss::Other => None,
        };
        if let (Some(why), Some(shard)) = (why, present.as_ref().and_then(|p| p.shard.as_ref())) {
            self.avoid.add(shard, why, now, DIED);
        }
        let spread = match loss {
            Loss::Dead | Loss::Silent if self.may_haste(now) => AT_ONCE.mul_f64(random),
            Loss::Ordered if self.may_haste(now) => BACKOFF.0.mul_f64(random),
            Loss::Dead | Loss::Silent | Loss::Ordered | Loss::Other => self.backoff.next_delay(random),
        };
        let step = match present {
            // Whoever was on the way to another shard goes there.
            Some(present) if loss == Loss::Silent && self.detour.is_empty() => {
                self.quick = true;
                let rest = self.rest(&present, now);
                Step { within: Some(QUICK), ..self.go(present, rest) }
            }
            Some(_) | None => self.advance(now, random),
        };
        Step { delay: step.delay.max(spread), ..step }
    }

    fn refused(&mut self, code: CloseCode, retry_after: Option<Duration>, now: Instant, random: f64) {
        self.answered = true;
        // Never earlier than asked, and a crowd that was asked the same comes back spread out.
        let rest = retry_after.unwrap_or_else(|| pause(code)).mul_f64(1.0 + random / 4.0);
        self.resting.push((self.last.clone(), now + rest));
        if let (CloseCode::Overloaded, Some(shard)) = (code, &self.last.shard) {
            self.avoid.add(shard, Why::Asked, now, rest);
        }
    }

    fn had_no_time(&mut self, now: Instant, random: f64) {
        (self.answered, self.busy) = (true, true);
        let rest = BUSY.0 + (BUSY.1 - BUSY.0).mul_f64(random);
        self.resting.push((self.last.clone(), now + rest));
        if let Some(shard) = &self.last.shard {
            self.avoid.add(shard, Why::Asked, now, rest);
        }
    }

    fn may_haste(&mut self, now: Instant) -> bool {
        self.hasty.retain(|at| now - *at < HASTE.1);
        let may = self.hasty.len() < HASTE.0;
        if may {
            self.hasty.push_back(now);
        }
        may
    }

    /// Notes that the address of the last step is of no use, and, if it was the last one of a shard, that the shard is.
    fn could_not_reach_last(&mut self, now: Instant) {
        if !self.unreached.contains(&self.last.address) {
            self.unreached.push(self.last.address.clone());
        }
        let Some(shard) = &self.last.shard else { return };
        let mut known = self.detour_was.iter().chain(&self.places).filter(|place| place.shard.as_ref() == Some(shard));
        if known.all(|place| self.unreached.contains(&place.address)) {
            self.avoid.add(shard, Why::Unreached, now, UNREACHED);
        }
    }

    /// Takes note of what only people can change. If it is about this edge and not about one shard, the round is over.
    fn mind(&mut self, cause: EndCause) {
        let class = Class::of(cause);
        if class.needs_people() {
            self.floor = SLOW;
        }
        if class.is_about_this_edge() {
            self.end_round();
        }
    }

    fn begin(&mut self) {
        (self.next, self.tried, self.answered, self.busy) = (0, 0, false, false);
        self.spare.clear();
        self.unreached.clear();
    }

    fn end_round(&mut self) {
        self.detour.clear();
        self.spare.clear();
        self.tried = self.places.len();
    }

    fn advance(&mut self, now: Instant, random: f64) -> Step {
        self.resting.retain(|(_, until)| *until > now);
        if let Some(place) = self.detour.pop_front() {
            let rest = self.rest(&place, now);
            return self.go(place, rest);
        }
        self.redirects = 0;
        while self.tried < self.places.len() {
            let place = self.take();
            if !self.rest(&place, now).is_zero() {
                continue;
            }
            if !self.avoids(&place, now) {
                return self.go(place, Duration::ZERO);
            }
            self.spare.push_back(place);
        }
        if let Some(place) = self.spare.pop_front() {
            return self.go(place, Duration::ZERO);
        }
        self.pause(now, random)
    }

    /// A whole round was without luck.
    fn pause(&mut self, now: Instant, random: f64) -> Step {
        if !self.answered {
            self.avoid.forgive_unreached();
        }
        self.answered = false;
        self.unreached.clear();
        let floor = std::mem::take(&mut self.floor);
        let pause = if std::mem::take(&mut self.busy) { BUSY.0 } else { self.backoff.next_delay(random) }.max(floor);
        self.tried = 0;
        // The one that wants to rest least comes first, and of equals the next in turn.
        let soonest = (0..self.places.len()).map(|i| (self.next + i) % self.places.len()).min_by_key(|&i| {
            let place = &self.places[i];
            (self.rest(place, now).max(pause), self.avoids(place, now + pause))
        });
        self.next = soonest.unwrap_or(self.next);
        let place = self.take();
        let delay = self.rest(&place, now).max(pause);
        self.go(place, delay)
    }

    fn take(&mut self) -> Place {
        let place = self.places[self.next].clone();
        self.next = (self.next + 1) % self.places.len();
        self.tried += 1;
        place
    }

    fn avoids(&self, place: &Place, now: Instant) -> bool {
        place.shard.as_ref().is_some_and(|shard| self.avoid.has(shard, now))
    }

    fn rest(&self, place: &Place, now: Instant) -> Duration {
        let same =
            |other: &Place| other.address == place.address || (other.shard.is_some() && other.shard == place.shard);
        let rests = self.resting.iter().filter(|(other, _)| same(other));
        rests.map(|(_, until)| *until - now).max().unwrap_or_default()
    }

    /// Who is behind an address that may be known by itself.
    fn learn(&mut self, known: &Place) {
        for place in self.bootstrap.iter_mut().chain(&mut self.places) {
            if place.address == known.address {
                place.shard.clone_from(&known.shard);
            }
        }
    }

    fn go(&mut self, place: Place, delay: Duration) -> Step {
        self.last = place;
        Step { address: self.last.address.clone(), delay, within: None }
    }
}

/// How a tunnel ended, as far as it says where to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// The shard is certainly no more.
    Dead,
    /// Nothing comes from it.
    Silent,
    /// It closed the link in good order, so that another one is expected to serve right away.
    Ordered,
    /// Anything else.
    Other,
}

impl Loss {
    const fn of(cause: EndCause) -> Self {
        use CloseCode as C;
        match cause {
            EndCause::NobodyListens | EndCause::PeerRestarted => Self::Dead,
            EndCause::TimedOut => Self::Silent,
            EndCause::Closed(C::Shutdown | C::Drained | C::Moved | C::Redirected) => Self::Ordered,
            EndCause::Closed(_)
            | EndCause::Local
            | EndCause::NoRoute
            | EndCause::ProxyRefused
            | EndCause::NameUnknown
            | EndCause::WrongCa
            | EndCause::PeerExpired
            | EndCause::WrongPeer
            | EndCause::Distrusted
            | EndCause::Expired
            | EndCause::Clock
            | EndCause::NoCommonVersion
            | EndCause::Transport => Self::Other,
        }
    }
}

const fn pause(code: CloseCode) -> Duration {
    match code.retry() {
        Retry::Now => Duration::ZERO,
        Retry::After(duration) => duration,
        Retry::Never => SLOW,
    }
}

#[cfg(test)]
mod tests;
