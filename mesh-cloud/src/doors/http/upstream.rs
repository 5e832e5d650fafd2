//! Connections to services, each of them one stream through the mesh, kept for the later requests of one visitor.

use std::{collections::HashMap, time::Duration};

use hyper::{
    Request, Response, Version,
    body::Incoming,
    client::conn::{http1, http2},
    rt::Executor,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use proto::{stream::Refusal, target::Target};
use runtime::shutdown::Tasks;
use tokio::time::timeout;

use super::body::{self, Body};
use crate::{
    flow::io::{BrokenOff, RecordedIo},
    route::{self, Router},
};

/// Idle connections that one visitor keeps per service; more are closed.
const IDLE: usize = 4;
/// Longest head of a response in bytes.
const MAX_HEAD: usize = 128 * 1024;
/// How long a connection may take to become free again after the response that the client has just read to its end.
const TIDY: Duration = Duration::from_millis(20);
/// Flow control of HTTP/2 in bytes. The stream below has a window of its own, so these only must not be the narrower.
pub(crate) const STREAM_WINDOW: u32 = 1024 * 1024;
/// As [`STREAM_WINDOW`], for all streams of a connection.
pub(crate) const CONNECTION_WINDOW: u32 = 2 * 1024 * 1024;
/// How often to ask after the other side of an HTTP/2 connection, and how long to wait for the answer.
pub(crate) const PING: Duration = Duration::from_secs(20);

/// No response came.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// There is no way to the service.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The service broke off.
    #[error(transparent)]
    Broken(#[from] hyper::Error),
}

/// The connections of one visitor.
#[derive(Debug)]
pub(crate) struct Upstreams {
    router: Router,
    tasks: Tasks,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Of what control said when these were opened: after a change, policy decides anew.
    revision: u64,
    http1: HashMap<Key, Vec<Http1>>,
    http2: HashMap<Key, http2::SendRequest<Body>>,
}

/// A connection of HTTP/1.
#[derive(Debug)]
struct Http1 {
    sender: http1::SendRequest<Body>,
    broken_off: BrokenOff,
}

/// The time until a response. A client that goes away in it breaks its request off, of which hyper may not have sent
/// all.
#[derive(Debug)]
struct Waiting(Option<BrokenOff>);

impl Waiting {
    fn is_over(&mut self) {
        self.0 = None;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(broken_off) = &self.0 {
            broken_off.note();
        }
    }
}

/// Whose connection it is, and where it leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    who: String,
    credential: Option<String>,
    target: Target,
}

impl Upstreams {
    pub(crate) fn new(router: Router, tasks: Tasks) -> Self {
        Self { router, tasks, kept: Mutex::default() }
    }

    /// Sends a request and waits for the head of the response. A kept connection that turns out to be closed costs
    /// another try only if nothing of the request has been sent.
    pub(crate) async fn exchange(
        &self,
        route: route::Request,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, Failure> {
        let key = Key {
            who: route.principal.to_string(),
            credential: route.credential.clone(),
            target: route.target.clone(),
        };
        if request.version() == Version::HTTP_2 {
            self.over_http2(key, route, request).await
        } else {
            self.over_http1(key, route, request).await
        }
    }

    async fn over_http1(
        &self,
        key: Key,
        route: route::Request,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, Failure> {
        if let Some(mut idle) = self.idle(&key).await {
            request = request.map(|body| body::watched(body, idle.broken_off.clone()));
            let mut waiting = Waiting(Some(idle.broken_off.clone()));
            match idle.sender.try_send_request(request).await {
                Ok(response) => {
                    waiting.is_over();
                    self.keep(key, idle);
                    return Ok(response);
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(error.into_error().into()),
                },
            }
        }
        let io = self.dial(route).await?;
        let broken_off = io.broken_off();
        let (mut sender, connection) =
            http1::Builder::new().max_buf_size(MAX_HEAD).handshake::<_, Body>(TokioIo::new(io)).await?;
        self.tasks.spawn(async move {
            // Its error reaches whoever waits for the response or reads its body.
            let _ = connection.with_upgrades().await;
        });
        let mut waiting = Waiting(Some(broken_off.clone()));
        let response = sender.send_request(request.map(|body| body::watched(body, broken_off.clone()))).await?;
        waiting.is_over();
        self.keep(key, Http1 { sender, broken_off });
        Ok(response)
    }

    async fn over_http2(
        &self,
        key: Key,
        route: route::Request,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, Failure> {
        let kept = self.kept().http2.get(&key).filter(|sender| !sender.is_closed()).cloned();
        if let Some(mut sender) = kept {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(response),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(error.into_error().into()),
                },
            }
        }
        let io = TokioIo::new(self.dial(route).await?);
        let (mut sender, connection) = http2::Builder::new(InTasks(self.tasks.clone()))
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .handshake::<_, Body>(io)
            .await?;
        self.tasks.spawn(async move {
            let _ = connection.await;
        });
        self.kept().http2.insert(key, sender.clone());
        Ok(sender.send_request(request).await?)
    }

    async fn dial(&self, route: route::Request) -> Result<RecordedIo, Refusal> {
        Ok(self.router.open(route).await?.opened().await?.into_io())
    }

    async fn idle(&self, key: &Key) -> Option<Http1> {
        loop {
            let mut idle = self.kept().http1.get_mut(key)?.pop()?;
            if let Ok(Ok(())) = timeout(TIDY, idle.sender.ready()).await {
                return Some(idle);
            }
        }
    }

    fn keep(&self, key: Key, connection: Http1) {
        let mut kept = self.kept();
        let idle = kept.http1.entry(key).or_default();
        idle.retain(|other| !other.sender.is_closed());
        if idle.len() < IDLE && !connection.sender.is_closed() {
            idle.push(connection);
        }
    }

    fn kept(&self) -> parking_lot::MutexGuard<'_, Kept> {
        let revision = self.router.state().revision;
        let mut kept = self.kept.lock();
        if kept.revision != revision {
            *kept = Kept { revision, ..Kept::default() };
        }
        kept
    }
}

/// Runs hyper's tasks among ours.
#[derive(Clone, Debug)]
pub(crate) struct InTasks(pub(crate) Tasks);

impl<F> Executor<F> for InTasks
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}
