use super::*;

const RTT: Duration = Duration::from_millis(50);

/// A tunnel to a shard that a test makes speak and fall silent. Times are in milliseconds since it began.
struct Story {
    pulse: Pulse,
    began: Instant,
    now: u64,
    received: u64,
    lost: u64,
    signs: Signs,
    in_use: bool,
    rtt: Duration,
    mood: Mood,
    /// Answers come after the round trip.
    lives: bool,
    /// Bytes come, and no answers.
    deaf: bool,
    answers: VecDeque<(u64, u64)>,
    /// What happened, and when.
    log: Vec<(u64, &'static str)>,
}

impl Story {
    fn new(period_ms: u64) -> Self {
        let began = Instant::now();
        Self {
            pulse: Pulse::new(Duration::from_millis(period_ms), 1.0, began),
            began,
            now: 0,
            received: 0,
            lost: 0,
            signs: Signs::default(),
            in_use: false,
            rtt: RTT,
            mood: Mood::Serving,
            lives: true,
            deaf: false,
            answers: VecDeque::new(),
            log: Vec::new(),
        }
    }

    fn at(&self, ms: u64) -> Instant {
        self.began + Duration::from_millis(ms)
    }

    /// Lets the time pass; returns how the shard was found dead, if it was.
    fn until(&mut self, end: u64) -> Option<EndCause> {
        let mut wake = self.now;
        while self.now < end {
            while let Some((_, token)) = self.answers.pop_front_if(|(at, _)| *at <= self.now) {
                self.received += 40;
                assert!(self.deaf || self.pulse.answered(token, self.at(self.now)).is_some());
            }
            if self.now >= wake {
                match self.beat() {
                    Beat::Ping(token) => {
                        self.log.push((self.now, "ping"));
                        if self.lives {
                            self.answers.push_back((self.now + self.rtt.as_millis() as u64, token));
                        }
                        continue;
                    }
                    Beat::Rebind(_) => {
                        self.log.push((self.now, "rebind"));
                        self.pulse.rebound(self.at(self.now), true);
                        continue;
                    }
                    Beat::Wait(until) => {
                        assert!(until > self.at(self.now), "never in a tight loop");
                        wake = (until - self.began).as_millis() as u64;
                    }
                    Beat::Dead(end) => {
                        self.log.push((self.now, "dead"));
                        return Some(end.cause);
                    }
                }
            }
            self.now += 1;
        }
        None
    }

    fn beat(&mut self) -> Beat {
        let seen = Seen {
            now: self.at(self.now),
            received: self.received,
            lost: self.lost,
            in_use: self.in_use,
            rtt: self.rtt,
            signs: self.signs,
        };
        self.pulse.beat(&seen, self.mood)
    }

    fn refuse(&mut self) {
        self.signs.refused += 1;
    }

    fn times(&self, of: &str) -> Vec<u64> {
        self.log.iter().filter(|(_, what)| *what == of).map(|(at, _)| *at).collect()
    }
}

#[test]
fn a_shard_that_answers_is_asked_once_in_a_period() {
    for period in [3_000, 8_000] {
        let mut story = Story::new(period);
        assert_eq!(story.until(60_000), None);
        let expected: Vec<_> = (0..60_000).step_by(period as usize).collect();
        assert_eq!(story.times("ping"), expected);
        assert!(story.times("rebind").is_empty());
    }
}

#[test]
fn edges_that_came_together_do_not_ping_together() {
    for (phase, second) in [(0.0, 0), (0.25, 750), (0.9, 2_700)] {
        let mut story = Story::new(3_000);
        story.pulse = Pulse::new(Duration::from_millis(3_000), phase, story.began);
        assert_eq!(story.until(7_000), None);
        let due = [0, second, second + 3_000, second + 6_000];
        let expected: Vec<_> = due.into_iter().filter(|at| *at < 7_000).collect();
        assert_eq!(story.times("ping"), expected);
    }
}

#[test]
fn silence_makes_suspicious_then_takes_a_new_socket_then_is_the_end() {
    // Period; when it is asked again, when a new socket is taken, when it is the end.
    for (period, asked, rebound, dead) in [
        (500, 1_000, 4_500, 8_050),
        (3_000, 4_000, 6_050, 8_050),
        (5_000, 6_000, 8_050, 10_050),
        (8_000, 9_000, 10_050, 12_050),
    ] {
        let mut story = Story::new(period);
        story.until(100);
        story.lives = false;
        assert_eq!(story.until(30_000), Some(EndCause::TimedOut), "{period}");
        assert_eq!(story.times("ping")[1..3], [period, asked], "{period}");
        assert_eq!((story.times("rebind"), story.times("dead")), (vec![rebound], vec![dead]), "{period}");
    }
}

#[test]
fn a_long_round_trip_is_given_time() {
    let mut story = Story::new(3_000);
    story.rtt = Duration::from_millis(700);
    assert_eq!(story.until(60_000), None);
    assert_eq!(story.times("ping").len(), 20, "no ping too many");
    story.lives = false;
    assert_eq!(story.until(90_000), Some(EndCause::TimedOut));
}

#[test]
fn whatever_comes_is_a_sign_of_life_but_not_for_ever() {
    for (period, dead) in [(100, 2_000), (3_000, 12_000), (8_000, 14_000), (10_000, 16_000)] {
        let mut story = Story::new(period);
        story.deaf = true;
        assert_eq!(story.until(30_000), Some(EndCause::TimedOut), "{period}");
        assert!(story.times("rebind").is_empty(), "the path is good");
        assert_eq!(story.times("dead"), [dead], "{period}");
    }
    let mut story = Story::new(3_000);
    story.deaf = true;
    story.until(5_000);
    assert_eq!(story.times("ping"), [0, 1_000, 2_000, 3_000, 4_000], "and it is asked until then");
}

#[test]
fn a_path_that_loses_answers_and_is_acknowledged_has_twice_the_time() {
    for (until_ms, dead) in [(0, 12_000), (5_000, 17_000), (60_000, 24_000)] {
        let mut story = Story::new(3_000);
        story.deaf = true;
        for ms in (500..until_ms).step_by(500) {
            story.until(ms);
            story.lost += 1;
        }
        story.until(60_000);
        let at = story.times("dead")[0];
        assert!((dead - 600..=dead).contains(&at), "dead after {at} ms, not {dead}");
    }
}

#[test]
fn life_ends_suspicion_and_another_silence_may_take_another_socket() {
    let mut story = Story::new(3_000);
    story.until(100);
    for silent in [3_000, 13_000] {
        story.lives = false;
        assert_eq!(story.until(silent + 3_500), None);
        story.lives = true;
        assert_eq!(story.until(silent + 9_000), None, "{:?}", story.log);
    }
    assert_eq!(story.times("rebind").len(), 2, "{:?}", story.log);
    assert_eq!(story.until(40_000), None);
}

#[test]
fn two_refusals_and_silence_are_the_end() {
    let mut story = Story::new(3_000);
    story.until(2_999);
    story.lives = false;
    story.until(3_002);
    story.refuse();
    // The sign wakes the one who waits.
    assert_eq!(story.beat(), Beat::Ping(3), "asks at once");
    story.refuse();
    assert_eq!(story.until(10_000), Some(EndCause::NobodyListens));
    assert_eq!(story.times("dead"), [3_252]);
}

#[test]
fn one_refusal_alone_is_not_enough_and_neither_are_many_that_life_contradicts() {
    let mut story = Story::new(3_000);
    story.until(100);
    story.refuse();
    assert_eq!(story.until(60_000), None, "forged");
    for _ in 0..200 {
        story.refuse();
        story.refuse();
        let end = story.now + 97;
        assert_eq!(story.until(end), None, "forged again and again");
    }
    let asked = story.times("ping").iter().filter(|at| **at >= 60_000).count();
    assert!(asked <= 200, "{asked}");
    let mut story = Story::new(3_000);
    story.until(100);
    story.lives = false;
    story.refuse();
    assert_eq!(story.until(60_000), Some(EndCause::TimedOut), "one is not enough: it dies of silence");
}

#[test]
fn a_host_that_cannot_send_takes_a_new_socket_at_once_unless_something_comes() {
    let mut story = Story::new(3_000);
    story.until(1_000);
    story.lives = false;
    story.signs.unsent += 1;
    assert!(matches!(story.beat(), Beat::Ping(_)));
    story.until(2_000);
    assert_eq!(story.times("rebind"), [1_250]);
    story.lives = true;
    assert_eq!(story.until(9_000), None);
    // What comes shows that the socket is good enough.
    story.signs.unsent += 1;
    assert_eq!(story.until(20_000), None);
    assert_eq!(story.times("rebind").len(), 1);
}

#[test]
fn a_socket_that_cannot_be_had_is_tried_again_each_second() {
    let mut story = Story::new(3_000);
    story.until(100);
    story.lives = false;
    let mut tries = Vec::new();
    for now in (100..8_000).step_by(10) {
        story.now = now;
        while let beat @ (Beat::Ping(_) | Beat::Rebind(_)) = story.beat() {
            if matches!(beat, Beat::Rebind(_)) {
                tries.push(now);
                story.pulse.rebound(story.at(now), false);
            }
        }
    }
    assert_eq!(tries, [6_050, 7_050]);
    let mut story = Story::new(8_000);
    story.signs.unsent += 1;
    let mut tries = Vec::new();
    for now in (0..4_000).step_by(10) {
        story.now = now;
        while let beat @ (Beat::Ping(_) | Beat::Rebind(_)) = story.beat() {
            if matches!(beat, Beat::Rebind(_)) {
                tries.push(now);
                story.pulse.rebound(story.at(now), false);
            }
        }
    }
    assert_eq!(tries, [250, 1_250, 2_250, 3_250]);
}

#[test]
fn a_process_that_was_stopped_itself_asks_before_it_believes() {
    let mut story = Story::new(3_000);
    story.until(3_020);
    // Everything stands still for a minute; the answer waits in the socket.
    story.now = 63_000;
    let first = story.beat();
    assert!(!matches!(first, Beat::Dead(_)), "{first:?}");
    assert_eq!(story.until(90_000), None);
}

#[test]
fn whoever_leaves_keeps_the_path_open_and_waits_for_nothing() {
    let mut story = Story::new(3_000);
    story.until(100);
    (story.lives, story.mood) = (false, Mood::Leaving);
    story.signs.refused += 5;
    assert_eq!(story.until(60_000), None);
    assert!(story.times("ping").len() <= 22, "{:?}", story.log);
}

#[test]
fn a_shard_that_dies_under_a_full_window_is_found_dead_too() {
    let mut story = Story::new(3_000);
    story.until(3_010);
    (story.lives, story.mood) = (false, Mood::Blocked);
    story.answers.clear();
    assert_eq!(story.until(30_000), Some(EndCause::TimedOut));
    assert!((8_000..=9_100).contains(&story.times("dead")[0]), "{:?}", story.log);
    let mut story = Story::new(3_000);
    story.until(100);
    (story.lives, story.mood) = (false, Mood::Blocked);
    story.signs.refused += 2;
    assert_eq!(story.until(30_000), Some(EndCause::NobodyListens), "{:?}", story.log);
}

#[test]
fn an_answer_counts_for_the_pings_before_it_and_only_once() {
    let mut story = Story::new(100);
    story.lives = false;
    story.until(150);
    let now = story.at(180);
    assert_eq!(story.pulse.answered(77, now), None, "a token that was never sent");
    assert_eq!(story.pulse.answered(2, now), Some(Duration::from_millis(80)));
    assert_eq!(story.pulse.answered(1, now), None);
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut story = Story::new(100);
    story.deaf = true;
    story.mood = Mood::Leaving;
    story.until(60_000);
    assert_eq!(story.pulse.unanswered.len(), REMEMBERED);
    assert_eq!(story.pulse.unanswered[0].0, 1);
}

#[test]
fn a_machine_with_another_address_takes_a_new_socket_at_once_and_speaks_from_it() {
    let mut story = Story::new(4000);
    story.until(10_000);
    story.log.clear();
    story.signs.moved += 1;
    story.until(10_100);
    assert_eq!(story.log, [(10_000, "rebind"), (10_000, "ping")]);
    story.signs.moved += 1;
    story.until(10_200);
    assert_eq!(story.log[2..], [(10_100, "rebind"), (10_100, "ping")], "and again, however soon");
    story.mood = Mood::Leaving;
    story.signs.moved += 1;
    story.until(10_300);
    assert_eq!(story.log[4].1, "rebind", "streams of an old tunnel go on as well");
}

#[test]
fn a_download_that_stops_is_asked_about_within_a_second() {
    for (in_use, kilobytes, asked) in [(true, 20, true), (true, 1, false), (false, 20, false)] {
        let mut story = Story::new(4000);
        story.in_use = in_use;
        story.until(5000);
        for step in 1..=20 {
            story.received += kilobytes * 1000;
            story.until(5000 + 100 * step);
        }
        story.log.clear();
        story.until(8000);
        let early = story.log.iter().any(|(at, what)| *what == "ping" && *at <= 8000);
        assert_eq!(early, asked, "in use: {in_use}, {kilobytes} kB each 0.1 s: {:?}", story.log);
        story.log.clear();
        // One question is enough while the answer comes.
        story.until(8900);
        assert!(story.log.len() <= 1, "{:?}", story.log);
    }
}
