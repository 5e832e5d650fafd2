//! Streams that somebody on a link opens: an edge, a person's tool, another shard. Each begins with an `Open`, goes to the
//! router and then to its target.

use std::time::Duration;

use proto::{
    code::{RefuseCode, ResetCode},
    frame::MAX_STREAM_HEAD,
    id::UserId,
    principal::Principal,
    stream::{Answer, Open, Refusal},
};
use runtime::{
    flow,
    frames::FrameReader,
    link::{Link, LinkEnd, Stream},
    shutdown::Tasks,
};
use tokio::time::timeout;

use crate::{
    fair::{Share, UserShares},
    route::{Request, Router},
};

/// How long the head of a stream may take.
const HEAD: Duration = Duration::from_secs(10);

/// For whom the streams of a link are.
#[derive(Clone)]
pub(crate) enum OnBehalf {
    /// For the one at the other end.
    Of { principal: Principal, credential: Option<String>, shares: Option<(UserId, UserShares)> },
    /// For whom another shard says.
    Stated,
}

/// Serves the streams that somebody on a link opens.
pub(crate) struct Opener {
    /// Finds the tunnels.
    pub(crate) router: Router,
    /// For whom.
    pub(crate) on_behalf: OnBehalf,
    /// Where they come in.
    pub(crate) link: Link,
}

impl Opener {
    /// Serves whatever is opened, until the link ends.
    pub(crate) async fn run(self, tasks: Tasks) -> LinkEnd {
        loop {
            match self.link.accept().await {
                Ok(stream) => self.serve(stream, &tasks),
                Err(end) => return end,
            }
        }
    }

    /// As [`Opener::run`], for a link on which mostly nothing is opened: it may have `streams` open at once from its first
    /// one on. QUIC sets memory aside for each that may come, about 200 bytes.
    pub(crate) async fn run_small(self, streams: u32, tasks: Tasks) -> LinkEnd {
        match self.link.accept().await {
            Ok(stream) => self.serve(stream, &tasks),
            Err(end) => return end,
        }
        self.link.allow_streams(streams);
        self.run(tasks).await
    }

    /// Serves one stream in a task of its own.
    pub(crate) fn serve(&self, stream: Stream, tasks: &Tasks) {
        let (router, on_behalf) = (self.router.clone(), self.on_behalf.clone());
        let from = self.link.remote_address().to_string();
        tasks.spawn(relay(stream, router, on_behalf, from));
    }
}

async fn relay(mut stream: Stream, router: Router, on_behalf: OnBehalf, from: String) {
    let mut reader = FrameReader::new(MAX_STREAM_HEAD);
    let open = match timeout(HEAD, reader.next(&mut stream.recv)).await {
        Ok(Ok(Some(body))) => Open::decode(body),
        Ok(Ok(None) | Err(_)) | Err(_) => return stream.abort(ResetCode::ProtocolError),
    };
    stream.recv.unread(reader.into_rest());
    let passed_on = matches!(on_behalf, OnBehalf::Stated);
    let datagrams = open.as_ref().is_ok_and(|open| open.datagrams);
    let request = open
        .map_err(|e| Refusal::because(RefuseCode::BadRequest, e.to_string()))
        .and_then(|open| request(open, on_behalf, from));
    let opened = match request {
        // The share is held for as long as the stream is.
        Ok((request, share)) => router.open(request).await.map(|pending| (pending, share)),
        Err(refusal) => Err(refusal),
    };
    let refusal = match opened {
        Ok((pending, _share)) => {
            if passed_on {
                let routed = Answer::Routed(pending.routed().clone()).encode();
                if stream.send.write_one(routed).await.is_err() {
                    return;
                }
            }
            if datagrams {
                return pending.flow(flow::stream::side(stream), None).await;
            }
            return pending.relay(stream).await;
        }
        Err(refusal) => refusal,
    };
    if stream.send.write_one(Answer::Refused(refusal).encode()).await.is_ok() {
        stream.send.finish();
        // Until it has arrived, or the link has ended.
        let _ = stream.send.delivered().await;
    }
    stream.recv.stop(ResetCode::Refused);
}

/// What an Open asks for, and on whose behalf: only a shard is believed when it says for whom.
fn request(open: Open, on_behalf: OnBehalf, from: String) -> Result<(Request, Option<Share<UserId>>), Refusal> {
    match on_behalf {
        OnBehalf::Of { principal, credential, shares } => {
            let share = shares.map(|(user, shares)| {
                shares.take(&user).ok_or_else(|| {
                    let reason = format!(
                        "user/{user} has as many streams open at this shard as one user may (limits.streams_per_user)"
                    );
                    Refusal::because(RefuseCode::LimitReached, reason)
                })
            });
            let request = Request {
                credential,
                trace: open.trace,
                datagrams: open.datagrams,
                ..Request::new(principal, from, "link", open.target)
            };
            Ok((request, share.transpose()?))
        }
        OnBehalf::Stated => {
            let principal = open.principal.ok_or_else(|| {
                Refusal::because(RefuseCode::BadRequest, "a shard passed a stream on and did not say for whom")
            })?;
            let request = Request {
                trace: open.trace,
                hops: open.hops,
                via: open.via,
                relayed: true,
                datagrams: open.datagrams,
                ..Request::new(principal, from, &open.door, open.target)
            };
            Ok((request, None))
        }
    }
}
