//! The shard's grip on one edge: the control stream, and a handle by which streams are opened to it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use proto::{
    code::{CloseCode, RefuseCode},
    frame::{FrameError, MAX_EDGE_TO_SHARD},
    id::{EdgeId, ShardId, SiteName},
    message::{EdgeToShard, Hello, Refuse, Renew, Renewal, Service, ShardToEdge},
    standing::Standing,
    stream::{Open, Refusal},
};
use runtime::{
    clock,
    frames::{FrameReader, ReadFrameError},
    link::{Link, LinkEnd, LinkStats, Stream},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

/// How long the edge may take for its first message.
const HELLO: Duration = Duration::from_secs(5);
/// How long a message to the edge may take to be taken off our hands.
const WRITE: Duration = Duration::from_secs(5);
/// How long a last word may take to arrive before the link is closed all the same.
const LAST_WORD: Duration = Duration::from_secs(1);
/// How long to wait for the edge to allow one more stream.
const STREAM_CREDIT: Duration = Duration::from_secs(2);
/// How much later than asked for a ping comes at the latest: by then the edge has asked again.
const OVERDUE: Duration = Duration::from_millis(1500);
/// Orders that wait to be sent to the edge; one more is not taken.
const ORDERS: usize = 16;

/// A grip on an edge that is connected here.
#[derive(Debug)]
pub struct EdgeHandle {
    /// Who.
    pub id: EdgeId,
    /// Its site, by its certificate.
    pub site: Option<SiteName>,
    /// Of this tunnel.
    pub generation: u64,
    /// Of the edge's process.
    pub instance: u64,
    /// Version of its software.
    pub version: String,
    /// Since when, in seconds since 1970.
    pub since: i64,
    /// When its tunnel began.
    pub came: Instant,
    /// When the edge said Hello, by its own clock in milliseconds since 1970: of two tunnels, the later one counts.
    pub unix_ms: u64,
    /// Shards that the edge cannot reach or was asked to leave, as of its Hello.
    pub avoids: Vec<ShardId>,
    /// The tunnel.
    pub link: Link,
    /// When it last said something, in milliseconds since it came, and how often it was asked to.
    heard: AtomicU64,
    period: AtomicU64,
    /// What the link had seen when somebody asked the edge something, and when that was: the first of those since whom
    /// nothing has come.
    pub(crate) asked: Mutex<Option<(LinkStats, Instant)>>,
    services: RwLock<Arc<Vec<Service>>>,
    /// How the edge says that it came here, and when it said so, in seconds since 1970.
    standing: RwLock<Option<(Arc<Standing>, i64)>>,
    streams: AtomicUsize,
    orders: mpsc::Sender<ShardToEdge>,
    replaced: CancellationToken,
}

impl EdgeHandle {
    /// What it announces.
    #[must_use]
    pub fn services(&self) -> Arc<Vec<Service>> {
        Arc::clone(&self.services.read())
    }

    /// Takes over a new announcement; the registry does, which keeps the index.
    pub(crate) fn set_services(&self, services: Vec<Service>) {
        *self.services.write() = Arc::new(services);
    }

    /// How the edge says that it came here, and when it said so, in seconds since 1970.
    #[must_use]
    pub fn standing(&self) -> Option<(Arc<Standing>, i64)> {
        self.standing.read().clone()
    }

    /// Takes over what it says; the registry does, which tells those who follow.
    pub(crate) fn set_standing(&self, standing: Standing) {
        *self.standing.write() = Some((Arc::new(standing), clock::unix_now()));
    }

    /// Streams that are open to the edge.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// Where the edge is.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.link.remote_address()
    }

    /// How long ago the edge itself last said something: it pings, so that this is no more than a few seconds.
    #[must_use]
    pub fn heard(&self) -> Duration {
        self.came.elapsed().saturating_sub(Duration::from_millis(self.heard.load(Ordering::Relaxed)))
    }

    /// Whether it should have pinged by now, and once more.
    pub(crate) fn is_overdue(&self) -> bool {
        self.heard() > Duration::from_millis(self.period.load(Ordering::Relaxed)) + OVERDUE
    }

    fn hears(&self) {
        let now = u64::try_from(self.came.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.store(now, Ordering::Relaxed);
    }

    /// Opens a stream to the edge and sends the head. The answer is still to come.
    ///
    /// # Errors
    /// If the link has ended, or the edge allows no more streams.
    pub async fn open(self: &Arc<Self>, open: &Open) -> Result<(Stream, StreamCount), Refusal> {
        let head = open.encode().map_err(|e| Refusal::because(RefuseCode::BadRequest, e.to_string()))?;
        let mut stream = match timeout(STREAM_CREDIT, self.link.open()).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(end)) => return Err(Refusal::because(RefuseCode::LinkLost, lost(&self.id, &end.to_string()))),
            Err(_) => {
                let reason = format!("edge/{} has as many streams open as it allows", self.id);
                return Err(Refusal::because(RefuseCode::LimitReached, reason));
            }
        };
        stream
            .send
            .write_one(head)
            .await
            .map_err(|e| Refusal::because(RefuseCode::LinkLost, lost(&self.id, &e.to_string())))?;
        Ok((stream, StreamCount::new(self)))
    }

    /// Gives an order to the edge. Returns whether it was taken: not if the session has ended, or if the edge has not
    /// read those before.
    #[must_use]
    pub fn order(&self, order: ShardToEdge) -> bool {
        self.orders.try_send(order).is_ok()
    }

    /// Another process of the same edge has taken over: the session closes the link.
    pub fn replaced(&self) {
        self.replaced.cancel();
    }
}

fn lost(edge: &EdgeId, why: &str) -> String {
    format!("the link to edge/{edge} broke while the stream was being opened ({why}); try again")
}

/// Counts a stream of an edge, until dropped.
#[derive(Debug)]
pub struct StreamCount(Arc<EdgeHandle>);

impl StreamCount {
    /// Of which tunnel.
    pub(crate) const fn tunnel(&self) -> &Arc<EdgeHandle> {
        &self.0
    }

    fn new(handle: &Arc<EdgeHandle>) -> Self {
        handle.streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(handle))
    }
}

impl Drop for StreamCount {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    /// The link did.
    #[error(transparent)]
    Link(#[from] LinkEnd),
    /// The edge said that it leaves.
    #[error("the edge left: {0}")]
    Bye(String),
    /// The shard ended it.
    #[error("{}: {}", .0.code, .0.reason)]
    Refused(Refuse),
}

/// A session whose edge has said Hello and waits for its Welcome.
#[derive(Debug)]
pub struct Session {
    /// The grip on the edge.
    pub handle: Arc<EdgeHandle>,
    /// What the edge said.
    pub hello: Hello,
    control: Control,
    orders: mpsc::Receiver<ShardToEdge>,
}

/// The control stream.
#[derive(Debug)]
struct Control {
    stream: Stream,
    reader: FrameReader,
}

/// What an edge says of itself while it is served.
#[derive(Debug)]
pub enum Notice {
    /// All services that it now answers for.
    Announced(Vec<Service>),
    /// How it came here.
    Stands(Standing),
    /// It wants no new streams; those that are open go on.
    Leaving,
}

/// Asks control for an edge's next certificate.
pub type Renewals = mpsc::Sender<RenewalRequest>;

/// One such question.
#[derive(Debug)]
pub struct RenewalRequest {
    /// What the edge asked.
    pub renew: Renew,
    /// Where the answer goes.
    pub answer: tokio::sync::oneshot::Sender<Result<Renewal, Refuse>>,
}

impl Session {
    /// Waits for the Hello on a fresh link and checks that it names nobody but the certificate's holder.
    ///
    /// # Errors
    /// If it does not come in time, is none, or names somebody else; the link has then been closed.
    pub async fn greet(link: Link, edge: EdgeId, generation: u64) -> Result<Self, SessionEnd> {
        let greeting = async {
            let mut control = Control { stream: link.accept().await?, reader: FrameReader::new(MAX_EDGE_TO_SHARD) };
            // A Pong that waits behind a thousand downloads on a slow link would look like a dead link.
            control.stream.send.go_first();
            Ok::<_, SessionEnd>((control.read().await, control))
        };
        let (first, control) = match timeout(HELLO, greeting).await {
            Ok(result) => result?,
            Err(_) => {
                let refuse = Refuse::because(CloseCode::HelloTimeout, CloseCode::HelloTimeout.sentence());
                link.close(refuse.code, &refuse.reason);
                return Err(SessionEnd::Refused(refuse));
            }
        };
        let hello = match first {
            Ok(Some(EdgeToShard::Hello(hello))) => hello,
            Ok(_) => return Err(control.refuse(&link, protocol("the first message was no Hello")).await),
            Err(e) => return Err(control.refuse(&link, protocol(&e.to_string())).await),
        };
        if hello.name != edge {
            let reason = format!("the certificate is edge/{edge}'s, and the message says edge/{}", hello.name);
            return Err(control.refuse(&link, Refuse::because(CloseCode::NameMismatch, reason)).await);
        }
        let (sender, orders) = mpsc::channel(ORDERS);
        let handle = EdgeHandle {
            id: edge,
            site: link.peer().site.clone(),
            generation,
            instance: hello.instance,
            version: hello.version.clone(),
            since: clock::unix_now(),
            came: Instant::now(),
            unix_ms: hello.unix_ms,
            avoids: hello.avoid.clone(),
            link,
            heard: AtomicU64::new(0),
            period: AtomicU64::new(0),
            asked: Mutex::default(),
            services: RwLock::default(),
            standing: RwLock::default(),
            streams: AtomicUsize::new(0),
            orders: sender,
            replaced: CancellationToken::new(),
        };
        Ok(Self { handle: Arc::new(handle), hello, control, orders })
    }

    /// Turns the edge away with a reason that reaches it.
    pub async fn refuse(self, refuse: Refuse) -> SessionEnd {
        self.control.refuse(&self.handle.link, refuse).await
    }

    /// Ends a session whose edge was told to go to another shard: it closes the link itself.
    pub async fn redirected(mut self, to: &ShardId) -> SessionEnd {
        let link = &self.handle.link;
        self.control.stream.send.finish();
        let _ = timeout(LAST_WORD, link.ended()).await;
        let refuse = Refuse::because(CloseCode::Redirected, format!("shard {to} serves it"));
        link.close(refuse.code, &refuse.reason);
        SessionEnd::Refused(refuse)
    }

    /// Says a first word to the edge: Welcome, or Redirect.
    ///
    /// # Errors
    /// If it could not be sent.
    pub async fn say(&mut self, message: ShardToEdge) -> Result<(), SessionEnd> {
        if let ShardToEdge::Welcome(welcome) = &message {
            let period = u64::try_from(welcome.ping.as_millis()).unwrap_or(u64::MAX);
            self.handle.period.store(period, Ordering::Relaxed);
        }
        self.control.write(message).await
    }

    /// Serves the control stream until the session ends, for whatever reason, and closes the link.
    pub async fn serve(
        mut self,
        notify: impl Fn(Notice) + Send,
        renewals: &Renewals,
        ended: &CancellationToken,
    ) -> SessionEnd {
        let link = self.handle.link.clone();
        let mut renewing: Option<tokio::sync::oneshot::Receiver<Result<Renewal, Refuse>>> = None;
        let end = loop {
            let step = tokio::select! {
                biased;
                () = ended.cancelled() => {
                    let refuse = Refuse::because(CloseCode::Revoked, CloseCode::Revoked.sentence());
                    break self.control.refuse(&link, refuse).await;
                }
                () = self.handle.replaced.cancelled() => {
                    let refuse = Refuse::because(CloseCode::Replaced, CloseCode::Replaced.sentence());
                    break self.control.refuse(&link, refuse).await;
                }
                Some(order) = self.orders.recv() => self.control.write(order).await,
                Some(answer) = answered(&mut renewing) => {
                    renewing = None;
                    self.control.write(ShardToEdge::Renewed(answer)).await
                }
                message = self.control.reader.next(&mut self.control.stream.recv) => {
                    self.handle.hears();
                    match decode(message) {
                        Ok(EdgeToShard::Ping(token)) => self.control.write(ShardToEdge::Pong(token)).await,
                        Ok(EdgeToShard::Announce(services)) => {
                            notify(Notice::Announced(services));
                            Ok(())
                        }
                        Ok(EdgeToShard::Standing(standing)) => {
                            notify(Notice::Stands(standing));
                            Ok(())
                        }
                        Ok(EdgeToShard::Renew(renew)) => match ask(renewals, renew) {
                            Ok(receiver) => {
                                renewing = Some(receiver);
                                Ok(())
                            }
                            Err(busy) => self.control.write(ShardToEdge::Renewed(Err(busy))).await,
                        },
                        Ok(EdgeToShard::Bye { reason }) => Err(SessionEnd::Bye(reason)),
                        Ok(EdgeToShard::Hello(_)) => Err(SessionEnd::Refused(protocol("a second Hello"))),
                        Err(end) => Err(end),
                    }
                }
            };
            match step {
                Ok(()) => {}
                // The link knows better why it ended than a stream in it.
                Err(SessionEnd::Link(end)) => break SessionEnd::Link(link.end().unwrap_or(end)),
                Err(SessionEnd::Refused(refuse)) => break self.control.refuse(&link, refuse).await,
                Err(bye) => break bye,
            }
        };
        if let SessionEnd::Bye(_) = &end {
            notify(Notice::Leaving);
            // The edge closes when its last stream has ended; its silence ends the link otherwise. Whoever is revoked
            // meanwhile has no time to leave.
            tokio::select! {
                biased;
                () = ended.cancelled() => link.close(CloseCode::Revoked, CloseCode::Revoked.sentence()),
                _ = link.ended() => {}
            }
        }
        link.close(CloseCode::Done, "");
        end
    }
}

async fn answered(
    renewing: &mut Option<tokio::sync::oneshot::Receiver<Result<Renewal, Refuse>>>,
) -> Option<Result<Renewal, Refuse>> {
    let receiver = renewing.as_mut()?;
    Some(receiver.await.unwrap_or_else(|_| Err(renewal_failed("the shard is shutting down"))))
}

fn ask(renewals: &Renewals, renew: Renew) -> Result<tokio::sync::oneshot::Receiver<Result<Renewal, Refuse>>, Refuse> {
    let (answer, receiver) = tokio::sync::oneshot::channel();
    match renewals.try_send(RenewalRequest { renew, answer }) {
        Ok(()) => Ok(receiver),
        Err(_) => Err(renewal_failed("too many renewals at once")),
    }
}

/// A renewal that did not work now and may later.
#[must_use]
pub fn renewal_failed(why: &str) -> Refuse {
    Refuse { code: CloseCode::Overloaded, reason: why.to_owned(), retry_after: Some(Duration::from_secs(30)) }
}

fn protocol(why: &str) -> Refuse {
    Refuse::because(CloseCode::ProtocolError, why)
}

fn decode(message: Result<Option<Bytes>, ReadFrameError>) -> Result<EdgeToShard, SessionEnd> {
    let refused = |e: &dyn std::fmt::Display| SessionEnd::Refused(protocol(&e.to_string()));
    match message {
        Ok(Some(body)) => match EdgeToShard::decode(body) {
            // A message of a newer version counts as a sign of life.
            Ok(message) => Ok(message.unwrap_or(EdgeToShard::Ping(0))),
            Err(e) => Err(refused(&e)),
        },
        Ok(None) => Err(SessionEnd::Bye("it ended the control stream".into())),
        Err(ReadFrameError::Stream(runtime::link::StreamError::Link(end))) => Err(SessionEnd::Link(end)),
        Err(e) => Err(refused(&e)),
    }
}

impl Control {
    async fn read(&mut self) -> Result<Option<EdgeToShard>, FrameError> {
        match self.reader.next(&mut self.stream.recv).await {
            Ok(Some(body)) => EdgeToShard::decode(body),
            Ok(None) => Ok(None),
            Err(ReadFrameError::Frame(e)) => Err(e),
            Err(e) => Err(FrameError::Malformed(e.to_string())),
        }
    }

    async fn write(&mut self, message: ShardToEdge) -> Result<(), SessionEnd> {
        let frame = message.encode().map_err(|e| SessionEnd::Refused(protocol(&e.to_string())))?;
        match timeout(WRITE, self.stream.send.write_one(frame)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(runtime::link::StreamError::Link(end))) => Err(SessionEnd::Link(end)),
            Ok(Err(e)) => Err(SessionEnd::Refused(protocol(&e.to_string()))),
            Err(_) => Err(SessionEnd::Refused(protocol("the edge does not read its control stream"))),
        }
    }

    /// Says why, waits a moment for that to arrive, and closes the link with the same code.
    async fn refuse(mut self, link: &Link, refuse: Refuse) -> SessionEnd {
        let deadline = Instant::now() + LAST_WORD;
        if self.write(ShardToEdge::Refuse(refuse.clone())).await.is_ok() {
            self.stream.send.finish();
            let _ = tokio::time::timeout_at(deadline, self.stream.send.delivered()).await;
        }
        link.close(refuse.code, &refuse.reason);
        SessionEnd::Refused(refuse)
    }
}
