//! A flow of datagrams through the shard. It is opened, recorded and ended as a stream is; what differs is what moves.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use proto::{
    code::ResetCode,
    frame::MAX_STREAM_HEAD,
    stream::{Answer, Refusal},
};
use runtime::{
    flow::{self, Finished, PacketSink, PacketSource, Side, Tally, Terms, relay},
    frames::FrameReader,
    link::RecvHalf,
    splice::Broken,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{ANSWER, Pending, Trail, Waiting};
use crate::live::Lease;

/// What came of waiting for the edge.
enum Opening {
    Answered(Answer, Bytes),
    Refused(Refusal),
    Broken(Broken),
    /// The opener has gone.
    Gone,
}

impl Pending {
    /// Moves datagrams until the flow ends, for the last if nothing comes for `idle`. Those that come before the edge's
    /// answer go behind the Open; an opener that itself waits for an answer gets the edge's.
    pub async fn flow<I: PacketSource, O: PacketSink>(self, mut opener: Side<I, O>, idle: Option<Duration>) {
        let Self { stream, mut trail, silence, .. } = self;
        let mut edge = flow::stream::side(stream);
        let waiting = Waiting { deadline: trail.begun + ANSWER, edge: trail.edge.clone(), silence };
        let mut early = 0;
        let count = |bytes| {
            trail.meter.add_up(bytes);
            early += 1;
        };
        let opening = tokio::select! {
            biased;
            broken = trail.cut() => Opening::Broken(broken),
            opening = until_answered(&waiting, &mut opener, &mut edge, count) => opening,
        };
        trail.metrics.flow_carried(&Tally { up: early, ..Tally::default() });
        match opening {
            Opening::Answered(answer @ Answer::Opened { .. }, body) => {
                if let Answer::Opened { edge, address } = answer {
                    let took = trail.begun.elapsed();
                    trail.opened(&edge, address, took);
                }
                let result = match opener.sink.answer(framed(&body)).await {
                    Ok(()) => trail.flow(&mut opener, &mut edge, idle).await,
                    Err(broken) => Err(broken),
                };
                if let Err(broken) = &result {
                    stop(&mut opener, &mut edge, broken.code);
                }
                trail.ended(&result.map(|_| ())).await;
            }
            Opening::Answered(answer @ (Answer::Refused(_) | Answer::Routed(_)), body) => {
                let refusal = match answer {
                    Answer::Refused(refusal) => refusal,
                    Answer::Opened { .. } | Answer::Routed(_) => Refusal::new(proto::code::RefuseCode::Internal),
                };
                refuse(&mut opener, &mut edge, framed(&body)).await;
                trail.refused(&refusal).await;
            }
            Opening::Refused(refusal) => {
                refuse(&mut opener, &mut edge, Answer::Refused(refusal.clone()).encode()).await;
                trail.refused(&refusal).await;
            }
            Opening::Broken(broken) => {
                stop(&mut opener, &mut edge, broken.code);
                trail.ended(&Err(broken)).await;
            }
            // Its record says so when it is dropped.
            Opening::Gone => stop(&mut opener, &mut edge, ResetCode::Cancelled),
        }
    }
}

impl Trail {
    async fn flow<AI, AO, BI, BO>(
        &mut self,
        opener: &mut Side<AI, AO>,
        edge: &mut Side<BI, BO>,
        idle: Option<Duration>,
    ) -> Result<Finished, Broken>
    where
        AI: PacketSource,
        AO: PacketSink,
        BI: PacketSource,
        BO: PacketSink,
    {
        opener.sink.opened();
        edge.sink.opened();
        let (meter, cancel) = (Arc::clone(&self.meter), CancellationToken::new());
        let terms = Terms { meter: &meter, idle, cancel: &cancel };
        let moving = relay(opener, edge, &terms);
        tokio::pin!(moving);
        let (result, tally) = tokio::select! {
            biased;
            broken = self.cut() => {
                cancel.cancel();
                (Err(broken), moving.await.1)
            }
            ended = &mut moving => ended,
        };
        self.metrics.flow_carried(&tally);
        result
    }

    /// Waits until the flow has to end.
    async fn cut(&self) -> Broken {
        let never = CancellationToken::new();
        let revoked = self.lease.as_ref().map_or(&never, Lease::ended);
        let code = tokio::select! {
            biased;
            () = revoked.cancelled() => ResetCode::Revoked,
            () = self.stopping.cancelled() => ResetCode::Shutdown,
        };
        Broken { code, detail: code.sentence().into() }
    }
}

/// Waits for the edge's answer, and sends meanwhile what comes.
async fn until_answered<I: PacketSource, O: PacketSink>(
    waiting: &Waiting,
    opener: &mut Side<I, O>,
    edge: &mut Side<flow::stream::StreamSource, flow::stream::StreamSink>,
    mut count: impl FnMut(usize),
) -> Opening {
    let mut reader = FrameReader::new(MAX_STREAM_HEAD);
    let opening = {
        let answer = waiting.answer(edge.source.recv(), &mut reader);
        tokio::pin!(answer);
        loop {
            tokio::select! {
                biased;
                answered = &mut answer => break match answered {
                    Ok((answer, body)) => Opening::Answered(answer, body),
                    Err(refusal) => Opening::Refused(refusal),
                },
                // What the edge says is behind that.
                Ok(()) = edge.sink.flush() => {}
                next = opener.source.next() => match next {
                    Ok(Some(payload)) => {
                        count(payload.len());
                        edge.sink.put(payload);
                    }
                    Ok(None) | Err(_) => break Opening::Gone,
                },
            }
        }
    };
    unread(edge.source.recv(), reader);
    opening
}

fn unread(recv: &mut RecvHalf, reader: FrameReader) {
    recv.unread(reader.into_rest());
}

fn framed(body: &Bytes) -> Bytes {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    Bytes::from([&length.to_be_bytes()[..], body].concat())
}

/// Tells an opener that waits for an answer that it is no.
async fn refuse<AI, AO, BI, BO>(opener: &mut Side<AI, AO>, edge: &mut Side<BI, BO>, answer: Bytes)
where
    AI: PacketSource,
    AO: PacketSink,
    BI: PacketSource,
    BO: PacketSink,
{
    edge.source.stop(ResetCode::Cancelled);
    edge.sink.abort(ResetCode::Cancelled);
    opener.source.stop(ResetCode::Refused);
    if opener.sink.answer(answer).await.is_ok() {
        let deadline = Instant::now() + ANSWER;
        let _ = tokio::time::timeout_at(deadline, opener.sink.finish()).await;
    }
}

fn stop<AI, AO, BI, BO>(opener: &mut Side<AI, AO>, edge: &mut Side<BI, BO>, code: ResetCode)
where
    AI: PacketSource,
    AO: PacketSink,
    BI: PacketSource,
    BO: PacketSink,
{
    opener.source.stop(code);
    opener.sink.abort(code);
    edge.source.stop(code);
    edge.sink.abort(code);
}
