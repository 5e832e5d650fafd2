//! How a shard proves itself to SSH clients: a host key that it makes at its first start, and a certificate of control for
//! it, so that one line in `known_hosts` is enough for all shards.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use proto::{
    backoff::Backoff,
    id::ShardId,
    ssh::{Certificate as Signed, HostCertificateRequest},
};
use runtime::{clock, identity::IdentityDir};
use russh::{MethodKind, MethodSet, Preferred, SshId, cipher, compression, kex, mac, server::Config};
use ssh_key::{Algorithm, Certificate, EcdsaCurve, HashAlg, LineEnding, PrivateKey, private::Ed25519Keypair};
use tokio::{sync::watch, time::sleep};

use super::who::line;
use crate::{follow::Clients, metrics::Metrics};

/// The host key in the shard's folder, as OpenSSH writes it, mode 0600.
const KEY: &str = "ssh_host_ed25519_key";
/// Its certificate.
const CERTIFICATE: &str = "ssh_host_ed25519_key-cert.pub";
/// Bytes that a client may send ahead on a channel.
const WINDOW: u32 = 2 * 1024 * 1024;
/// Largest packet of a channel in bytes, which is what OpenSSH sends.
const PACKET: u32 = 32 * 1024;
/// Keys that a client may show in vain.
const ATTEMPTS: usize = 16;
/// Bounds of the pause after control could not be asked.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// What SSH clients may negotiate. Nothing of SHA-1, no CBC; modern curves only.
const KEX: &[kex::Name] = &[
    kex::MLKEM768X25519_SHA256,
    kex::CURVE25519,
    kex::CURVE25519_PRE_RFC_8731,
    kex::EXTENSION_SUPPORT_AS_SERVER,
    kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
];
const CIPHERS: &[cipher::Name] =
    &[cipher::CHACHA20_POLY1305, cipher::AES_256_GCM, cipher::AES_256_CTR, cipher::AES_128_CTR];
const MACS: &[mac::Name] = &[mac::HMAC_SHA512_ETM, mac::HMAC_SHA256_ETM];
const KEYS: &[Algorithm] = &[
    Algorithm::Ed25519,
    Algorithm::SkEd25519,
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
    Algorithm::SkEcdsaSha2NistP256,
    Algorithm::Rsa { hash: Some(HashAlg::Sha512) },
    Algorithm::Rsa { hash: Some(HashAlg::Sha256) },
];

/// The shard as an SSH host.
#[derive(Debug)]
pub struct Host {
    key: PrivateKey,
    dir: IdentityDir,
    names: Vec<String>,
    config: watch::Sender<Arc<Config>>,
    metrics: Arc<Metrics>,
}

impl Host {
    /// Takes key and certificate from this folder, and makes the key if there is none. `names` are those under which
    /// people reach the shard.
    ///
    /// # Errors
    /// If the folder cannot be read or written, or holds something else.
    pub fn open(dir: IdentityDir, names: Vec<String>, metrics: Arc<Metrics>) -> anyhow::Result<Self> {
        let path = dir.path().join(KEY);
        let key = match dir.read(KEY)? {
            Some(text) => PrivateKey::from_openssh(&text).with_context(|| {
                format!("{} is no private key of OpenSSH; remove it to have a new one made", path.display())
            })?,
            None => {
                let key = PrivateKey::from(Ed25519Keypair::from_seed(&rand::random()));
                dir.write(KEY, &key.to_openssh(LineEnding::LF)?)?;
                tracing::info!(path = %path.display(), fingerprint = %key.fingerprint(HashAlg::Sha256), "made an SSH host key");
                key
            }
        };
        let config = watch::channel(Arc::new(config(key.clone(), None))).0;
        let host = Self { key, dir, names, config, metrics };
        if let Some(text) = host.dir.read(CERTIFICATE)?
            && let Err(error) = host.show(&text)
        {
            tracing::warn!(%error, "the SSH host certificate that was kept is not used; control is asked for another one");
        }
        Ok(host)
    }

    /// What connections go by from now on.
    #[must_use]
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.borrow())
    }

    /// The public key, as a line without a comment.
    #[must_use]
    pub fn public_key(&self) -> String {
        line(self.key.public_key().key_data()).unwrap_or_default()
    }

    /// Shows a certificate from now on, if it is one of this key.
    ///
    /// # Errors
    /// If it is not, or has ended.
    pub fn show(&self, text: &str) -> anyhow::Result<()> {
        let certificate = Certificate::from_openssh(text.trim())?;
        anyhow::ensure!(certificate.public_key() == self.key.public_key().key_data(), "it is for another key");
        let now = u64::try_from(clock::unix_now()).unwrap_or(0);
        anyhow::ensure!(certificate.valid_before() > now, "it has ended");
        let not_after = i64::try_from(certificate.valid_before()).unwrap_or(i64::MAX);
        self.metrics.ssh_host_certificate_not_after.set(not_after);
        self.config.send_replace(Arc::new(config(self.key.clone(), Some(certificate))));
        Ok(())
    }

    /// When the next certificate is due: at 2/3 of the present one's life, at once if there is none.
    fn due(&self) -> i64 {
        let config = self.config();
        config.certificates.first().map_or(0, |certificate| {
            let (from, to) = (certificate.valid_after(), certificate.valid_before());
            i64::try_from(from + to.saturating_sub(from) / 3 * 2).unwrap_or(i64::MAX)
        })
    }

    /// Keeps the certificate fresh. A control that signs none is asked again all the same: it may be given keys.
    pub(crate) async fn keep(self: Arc<Self>, clients: Clients) {
        let mut backoff = Backoff::new(AGAIN.0, AGAIN.1);
        loop {
            let wait = self.due().saturating_sub(clock::unix_now()).max(0).unsigned_abs();
            if wait > 0 {
                // In small steps, since the wall clock may jump while this waits.
                sleep(Duration::from_secs(wait.min(60))).await;
                continue;
            }
            let request = HostCertificateRequest { key: self.public_key(), names: self.names.clone() };
            let signed = clients.post::<Signed>("/v1/ssh/host-certificates", &request).await;
            match signed.map_err(anyhow::Error::from).and_then(|signed| self.keep_signed(&signed)) {
                Ok(()) => backoff = Backoff::new(AGAIN.0, AGAIN.1),
                Err(error) => {
                    tracing::warn!(%error, "no SSH host certificate; clients see the bare host key");
                    sleep(backoff.next_delay(rand::random())).await;
                }
            }
        }
    }

    fn keep_signed(&self, signed: &Signed) -> anyhow::Result<()> {
        self.show(&signed.certificate)?;
        self.dir.write(CERTIFICATE, &format!("{}\n", signed.certificate.trim()))?;
        tracing::info!(not_after = signed.not_after, "the SSH host certificate is fresh");
        Ok(())
    }
}

/// The names of a shard for its certificate: its own, those that are set, and where it listens and is advertised.
#[must_use]
pub(crate) fn names(shard: &ShardId, set: &[String], advertised: &[String]) -> Vec<String> {
    let hosts = advertised.iter().filter_map(|address| address.parse::<proto::target::HostPort>().ok()).map(|a| a.host);
    let loopback = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let all = std::iter::once(shard.to_string()).chain(set.iter().cloned()).chain(hosts).chain(loopback);
    let mut names: Vec<String> = Vec::new();
    for name in all {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn config(key: PrivateKey, certificate: Option<Certificate>) -> Config {
    Config {
        server_id: SshId::Standard("SSH-2.0-Causeway".into()),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        // A key cannot be guessed, so there is nothing to slow down.
        auth_rejection_time: Duration::ZERO,
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![key],
        certificates: certificate.into_iter().collect(),
        window_size: WINDOW,
        maximum_packet_size: PACKET,
        // Nothing is read from russh's own queues of channels (see `lane`).
        channel_buffer_size: 1,
        event_buffer_size: 16,
        preferred: Preferred {
            kex: KEX.into(),
            key: KEYS.into(),
            host_key_certificates: (&[]).into(),
            cipher: CIPHERS.into(),
            mac: MACS.into(),
            compression: (&[compression::NONE]).into(),
        },
        max_auth_attempts: ATTEMPTS,
        // TCP's keep-alive finds out who is gone. An answer to one of SSH's may wait behind what is not read for now.
        inactivity_timeout: None,
        keepalive_interval: None,
        nodelay: true,
        ..Config::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_certified_for_every_name_once() {
        let shard = "s1".parse().unwrap();
        let set = ["shard.example.org".to_owned(), "192.0.2.1".to_owned()];
        let advertised = ["shard.example.org:7400".to_owned(), "[fd00::1]:7400".to_owned()];
        let names = names(&shard, &set, &advertised);
        assert_eq!(names, ["s1", "shard.example.org", "192.0.2.1", "fd00::1", "localhost", "127.0.0.1", "::1"]);
    }
}
