//! The link of a forward, dialled again whenever it is lost.

use std::time::Duration;

use proto::backoff::Backoff;
use runtime::{
    clock::unix_now,
    link::{Link, LinkEnd},
};
use tokio::{sync::watch, time::Instant};

use crate::{
    failure::{self, Failure},
    out,
    session::Session,
    text,
};

/// First and longest pause between two tries.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long a new connection waits for a link.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two tries to renew the certificate.
const RENEW_PAUSE: Duration = Duration::from_secs(60);

/// How it stands.
#[derive(Clone, Debug)]
enum State {
    Up(Link),
    /// Why not.
    Down(String),
}

/// The link, as connections see it.
#[derive(Clone, Debug)]
pub(super) struct Line(watch::Receiver<State>);

/// Keeps the link up.
#[derive(Debug)]
pub(super) struct Keeper {
    session: Session,
    state: watch::Sender<State>,
    link: Link,
    since: Instant,
    renew_after: Instant,
}

impl Line {
    /// Dials for the first time.
    ///
    /// # Errors
    /// If no shard can be reached.
    pub(super) async fn open(session: Session) -> Result<(Self, Keeper), Failure> {
        let link = session.dial().await?;
        let (state, line) = watch::channel(State::Up(link.clone()));
        let now = Instant::now();
        Ok((Self(line), Keeper { session, state, link, since: now, renew_after: now }))
    }

    /// The link, if it is up.
    pub(super) fn now(&self) -> Option<Link> {
        match &*self.0.borrow() {
            State::Up(link) => Some(link.clone()),
            State::Down(_) => None,
        }
    }

    /// The link; waits for it a while.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) async fn link(&self) -> Result<Link, String> {
        let mut line = self.0.clone();
        // A link that has just ended may not have been noticed yet.
        let up = line.wait_for(|state| matches!(state, State::Up(link) if link.end().is_none()));
        let waited = tokio::time::timeout(PATIENCE, up).await.map(|up| up.is_ok());
        match (&*self.0.borrow(), waited) {
            (State::Up(link), Ok(true)) => Ok(link.clone()),
            (State::Down(why), _) => Err(format!("there is no link to the mesh now: {why}")),
            (State::Up(_), _) => Err("the link to the mesh has just ended; try again".into()),
        }
    }
}

impl Keeper {
    /// Dials again whenever the link is lost, and before the certificate ends. Returns when that is of no use any more.
    pub(super) async fn keep(mut self) -> Failure {
        loop {
            let lost = tokio::select! {
                biased;
                lost = self.link.ended() => Some(lost),
                () = self.renewal_due() => None,
            };
            let again = match lost {
                Some(lost) => self.redial(&lost).await,
                None => self.renew().await,
            };
            if let Err(failure) = again {
                return failure;
            }
        }
    }

    async fn renewal_due(&self) {
        let left = u64::try_from(self.session.facts().renew_at().saturating_sub(unix_now())).unwrap_or(0);
        tokio::time::sleep_until(self.renew_after.max(Instant::now() + Duration::from_secs(left))).await;
    }

    /// Takes a new certificate to a new link; streams of the old link go on there.
    async fn renew(&mut self) -> Result<(), Failure> {
        self.renew_after = Instant::now() + RENEW_PAUSE;
        match self.session.renew_if_due().await {
            Ok(true) => match self.session.dial().await {
                Ok(link) => self.up(link),
                Err(e) => tracing::warn!(error = %e, "no second link with the new certificate; the old one serves"),
            },
            Ok(false) => {}
            Err(e) => tracing::warn!(error = %e, "the certificate could not be renewed; trying again"),
        }
        Ok(())
    }

    async fn redial(&mut self, lost: &LinkEnd) -> Result<(), Failure> {
        let why = failure::of_link(lost);
        if let refused @ Failure::Refused(_) = Failure::link(lost, why.clone()) {
            // An expired certificate may have a successor; anything else is final.
            if !matches!(self.session.renew_if_due().await, Ok(true)) {
                return Err(refused);
            }
        }
        out::note(&format!("link lost: {why}; dialling again"));
        self.state.send_replace(State::Down(why));
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let down = Instant::now();
        // A link that is lost as soon as it is there must not be dialled without pause.
        let mut pause = self.since.elapsed() < LONGEST_PAUSE;
        loop {
            if pause {
                tokio::time::sleep(backoff.next_delay(rand::random())).await;
            }
            pause = true;
            match self.session.dial().await {
                Ok(link) => {
                    out::note(&format!(
                        "link is back after {}, via {}",
                        text::span(down.elapsed()),
                        link.peer().identity.name
                    ));
                    self.up(link);
                    return Ok(());
                }
                Err(refused @ Failure::Refused(_)) => return Err(refused),
                Err(e) => {
                    self.state.send_replace(State::Down(e.to_string()));
                }
            }
        }
    }

    fn up(&mut self, link: Link) {
        self.link = link.clone();
        self.since = Instant::now();
        self.state.send_replace(State::Up(link));
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use proto::{ALPN_MESH, code::CloseCode};
    use runtime::{
        identity::IdentityDir,
        link::{
            listen::Listener,
            quic::{self, LinkLimits},
        },
        tls::{LiveIdentity, MeshVerifier, server_config, testing::TestCa},
    };

    use super::*;

    fn shard(ca: &TestCa) -> Listener {
        let identity = LiveIdentity::new(&ca.issue("shard/s1")).unwrap();
        let tls = server_config(&identity, MeshVerifier::of_clients(ca.bundle(), true), &[ALPN_MESH]).unwrap();
        let limits = LinkLimits::default();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Listener::bind(any, quic::server_config(tls, &limits).unwrap(), &limits).unwrap()
    }

    async fn alice(ca: &TestCa, shard: &Listener, home: &std::path::Path) -> Session {
        let dir = IdentityDir::open(home).unwrap();
        dir.store(&ca.issue("user/alice"), &ca.bundle()).unwrap();
        dir.write("control", "127.0.0.1:1").unwrap();
        let address = shard.local_addr().unwrap();
        let note = format!(r#"{{"fetched":{},"shards":[{{"shard":"s1","addresses":["{address}"]}}]}}"#, unix_now());
        dir.write("shards", &note).unwrap();
        Session::open(home).await.unwrap()
    }

    async fn arrival(shard: &Listener) -> Link {
        shard.accept().await.unwrap().accept().await.unwrap()
    }

    #[tokio::test]
    async fn a_lost_link_is_dialled_again_until_the_user_is_revoked() {
        let (ca, home) = (TestCa::new(), tempfile::tempdir().unwrap());
        let shard = shard(&ca);
        let session = alice(&ca, &shard, home.path()).await;
        let (opened, first) = tokio::join!(Line::open(session), arrival(&shard));
        let (line, keeper) = opened.unwrap();
        assert_eq!(line.link().await.unwrap().peer().identity.name.as_str(), "s1");
        let story = async {
            first.close(CloseCode::Shutdown, "");
            let second = arrival(&shard).await;
            let link = line.link().await.unwrap();
            assert!(link.end().is_none(), "a new connection got the link that was lost");
            assert_eq!(first.peer().identity, second.peer().identity);
            second.close(CloseCode::Revoked, "");
        };
        let (end, ()) = tokio::join!(keeper.keep(), story);
        assert!(matches!(&end, Failure::Refused(why) if why.contains("revoked")), "{end:?}");
        let why = line.link().await.unwrap_err();
        assert!(why.contains("link"), "{why}");
    }
}
