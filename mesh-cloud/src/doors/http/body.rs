//! Bodies on their way through: never collected, never ended early.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio_util::sync::CancellationToken;

use crate::flow::io::BrokenOff;

/// A body of either direction.
pub(crate) type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// How long a body that waits for `100 Continue` waits (RFC 9110, 10.1.1: not indefinitely).
const CONTINUE: Duration = Duration::from_secs(1);

/// No body.
pub(crate) fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// A sentence.
pub(crate) fn text(text: String) -> Body {
    Full::from(text).map_err(|never| match never {}).boxed_unsync()
}

/// What a client sends; held back until `go`, if there is one.
pub(crate) fn from_client(body: Incoming, go: Option<CancellationToken>) -> Body {
    match go {
        None => body.boxed_unsync(),
        Some(go) => {
            let gate = Box::pin(async move {
                // Late is as good as told: the service may not know of 100 at all.
                let _ = tokio::time::timeout(CONTINUE, go.cancelled_owned()).await;
            });
            Held { body, gate: Some(gate) }.boxed_unsync()
        }
    }
}

/// What a service answers; if it breaks off, the client's connection is to know.
pub(crate) fn from_service(body: Incoming, broken_off: Option<BrokenOff>) -> Body {
    match broken_off {
        Some(broken_off) => Watched { body, ended: false, broken_off }.boxed_unsync(),
        None => body.boxed_unsync(),
    }
}

/// What a client sends, on its way to a connection that is to know if it breaks off.
pub(crate) fn watched(body: Body, broken_off: BrokenOff) -> Body {
    Watched { body, ended: false, broken_off }.boxed_unsync()
}

struct Held {
    body: Incoming,
    gate: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(gate) = &mut self.gate {
            ready!(gate.as_mut().poll(cx));
            self.gate = None;
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Notes it if the body fails, or is given up before its end.
struct Watched<B: HttpBody> {
    body: B,
    ended: bool,
    broken_off: BrokenOff,
}

impl<B: HttpBody> Drop for Watched<B> {
    fn drop(&mut self) {
        if !self.ended && !self.body.is_end_stream() {
            self.broken_off.note();
        }
    }
}

impl<B: HttpBody<Data = Bytes> + Unpin> HttpBody for Watched<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(_)) => {}
            Some(Err(_)) => self.broken_off.note(),
            None => self.ended = true,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
