use proto::code::ResetCode;

use super::*;
use crate::link::tcp::{flow::Over, record::Parser, record::Piece};

/// A side that has heard what the other one allows.
fn side(limits: &LinkLimits) -> State {
    let mut state = State::new(limits);
    for record in
        [Record::Streams(limits.streams), Record::Window(limits.stream_window), Record::Credit(limits.link_window)]
    {
        state.hear(LINK, record).unwrap();
    }
    state.link = Sayings::default();
    state
}

/// Carries what one side has to say about a stream to the other.
fn carry(from: &mut State, key: u64, to: &mut State, there: u64) {
    let mut wire = Vec::new();
    from.put(key, usize::MAX, &mut wire);
    let (mut parser, mut input) = (Parser::default(), &wire[..]);
    while let Some(piece) = parser.next(&mut input).unwrap() {
        match piece {
            Piece::Record(record) => drop(to.hear(there, record).unwrap()),
            Piece::Bytes(data) => to.data(there, data).unwrap(),
        }
    }
}

fn small() -> LinkLimits {
    LinkLimits { stream_window: 1000, link_window: 100_000, streams: 2, ..LinkLimits::default() }
}

fn open(state: &mut State) -> u64 {
    state.open(Waker::noop()).unwrap()
}

#[test]
fn a_stream_is_forgotten_once_both_ends_are_said_and_known() {
    let (mut a, mut b) = (side(&small()), side(&small()));
    let (here, there) = (open(&mut a), b.arrived().unwrap());
    for (state, key) in [(&mut a, here), (&mut b, there)] {
        let flow = state.flows.get_mut(&key).unwrap();
        flow.out.finish(Over::Clean);
        flow.held = (false, false);
    }
    for _ in 0..2 {
        carry(&mut a, here, &mut b, there);
        carry(&mut b, there, &mut a, here);
    }
    for (state, key) in [(&mut a, here), (&mut b, there)] {
        assert!(state.flows[&key].settled());
        state.settled(key);
        assert!(state.flows.is_empty());
        assert_eq!(state.open, (0, 0));
    }
}

#[test]
fn a_stream_sends_no_more_than_its_window_and_goes_on_when_the_reader_does() {
    let (mut a, mut b) = (side(&small()), side(&small()));
    let (here, there) = (open(&mut a), b.arrived().unwrap());
    let mut chunk = bytes::Bytes::from(vec![7; 1500]);
    a.queued += a.flows.get_mut(&here).unwrap().out.push(&mut chunk, false);
    carry(&mut a, here, &mut b, there);
    assert!(!a.wants(here), "the window is used up");
    let first = b.flows.get_mut(&there).unwrap().inn.take(usize::MAX).unwrap();
    assert_eq!(first.len(), 1000);
    carry(&mut b, there, &mut a, here);
    carry(&mut a, here, &mut b, there);
    assert_eq!(b.flows.get_mut(&there).unwrap().inn.take(usize::MAX).unwrap().len(), 500);
    assert_eq!(a.queued, 0);
}

#[test]
fn who_sends_more_than_it_may_is_found_out() {
    let limits = small();
    let mut state = side(&limits);
    let key = state.arrived().unwrap();
    state.data(key, &[0; 1000]).unwrap();
    assert!(state.data(key, &[0; 1]).is_err(), "the stream's window");
    let mut state = side(&LinkLimits { link_window: 1500, ..limits });
    let (one, two) = (state.arrived().unwrap(), state.arrived().unwrap());
    state.data(one, &[0; 1000]).unwrap();
    assert!(state.data(two, &[0; 1000]).is_err(), "the link's window");
    let mut state = side(&limits);
    let most = (0..1000).take_while(|_| state.arrived().is_ok()).count();
    assert!((2..=2 + SLACK as usize + 1).contains(&most), "{most} streams");
    assert!(state.hear(1, Record::Got).is_err(), "an end that was never sent");
    assert!(state.hear(1, Record::Close(1)).is_err(), "not on this stream");
    state.hear(1, Record::End).unwrap();
    assert!(state.data(1, &[0]).is_err(), "data behind the end");
    assert!(state.hear(1, Record::End).is_err(), "two ends");
}

#[test]
fn what_is_dropped_unread_gives_its_room_on_the_link_back() {
    let mut state = side(&LinkLimits { link_window: 2000, ..small() });
    let key = state.arrived().unwrap();
    state.data(key, &[0; 500]).unwrap();
    assert!(!state.link.any());
    let freed = state.flows.get_mut(&key).unwrap().inn.stop(ResetCode::Cancelled);
    state.freed(freed);
    assert_eq!(state.link.credit, Some(500));
    state.data(key, &[0; 500]).unwrap();
    assert_eq!(state.link.credit, Some(1000), "as is what comes later");
}

#[test]
fn bulk_leaves_room_for_what_goes_first() {
    let limits = LinkLimits { link_window: 100_000, stream_window: 200_000, streams: 4, ..small() };
    let (mut a, mut b) = (side(&limits), side(&limits));
    let (bulk, there) = (open(&mut a), b.arrived().unwrap());
    for _ in 0..2 {
        let mut chunk = bytes::Bytes::from(vec![7; 60_000]);
        a.queued += a.flows.get_mut(&bulk).unwrap().out.push(&mut chunk, false);
        carry(&mut a, bulk, &mut b, there);
    }
    assert!(!a.wants(bulk), "what is left on the link is for others");
    let control = open(&mut a);
    let flow = a.flows.get_mut(&control).unwrap();
    flow.first = true;
    a.queued += flow.out.push(&mut bytes::Bytes::from_static(b"ping"), false);
    assert!(a.wants(control));
    a.hear(LINK, Record::Credit(200_000)).unwrap();
    assert!(a.released().contains(&bulk));
    assert!(a.wants(bulk));
}
