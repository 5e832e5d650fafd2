//! The way to an edge: a link to some shard that answers, and a stream in it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use proto::{
    ALPN_MESH,
    code::{CloseCode, RefuseCode},
    identity::Role,
    message::Candidate,
    stream::{Open, Refusal},
    target::{HostPort, Target},
};
use rand::seq::SliceRandom;
pub(crate) use runtime::open::Opened;
use runtime::{
    link::{
        EndCause, Link, LinkEnd,
        quic::{self, Dialer, LinkLimits},
    },
    open,
    tls::{self, MeshVerifier},
};

use crate::{
    failure::{self, Failure},
    session::{Session, no_tls},
    text,
};

/// How long a shard may take for a handshake before the next one is tried.
const HANDSHAKE: Duration = Duration::from_secs(3);
/// How long a name may take to be resolved.
const RESOLVE: Duration = Duration::from_secs(3);
/// Most addresses of one name that are tried.
const MOST_ADDRESSES: usize = 4;
/// How long a goodbye may take to leave this machine.
const GOODBYE: Duration = Duration::from_millis(200);

/// A stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// The mesh said no.
    #[error("{}", failure::of_refusal(.0))]
    Refused(Refusal),
    /// The link ended.
    #[error("{}", failure::of_link(.0))]
    Link(LinkEnd),
    /// The stream broke, or what came was no answer.
    #[error("the shard did not answer as it should ({0}); its log may say why")]
    Nonsense(String),
    /// Nothing came.
    #[error("the shard did not answer within {}; try again", text::span(open::OPEN))]
    TimedOut,
}

impl OpenError {
    /// Whether another shard may do better.
    fn is_the_shards(&self) -> bool {
        match self {
            // Every shard reaches every edge, so what one says of an edge holds for all.
            Self::Refused(refusal) => {
                use RefuseCode as C;
                matches!(refusal.code, C::Draining | C::LimitReached | C::LoopDetected | C::NotReady)
            }
            Self::Link(end) => match end.cause {
                EndCause::Closed(code) => matches!(
                    code,
                    CloseCode::Shutdown | CloseCode::Drained | CloseCode::Overloaded | CloseCode::ProtocolError
                ),
                EndCause::TimedOut | EndCause::PeerRestarted | EndCause::NobodyListens | EndCause::NoRoute => true,
                EndCause::Local
                | EndCause::NameUnknown
                | EndCause::ProxyRefused
                | EndCause::WrongCa
                | EndCause::PeerExpired
                | EndCause::WrongPeer
                | EndCause::Distrusted
                | EndCause::Expired
                | EndCause::Clock
                | EndCause::NoCommonVersion
                | EndCause::Transport => false,
            },
            Self::Nonsense(_) | Self::TimedOut => false,
        }
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        let why = error.to_string();
        match error {
            OpenError::Refused(refusal) => refusal.into(),
            OpenError::Link(end) => Self::link(&end, why),
            OpenError::Nonsense(_) => Self::Failed(why),
            OpenError::TimedOut => Self::Unreachable(why),
        }
    }
}

impl From<open::OpenError> for OpenError {
    fn from(error: open::OpenError) -> Self {
        match error {
            open::OpenError::Refused(refusal) => Self::Refused(refusal),
            open::OpenError::Link(end) => Self::Link(end),
            open::OpenError::Nonsense(why) => Self::Nonsense(why),
            open::OpenError::TimedOut => Self::TimedOut,
        }
    }
}

/// Opens a stream, and waits for the answer of the edge.
///
/// # Errors
/// If it is refused, or the link ends.
pub(crate) async fn open(link: &Link, target: &Target) -> Result<Opened, OpenError> {
    Ok(open::open(link, Open::new(target.clone())).await?)
}

/// The same for a flow of datagrams.
///
/// # Errors
/// As [`open()`].
pub(crate) async fn open_flow(link: &Link, target: &Target) -> Result<Opened, OpenError> {
    Ok(open::open(link, Open::flow(target.clone())).await?)
}

/// Closes a link, and sees to it that the other side hears of it now and not by silence.
pub(crate) async fn goodbye(link: &Link) {
    let before = link.stats().sent_bytes;
    link.close(CloseCode::Done, "");
    let told = async {
        while link.stats().sent_bytes == before {
            tokio::task::yield_now().await;
        }
    };
    // An old link may have nothing left to say.
    let _ = tokio::time::timeout(GOODBYE, told).await;
}

impl Session {
    /// A link to the first shard that answers.
    ///
    /// # Errors
    /// If none does, or if none wants this user.
    pub(crate) async fn dial(&self) -> Result<Link, Failure> {
        self.over_some_shard(async |link| Ok(link)).await
    }

    /// A stream for the target, over the first shard that serves.
    ///
    /// # Errors
    /// If no shard answers, or if the stream is refused.
    pub(crate) async fn connect(&self, target: &Target) -> Result<(Link, Opened), Failure> {
        self.over_some_shard(async |link| {
            let opened = open(&link, target).await?;
            Ok((link, opened))
        })
        .await
    }

    async fn over_some_shard<T>(&self, work: impl AsyncFn(Link) -> Result<T, OpenError>) -> Result<T, Failure> {
        let dialer = self.dialer()?;
        let mut shards = self.shards().await?;
        // Whichever comes first is as good as any other, and together people's tools should load them all alike.
        shards.shuffle(&mut rand::rng());
        let mut troubles = Troubles::default();
        for round in 0..2 {
            let mut link_lost = shards.is_empty();
            for shard in &shards {
                let link = match dial_shard(&dialer, shard).await {
                    Ok(link) => link,
                    Err(trouble) => {
                        troubles.0.push(trouble);
                        link_lost = true;
                        continue;
                    }
                };
                match work(link).await {
                    // A shard says itself what it refuses.
                    Err(e @ OpenError::Refused(_)) if e.is_the_shards() => troubles.0.push(e.into()),
                    Err(e) if e.is_the_shards() => {
                        troubles.0.push(Failure::from(e).within(&format!("shard {}", shard.shard)));
                        link_lost = true;
                    }
                    done => return Ok(done?),
                }
            }
            if !link_lost {
                break;
            }
            // The list may be an old note; control knows better.
            match self.fresh_shards().await {
                Ok(mut now) if round == 0 && !same(&now, &shards) => {
                    now.shuffle(&mut rand::rng());
                    shards = now;
                }
                Ok(_) | Err(_) => break,
            }
        }
        Err(troubles.into())
    }

    fn dialer(&self) -> Result<Dialer, Failure> {
        let limits = LinkLimits {
            keep_alive: Some(Duration::from_secs(5)),
            handshake: HANDSHAKE,
            // Shards open no streams towards people.
            streams: 0,
            ..LinkLimits::default()
        };
        let verifier =
            MeshVerifier::of_servers(self.bundle().clone(), Role::Shard).knowing_that(self.facts().not_before);
        let tls =
            tls::client_config(Some(self.identity()), Arc::new(verifier), &[ALPN_MESH]).map_err(|e| no_tls(&e))?;
        let config = quic::client_config(tls, &limits).map_err(|e| no_tls(&e))?;
        Ok(Dialer::new(config, &limits))
    }
}

/// What went wrong with each shard that was tried.
#[derive(Debug, Default)]
struct Troubles(Vec<Failure>);

impl From<Troubles> for Failure {
    fn from(troubles: Troubles) -> Self {
        let mut seen = Vec::new();
        for trouble in &troubles.0 {
            let words = trouble.to_string();
            if !seen.contains(&words) {
                seen.push(words);
            }
        }
        let all = seen.join("; ");
        match &troubles.0[..] {
            [Self::Failed(_)] => Self::Failed(all),
            [] => Self::Unreachable(
                "control knows of no shard that is alive: start one ('mesh-cloud'), and look at 'meshctl shard ls'"
                    .into(),
            ),
            // Only if every shard refuses will another try not help.
            all_refuse if all_refuse.iter().all(|t| matches!(t, Self::Refused(_))) => Self::Refused(all),
            _ => Self::Unreachable(all),
        }
    }
}

/// Whether two lists name the same shards at the same addresses.
fn same(a: &[Candidate], b: &[Candidate]) -> bool {
    a.len() == b.len() && a.iter().all(|shard| b.contains(shard))
}

async fn dial_shard(dialer: &Dialer, shard: &Candidate) -> Result<Link, Failure> {
    let mut troubles = Troubles::default();
    for address in &shard.addresses {
        let end = match dial_address(dialer, shard.shard.as_str(), address).await {
            Ok(link) => return Ok(link),
            Err(end) => end,
        };
        let why = failure::of_link(&end);
        troubles.0.push(Failure::link(&end, why).within(&format!("shard {} at {address}", shard.shard)));
    }
    if troubles.0.is_empty() {
        return Err(Failure::Unreachable(format!(
            "shard {} has told control no address; set 'advertise' in its configuration",
            shard.shard
        )));
    }
    Err(troubles.into())
}

async fn dial_address(dialer: &Dialer, name: &str, address: &str) -> Result<Link, LinkEnd> {
    let mut last = LinkEnd::new(EndCause::NameUnknown, address);
    for address in resolve(address).await? {
        match dialer.dial(address, name).await {
            Ok(link) => return Ok(link),
            Err(end) => last = end,
        }
    }
    Err(last)
}

async fn resolve(address: &str) -> Result<Vec<SocketAddr>, LinkEnd> {
    let unknown = |why: String| LinkEnd::new(EndCause::NameUnknown, why);
    let to: HostPort = address.parse().map_err(|e: proto::target::InvalidTarget| unknown(e.to_string()))?;
    match tokio::time::timeout(RESOLVE, tokio::net::lookup_host((to.host.as_str(), to.port))).await {
        Ok(found) => Ok(found.map_err(|e| unknown(e.to_string()))?.take(MOST_ADDRESSES).collect()),
        Err(_) => Err(unknown(format!("no answer to {} within {}", to.host, text::span(RESOLVE)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn troubles_are_told_once_each_and_the_worst_hope_wins() {
        let both = Troubles(vec![
            Failure::Unreachable("shard a: No answer".into()),
            Failure::Unreachable("shard a: No answer".into()),
            Failure::Refused("shard b: The certificate is revoked".into()),
        ]);
        let failure = Failure::from(both);
        assert!(matches!(failure, Failure::Unreachable(_)));
        assert_eq!(failure.to_string(), "shard a: No answer; shard b: The certificate is revoked");
        assert!(matches!(Failure::from(Troubles(vec![Failure::Refused("x".into())])), Failure::Refused(_)));
        assert!(Failure::from(Troubles::default()).to_string().contains("mesh-cloud"));
    }
}
