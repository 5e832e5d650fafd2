//! One channel of an SSH connection as an end of a splice.
//!
//! russh grants a client more window as soon as bytes have come, whether anybody has taken them or not. So what comes
//! queues here, and its bounds are kept by not reading the connection (`room`).

use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use proto::code::ResetCode;
use runtime::splice::{Broken, End, Sink, Source};
use russh::{ChannelWriteHalf, server::Msg};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// What has come from the client and is not passed on yet.
#[derive(Debug, Default)]
pub(super) struct Lane {
    inner: Mutex<Inner>,
    filled: Notify,
    taken: Notify,
    broken: CancellationToken,
    /// Whether something is on its way to the client, and how often something has left.
    replying: AtomicBool,
    replies: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    queue: VecDeque<Bytes>,
    bytes: usize,
    /// Bytes that were taken, ever.
    taken: u64,
    /// The client will send no more.
    finished: bool,
    /// The client was told that it gets no more.
    told_end: bool,
    /// Nobody wants what comes.
    unwanted: bool,
    broken: Option<Broken>,
}

impl Lane {
    /// Queues bytes. Returns how many wait now.
    pub(super) fn push(&self, bytes: Bytes) -> usize {
        let mut inner = self.inner.lock();
        if !inner.unwanted && inner.broken.is_none() && !inner.finished {
            inner.bytes += bytes.len();
            inner.queue.push_back(bytes);
            self.filled.notify_one();
        }
        inner.bytes
    }

    /// Bytes that wait.
    pub(super) fn waiting(&self) -> usize {
        self.inner.lock().bytes
    }

    /// Bytes that were taken so far.
    pub(super) fn taken(&self) -> u64 {
        self.inner.lock().taken
    }

    /// Waits until bytes are taken, or will never be.
    pub(super) async fn progress(&self) {
        self.taken.notified().await;
    }

    /// Whether something cannot go to the client now, and how often something could.
    pub(super) fn replies(&self) -> (bool, u64) {
        (self.replying.load(Ordering::Relaxed), self.replies.load(Ordering::Relaxed))
    }

    /// The client has sent its last byte.
    pub(super) fn finish(&self) {
        self.inner.lock().finished = true;
        self.filled.notify_one();
    }

    /// The client has closed the channel: that is clean only if both directions had ended.
    pub(super) fn closed(&self) {
        let clean = {
            let inner = self.inner.lock();
            inner.finished && inner.told_end
        };
        if !clean {
            self.break_off(ResetCode::PeerReset, "the SSH client closed the channel before both directions had ended");
        }
    }

    /// Breaks it.
    pub(super) fn break_off(&self, code: ResetCode, detail: &str) {
        let mut inner = self.inner.lock();
        inner.broken.get_or_insert_with(|| Broken { code, detail: detail.to_owned() });
        inner.queue.clear();
        inner.bytes = 0;
        drop(inner);
        self.filled.notify_one();
        self.taken.notify_one();
        self.broken.cancel();
    }

    fn take(&self, out: &mut [Bytes]) -> Option<Result<usize, Broken>> {
        let mut inner = self.inner.lock();
        if let Some(broken) = &inner.broken {
            return Some(Err(broken.clone()));
        }
        let count = inner.queue.len().min(out.len());
        if count == 0 {
            return inner.finished.then_some(Ok(0));
        }
        let mut bytes = 0;
        for (slot, piece) in out.iter_mut().zip(inner.queue.drain(..count)) {
            bytes += piece.len();
            *slot = piece;
        }
        inner.bytes -= bytes;
        inner.taken += bytes as u64;
        self.taken.notify_one();
        Some(Ok(count))
    }

    fn end(&self) -> Broken {
        let broken = self.inner.lock().broken.clone();
        broken.unwrap_or_else(|| Broken { code: ResetCode::PeerReset, detail: "the SSH connection has ended".into() })
    }
}

/// The channel.
pub(super) struct ChannelEnd {
    /// What comes.
    pub(super) lane: Arc<Lane>,
    /// Where it goes.
    pub(super) write: Arc<ChannelWriteHalf<Msg>>,
}

impl End for ChannelEnd {
    type Source = LaneSource;
    type Sink = ChannelSink;

    fn halves(self) -> (LaneSource, ChannelSink) {
        let sink = ChannelSink { lane: Arc::clone(&self.lane), write: self.write, sending: None };
        (LaneSource(self.lane), sink)
    }
}

/// The reading half.
pub(super) struct LaneSource(Arc<Lane>);

impl Source for LaneSource {
    async fn fill(&mut self, out: &mut [Bytes]) -> Result<usize, Broken> {
        loop {
            if let Some(taken) = self.0.take(out) {
                return taken;
            }
            self.0.filled.notified().await;
        }
    }

    fn stop(&mut self, _: ResetCode) {
        let mut inner = self.0.inner.lock();
        inner.unwanted = true;
        inner.queue.clear();
        inner.bytes = 0;
        self.0.taken.notify_one();
    }
}

type Sending = Pin<Box<dyn Future<Output = Result<(), russh::Error>> + Send>>;

/// The writing half. It waits for the client's window of this channel alone, so that nothing of it stands in the way of
/// other channels.
pub(super) struct ChannelSink {
    lane: Arc<Lane>,
    write: Arc<ChannelWriteHalf<Msg>>,
    /// What was taken and is not on its way yet; it outlives a call that is dropped.
    sending: Option<Sending>,
}

impl fmt::Debug for ChannelSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChannelSink").field("sending", &self.sending.is_some()).finish_non_exhaustive()
    }
}

impl ChannelSink {
    async fn settle(&mut self) -> Result<(), Broken> {
        let Some(sending) = &mut self.sending else { return Ok(()) };
        self.lane.replying.store(true, Ordering::Relaxed);
        let sent = tokio::select! {
            biased;
            () = self.lane.broken.cancelled() => return Err(self.lane.end()),
            sent = sending => sent,
        };
        self.sending = None;
        self.lane.replying.store(false, Ordering::Relaxed);
        self.lane.replies.fetch_add(1, Ordering::Relaxed);
        sent.map_err(|_| self.lane.end())
    }
}

impl Sink for ChannelSink {
    async fn drain(&mut self, pieces: &mut [Bytes]) -> Result<(), Broken> {
        self.settle().await?;
        let batch = gathered(pieces);
        if !batch.is_empty() {
            let write = Arc::clone(&self.write);
            self.sending = Some(Box::pin(async move { write.data_bytes(batch).await }));
        }
        self.settle().await
    }

    async fn finish(&mut self) -> Result<(), Broken> {
        self.settle().await?;
        self.lane.inner.lock().told_end = true;
        let write = Arc::clone(&self.write);
        self.sending = Some(Box::pin(async move { write.eof().await }));
        self.settle().await
    }

    async fn delivered(&mut self) -> Result<(), Broken> {
        Ok(())
    }

    /// Whoever runs the splice closes the channel, and without an end before it that is an abnormal one.
    fn abort(&mut self, _: ResetCode) {
        self.sending = None;
    }
}

/// Takes all pieces, as one: a piece from a link is the payload of a packet, and twenty of them fit into one of SSH, each
/// of which costs an encryption and a turn of the connection's task.
fn gathered(pieces: &mut [Bytes]) -> Bytes {
    let filled = pieces.iter().filter(|p| !p.is_empty()).count();
    if filled <= 1 {
        let found = pieces.iter_mut().find(|p| !p.is_empty());
        return found.map(std::mem::take).unwrap_or_default();
    }
    let mut all = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
    for piece in pieces {
        all.extend_from_slice(&std::mem::take(piece));
    }
    all.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(lane: &Lane) -> Option<Result<Vec<u8>, ResetCode>> {
        let mut out = [const { Bytes::new() }; 4];
        let taken = lane.take(&mut out)?;
        Some(taken.map(|count| out[..count].concat()).map_err(|broken| broken.code))
    }

    #[test]
    fn bytes_come_out_in_their_order_and_then_the_end() {
        let lane = Lane::default();
        assert_eq!(filled(&lane), None, "nothing has come, and more may");
        for piece in [&b"a"[..], b"bc", b"d", b"e", b"f"] {
            lane.push(Bytes::copy_from_slice(piece));
        }
        lane.finish();
        assert_eq!(lane.waiting(), 6);
        assert_eq!((filled(&lane).unwrap().unwrap(), lane.waiting(), lane.taken()), (b"abcde".to_vec(), 1, 5));
        assert_eq!(filled(&lane).unwrap().unwrap(), b"f");
        assert_eq!(filled(&lane).unwrap().unwrap(), b"");
        lane.push(Bytes::from_static(b"late"));
        assert_eq!(filled(&lane).unwrap().unwrap(), b"", "behind the end there is nothing");
    }

    #[test]
    fn a_channel_that_is_closed_in_the_middle_is_broken() {
        let lane = Lane::default();
        lane.push(Bytes::from_static(b"half"));
        lane.finish();
        lane.closed();
        assert_eq!(filled(&lane), Some(Err(ResetCode::PeerReset)), "the other direction had not ended");
        let lane = Lane::default();
        lane.finish();
        lane.inner.lock().told_end = true;
        lane.closed();
        assert_eq!(filled(&lane), Some(Ok(vec![])));
    }

    #[test]
    fn pieces_are_gathered_and_one_is_not_copied() {
        let alone = Bytes::from_static(b"alone");
        let mut pieces = [Bytes::new(), alone.clone()];
        assert_eq!(gathered(&mut pieces).as_ptr(), alone.as_ptr());
        assert!(pieces.iter().all(Bytes::is_empty));
        assert_eq!(gathered(&mut [alone.clone(), Bytes::new(), alone]), "alonealone");
        assert!(gathered(&mut [Bytes::new()]).is_empty());
    }
}
