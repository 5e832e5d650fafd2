//! Where an edge goes next, and when. Pure: an outcome, the time and a random number in; an address and a delay out.
//!
//! All known addresses are tried in turn, one right after the other; only a whole round without luck makes a pause,
//! which grows. A shard that asked to be left alone for a while is left alone for that while.

use std::{collections::VecDeque, time::Duration};

use proto::{
    backoff::Backoff,
    code::{CloseCode, Retry},
    message::{Candidate, Refuse},
};
use runtime::link::{EndCause, LinkEnd};
use tokio::time::Instant;

/// Redirects that are followed in a row.
const MAX_REDIRECTS: u8 = 3;
/// Pauses between rounds over all addresses.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Pause after a problem that only people can solve.
const SLOW: Duration = Duration::from_secs(60);

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
}

/// Where to go next, and when; what it goes by is in the head of this module.
#[derive(Clone, Debug)]
pub struct Course {
    bootstrap: Vec<String>,
    places: Vec<String>,
    next: usize,
    tried: usize,
    detour: VecDeque<String>,
    redirects: u8,
    resting: Vec<(String, Instant)>,
    floor: Duration,
    last: String,
    backoff: Backoff,
}

impl Course {
    /// Begins with these addresses; `None` if there is none.
    #[must_use]
    pub fn new(bootstrap: Vec<String>) -> Option<Self> {
        let last = bootstrap.first()?.clone();
        Some(Self {
            places: bootstrap.clone(),
            bootstrap,
            next: 0,
            tried: 0,
            detour: VecDeque::new(),
            redirects: 0,
            resting: Vec::new(),
            floor: Duration::ZERO,
            last,
            backoff: Backoff::new(BACKOFF.0, BACKOFF.1),
        })
    }

    /// The first step, after a delay.
    pub fn first(&mut self, delay: Duration, now: Instant) -> Step {
        let step = self.advance(now, 0.0);
        Step { delay: step.delay.max(delay), ..step }
    }

    /// A tunnel serves: from now on its shard's candidates come first.
    pub fn arrived(&mut self, candidates: &[Candidate]) {
        let known = candidates.iter().flat_map(|c| &c.addresses).chain(&self.bootstrap);
        let mut places: Vec<String> = Vec::new();
        for address in known {
            if !places.contains(address) {
                places.push(address.clone());
            }
        }
        self.places = places;
        (self.next, self.tried, self.redirects, self.floor) = (0, 0, 0, Duration::ZERO);
        self.detour.clear();
    }

    /// A course for leaving the tunnel at `present` towards these candidates, or, if there are none, towards whoever
    /// else is known; `None` if nobody is.
    #[must_use]
    pub fn aside(&self, to: &[Candidate], present: &str) -> Option<Self> {
        let ordered: Vec<String> = to.iter().flat_map(|c| c.addresses.clone()).collect();
        if !ordered.is_empty() {
            return Self::new(ordered);
        }
        Self::new(self.places.iter().filter(|a| *a != present).cloned().collect())
    }

    /// The edge left a tunnel for the one that this course found: what was known before stays known.
    pub fn returned(&mut self, aside: Self) {
        let bootstrap = std::mem::take(&mut self.bootstrap);
        let others: Vec<_> = bootstrap.iter().filter(|b| !aside.places.contains(b)).cloned().collect();
        *self = Self { bootstrap, ..aside };
        self.places.extend(others);
    }

    /// Tries these first at the next step: the tunnel broke while the edge was on its way to them.
    pub fn prefer(&mut self, to: &[Candidate]) {
        self.detour = to.iter().flat_map(|c| c.addresses.clone()).collect();
    }

    /// The refusal that is told next came from this address.
    pub fn was_at(&mut self, address: &str) {
        address.clone_into(&mut self.last);
    }

    /// What to do next; `random` is uniform in `[0, 1)`.
    pub fn step(&mut self, outcome: &Outcome, now: Instant, random: f64) -> Step {
        match outcome {
            Outcome::Redirected(to) if self.redirects < MAX_REDIRECTS && !to.addresses.is_empty() => {
                self.redirects += 1;
                self.detour = to.addresses.iter().cloned().collect();
            }
            Outcome::Redirected(_) => {
                // The shards disagree. A pause gives them time, and the search begins anew.
                self.detour.clear();
                self.tried = self.places.len();
            }
            Outcome::Failed(end) => self.mind(end.cause),
            Outcome::Refused(refuse) => {
                self.mind(EndCause::Closed(refuse.code));
                let asked = refuse.retry_after.unwrap_or_else(|| pause(refuse.code));
                // Never earlier than asked, and a crowd that was asked the same comes back spread out.
                self.resting.push((self.last.clone(), now + asked.mul_f64(1.0 + random / 4.0)));
            }
            Outcome::Lost(end, lived) => {
                self.backoff.link_lived(*lived);
                (self.next, self.tried) = (0, 0);
                self.mind(end.cause);
                let step = self.advance(now, random);
                let jitter = if leaves_in_order(end.cause) {
                    BACKOFF.0.mul_f64(random)
                } else {
                    self.backoff.next_delay(random)
                };
                return Step { delay: step.delay.max(jitter), ..step };
            }
        }
        self.advance(now, random)
    }

    /// Takes note of what only people can change. If it is about this edge and not about one shard, the round is over.
    fn mind(&mut self, cause: EndCause) {
        if hopeless(cause) {
            self.floor = SLOW;
        }
        if about_this_edge(cause) {
            self.detour.clear();
            self.tried = self.places.len();
        }
    }

    fn advance(&mut self, now: Instant, random: f64) -> Step {
        self.resting.retain(|(_, until)| *until > now);
        if let Some(address) = self.detour.pop_front() {
            return self.go(address.clone(), self.rest(&address, now));
        }
        self.redirects = 0;
        while self.tried < self.places.len() {
            let address = self.take();
            if self.rest(&address, now).is_zero() {
                return self.go(address, Duration::ZERO);
            }
        }
        let pause = self.backoff.next_delay(random).max(std::mem::take(&mut self.floor));
        self.tried = 0;
        // The round is over: the one that wants to rest least comes first, and of equals the next in turn.
        let soonest = (0..self.places.len())
            .map(|i| (self.next + i) % self.places.len())
            .min_by_key(|&i| self.rest(&self.places[i], now).max(pause));
        self.next = soonest.unwrap_or(self.next);
        let address = self.take();
        let delay = self.rest(&address, now).max(pause);
        self.go(address, delay)
    }

    fn take(&mut self) -> String {
        let address = self.places[self.next].clone();
        self.next = (self.next + 1) % self.places.len();
        self.tried += 1;
        address
    }

    fn rest(&self, address: &str, now: Instant) -> Duration {
        let rests = self.resting.iter().filter(|(a, _)| a == address);
        rests.map(|(_, until)| *until - now).max().unwrap_or_default()
    }

    fn go(&mut self, address: String, delay: Duration) -> Step {
        self.last.clone_from(&address);
        Step { address, delay }
    }
}

/// Whether only people can change it.
pub(crate) const fn hopeless(cause: EndCause) -> bool {
    // One shard's clock or CA may be wrong, so the others are asked before the long pause.
    let here = matches!(cause, EndCause::Expired | EndCause::Distrusted | EndCause::Closed(CloseCode::Expired));
    here || about_this_edge(cause)
}

/// Whether every shard would say the same.
const fn about_this_edge(cause: EndCause) -> bool {
    use CloseCode as C;
    matches!(cause, EndCause::Closed(C::Revoked | C::NameMismatch | C::WrongRole | C::DuplicateIdentity))
}

/// Whether the shard closed the link in good order, so that another one is expected to serve right away.
const fn leaves_in_order(cause: EndCause) -> bool {
    use CloseCode as C;
    matches!(cause, EndCause::Closed(C::Shutdown | C::Drained | C::Moved | C::Redirected))
}

const fn pause(code: CloseCode) -> Duration {
    match code.retry() {
        Retry::Now => Duration::ZERO,
        Retry::After(duration) => duration,
        Retry::Never => SLOW,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Duration = Duration::ZERO;

    fn course(addresses: &[&str]) -> Course {
        Course::new(addresses.iter().map(ToString::to_string).collect()).unwrap()
    }

    fn candidate(shard: &str, addresses: &[&str]) -> Candidate {
        Candidate { shard: shard.parse().unwrap(), addresses: addresses.iter().map(ToString::to_string).collect() }
    }

    fn failed(cause: EndCause) -> Outcome {
        Outcome::Failed(LinkEnd::new(cause, ""))
    }

    fn lost(cause: EndCause, lived: u64) -> Outcome {
        Outcome::Lost(LinkEnd::new(cause, ""), Duration::from_secs(lived))
    }

    fn redirect(address: &str) -> Outcome {
        Outcome::Redirected(candidate("x", &[address]))
    }

    fn refused(code: CloseCode, retry_ms: Option<u64>) -> Outcome {
        Outcome::Refused(Refuse { code, reason: String::new(), retry_after: retry_ms.map(Duration::from_millis) })
    }

    /// Takes each outcome in turn, with the largest random number, and compares address and delay in milliseconds.
    fn story(course: &mut Course, now: Instant, steps: &[(Outcome, &str, u64)]) {
        for (i, (outcome, address, delay)) in steps.iter().enumerate() {
            let step = course.step(outcome, now, 1.0);
            assert_eq!((step.address.as_str(), step.delay.as_millis()), (*address, u128::from(*delay)), "step {i}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_is_quick_and_the_pauses_between_rounds_grow_to_the_cap() {
        let (mut c, now) = (course(&["a:1", "b:1"]), Instant::now());
        assert_eq!(c.first(NONE, now), Step { address: "a:1".into(), delay: NONE });
        let no = || failed(EndCause::TimedOut);
        story(
            &mut c,
            now,
            &[
                (no(), "b:1", 0),
                (no(), "a:1", 1_500),
                (no(), "b:1", 0),
                (no(), "a:1", 4_500),
                (no(), "b:1", 0),
                (no(), "a:1", 13_500),
                (no(), "b:1", 0),
                (no(), "a:1", 30_000),
                (no(), "b:1", 0),
                (no(), "a:1", 30_000),
            ],
        );
    }

    #[tokio::test(start_paused = true)]
    async fn three_redirects_are_followed_and_the_fourth_makes_a_pause() {
        let (mut c, now) = (course(&["a:1", "b:1"]), Instant::now());
        c.first(NONE, now);
        story(
            &mut c,
            now,
            &[
                (redirect("x:1"), "x:1", 0),
                (redirect("y:1"), "y:1", 0),
                (redirect("z:1"), "z:1", 0),
                (redirect("a:1"), "b:1", 1_500),
                (redirect("x:1"), "x:1", 0),
                (failed(EndCause::TimedOut), "a:1", 0),
            ],
        );
        assert_eq!(c.step(&Outcome::Redirected(candidate("x", &[])), now, 0.0).delay, BACKOFF.0, "nowhere to");
    }

    #[tokio::test(start_paused = true)]
    async fn every_address_of_a_redirect_is_tried() {
        let (mut c, now) = (course(&["a:1", "b:1"]), Instant::now());
        c.first(NONE, now);
        let to = Outcome::Redirected(candidate("x", &["x:1", "x:2"]));
        let no = || failed(EndCause::NoRoute);
        story(&mut c, now, &[(to, "x:1", 0), (no(), "x:2", 0), (no(), "b:1", 0)]);
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_link_that_outlived_the_cap_begins_anew() {
        let (mut c, now) = (course(&["a:1"]), Instant::now());
        c.first(NONE, now);
        c.arrived(&[]);
        story(
            &mut c,
            now,
            &[
                (lost(EndCause::TimedOut, 1), "a:1", 1_500),
                (lost(EndCause::TimedOut, 1), "a:1", 4_500),
                (lost(EndCause::TimedOut, 31), "a:1", 1_500),
                (lost(EndCause::Closed(CloseCode::Drained), 1), "a:1", 500),
            ],
        );
    }

    #[tokio::test(start_paused = true)]
    async fn candidates_of_a_welcome_come_first_and_bootstrap_stays_known() {
        let (mut c, now) = (course(&["a:1", "b:1"]), Instant::now());
        c.first(NONE, now);
        c.arrived(&[candidate("x", &["x:1", "b:1"]), candidate("y", &["y:1"])]);
        let no = || failed(EndCause::TimedOut);
        story(
            &mut c,
            now,
            &[
                (lost(EndCause::TimedOut, 99), "x:1", 1_500),
                (no(), "b:1", 0),
                (no(), "y:1", 0),
                (no(), "a:1", 0),
                (no(), "x:1", 4_500),
            ],
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_to_be_left_alone_is_left_alone_and_the_others_are_asked() {
        let (mut c, now) = (course(&["a:1", "b:1"]), Instant::now());
        c.first(NONE, now);
        story(
            &mut c,
            now,
            &[
                (refused(CloseCode::Overloaded, Some(20_000)), "b:1", 0),
                (refused(CloseCode::Overloaded, Some(8_000)), "b:1", 10_000),
            ],
        );
        // A quarter more than was asked for, at most; then it is one like the others.
        story(&mut c, now + Duration::from_secs(26), &[(failed(EndCause::TimedOut), "a:1", 0)]);
        let mut alone = course(&["a:1"]);
        alone.first(NONE, now);
        story(&mut alone, now, &[(refused(CloseCode::Overloaded, None), "a:1", 6_250)]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_only_people_can_change_is_tried_slowly() {
        for code in [CloseCode::Revoked, CloseCode::NameMismatch, CloseCode::WrongRole, CloseCode::DuplicateIdentity] {
            let (mut c, now) = (course(&["a:1", "b:1"]), Instant::now());
            c.first(NONE, now);
            story(&mut c, now, &[(refused(code, None), "b:1", 60_000)]);
            story(&mut c, now, &[(failed(EndCause::Closed(code)), "b:1", 60_000)]);
            let mut c = course(&["a:1", "b:1"]);
            story(&mut c, now, &[(lost(EndCause::Closed(code), 99), "a:1", 60_000)]);
        }
        for cause in [EndCause::Expired, EndCause::Distrusted, EndCause::Closed(CloseCode::Expired)] {
            let (mut c, now) = (course(&["a:1", "b:1"]), Instant::now());
            c.first(NONE, now);
            story(&mut c, now, &[(failed(cause), "b:1", 0), (failed(cause), "a:1", 60_000)]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_order_leads_aside_and_back() {
        let (mut c, now) = (course(&["a:1", "b:1"]), Instant::now());
        c.first(NONE, now);
        c.arrived(&[]);
        assert!(course(&["a:1"]).aside(&[], "a:1").is_none(), "nowhere else");
        assert_eq!(c.aside(&[], "a:1").unwrap().first(NONE, now).address, "b:1");
        let mut aside = c.aside(&[candidate("x", &["x:1"])], "a:1").unwrap();
        let delay = Duration::from_secs(3);
        assert_eq!(aside.first(delay, now), Step { address: "x:1".into(), delay });
        aside.arrived(&[candidate("y", &["y:1"])]);
        c.returned(aside);
        assert_eq!(c.places, ["y:1", "x:1", "a:1", "b:1"]);
        c.prefer(&[candidate("z", &["z:1"])]);
        story(&mut c, now, &[(lost(EndCause::TimedOut, 99), "z:1", 1_500), (failed(EndCause::TimedOut), "y:1", 0)]);
    }
}
