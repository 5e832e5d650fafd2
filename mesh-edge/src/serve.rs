//! Serving the streams that a shard opens: read what it is for, decide, dial, answer, and move bytes.
//!
//! Each stream is a task of its own from its first byte on; the accept loop does nothing but start them, so that a slow
//! opener or a dead target never delays anybody else.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use proto::{
    audit::AccessRecord,
    code::{RefuseCode, ResetCode},
    frame::MAX_STREAM_HEAD,
    id::{EdgeId, ShardId},
    principal::Principal,
    stream::{Answer, Open, Refusal},
};
use runtime::{
    access::{self, AccessWriter},
    frames::{FrameReader, ReadFrameError},
    link::{Carrier, Link, Stream, StreamError},
    shutdown::Tasks,
    splice::{Broken, Meter, TcpEnd, splice},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, debug};

use crate::{
    allow::{Allow, Machine, Plan},
    dial::dial,
    load::{InFlight, Load},
    machine,
    metrics::Metrics,
};

mod flow;

/// How long the `Open` frame may take.
const OPEN: Duration = Duration::from_secs(10);
/// Pieces that an echo moves at once.
const PIECES: usize = 16;

/// Serves streams of all tunnels of an edge.
#[derive(Debug)]
pub struct Server {
    edge: EdgeId,
    allow: Allow,
    bounds: Bounds,
    permits: Arc<Semaphore>,
    flows: Arc<Semaphore>,
    access: AccessWriter,
    metrics: Arc<Metrics>,
    tasks: Tasks,
}

/// How a stream ended, for its record.
struct Ended {
    record: AccessRecord,
    outcome: &'static str,
}

impl Server {
    /// Puts it together.
    #[must_use]
    pub fn new(allow: Allow, bounds: Bounds, with: ServerParts) -> Self {
        let room = |count: u32| Arc::new(Semaphore::new(usize::try_from(count).unwrap_or(Semaphore::MAX_PERMITS)));
        let (permits, flows) = (room(bounds.streams), room(bounds.flows));
        let ServerParts { edge, access, metrics, tasks } = with;
        Self { edge, allow, bounds, permits, flows, access, metrics, tasks }
    }

    /// Accepts the streams of one link until it ends or is over.
    pub async fn accept(self: Arc<Self>, link: Link, shard: ShardId, load: Load, over: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = over.cancelled() => return,
                accepted = link.accept() => accepted,
            };
            // Why the link ended is told by the control stream.
            let Ok(stream) = accepted else { return };
            let (server, shard, flight) = (Arc::clone(&self), (shard.clone(), link.carrier()), load.enter());
            let permit = Arc::clone(&self.permits).try_acquire_owned().ok();
            let span = tracing::info_span!("stream", edge = %self.edge, target = tracing::field::Empty, who = tracing::field::Empty);
            self.tasks.spawn(async move { server.stream(stream, &shard, permit, flight).await }.instrument(span));
        }
    }

    async fn stream(
        &self,
        mut stream: Stream,
        shard: &(ShardId, Carrier),
        permit: Option<OwnedSemaphorePermit>,
        flight: InFlight,
    ) {
        let began = Instant::now();
        let open = match read_open(&mut stream).await {
            Ok(open) => open,
            Err(refusal) => {
                debug!(reason = %refusal, "a stream that is for nothing");
                self.metrics.streams.with_label_values(&[refusal.code.slug()]).inc();
                return refuse(stream, refusal).await;
            }
        };
        let record = self.record(&open, shard);
        Span::current().record("target", &record.target).record("who", &record.who);
        self.metrics.streams_active.inc();
        let mut ended = match self.check(&open, permit.as_ref()) {
            Ok(Plan::Echo) => self.echo(stream, record).await,
            Ok(Plan::Flow { to, rule, by_address }) => self.flow(stream, record, (&to, &rule, by_address), began).await,
            Ok(Plan::Dial { to, rule, by_address, or }) => {
                let dialling = async {
                    let first = dial(&self.allow, &to, &rule, by_address, self.bounds.dial).await;
                    match (first, &or) {
                        (Err(refusal), Some(or)) if refusal.code == RefuseCode::TargetRefused => {
                            dial(&self.allow, or, &rule, false, self.bounds.dial).await
                        }
                        (first, _) => first,
                    }
                };
                let left = stream.send.refused();
                let dialled = tokio::select! {
                    biased;
                    error = left => Err(Gone(error)),
                    dialled = dialling => Ok(dialled),
                };
                match dialled {
                    Err(Gone(error)) => abandoned(stream, record, &error),
                    Ok(Err(refusal)) => self.refused(stream, record, refusal).await,
                    Ok(Ok(dialled)) => self.connected(stream, record, dialled, began).await,
                }
            }
            Err(refusal) => self.refused(stream, record, refusal).await,
        };
        self.metrics.streams_active.dec();
        self.metrics.streams.with_label_values(&[ended.outcome]).inc();
        self.metrics.bytes_up.inc_by(ended.record.up);
        self.metrics.bytes_down.inc_by(ended.record.down);
        ended.record.duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        drop((permit, flight));
        self.access.write(ended.record).await;
    }

    fn check(&self, open: &Open, permit: Option<&OwnedSemaphorePermit>) -> Result<Plan, Refusal> {
        if self.tasks.is_stopping() {
            return Err(Refusal::because(RefuseCode::EdgeOffline, format!("edge {} is shutting down", self.edge)));
        }
        let machine = Machine { has_address: machine::has_address, has_pod: machine::has_pod };
        let plan = self.allow.plan_for(open.principal.as_ref(), &open.target, machine)?;
        if matches!(plan, Plan::Flow { .. }) != open.datagrams {
            let why = if open.datagrams {
                format!("{} takes TCP connections and no datagrams", open.target)
            } else {
                format!(
                    "{} takes datagrams: reach it by a UDP door, by SOCKS5's UDP ASSOCIATE or by 'meshctl forward --udp'",
                    open.target
                )
            };
            return Err(Refusal::because(RefuseCode::Unsupported, why));
        }
        match permit {
            Some(_) => Ok(plan),
            None => {
                let why = format!("edge {} serves as many streams as limits.streams allows", self.edge);
                Err(Refusal::because(RefuseCode::LimitReached, why))
            }
        }
    }

    fn record(&self, open: &Open, (shard, carrier): &(ShardId, Carrier)) -> AccessRecord {
        let unnamed = || Principal::Door { name: "(unnamed)".into() };
        let who = open.principal.clone().unwrap_or_else(unnamed);
        AccessRecord {
            from: shard.to_string(),
            shard: shard.to_string(),
            edge: self.edge.to_string(),
            carrier: carrier.slug().to_owned(),
            door: if open.door.is_empty() { "link".to_owned() } else { open.door.clone() },
            trace: open.trace.map(|t| t.trace_id.iter().map(|b| format!("{b:02x}")).collect()).unwrap_or_default(),
            ..AccessRecord::new(&who, &open.target)
        }
    }

    async fn refused(&self, stream: Stream, record: AccessRecord, refusal: Refusal) -> Ended {
        debug!(code = %refusal.code, reason = %refusal, "stream refused");
        let (record, outcome) = (record.refused(refusal.code, &refusal.reason), refusal.code.slug());
        refuse(stream, refusal).await;
        Ended { record, outcome }
    }

    async fn connected(
        &self,
        mut stream: Stream,
        mut record: AccessRecord,
        dialled: crate::dial::Dialled,
        began: Instant,
    ) -> Ended {
        let address = dialled.address.to_string();
        record.open_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        (record.rule, record.address) = (dialled.rule, address.clone());
        let target = match TcpEnd::new(dialled.socket, Bytes::new()) {
            Ok(target) => target,
            Err(e) => {
                let why = format!("{address} broke the connection at once: {e}");
                return self.refused(stream, record, Refusal::because(RefuseCode::TargetRefused, why)).await;
            }
        };
        let answer = Answer::Opened { edge: self.edge.clone(), address }.encode();
        if let Err(error) = stream.send.write_one(answer).await {
            return abandoned(stream, record, &error);
        }
        debug!(address = record.address, rule = record.rule, "stream opened");
        let meter = Arc::new(Meter::default());
        // Streams end with their link, which is closed at the drain deadline; nothing else cuts them.
        let result = splice(stream, target, &meter, &CancellationToken::new()).await;
        finished(record, &result, &meter)
    }

    async fn echo(&self, mut stream: Stream, mut record: AccessRecord) -> Ended {
        let answer = Answer::Opened { edge: self.edge.clone(), address: "(probe)".into() }.encode();
        let mut echoed = 0;
        let result = async {
            stream.send.write_one(answer).await?;
            let mut pieces = [const { Bytes::new() }; PIECES];
            while let Some(count) = stream.recv.chunks(&mut pieces).await? {
                let bytes: usize = pieces[..count].iter().map(Bytes::len).sum();
                stream.send.write(&mut pieces[..count]).await?;
                echoed += bytes as u64;
            }
            stream.send.finish();
            stream.send.delivered().await
        };
        let result: Result<(), Broken> = result.await.map_err(Broken::from);
        if let Err(broken) = &result {
            stream.abort(broken.code);
        }
        (record.up, record.down) = (echoed, echoed);
        ended(record, &result)
    }
}

/// What an edge takes upon itself.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// How long dialing a target may take.
    pub dial: Duration,
    /// Streams at once, flows included.
    pub streams: u32,
    /// Flows of datagrams at once.
    pub flows: u32,
    /// Silence after which a flow ends.
    pub idle: Duration,
}

/// What a [`Server`] needs besides its rules.
#[derive(Debug)]
pub struct ServerParts {
    /// Who serves.
    pub edge: EdgeId,
    /// Where records go.
    pub access: AccessWriter,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// To whom the streams' tasks belong.
    pub tasks: Tasks,
}

/// The opener went away.
struct Gone(StreamError);

async fn read_open(stream: &mut Stream) -> Result<Open, Refusal> {
    let bad = |why: String| Refusal::because(RefuseCode::BadRequest, why);
    let mut reader = FrameReader::new(MAX_STREAM_HEAD);
    let body = match timeout(OPEN, reader.next(&mut stream.recv)).await {
        Ok(Ok(Some(body))) => body,
        Ok(Ok(None)) => return Err(bad("the stream ended before its Open frame".into())),
        Ok(Err(e @ (ReadFrameError::Stream(_) | ReadFrameError::Frame(_) | ReadFrameError::Truncated))) => {
            return Err(bad(e.to_string()));
        }
        Err(_) => return Err(bad(format!("no Open frame within {} s", OPEN.as_secs()))),
    };
    stream.recv.unread(reader.into_rest());
    Open::decode(body).map_err(|e| bad(e.to_string()))
}

/// Answers with a refusal. Whatever the opener has sent is not read.
async fn refuse(mut stream: Stream, refusal: Refusal) {
    stream.recv.stop(ResetCode::Refused);
    if stream.send.write_one(Answer::Refused(refusal).encode()).await.is_ok() {
        stream.send.finish();
    }
}

fn abandoned(stream: Stream, record: AccessRecord, error: &StreamError) -> Ended {
    debug!(%error, "the opener went away");
    stream.abort(error.reset_code());
    ended(record, &Err(Broken { code: error.reset_code(), detail: error.to_string() }))
}

fn finished(mut record: AccessRecord, result: &Result<(), Broken>, meter: &Meter) -> Ended {
    (record.up, record.down) = (meter.up(), meter.down());
    ended(record, result)
}

fn ended(record: AccessRecord, result: &Result<(), Broken>) -> Ended {
    let outcome = match result {
        Ok(()) => "finished",
        Err(broken) => broken.code.slug(),
    };
    Ended { record: access::ended(record, result), outcome }
}
