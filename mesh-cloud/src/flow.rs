//! One flow through the shard, from the door's question to its access record.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use proto::{
    code::{RefuseCode, ResetCode},
    frame::{self, MAX_STREAM_HEAD},
    id::EdgeId,
    stream::{Answer, Refusal, Routed},
};
use runtime::{
    access::{AccessRecord, AccessWriter},
    frames::{FrameReader, ReadFrameError},
    link::{RecvHalf, SendHalf, Stalled, Stream, StreamError},
    splice::{Broken, End, Meter, Source, splice},
};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::{live::Lease, metrics::Metrics, session::StreamCount};

pub mod io;
mod packets;
pub(crate) mod silence;

use silence::Silence;

/// How long an edge may take to answer an Open. Its own deadline for dialling is shorter.
const ANSWER: Duration = Duration::from_secs(10);

/// A flow whose Open is on its way.
#[derive(Debug)]
pub struct Pending {
    pub(crate) stream: Stream,
    pub(crate) trail: Trail,
    /// Which tunnel it goes through.
    pub(crate) routed: Routed,
    /// Tells when that tunnel is cut, if it ends here and the opener wants to know at once.
    pub(crate) silence: Option<Box<Silence>>,
}

/// A flow whose target is connected.
#[derive(Debug)]
pub struct Opened {
    stream: Stream,
    trail: Trail,
}

/// What a flow leaves behind, and what may end it.
#[derive(Debug)]
pub(crate) struct Trail {
    pub(crate) edge: EdgeId,
    /// Taken when it is written.
    pub(crate) record: Option<AccessRecord>,
    /// Whether the record is only counted, since the shard where the flow entered writes it.
    pub(crate) quiet: bool,
    pub(crate) begun: Instant,
    pub(crate) access: AccessWriter,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) stopping: CancellationToken,
    pub(crate) lease: Option<Lease>,
    /// Counts the flow's bytes, whichever way they are moved.
    pub(crate) meter: Arc<Meter>,
    /// Bytes of the edge's answer that went through with the target's, and are not the target's.
    pub(crate) answer_bytes: u64,
    /// Held for as long as the flow counts as one of the edge's streams.
    pub(crate) _count: Option<StreamCount>,
}

impl Pending {
    /// Which tunnel it goes through.
    #[must_use]
    pub const fn routed(&self) -> &Routed {
        &self.routed
    }

    /// Waits for the edge's answer.
    ///
    /// # Errors
    /// If it is no, or does not come in time; the record has then been written.
    pub async fn opened(self) -> Result<Opened, Refusal> {
        let deadline = self.trail.begun + ANSWER;
        self.opened_by(deadline).await
    }

    /// As [`Pending::opened`], for somebody who cannot wait that long.
    ///
    /// # Errors
    /// As there.
    pub async fn opened_by(mut self, deadline: Instant) -> Result<Opened, Refusal> {
        let mut reader = FrameReader::new(MAX_STREAM_HEAD);
        let deadline = deadline.min(self.trail.begun + ANSWER);
        let waiting = Waiting { deadline, edge: self.trail.edge.clone(), silence: self.silence.take() };
        match waiting.answer(&mut self.stream.recv, &mut reader).await {
            Ok((Answer::Opened { edge, address }, _)) => {
                self.stream.recv.unread(reader.into_rest());
                let took = self.trail.begun.elapsed();
                self.trail.opened(&edge, address, took);
                Ok(Opened { stream: self.stream, trail: self.trail })
            }
            Ok((Answer::Routed(_), _)) => {
                let refusal = Refusal::new(RefuseCode::Internal);
                self.stream.abort(ResetCode::ProtocolError);
                self.trail.refused(&refusal).await;
                Err(refusal)
            }
            Ok((Answer::Refused(refusal), _)) | Err(refusal) => {
                self.stream.abort(ResetCode::Cancelled);
                self.trail.refused(&refusal).await;
                Err(refusal)
            }
        }
    }

    /// Moves bytes at once, without waiting for the answer: what the opener sends goes behind the Open, and a refusal
    /// ends the flow with a reset.
    pub async fn splice(self, opener: impl End) {
        self.run(opener, Mode::Strip).await;
    }

    /// As [`Pending::splice`], for an opener that itself waits for an answer frame: the edge's goes through to it.
    pub async fn relay(self, opener: Stream) {
        self.run(opener, Mode::Relay).await;
    }

    async fn run(self, opener: impl End, mode: Mode) {
        let answer = Arc::new(OnceLock::new());
        let answering = Answering {
            stream: self.stream,
            mode,
            answer: Arc::clone(&answer),
            waiting: Waiting {
                deadline: self.trail.begun + ANSWER,
                edge: self.trail.edge.clone(),
                silence: self.silence,
            },
        };
        let mut trail = self.trail;
        let result = trail.splice(opener, answering).await;
        match answer.get() {
            Some((answer @ Answer::Opened { edge, address }, when)) => {
                trail.opened(edge, address.clone(), *when - trail.begun);
                if mode == Mode::Relay {
                    trail.answer_bytes = answer.encode().len() as u64;
                }
                trail.ended(&result).await;
            }
            Some((Answer::Refused(refusal), _)) => trail.refused(refusal).await,
            Some((Answer::Routed(_), _)) | None => trail.ended(&result).await,
        }
    }
}

impl Opened {
    /// The edge that serves.
    #[must_use]
    pub const fn edge(&self) -> &EdgeId {
        &self.trail.edge
    }

    /// Moves bytes between the opener and the target until both directions have ended.
    pub async fn splice(mut self, opener: impl End) {
        let result = self.trail.splice(opener, self.stream).await;
        self.trail.ended(&result).await;
    }

    /// The flow as a reader and writer, which leaves its record when it is dropped.
    #[must_use]
    pub fn into_io(self) -> io::RecordedIo {
        io::RecordedIo::new(self)
    }
}

impl Trail {
    async fn splice(&mut self, opener: impl End, target: impl End) -> Result<(), Broken> {
        let meter = Arc::clone(&self.meter);
        let never = CancellationToken::new();
        let revoked = self.lease.as_ref().map_or(&never, Lease::ended);
        // Dropping the splice would reset as well; running it to its end under a token gives the reset its code.
        let cancel = self.stopping.child_token();
        let moving = splice(opener, target, &meter, &cancel);
        tokio::pin!(moving);
        tokio::select! {
            biased;
            () = revoked.cancelled() => {
                cancel.cancel();
                let _ = moving.await;
                Err(Broken { code: ResetCode::Revoked, detail: ResetCode::Revoked.sentence().into() })
            }
            result = &mut moving => result,
        }
    }

    fn opened(&mut self, edge: &EdgeId, address: String, took: Duration) {
        self.metrics.open_seconds.observe(took.as_secs_f64());
        if let Some(record) = &mut self.record {
            record.edge = edge.to_string();
            record.address = address;
            record.open_us = micros(took);
        }
    }

    async fn ended(mut self, result: &Result<(), Broken>) {
        let Some(record) = self.end_record(result) else { return };
        if !self.quiet {
            self.access.clone().write(record).await;
        }
    }

    /// As [`Trail::ended`], from where nobody can wait.
    fn ended_now(mut self, result: &Result<(), Broken>) {
        if let Some(record) = self.end_record(result)
            && !self.quiet
            && !self.access.write_now(record)
        {
            self.metrics.records_lost.inc();
        }
    }

    fn end_record(&mut self, result: &Result<(), Broken>) -> Option<AccessRecord> {
        let mut record = self.record.take()?.ended(result, self.begun.elapsed());
        (record.up, record.down) = (self.meter.up(), self.meter.down().saturating_sub(self.answer_bytes));
        self.metrics.stream_ended(&record);
        Some(record)
    }

    async fn refused(mut self, refusal: &Refusal) {
        let Some(record) = self.record.take() else { return };
        let record = record.refused(refusal.code, &refusal.reason);
        self.metrics.stream_ended(&record);
        if !self.quiet {
            self.access.clone().write(record).await;
        }
    }
}

impl Drop for Trail {
    /// The opener went away before there was an end: it is recorded all the same.
    fn drop(&mut self) {
        let Some(mut record) = self.record.take() else { return };
        (record.up, record.down) = (self.meter.up(), self.meter.down().saturating_sub(self.answer_bytes));
        cancelled(record, self.begun, &self.metrics, (!self.quiet).then_some(&self.access));
    }
}

fn cancelled(mut record: AccessRecord, begun: Instant, metrics: &Metrics, access: Option<&AccessWriter>) {
    record.outcome = "cancelled";
    record.code = ResetCode::Cancelled.slug();
    record.duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    metrics.stream_ended(&record);
    if access.is_some_and(|access| !access.write_now(record)) {
        metrics.records_lost.inc();
    }
}

/// A request that is neither a flow nor refused yet. If its opener goes away meanwhile, it is recorded all the same.
pub(crate) struct Beginning<'a> {
    /// Taken when the request has become a flow, which then has the record, or is refused.
    pub(crate) record: Option<AccessRecord>,
    /// Whether the record is only counted.
    pub(crate) quiet: bool,
    pub(crate) begun: Instant,
    pub(crate) access: &'a AccessWriter,
    pub(crate) metrics: &'a Metrics,
}

impl Beginning<'_> {
    pub(crate) async fn refused(mut self, refusal: &Refusal) {
        let Some(record) = self.record.take() else { return };
        let mut record = record.refused(refusal.code, &refusal.reason);
        record.duration_ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.metrics.stream_ended(&record);
        if !self.quiet {
            self.access.write(record).await;
        }
    }
}

impl Drop for Beginning<'_> {
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            cancelled(record, self.begun, self.metrics, (!self.quiet).then_some(self.access));
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Waits for the edge's answer.
struct Waiting {
    deadline: Instant,
    edge: EdgeId,
    silence: Option<Box<Silence>>,
}

impl Waiting {
    /// Reads the answer frame; also returns its bytes, for those who pass it on.
    async fn answer(&self, recv: &mut RecvHalf, reader: &mut FrameReader) -> Result<(Answer, Bytes), Refusal> {
        let edge = &self.edge;
        let lost = |why: String| {
            let reason = format!("the link to edge/{edge} broke while the stream was being opened ({why}); try again");
            Refusal::because(RefuseCode::LinkLost, reason)
        };
        let read = tokio::select! {
            biased;
            read = timeout_at(self.deadline, reader.next(recv)) => read,
            refusal = cut(self.silence.as_deref()) => return Err(refusal),
        };
        match read {
            Ok(Ok(Some(body))) => match Answer::decode(body.clone()) {
                Ok(answer) => Ok((answer, body)),
                Err(e) => Err(Refusal::because(RefuseCode::Internal, format!("edge/{edge} answered nonsense: {e}"))),
            },
            Ok(Ok(None)) => Err(lost("the edge ended the stream".into())),
            // A reset overtakes what was sent before it: the edge had said yes, and the target broke off at once.
            Ok(Err(ReadFrameError::Stream(StreamError::Reset(ResetCode::PeerReset)))) => {
                let reason =
                    format!("the target broke off as soon as edge/{edge} had reached it; does it listen there?");
                Err(Refusal::because(RefuseCode::TargetRefused, reason))
            }
            Ok(Err(e)) => Err(lost(e.to_string())),
            Err(_) => {
                let reason = format!("edge/{edge} did not answer in time; its link may be down");
                Err(Refusal::because(RefuseCode::MeshTimeout, reason))
            }
        }
    }
}

async fn cut(silence: Option<&Silence>) -> Refusal {
    match silence {
        // It waits in few cases; its room is not every stream's.
        Some(silence) => Box::pin(silence.cut()).await,
        None => std::future::pending().await,
    }
}

/// What to do with the edge's answer frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Take it off: the opener knows nothing of frames.
    Strip,
    /// Pass it on: the opener waits for it.
    Relay,
}

/// A stream to an edge whose answer is still to come.
struct Answering {
    stream: Stream,
    mode: Mode,
    answer: Arc<OnceLock<(Answer, Instant)>>,
    waiting: Waiting,
}

struct AnsweringSource {
    recv: RecvHalf,
    reader: Option<FrameReader>,
    mode: Mode,
    answer: Arc<OnceLock<(Answer, Instant)>>,
    waiting: Waiting,
}

impl End for Answering {
    type Source = AnsweringSource;
    type Sink = SendHalf;

    fn halves(self) -> (AnsweringSource, SendHalf) {
        let source = AnsweringSource {
            recv: self.stream.recv,
            reader: Some(FrameReader::new(MAX_STREAM_HEAD)),
            mode: self.mode,
            answer: self.answer,
            waiting: self.waiting,
        };
        (source, self.stream.send)
    }
}

impl Source for AnsweringSource {
    async fn fill(&mut self, out: &mut [Bytes]) -> Result<usize, Broken> {
        let Some(mut reader) = self.reader.take() else { return self.recv.fill(out).await };
        let (answer, body) = match self.waiting.answer(&mut self.recv, &mut reader).await {
            Ok(read) => read,
            Err(refusal) => {
                let answer = Answer::Refused(refusal);
                let frame = answer.encode();
                (answer, frame.slice(frame::HEADER..))
            }
        };
        self.recv.unread(reader.into_rest());
        let refused = match &answer {
            Answer::Refused(refusal) => Some(refusal.reason.clone()),
            Answer::Opened { .. } | Answer::Routed(_) => None,
        };
        // Set once: the reader was there.
        let _ = self.answer.set((answer, Instant::now()));
        match (self.mode, refused) {
            (Mode::Strip, None) => self.recv.fill(out).await,
            (Mode::Strip, Some(detail)) => Err(Broken { code: ResetCode::Refused, detail }),
            (Mode::Relay, _) => {
                let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
                out[0] = Bytes::copy_from_slice(&[&len.to_be_bytes()[..], &body].concat());
                Ok(1)
            }
        }
    }

    fn stop(&mut self, code: ResetCode) {
        self.recv.stop(code);
    }

    fn stalled(&self) -> Option<Stalled> {
        Some(self.recv.stalled())
    }
}
