//! What the holders of a TCP link and its streams have in hand.

use std::{
    future::poll_fn,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use proto::code::{CloseCode, ResetCode};

use super::{
    driver::Ready,
    flow::{Flow, Over},
    state::State,
    wire::Counts,
};
use crate::link::{EndCause, LinkEnd, LinkStats, StreamError, quic::LinkLimits};

/// What a link's driver and its holders share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) ready: Arc<Ready>,
    pub(super) counts: Arc<Counts>,
    pub(super) idle: Duration,
    closed: Mutex<Option<LinkEnd>>,
}

impl Shared {
    pub(super) fn new(limits: &LinkLimits, counts: Arc<Counts>) -> Self {
        Self {
            state: Mutex::new(State::new(limits)),
            ready: Arc::default(),
            counts,
            idle: limits.idle,
            closed: Mutex::default(),
        }
    }

    pub(super) fn ended(&self, end: LinkEnd) {
        self.state.lock().ended(end);
    }

    /// The end, if this side has closed the link.
    pub(super) fn closed_here(&self) -> Option<LinkEnd> {
        self.closed.lock().clone()
    }

    pub(super) fn close(&self, code: CloseCode, reason: &str) {
        let mut state = self.state.lock();
        if state.end.is_some() {
            return;
        }
        state.close(code.number(), reason);
        let end = LinkEnd::new(EndCause::Local, format!("closed here: {code}"));
        state.ended(end.clone());
        *self.closed.lock() = Some(end);
        self.ready.wake();
    }

    fn with<T>(&self, key: u64, work: impl FnOnce(&mut Flow) -> T) -> Option<T> {
        self.state.lock().flows.get_mut(&key).map(work)
    }
}

/// Closes the link when nobody holds it any more.
#[derive(Debug)]
pub(super) struct Held(Arc<Shared>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.close(CloseCode::Done, "");
    }
}

/// A link over TCP.
#[derive(Clone, Debug)]
pub(crate) struct TcpLink {
    held: Arc<Held>,
    remote: SocketAddr,
    alpn: Option<Arc<[u8]>>,
}

impl TcpLink {
    pub(super) fn new(shared: Arc<Shared>, remote: SocketAddr, alpn: Option<&[u8]>) -> Self {
        Self { held: Arc::new(Held(shared)), remote, alpn: alpn.map(Arc::from) }
    }

    fn shared(&self) -> &Shared {
        &self.held.0
    }

    /// Waits until the peer has said what it allows.
    pub(super) async fn greeted(&self) -> Result<(), LinkEnd> {
        poll_fn(|cx| {
            let mut state = self.shared().state.lock();
            if let Some(end) = &state.end {
                return Poll::Ready(Err(end.clone()));
            }
            if state.greeted() {
                return Poll::Ready(Ok(()));
            }
            state.wait_for_end(cx.waker());
            Poll::Pending
        })
        .await
    }

    pub(crate) const fn remote_address(&self) -> SocketAddr {
        self.remote
    }

    pub(crate) fn alpn(&self) -> Option<Vec<u8>> {
        self.alpn.as_deref().map(<[u8]>::to_vec)
    }

    pub(crate) fn rtt(&self) -> Duration {
        self.shared().state.lock().rtt.unwrap_or(Duration::from_millis(100))
    }

    pub(crate) async fn open(&self) -> Result<(Sender, Receiver), LinkEnd> {
        let key = poll_fn(|cx| self.poll_stream(cx, State::open)).await?;
        Ok(self.halves(key))
    }

    pub(crate) async fn accept(&self) -> Result<(Sender, Receiver), LinkEnd> {
        let key = poll_fn(|cx| self.poll_stream(cx, State::accept)).await?;
        Ok(self.halves(key))
    }

    fn poll_stream(
        &self,
        cx: &Context<'_>,
        take: fn(&mut State, &std::task::Waker) -> Option<u64>,
    ) -> Poll<Result<u64, LinkEnd>> {
        let mut state = self.shared().state.lock();
        if let Some(end) = &state.end {
            return Poll::Ready(Err(end.clone()));
        }
        take(&mut state, cx.waker()).map_or(Poll::Pending, |key| Poll::Ready(Ok(key)))
    }

    fn halves(&self, key: u64) -> (Sender, Receiver) {
        let half = || Half { held: Arc::clone(&self.held), key };
        (Sender(half()), Receiver(half()))
    }

    pub(crate) fn allow_streams(&self, count: u32) {
        self.shared().state.lock().allow_streams(count);
        self.shared().ready.nudge(super::state::LINK);
    }

    pub(crate) fn close(&self, code: CloseCode, reason: &str) {
        self.shared().close(code, reason);
    }

    pub(crate) fn end(&self) -> Option<LinkEnd> {
        self.shared().state.lock().end.clone()
    }

    pub(crate) async fn ended(&self) -> LinkEnd {
        poll_fn(|cx| {
            let mut state = self.shared().state.lock();
            if let Some(end) = &state.end {
                return Poll::Ready(end.clone());
            }
            state.wait_for_end(cx.waker());
            Poll::Pending
        })
        .await
    }

    pub(crate) fn stats(&self) -> LinkStats {
        let counts = &self.shared().counts;
        LinkStats {
            sent_bytes: counts.sent.load(Ordering::Relaxed),
            received_bytes: counts.received.load(Ordering::Relaxed),
            ..LinkStats::default()
        }
    }
}

/// One half of a stream.
#[derive(Debug)]
struct Half {
    held: Arc<Held>,
    key: u64,
}

impl Half {
    fn shared(&self) -> &Shared {
        &self.held.0
    }

    fn nudge(&self) {
        self.shared().ready.nudge(self.key);
    }
}

/// Towards the peer.
#[derive(Debug)]
pub(crate) struct Sender(Half);

impl Sender {
    pub(crate) fn poll_write(&self, cx: &Context<'_>, chunk: &mut Bytes) -> Poll<Result<usize, StreamError>> {
        let mut state = self.0.shared().state.lock();
        let (crowded, end) = (state.crowded(), state.end.clone());
        let Some(flow) = state.flows.get_mut(&self.0.key) else { return Poll::Ready(Err(lost(end))) };
        if let Some(code) = flow.out.stopped {
            return Poll::Ready(Err(StreamError::Reset(code)));
        }
        if flow.out.end.is_some() {
            return Poll::Ready(Err(StreamError::Ended));
        }
        if let Some(end) = end {
            return Poll::Ready(Err(StreamError::Link(end)));
        }
        let bytes = flow.out.push(chunk, crowded);
        if bytes == 0 && !chunk.is_empty() {
            flow.out.wait(cx.waker());
            return Poll::Pending;
        }
        state.queued += bytes;
        drop(state);
        self.0.nudge();
        Poll::Ready(Ok(bytes))
    }

    pub(crate) async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), StreamError> {
        for chunk in chunks {
            while !chunk.is_empty() {
                poll_fn(|cx| self.poll_write(cx, chunk)).await?;
            }
        }
        Ok(())
    }

    pub(crate) fn go_first(&self) {
        self.0.shared().with(self.0.key, |flow| flow.first = true);
    }

    pub(crate) fn finish(&self) {
        self.end(Over::Clean);
    }

    pub(crate) fn reset(&self, code: ResetCode) {
        self.end(Over::Reset(code));
    }

    fn end(&self, over: Over) {
        let mut state = self.0.shared().state.lock();
        if let Some(flow) = state.flows.get_mut(&self.0.key) {
            let dropped = flow.out.finish(over);
            state.queued -= dropped;
        }
        drop(state);
        self.0.nudge();
    }

    pub(crate) async fn delivered(&self) -> Result<(), StreamError> {
        poll_fn(|cx| {
            let mut state = self.0.shared().state.lock();
            let end = state.end.clone();
            let Some(flow) = state.flows.get_mut(&self.0.key) else { return Poll::Ready(Err(lost(end))) };
            match (flow.out.stopped, flow.out.end, end) {
                (Some(code), _, _) => Poll::Ready(Err(StreamError::Reset(code))),
                (None, Some(Over::Reset(_)), _) => Poll::Ready(Err(StreamError::Ended)),
                (None, _, _) if flow.out.got => Poll::Ready(Ok(())),
                (None, _, Some(end)) => Poll::Ready(Err(StreamError::Link(end))),
                (None, _, None) => {
                    flow.out.wait(cx.waker());
                    Poll::Pending
                }
            }
        })
        .await
    }

    pub(crate) fn refused(&self) -> impl Future<Output = StreamError> + Send + use<> {
        let (shared, key) = (Arc::clone(&self.0.held.0), self.0.key);
        poll_fn(move |cx| {
            let mut state = shared.state.lock();
            let end = state.end.clone();
            let Some(flow) = state.flows.get_mut(&key) else { return Poll::Pending };
            match (flow.out.stopped, end) {
                (Some(code), _) => Poll::Ready(StreamError::Reset(code)),
                // It is over, and was not refused.
                (None, _) if flow.out.got => Poll::Pending,
                (None, Some(end)) => Poll::Ready(StreamError::Link(end)),
                (None, None) => {
                    flow.out.wait(cx.waker());
                    Poll::Pending
                }
            }
        })
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut state = self.0.shared().state.lock();
        if let Some(flow) = state.flows.get_mut(&self.0.key) {
            flow.held.0 = false;
            let dropped = if flow.out.end.is_none() { flow.out.finish(Over::Reset(ResetCode::Cancelled)) } else { 0 };
            state.queued -= dropped;
        }
        state.tidy(self.0.key);
        drop(state);
        self.0.nudge();
    }
}

/// From the peer.
#[derive(Debug)]
pub(crate) struct Receiver(Half);

impl Receiver {
    pub(crate) fn poll_take(&self, cx: &Context<'_>, max: usize) -> Poll<Result<Option<Bytes>, StreamError>> {
        let mut state = self.0.shared().state.lock();
        let end = state.end.clone();
        let Some(flow) = state.flows.get_mut(&self.0.key) else { return Poll::Ready(Err(lost(end))) };
        if flow.inn.stop.is_some() {
            return Poll::Ready(Err(StreamError::Ended));
        }
        if let Some(bytes) = flow.inn.take(max) {
            let due = flow.inn.credit_due();
            state.freed(bytes.len());
            let about_link = state.link.any();
            drop(state);
            if due {
                self.0.nudge();
            }
            if about_link {
                self.0.shared().ready.nudge(super::state::LINK);
            }
            return Poll::Ready(Ok(Some(bytes)));
        }
        match (flow.inn.over, end) {
            (Some(Over::Clean), _) => Poll::Ready(Ok(None)),
            (Some(Over::Reset(code)), _) => Poll::Ready(Err(StreamError::Reset(code))),
            (None, Some(end)) => Poll::Ready(Err(StreamError::Link(end))),
            (None, None) => {
                flow.inn.wait(cx.waker());
                state.reader_waits();
                if state.link.any() {
                    drop(state);
                    self.0.shared().ready.nudge(super::state::LINK);
                }
                Poll::Pending
            }
        }
    }

    pub(crate) async fn chunk(&self, max: usize) -> Result<Option<Bytes>, StreamError> {
        poll_fn(|cx| self.poll_take(cx, max)).await
    }

    /// As many pieces as there are and fit.
    pub(crate) async fn chunks(&self, out: &mut [Bytes]) -> Result<Option<usize>, StreamError> {
        let Some((first, rest)) = out.split_first_mut() else { return Ok(Some(0)) };
        let Some(bytes) = self.chunk(usize::MAX).await? else { return Ok(None) };
        *first = bytes;
        let cx = Context::from_waker(std::task::Waker::noop());
        let mut count = 1;
        for piece in rest {
            let Poll::Ready(Ok(Some(bytes))) = self.poll_take(&cx, usize::MAX) else { break };
            *piece = bytes;
            count += 1;
        }
        Ok(Some(count))
    }

    pub(crate) fn stop(&self, code: ResetCode) {
        let mut state = self.0.shared().state.lock();
        if let Some(flow) = state.flows.get_mut(&self.0.key) {
            let freed = flow.inn.stop(code);
            state.freed(freed);
        }
        let about_link = state.link.any();
        drop(state);
        self.0.nudge();
        if about_link {
            self.0.shared().ready.nudge(super::state::LINK);
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop(ResetCode::Cancelled);
        let mut state = self.0.shared().state.lock();
        if let Some(flow) = state.flows.get_mut(&self.0.key) {
            flow.held.1 = false;
        }
        state.tidy(self.0.key);
        drop(state);
        self.0.nudge();
    }
}

/// A stream that is not known any more has ended with the link, or long before.
fn lost(end: Option<LinkEnd>) -> StreamError {
    end.map_or(StreamError::Ended, StreamError::Link)
}
