//! Datagrams both ways between two ends, for as long as a UDP flow lives.
//!
//! A flow has the life of a stream: it is opened, allowed, counted and recorded as one, and it ends with it. Its
//! datagrams travel as QUIC DATAGRAMs where the link has them and they fit, and in the stream otherwise
//! ([`proto::datagram`]). One task moves both directions. Nothing in here waits for room: what cannot go on now is
//! dropped and counted, as UDP does it, so that a slow flow costs nobody anything but itself.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use proto::code::ResetCode;
use tokio::{
    task::yield_now,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::splice::{Broken, Meter};

pub mod port;
pub mod queue;
pub mod socket;
pub mod stream;

/// How long silence may last on a flow before it ends, unless somebody says otherwise.
pub const IDLE: Duration = Duration::from_secs(60);
/// Datagrams that are moved before others get their turn.
const TURN: u32 = 32;
/// How long the ends may take to hear of a clean end.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Where datagrams come from.
pub trait PacketSource: Send {
    /// The next one; `None` at the clean end. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Result<Option<Bytes>, Broken>> + Send;
    /// Waits until the other side has ended as well, as far as it has an end.
    fn ended(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
    /// Wants no more.
    fn stop(&mut self, code: ResetCode);
    /// Datagrams that were dropped on their way in.
    fn dropped(&self) -> u64;
}

/// Where datagrams go to.
pub trait PacketSink: Send {
    /// Sends one, keeps it for [`PacketSink::flush`], or drops it.
    fn put(&mut self, payload: Bytes);
    /// Sends what was kept; waits for ever while there is nothing. Cancel-safe.
    fn flush(&mut self) -> impl Future<Output = Result<(), Broken>> + Send;
    /// Sends what was kept, and the clean end.
    fn finish(&mut self) -> impl Future<Output = ()> + Send;
    /// Breaks it.
    fn abort(&mut self, code: ResetCode);
    /// Passes on what an edge answered, before the first datagram; of no concern to an end that waits for no answer.
    ///
    /// # Errors
    /// If the end is gone.
    fn answer(&mut self, frame: Bytes) -> impl Future<Output = Result<(), Broken>> + Send {
        drop(frame);
        std::future::ready(Ok(()))
    }
    /// From now on the other side knows the flow, and datagrams need not go in its stream.
    fn opened(&mut self) {}
    /// Datagrams that were dropped for lack of room.
    fn dropped(&self) -> u64;
}

/// One end of a flow.
#[derive(Debug)]
pub struct Side<I, O> {
    /// What comes from it.
    pub source: I,
    /// What goes to it.
    pub sink: O,
}

/// When a flow ends, and what is counted meanwhile.
#[derive(Debug)]
pub struct Terms<'a> {
    /// Counts bytes.
    pub meter: &'a Meter,
    /// How long neither direction may carry anything; `None` leaves that to others.
    pub idle: Option<Duration>,
    /// Ends it with [`ResetCode::Shutdown`].
    pub cancel: &'a CancellationToken,
}

/// What a flow has carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Datagrams from the first end to the second.
    pub up: u64,
    /// Datagrams from the second end to the first.
    pub down: u64,
    /// Datagrams that were dropped here.
    pub dropped: u64,
}

/// Why a flow ended without breaking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// One of the ends has had enough.
    Ended,
    /// Nothing came for too long.
    Idle,
}

/// Moves datagrams between two ends until one of them ends, nothing comes for too long, or something breaks.
///
/// # Errors
/// The first part of the result says why it broke; both ends have then been reset.
pub async fn relay<AI, AO, BI, BO>(
    a: &mut Side<AI, AO>,
    b: &mut Side<BI, BO>,
    terms: &Terms<'_>,
) -> (Result<Finished, Broken>, Tally)
where
    AI: PacketSource,
    AO: PacketSink,
    BI: PacketSource,
    BO: PacketSink,
{
    let clock = Clock { begun: Instant::now(), last: AtomicU64::new(0) };
    let (mut up, mut down) = (0, 0);
    let result = {
        let both = async {
            let there = pump(&mut a.source, &mut b.sink, &clock, &mut up, |n| terms.meter.add_up(n));
            let back = pump(&mut b.source, &mut a.sink, &clock, &mut down, |n| terms.meter.add_down(n));
            match tokio::try_join!(there, back) {
                Ok((never, _)) => match never {},
                Err(Stop::End) => Ok(Finished::Ended),
                Err(Stop::Broken(broken)) => Err(broken),
            }
        };
        tokio::select! {
            biased;
            () = terms.cancel.cancelled() => {
                Err(Broken { code: ResetCode::Shutdown, detail: "the process is shutting down".into() })
            }
            result = both => result,
            () = clock.silence(terms.idle) => Ok(Finished::Idle),
        }
    };
    match &result {
        Ok(_) => finish(a, b).await,
        Err(broken) => {
            a.source.stop(broken.code);
            b.source.stop(broken.code);
            a.sink.abort(broken.code);
            b.sink.abort(broken.code);
        }
    }
    let dropped = [a.source.dropped(), a.sink.dropped(), b.source.dropped(), b.sink.dropped()];
    (result, Tally { up, down, dropped: dropped.into_iter().sum() })
}

/// Ends both sides cleanly, as far as they do their part in time.
pub async fn finish<AI, AO, BI, BO>(a: &mut Side<AI, AO>, b: &mut Side<BI, BO>)
where
    AI: PacketSource,
    AO: PacketSink,
    BI: PacketSource,
    BO: PacketSink,
{
    let all = async { tokio::join!(a.sink.finish(), b.sink.finish(), a.source.ended(), b.source.ended()) };
    // Whoever is late is reset when it is dropped.
    let _ = timeout(LAST_WORD, all).await;
}

enum Stop {
    End,
    Broken(Broken),
}

async fn pump(
    source: &mut impl PacketSource,
    sink: &mut impl PacketSink,
    clock: &Clock,
    moved: &mut u64,
    count: impl Fn(usize),
) -> Result<Infallible, Stop> {
    let mut turn = 0;
    loop {
        let next = tokio::select! {
            biased;
            flushed = sink.flush() => {
                flushed.map_err(Stop::Broken)?;
                continue;
            }
            next = source.next() => next,
        };
        let payload = next.map_err(Stop::Broken)?.ok_or(Stop::End)?;
        count(payload.len());
        *moved += 1;
        sink.put(payload);
        clock.tick();
        turn += 1;
        if turn == TURN {
            turn = 0;
            yield_now().await;
        }
    }
}

/// When something was last carried.
struct Clock {
    begun: Instant,
    /// In milliseconds since then.
    last: AtomicU64,
}

impl Clock {
    fn tick(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// Waits until nothing has come for so long.
    async fn silence(&self, idle: Option<Duration>) {
        let Some(idle) = idle else { return std::future::pending().await };
        loop {
            let until = self.begun + Duration::from_millis(self.last.load(Ordering::Relaxed)) + idle;
            if Instant::now() >= until {
                return;
            }
            sleep_until(until).await;
        }
    }
}
