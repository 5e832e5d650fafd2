//! Who comes over QUIC: edges with their tunnels, people's tools with their streams.

use std::{sync::Arc, time::Duration};

use proto::{
    code::{CloseCode, RefuseCode},
    frame::MAX_STREAM_HEAD,
    id::ShardId,
    identity::{Identity, Role},
    message::{Refuse, ShardToEdge, Welcome},
    principal::Principal,
    stream::{Answer, Open, Refusal},
    target::Target,
};
use runtime::{
    clock,
    frames::FrameReader,
    link::{Link, LinkEnd, Stream, quic::Listener},
    shutdown::Tasks,
};
use tokio::{sync::Semaphore, time::timeout};
use tracing::{Instrument, info_span};

use crate::{
    config::LimitsConfig,
    live::Lease,
    registry::{Registered, Registry},
    route::{Request, Router},
    session::{Notice, Renewals, Session, SessionEnd},
};

/// How often an edge pings. Three missed in a row end the link, so that a silent death is seen within 12 s.
const PING: Duration = Duration::from_secs(4);
/// How long the head of a stream may take.
const HEAD: Duration = Duration::from_secs(10);

/// What every arrival needs.
#[derive(Clone, Debug)]
pub struct Reception {
    /// This shard.
    pub shard: ShardId,
    /// Tunnels.
    pub registry: Registry,
    /// Opens streams.
    pub router: Router,
    /// Credentials in use.
    pub live: crate::live::LiveCredentials,
    /// Passes renewals to control.
    pub renewals: Renewals,
    /// Bounds.
    pub limits: LimitsConfig,
}

impl Reception {
    /// Accepts until `accepting` stops. Links live on in `sessions`, streams in `streams`.
    pub async fn run(self, listener: Listener, accepting: Tasks, sessions: Tasks, streams: Tasks) {
        let handshakes = Arc::new(Semaphore::new(self.limits.handshakes));
        loop {
            let arriving = tokio::select! {
                biased;
                () = accepting.stopping() => return,
                arriving = listener.accept() => arriving,
            };
            let Some(arriving) = arriving else { return };
            let outcome = |outcome: &str| self.count(outcome);
            if listener.links() > self.limits.links {
                outcome("full");
                arriving.refuse();
                continue;
            }
            // From half of the room on, everybody proves the own address first, which costs this shard nothing; the
            // other half is left to those who have.
            let arriving = if handshakes.available_permits() * 2 <= self.limits.handshakes {
                match arriving.retry() {
                    Ok(()) => {
                        outcome("retry");
                        continue;
                    }
                    Err(proven) => proven,
                }
            } else {
                arriving
            };
            let Ok(permit) = Arc::clone(&handshakes).try_acquire_owned() else {
                outcome("busy");
                arriving.refuse();
                continue;
            };
            let (this, streams) = (self.clone(), streams.clone());
            sessions.spawn(async move {
                let from = arriving.remote_address();
                let link = match arriving.accept().await {
                    Ok(link) => link,
                    Err(end) => {
                        this.count(end.cause.slug());
                        tracing::info!(%from, cause = %end.cause, detail = end.detail, "a handshake failed");
                        return;
                    }
                };
                drop(permit);
                this.receive(link, streams).await;
            });
        }
    }

    fn count(&self, outcome: &str) {
        self.router.metrics().arrivals.with_label_values(&[outcome]).inc();
    }

    async fn receive(self, link: Link, tasks: Tasks) {
        let facts = link.peer();
        let identity = facts.identity.clone();
        let outcome = |outcome: &str| self.count(outcome);
        let lease = self.live.lease(&facts.serial);
        if !self.router.state().is_good(&facts.serial) {
            outcome("revoked");
            tracing::warn!(%identity, from = %link.remote_address(), "a revoked certificate was shown");
            link.close(CloseCode::Revoked, CloseCode::Revoked.sentence());
            return;
        }
        // A resumed session shows the certificate of its first handshake.
        if facts.not_after < clock::unix_now() {
            outcome("expired");
            link.close(CloseCode::Expired, CloseCode::Expired.sentence());
            return;
        }
        match identity.role {
            Role::Edge => {
                outcome("edge");
                let span = info_span!("edge", id = %identity.name, generation = tracing::field::Empty);
                self.edge(link, &identity, lease, tasks).instrument(span).await;
            }
            Role::User => {
                outcome("user");
                let span = info_span!("user", name = %identity.name);
                self.user(link, &identity, lease, tasks).instrument(span).await;
            }
            Role::Shard | Role::Control => {
                outcome("wrong-role");
                let reason = format!("a {} certificate may not connect here", identity.role);
                link.close(CloseCode::WrongRole, &reason);
            }
        }
    }

    async fn edge(&self, link: Link, identity: &Identity, lease: Lease, tasks: Tasks) {
        let metrics = self.router.metrics();
        let Some(id) = identity.edge() else { return };
        let from = link.remote_address();
        let generation = self.registry.next_generation();
        tracing::Span::current().record("generation", generation);
        let end = match Session::greet(link, id, generation).await {
            Ok(session) => match self.welcome(session).await {
                Ok((session, registered)) => {
                    tracing::info!(%from, version = session.handle.version, "connected");
                    metrics.tunnels.inc();
                    let end = self.tunnel(session, registered, lease, tasks).await;
                    metrics.tunnels.dec();
                    end
                }
                Err(end) => end,
            },
            Err(end) => end,
        };
        let cause = match &end {
            SessionEnd::Link(end) => end.cause.slug(),
            SessionEnd::Bye(_) => "bye",
            SessionEnd::Refused(refuse) => refuse.code.slug(),
        };
        metrics.session_ends.with_label_values(&[cause]).inc();
        tracing::info!(%from, cause, %end, "disconnected");
    }

    /// Enters the edge and says Welcome, or turns it away.
    async fn welcome(&self, mut session: Session) -> Result<(Session, Registered), SessionEnd> {
        let skew = i128::from(session.hello.unix_ms) - i128::from(clock::unix_millis());
        if skew.unsigned_abs() > 60_000 {
            tracing::warn!(skew_ms = %skew, "the edge's clock is wrong");
        }
        let (registered, old) = match self.registry.enter(Arc::clone(&session.handle)) {
            Ok(entered) => entered,
            Err(duplicate) => {
                self.router.metrics().duplicate_identities.inc();
                let (here, there) = (session.handle.address(), duplicate.incumbent);
                tracing::warn!(%here, %there, "two machines use one identity; enrol one of them anew");
                let reason = format!(
                    "the machine at {there} is connected with the same identity; enrol one of the two anew under a name of its own"
                );
                return Err(session.refuse(Refuse::because(CloseCode::DuplicateIdentity, reason)).await);
            }
        };
        if let Some(old) = old.filter(|old| old.instance != session.handle.instance) {
            old.replaced();
        }
        let welcome = Welcome {
            shard: self.shard.clone(),
            epoch: 0,
            candidates: self.router.state().shards.clone(),
            unix_ms: clock::unix_millis(),
            ping: PING,
            generation: session.handle.generation,
        };
        session.say(ShardToEdge::Welcome(welcome)).await?;
        Ok((session, registered))
    }

    async fn tunnel(&self, session: Session, registered: Registered, lease: Lease, tasks: Tasks) -> SessionEnd {
        let handle = Arc::clone(&session.handle);
        let who = Principal::Edge { name: handle.id.clone(), site: handle.site.clone() };
        let opener =
            Opener { router: self.router.clone(), principal: who, credential: None, link: handle.link.clone() };
        let opening = opener.run(tasks);
        let notify = |notice| match notice {
            Notice::Announced(services) => registered.announce(services),
            Notice::Leaving => registered.leave(),
        };
        let serving = session.serve(notify, &self.renewals, lease.ended());
        tokio::pin!(serving);
        tokio::select! {
            biased;
            end = &mut serving => end,
            // It ends with the link, of which the session knows more.
            _ = opening => serving.await,
        }
    }

    async fn user(&self, link: Link, identity: &Identity, lease: Lease, tasks: Tasks) {
        let Some(name) = identity.user() else { return };
        let metrics = self.router.metrics();
        metrics.user_links.inc();
        link.allow_streams(self.limits.streams_per_link);
        let principal = Principal::User { name, groups: link.peer().groups.clone() };
        let credential = Some(link.peer().serial.clone());
        let opener = Opener { router: self.router.clone(), principal, credential, link: link.clone() };
        tokio::select! {
            biased;
            () = lease.ended().cancelled() => link.close(CloseCode::Revoked, CloseCode::Revoked.sentence()),
            end = opener.run(tasks) => tracing::debug!(cause = %end.cause, "the user left"),
        }
        metrics.user_links.dec();
    }
}

/// Serves the streams that somebody on a link opens.
struct Opener {
    router: Router,
    principal: Principal,
    credential: Option<String>,
    link: Link,
}

impl Opener {
    async fn run(self, tasks: Tasks) -> LinkEnd {
        loop {
            let stream = match self.link.accept().await {
                Ok(stream) => stream,
                Err(end) => return end,
            };
            let request = Request::new(
                self.principal.clone(),
                self.link.remote_address().to_string(),
                "link",
                // Replaced by what the Open says.
                Target::Probe { edge: self.link.peer().identity.name.clone() },
            );
            let request = Request { credential: self.credential.clone(), ..request };
            tasks.spawn(relay(stream, self.router.clone(), request));
        }
    }
}

async fn relay(mut stream: Stream, router: Router, request: Request) {
    let mut reader = FrameReader::new(MAX_STREAM_HEAD);
    let open = match timeout(HEAD, reader.next(&mut stream.recv)).await {
        Ok(Ok(Some(body))) => Open::decode(body),
        Ok(Ok(None) | Err(_)) | Err(_) => return stream.abort(proto::code::ResetCode::ProtocolError),
    };
    stream.recv.unread(reader.into_rest());
    let refusal = match open {
        Ok(Open { target, trace, hops, .. }) => match router.open(Request { target, trace, hops, ..request }).await {
            Ok(pending) => return pending.relay(stream).await,
            Err(refusal) => refusal,
        },
        Err(e) => Refusal::because(RefuseCode::BadRequest, e.to_string()),
    };
    if stream.send.write_one(Answer::Refused(refusal).encode()).await.is_ok() {
        stream.send.finish();
        // Until it has arrived, or the link has ended.
        let _ = stream.send.delivered().await;
    }
    stream.recv.stop(proto::code::ResetCode::Refused);
}
