use super::*;

const NONE: Duration = Duration::ZERO;

fn course(addresses: &[&str]) -> Course {
    Course::new(addresses.iter().map(ToString::to_string).collect()).unwrap()
}

fn candidate(shard: &str, addresses: &[&str]) -> Candidate {
    Candidate { shard: shard.parse().unwrap(), addresses: addresses.iter().map(ToString::to_string).collect() }
}

fn shard(name: &str) -> ShardId {
    name.parse().unwrap()
}

fn avoided(course: &Course, now: Instant) -> Vec<String> {
    course.avoided(now).iter().map(ToString::to_string).collect()
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
    assert_eq!(c.first(NONE, now), Step { address: "a:1".into(), delay: NONE, within: None });
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
    c.arrived(&shard("a"), &[]);
    story(
        &mut c,
        now,
        &[
            (lost(EndCause::Transport, 1), "a:1", 1_500),
            (lost(EndCause::Transport, 1), "a:1", 4_500),
            (lost(EndCause::Transport, 31), "a:1", 1_500),
            (lost(EndCause::Closed(CloseCode::Drained), 1), "a:1", 500),
        ],
    );
}

#[tokio::test(start_paused = true)]
async fn candidates_of_a_welcome_come_first_and_bootstrap_stays_known() {
    let (mut c, now) = (course(&["a:1", "b:1"]), Instant::now());
    c.first(NONE, now);
    c.arrived(&shard("a"), &[candidate("x", &["x:1", "b:1"]), candidate("y", &["y:1"])]);
    let no = || failed(EndCause::TimedOut);
    story(
        &mut c,
        now,
        &[
            (lost(EndCause::Transport, 99), "x:1", 1_500),
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
async fn a_shard_without_time_for_a_handshake_is_asked_again_soon_however_often_it_said_so() {
    let mut now = Instant::now();
    let mut alone = course(&["a:1"]);
    alone.first(NONE, now);
    for _ in 0..10 {
        story(&mut alone, now, &[(failed(EndCause::Closed(CloseCode::Overloaded)), "a:1", 7_000)]);
        now += Duration::from_secs(7);
    }
    let step = alone.step(&failed(EndCause::Closed(CloseCode::Overloaded)), now, 0.0);
    assert_eq!(step.delay, BUSY.0, "a crowd that was turned away at once comes back as a stream");
    // Silence is another matter, and has not been waited for yet.
    now += BUSY.0;
    story(&mut alone, now, &[(failed(EndCause::TimedOut), "a:1", 1_500), (failed(EndCause::TimedOut), "a:1", 4_500)]);
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
    c.arrived(&shard("a"), &[]);
    let mut alone = course(&["a:1"]);
    alone.first(NONE, now);
    alone.arrived(&shard("a"), &[]);
    assert!(alone.aside(&[]).is_none(), "nowhere else");
    assert_eq!(c.aside(&[]).unwrap().first(NONE, now).address, "b:1");
    let mut aside = c.aside(&[candidate("x", &["x:1"])]).unwrap();
    let delay = Duration::from_secs(3);
    assert_eq!(aside.first(delay, now), Step { address: "x:1".into(), delay, within: None });
    aside.arrived(&shard("x"), &[candidate("y", &["y:1"])]);
    c.returned(aside);
    assert_eq!(c.places.iter().map(|p| p.address.as_str()).collect::<Vec<_>>(), ["y:1", "x:1", "a:1", "b:1"]);
    c.prefer(&[candidate("z", &["z:1"])], now);
    // Whoever is on the way elsewhere goes there, and not back to the shard that fell silent.
    story(&mut c, now, &[(lost(EndCause::TimedOut, 99), "z:1", 200), (failed(EndCause::TimedOut), "y:1", 0)]);
}

/// A tunnel to `s`, which was reached at `a:1`, with two candidates.
fn settled(now: Instant) -> Course {
    let mut c = course(&["a:1", "b:1"]);
    c.first(NONE, now);
    c.arrived(&shard("s"), &[candidate("x", &["x:1"]), candidate("y", &["y:1", "y:2"])]);
    c
}

#[tokio::test(start_paused = true)]
async fn from_a_shard_that_is_certainly_dead_the_edge_goes_to_the_next_owner_at_once() {
    for cause in [EndCause::NobodyListens, EndCause::PeerRestarted] {
        let now = Instant::now();
        let mut c = settled(now);
        let no = || failed(EndCause::TimedOut);
        story(&mut c, now, &[(lost(cause, 99), "x:1", 200)]);
        assert_eq!(avoided(&c, now), ["s"]);
        assert!(avoided(&c, now + DIED).is_empty());
        // The dead one is asked last.
        story(&mut c, now, &[(no(), "y:1", 0), (no(), "y:2", 0), (no(), "b:1", 0), (no(), "a:1", 0)]);
        assert_eq!(avoided(&c, now), ["s", "x", "y"]);
        story(&mut c, now, &[(no(), "x:1", 1_500)]);
        assert_eq!(avoided(&c, now), ["s"], "nobody answered, so it was not them");
    }
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_fell_silent_gets_one_quick_try() {
    let now = Instant::now();
    let mut c = settled(now);
    let step = c.step(&lost(EndCause::TimedOut, 99), now, 1.0);
    assert_eq!(step, Step { address: "a:1".into(), delay: AT_ONCE, within: Some(QUICK) });
    assert_eq!(avoided(&c, now), ["s"]);
    let step = c.step(&failed(EndCause::TimedOut), now, 1.0);
    assert_eq!(step, Step { address: "x:1".into(), delay: NONE, within: None });
    assert_eq!(avoided(&c, now + DIED - Duration::from_millis(1)), ["s"]);
    assert!(avoided(&c, now + DIED).is_empty(), "the quick try says nothing new");
    // It was only the path: nothing speaks against it any more.
    let mut c = settled(now);
    c.step(&lost(EndCause::TimedOut, 99), now, 1.0);
    c.arrived(&shard("s"), &[candidate("x", &["x:1"])]);
    assert!(avoided(&c, now).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_takes_an_edge_and_loses_it_does_not_make_it_run_in_circles() {
    for cause in [EndCause::NobodyListens, EndCause::TimedOut, EndCause::Closed(CloseCode::Shutdown)] {
        let now = Instant::now();
        let (mut c, mut delays) = (settled(now), Vec::new());
        for _ in 0..6 {
            delays.push(c.step(&lost(cause, 0), now, 1.0).delay.as_millis());
            c.arrived(&shard("x"), &[candidate("s", &["a:1"])]);
        }
        assert_eq!(delays[3..], [1_500, 4_500, 13_500], "{cause}");
        assert!(delays[..3].iter().all(|delay| *delay <= 500));
        let later = now + HASTE.1;
        assert!(c.step(&lost(cause, 99), later, 1.0).delay <= Duration::from_millis(500), "and then it may again");
    }
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_cannot_be_reached_is_avoided_by_whoever_is_asked_next() {
    let (mut c, now) = (course(&["a:1"]), Instant::now());
    c.first(NONE, now);
    let no = || failed(EndCause::TimedOut);
    let to = Outcome::Redirected(candidate("x", &["x:1", "x:2"]));
    story(&mut c, now, &[(to, "x:1", 0), (no(), "x:2", 0)]);
    assert!(avoided(&c, now).is_empty(), "one address is left");
    story(&mut c, now, &[(no(), "a:1", 1_500)]);
    assert_eq!(avoided(&c, now), ["x"], "the one that sent us there answered: so it is that shard");
    assert!(avoided(&c, now + UNREACHED).is_empty());
    c.arrived(&shard("x"), &[]);
    assert!(avoided(&c, now).is_empty(), "it serves again");
}

#[tokio::test(start_paused = true)]
async fn a_full_owner_is_avoided_until_it_wants_to_be_asked_again() {
    let (mut c, now) = (course(&["a:1"]), Instant::now());
    c.first(NONE, now);
    let to = || Outcome::Redirected(candidate("x", &["x:1", "x:2"]));
    story(&mut c, now, &[(to(), "x:1", 0), (refused(CloseCode::Overloaded, Some(20_000)), "x:2", 25_000)]);
    assert_eq!(avoided(&c, now + Duration::from_secs(24)), ["x"]);
    assert!(avoided(&c, now + Duration::from_secs(25)).is_empty());
    // No room for a handshake says the same, without a time.
    let mut c = settled(now);
    c.step(&lost(EndCause::Transport, 99), now, 1.0);
    story(&mut c, now, &[(failed(EndCause::Closed(CloseCode::Overloaded)), "y:1", 0)]);
    assert_eq!(avoided(&c, now), ["x"]);
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_drains_is_avoided_until_it_is_gone_and_a_move_that_failed_for_a_minute() {
    let now = Instant::now();
    let mut c = settled(now);
    let deadline = Duration::from_secs(40);
    c.leaves(&shard("s"), 4, now, deadline);
    let mut aside = c.aside(&[candidate("x", &["x:1"]), candidate("y", &["y:1"])]).unwrap();
    assert_eq!(avoided(&aside, now), ["s"], "whoever is asked is told");
    aside.first(NONE, now);
    aside.step(&failed(EndCause::NobodyListens), now, 1.0);
    c.stayed(aside, &[], now);
    assert_eq!(avoided(&c, now), ["s", "x"], "what was found on the way stays known");
    c.stayed(c.aside(&[candidate("z", &["z:1"])]).unwrap(), &[candidate("z", &["z:1"])], now);
    assert_eq!(avoided(&c, now + deadline), ["x", "z"]);
    // The tunnel breaks on the way: those that are of no use are not preferred.
    c.prefer(&[candidate("z", &["z:1"]), candidate("w", &["w:1"])], now);
    story(&mut c, now, &[(lost(EndCause::Closed(CloseCode::Drained), 99), "w:1", 500)]);
    story(&mut c, now, &[(failed(EndCause::TimedOut), "y:1", 0)]);
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_drained_is_as_good_as_any_once_a_newer_ring_is_known() {
    let (now, hour) = (Instant::now(), Duration::from_secs(3600));
    let mut c = settled(now);
    c.leaves(&shard("s"), 4, now, hour);
    let mut aside = c.aside(&[candidate("x", &["x:1"])]).unwrap();
    aside.first(NONE, now);
    aside.heard_of(4);
    assert_eq!(avoided(&aside, now), ["s"], "the next shard has not heard that it stops");
    aside.heard_of(5);
    aside.arrived(&shard("x"), &[candidate("y", &["y:1"])]);
    c.returned(aside);
    assert!(avoided(&c, now).is_empty());
    // It is back before its drain time is over, and the shard after it drains: the edge goes where it belongs.
    c.leaves(&shard("x"), 6, now, hour);
    let mut aside = c.aside(&[candidate("s", &["a:1"]), candidate("y", &["y:1"])]).unwrap();
    assert_eq!(aside.first(NONE, now).address, "a:1");
    assert_eq!(avoided(&aside, now), ["x"]);
}

#[tokio::test(start_paused = true)]
async fn no_outcome_makes_a_tight_loop() {
    use EndCause as E;
    let causes = [
        E::Local,
        E::TimedOut,
        E::NobodyListens,
        E::PeerRestarted,
        E::NoRoute,
        E::NameUnknown,
        E::WrongCa,
        E::PeerExpired,
        E::WrongPeer,
        E::Distrusted,
        E::Expired,
        E::NoCommonVersion,
        E::Transport,
    ];
    let codes = CloseCode::ALL.iter().map(|code| E::Closed(*code));
    for cause in causes.into_iter().chain(codes) {
        for outcome in [failed(cause), lost(cause, 0)] {
            let began = Instant::now();
            let (mut c, mut now) = (settled(began), began);
            for _ in 0..60 {
                now += c.step(&outcome, now, 0.0).delay;
                if matches!(outcome, Outcome::Lost(..)) {
                    c.arrived(&shard("x"), &[candidate("s", &["a:1"])]);
                }
            }
            assert!(now - began >= Duration::from_secs(5), "{outcome:?}: {:?}", now - began);
        }
    }
}
