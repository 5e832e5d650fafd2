//! A user of a simulated mesh: opens streams to edges, as `meshctl` does.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use proto::{
    ALPN_MESH,
    code::{CloseCode, Retry},
    id::EdgeId,
    identity::Role,
};
use runtime::{
    link::{
        Link, LinkEnd,
        quic::{self, Dialer, LinkLimits},
    },
    tls::{self, LiveIdentity, MeshVerifier, TrustBundle},
};
use tokio::time::Instant;

use super::{Layout, address, authority::Authority};
use crate::{
    probe::{self, Load, StreamEnd},
    simnet::Net,
};

/// Where users dial from.
const PORT: u16 = 30_000;
/// How long a shard may take to answer a request, with whatever answer.
const ANSWER: Duration = Duration::from_secs(11);

/// A user.
#[derive(Debug)]
pub struct User {
    /// Its name.
    pub name: EdgeId,
    /// From where it dials.
    pub address: SocketAddr,
    net: Net,
    dialer: Dialer,
    serial: String,
    links: Mutex<BTreeMap<SocketAddr, Known>>,
    /// Held while dialling, so that many streams at once share one link.
    dialing: tokio::sync::Mutex<()>,
}

/// A link, and when it was last known to work.
#[derive(Debug)]
struct Known {
    link: Link,
    worked: Instant,
}

impl User {
    pub(super) fn new(
        i: usize,
        authority: &mut Authority,
        (net, bundle): (&Net, &TrustBundle),
        layout: &Layout,
    ) -> anyhow::Result<Self> {
        let name = format!("user-{i}");
        let credentials = authority.issue(&format!("user/{name}"));
        let identity = LiveIdentity::new(&credentials)?;
        let verifier = MeshVerifier::of_servers(bundle.clone(), Role::Shard);
        let tls = tls::client_config(Some(&identity), Arc::new(verifier), &[ALPN_MESH])?;
        let limits = layout.limits(LinkLimits { keep_alive: Some(Duration::from_secs(4)), ..LinkLimits::default() });
        let address = address(2, i, PORT);
        let dialer = Dialer::from_endpoint(net.endpoint(address, None)?, quic::client_config(tls, &limits)?, &limits);
        let serial = credentials.facts().serial.clone();
        Ok(Self {
            name: name.parse()?,
            address,
            net: net.clone(),
            dialer,
            serial,
            links: Mutex::default(),
            dialing: tokio::sync::Mutex::default(),
        })
    }

    /// Of its certificate.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// The link to a shard; a new one if there is none that lives.
    ///
    /// # Errors
    /// If the shard cannot be reached.
    pub async fn link(&self, shard: SocketAddr) -> Result<Link, LinkEnd> {
        let _alone = self.dialing.lock().await;
        let present =
            self.links.lock().get(&shard).filter(|known| known.link.end().is_none()).map(|known| known.link.clone());
        if let Some(link) = present {
            return Ok(link);
        }
        let link = self.dialer.dial(shard, "shard").await?;
        self.links.lock().insert(shard, Known { link: link.clone(), worked: Instant::now() });
        Ok(link)
    }

    /// Opens a stream to an edge's echo by way of a shard, and sees it to its end.
    pub async fn stream(&self, shard: SocketAddr, edge: &EdgeId, load: &Load) -> StreamEnd {
        self.stream_by(&[shard], edge, load).await
    }

    /// Opens a stream by way of the first of these shards that serves. As other clients do, it goes on to the next one
    /// if one cannot be reached, or says that another one serves; once a stream is open there is no way back.
    pub async fn stream_by(&self, shards: &[SocketAddr], edge: &EdgeId, load: &Load) -> StreamEnd {
        let mut last = StreamEnd::Broken("there is no shard".into());
        for shard in shards {
            let link = match self.link(*shard).await {
                Ok(link) => link,
                Err(end) => {
                    last = StreamEnd::Broken(format!("no link: {end}"));
                    continue;
                }
            };
            let worked = self.links.lock().get(shard).map_or_else(Instant::now, |known| known.worked);
            let answer = probe::open_within(&link, edge, ANSWER).await;
            if answer.is_some()
                && link.end().is_none()
                && let Some(known) = self.links.lock().get_mut(shard)
            {
                known.worked = Instant::now();
            }
            match answer {
                Some(Ok(stream)) => return probe::run_on(stream, load).await,
                Some(Err(StreamEnd::Refused(code))) if code.retry() != Retry::Now => return StreamEnd::Refused(code),
                Some(Err(end @ (StreamEnd::Wrong(_) | StreamEnd::Exact))) => return end,
                Some(Err(end @ (StreamEnd::Refused(_) | StreamEnd::Broken(_)))) => last = end,
                None if self.net.is_undisturbed(self.address.ip(), shard.ip(), worked) => {
                    return StreamEnd::Wrong(format!("rule 9: {shard} did not answer within {ANSWER:?}"));
                }
                None => last = StreamEnd::Broken("no answer".into()),
            }
        }
        last
    }

    /// Closes all links.
    pub fn leave(&self) {
        for known in std::mem::take(&mut *self.links.lock()).into_values() {
            known.link.close(CloseCode::Done, "");
        }
    }
}
