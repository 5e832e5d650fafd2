//! What control does for its own trust: the certificate of its API, and the roots that it hands out.

use std::{net::SocketAddr, time::Duration};

use proto::identity::{Identity, Role};
use rcgen::SubjectPublicKeyInfo;
use runtime::{
    clock::unix_now,
    identity::{Credentials, NodeKey},
    shutdown::Tasks,
    tls::{LiveIdentity, TrustBundle},
};

use crate::{
    authority::Authority,
    ca::{Ca, Holder, HostName, csr::Csr, roots::Sources},
    config::ControlConfig,
    metrics::Metrics,
    watch::Hub,
};

/// How often the files with roots are read again.
const ROOTS: Duration = Duration::from_secs(2);
/// How long to wait after a certificate could not be issued.
const AGAIN: Duration = Duration::from_secs(30);

/// What the API's certificate says.
#[derive(Debug)]
pub struct Own {
    holder: Holder,
    ttl: Duration,
}

impl Own {
    /// Control by its name, under every name that is set and under those of its own machine.
    ///
    /// # Errors
    /// If a name that is set is none.
    pub fn new(config: &ControlConfig, api: SocketAddr) -> anyhow::Result<Self> {
        let mut hosts = config.certified_names()?;
        let loopback = ["localhost", "127.0.0.1", "::1"].into_iter().filter_map(HostName::parse);
        let listens = (!api.ip().is_unspecified()).then(|| HostName::Ip(api.ip()));
        for host in loopback.chain(listens) {
            if !hosts.contains(&host) {
                hosts.push(host);
            }
        }
        let identity = Identity::new(config.trust_domain.clone(), Role::Control, config.name.clone());
        let holder = Holder { identity, groups: vec![], site: None, hosts };
        Ok(Self { holder, ttl: config.leaf_ttl_secs.of(Role::Control) })
    }

    /// Issues a certificate for a new key. The CA goes along, for those who know only its hash.
    ///
    /// # Errors
    /// If the CA cannot issue.
    pub fn issue(&self, ca: &Ca, now: i64) -> anyhow::Result<Credentials> {
        let key = NodeKey::generate()?;
        let csr = Csr::from_der(&key.csr(&[])?)?;
        let public: &SubjectPublicKeyInfo = csr.key();
        let leaf = ca.issue(&self.holder, public, self.ttl, now)?;
        Ok(Credentials::new(key, vec![leaf.der, ca.certificate().clone()])?)
    }

    /// How long a new certificate is shown before the next one is made: 2/3 of its life.
    const fn shown_for(&self) -> Duration {
        Duration::from_millis(self.ttl.as_secs() * 2000 / 3)
    }
}

/// Replaces the API's certificate in time. Connections that are open are not touched.
pub async fn renew(own: Own, authority: Authority, identity: LiveIdentity, metrics: Metrics, tasks: Tasks) {
    let mut wait = own.shown_for();
    metrics.api_not_after.set(identity.facts().not_after);
    while tasks.token().run_until_cancelled(tokio::time::sleep(wait)).await.is_some() {
        let renewed = own.issue(authority.ca(), unix_now()).and_then(|c| Ok(identity.replace(&c)?));
        wait = match renewed {
            Ok(()) => {
                let facts = identity.facts();
                metrics.api_not_after.set(facts.not_after);
                metrics.issued.with_label_values(&[Role::Control.as_str()]).inc();
                tracing::info!(serial = facts.serial, not_after = facts.not_after, "the API has a new certificate");
                own.shown_for()
            }
            Err(error) => {
                tracing::error!(%error, "the API's certificate cannot be renewed; trying again");
                AGAIN.min(own.shown_for())
            }
        };
    }
}

/// Reads the files with roots again and again; what changes is in force at once, for handshakes and watchers.
pub async fn follow_roots(sources: Sources, authority: Authority, bundle: TrustBundle, hub: Hub, tasks: Tasks) {
    let mut complained = false;
    while tasks.token().run_until_cancelled(tokio::time::sleep(ROOTS)).await.is_some() {
        match sources.bundle(authority.ca().certificate()) {
            Ok(read) => {
                complained = false;
                if bundle.replace(&read) {
                    hub.set_bundle(&bundle);
                    let roots = bundle.certificates();
                    let hashes: Vec<_> = roots.iter().filter_map(|r| runtime::cert::ca_hash(r).ok()).collect();
                    tracing::warn!(target: "audit", roots = ?hashes, "other roots are trusted now");
                }
            }
            Err(error) if !complained => {
                complained = true;
                tracing::error!(%error, "the roots cannot be read; those that were read last stay in force");
            }
            Err(_) => {}
        }
    }
}
