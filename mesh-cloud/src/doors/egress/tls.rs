//! TLS at the TCP side of the door: kube-apiserver shows a client certificate of a CA of its own, and this side one that
//! it knows. The files are looked at again every few seconds, so that certificates and CAs change without a restart:
//! kube-apiserver itself keeps its client certificate until it is restarted, and for as long as that takes the file of
//! CAs has the old and the new one.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use parking_lot::RwLock;
use runtime::{
    cert, identity,
    tls::{LiveIdentity, provider},
};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
    version::TLS13,
};

use super::answer::Failure;
use crate::{config::EgressTcpConfig, metrics::Metrics};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// The TLS of the door, as its files say.
#[derive(Debug)]
pub(super) struct LiveTls {
    certificate: Option<(PathBuf, PathBuf)>,
    client_ca: PathBuf,
    clients: Vec<String>,
    identity: LiveIdentity,
    metrics: Arc<Metrics>,
    present: RwLock<(Texts, Arc<ServerConfig>)>,
}

/// What the files said when they were read last, whether it could be used or not.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Texts {
    certificate: Option<(Vec<u8>, Vec<u8>)>,
    client_ca: Vec<u8>,
}

impl LiveTls {
    /// Reads the files for the first time.
    pub(super) fn load(
        config: &EgressTcpConfig,
        identity: &LiveIdentity,
        metrics: &Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(
            !config.clients.is_empty(),
            "doors.egress.tcp.clients is empty: name the common names or alternative names of kube-apiserver's client certificates"
        );
        let certificate = match (&config.cert, &config.key) {
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => anyhow::bail!("doors.egress.tcp needs both cert and key, or neither"),
        };
        let texts = Texts::read(certificate.as_ref(), &config.client_ca)?;
        let tls = texts.config(identity)?;
        Ok(Self {
            certificate,
            client_ca: config.client_ca.clone(),
            clients: config.clients.clone(),
            identity: identity.clone(),
            metrics: Arc::clone(metrics),
            present: RwLock::new((texts, tls)),
        })
    }

    /// For the next handshake.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.present.read().1)
    }

    /// Follows the files for ever.
    pub(super) async fn follow(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.look();
        }
    }

    fn look(&self) {
        // A file that is missing for a moment is one that is being replaced.
        let Ok(texts) = Texts::read(self.certificate.as_ref(), &self.client_ca) else { return };
        if self.present.read().0 == texts {
            return;
        }
        let (config, outcome) = match texts.config(&self.identity) {
            Ok(config) => {
                tracing::info!("the egress door has new certificates");
                (config, "taken")
            }
            Err(error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "the egress door's new files cannot be used; the old ones stay"
                );
                (self.config(), "unusable")
            }
        };
        *self.present.write() = (texts, config);
        self.metrics.egress_files.with_label_values(&[outcome]).inc();
    }

    /// Why a client may not come in although its certificate is good.
    pub(super) fn denies(&self, chain: Option<&[CertificateDer<'_>]>) -> Option<Failure> {
        let names = chain.and_then(<[_]>::first).and_then(|leaf| cert::names(leaf).ok()).unwrap_or_default();
        if names.iter().any(|name| self.clients.contains(name)) {
            return None;
        }
        let sentence = format!(
            "the client certificate is for {}, which doors.egress.tcp.clients does not list",
            if names.is_empty() { "nobody".to_owned() } else { names.join(", ") }
        );
        Some(Failure::new(403, "client-denied", sentence))
    }
}

impl Texts {
    fn read(certificate: Option<&(PathBuf, PathBuf)>, client_ca: &PathBuf) -> anyhow::Result<Self> {
        let read = |path: &PathBuf| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let certificate = certificate.map(|(cert, key)| anyhow::Ok((read(cert)?, read(key)?))).transpose()?;
        Ok(Self { certificate, client_ca: read(client_ca)? })
    }

    fn config(&self, identity: &LiveIdentity) -> anyhow::Result<Arc<ServerConfig>> {
        let mut roots = RootCertStore::empty();
        for root in identity::certificates(std::str::from_utf8(&self.client_ca)?).context("client_ca")? {
            roots.add(root).context("client_ca")?;
        }
        let provider = provider();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
        let builder = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier);
        let mut config = match &self.certificate {
            Some((cert, key)) => {
                let chain = identity::certificates(std::str::from_utf8(cert)?).context("cert")?;
                builder
                    .with_single_cert(chain, PrivateKeyDer::from_pem_slice(key).context("key")?)
                    .context("cert and key")?
            }
            None => builder.with_cert_resolver(Arc::new(identity.clone())),
        };
        // A client that comes back is looked at again: its CA may be gone by then.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}
