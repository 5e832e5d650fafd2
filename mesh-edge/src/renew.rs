//! Renewing the certificate over the control stream, at 2/3 of its life. Streams and the link go on: the new identity
//! is shown from the next handshake on.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use proto::{
    backoff::Backoff,
    message::{EdgeToShard, Refuse, Renewal},
};
use runtime::{
    clock,
    identity::{Credentials, IdentityDir, IdentityError, renewed},
    link::{LinkEnd, quic::LinkLimits},
    tls::{LiveIdentity, TrustBundle},
};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tracing::{error, info, warn};

use crate::{dice::Dice, life::Line, metrics::Metrics, ways::Ways};

/// How long to wait for a tunnel, and for control's answer through it.
const ANSWER: Duration = Duration::from_secs(30);
/// Pauses between tries.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// The wall clock may be set while we wait, so it is looked at again this often.
const LOOK: Duration = Duration::from_secs(600);
/// Renewals are spread over this part of the life, so that machines which enrolled together do not renew together.
const SPREAD: f64 = 0.05;

/// Renews as long as the process lives.
#[derive(Debug)]
pub struct Renewer {
    /// The present identity.
    pub credentials: Arc<Credentials>,
    /// Where it is shown.
    pub identity: LiveIdentity,
    /// Whom we trust.
    pub bundle: TrustBundle,
    /// Who dials with it.
    pub ways: Arc<Mutex<Ways>>,
    /// Limits of the links that are dialled.
    pub limits: LinkLimits,
    /// Where it is kept; `None` in simulations.
    pub store: Option<IdentityDir>,
    /// The way to the shard.
    pub line: watch::Receiver<Line>,
    /// What came back.
    pub answers: mpsc::Receiver<Result<Renewal, Refuse>>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Jitter.
    pub dice: Dice,
}

/// A renewal did not work.
#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error("there is no tunnel")]
    NoTunnel,
    #[error("no answer within {} s", ANSWER.as_secs())]
    NoAnswer,
    #[error("control refused: {0}")]
    Refused(Refuse),
    #[error("the answer cannot be used: {0}")]
    Unusable(String),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the new identity cannot dial: {0}")]
    Dialer(#[from] LinkEnd),
}

impl RenewError {
    const fn slug(&self) -> &'static str {
        match self {
            Self::NoTunnel | Self::NoAnswer => "no-answer",
            Self::Refused(_) => "refused",
            Self::Unusable(_) | Self::Identity(_) | Self::Dialer(_) => "unusable",
        }
    }
}

impl Renewer {
    /// Runs until it is dropped.
    pub async fn run(mut self) {
        loop {
            self.metrics.cert_expiry.set(self.credentials.facts().not_after);
            self.due().await;
            let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
            while let Err(error) = self.renew().await {
                let pause = match &error {
                    RenewError::Refused(Refuse { retry_after: Some(asked), .. }) => *asked,
                    RenewError::NoTunnel
                    | RenewError::NoAnswer
                    | RenewError::Refused(_)
                    | RenewError::Unusable(_)
                    | RenewError::Identity(_)
                    | RenewError::Dialer(_) => backoff.next_delay(self.dice.fraction()),
                };
                self.tell(&error, pause);
                sleep(pause).await;
            }
        }
    }

    async fn due(&self) {
        let facts = self.credentials.facts();
        let life = Duration::from_secs((facts.not_after - facts.not_before).try_into().unwrap_or(0));
        let spread = i64::try_from(life.mul_f64(SPREAD * self.dice.fraction()).as_secs()).unwrap_or(0);
        let due = facts.renew_at().saturating_add(spread);
        while let Some(left) = u64::try_from(due - clock::unix_now()).ok().filter(|left| *left > 0) {
            sleep(Duration::from_secs(left).min(LOOK)).await;
        }
    }

    fn tell(&self, error: &RenewError, pause: Duration) {
        self.metrics.renewals.with_label_values(&[error.slug()]).inc();
        let facts = self.credentials.facts();
        let (life, left_s) = (facts.not_after - facts.not_before, facts.not_after - clock::unix_now());
        let next_s = pause.as_secs_f32();
        if left_s <= 0 {
            self.metrics.identity_errors.with_label_values(&["own-expired"]).inc();
            error!(%error, next_s, "the certificate has expired and cannot be renewed; enrol again with 'mesh-edge join --replace'");
        } else if left_s < life / 6 {
            error!(%error, left_s, next_s, "the certificate ends soon and could not be renewed");
        } else {
            warn!(%error, left_s, next_s, "the certificate could not be renewed yet");
        }
    }

    async fn renew(&mut self) -> Result<(), RenewError> {
        let say = {
            let line = timeout(ANSWER, self.line.wait_for(|line| line.say.is_some())).await;
            let line = line.map_err(|_| RenewError::NoTunnel)?.map_err(|_| RenewError::NoTunnel)?;
            line.say.clone().ok_or(RenewError::NoTunnel)?
        };
        // An answer that came too late belongs to another key.
        while self.answers.try_recv().is_ok() {}
        let (key, request) = self.credentials.renewal(&[])?;
        say.send(EdgeToShard::Renew(request)).await.map_err(|_| RenewError::NoTunnel)?;
        let answer = timeout(ANSWER, self.answers.recv()).await.map_err(|_| RenewError::NoAnswer)?;
        let renewal = answer.ok_or(RenewError::NoAnswer)?.map_err(RenewError::Refused)?;
        let (credentials, bundle) = renewed(key, &renewal)?;
        self.check(&credentials, &bundle)?;
        self.take_over(Arc::new(credentials), &bundle).await
    }

    /// The shard in between is not to be able to make us somebody else, or to make us forget whom we trust.
    fn check(&self, next: &Credentials, bundle: &TrustBundle) -> Result<(), RenewError> {
        let unusable = |why: String| Err(RenewError::Unusable(why));
        let (is, was) = (&next.facts().identity, &self.credentials.facts().identity);
        if is != was {
            return unusable(format!("it is for {is}"));
        }
        let trusted = self.bundle.certificates();
        if !bundle.certificates().iter().any(|root| trusted.contains(root)) {
            return unusable("its trust bundle has no root in common with the present one".into());
        }
        bundle.vouches_for(next).or_else(|e| unusable(format!("its own bundle does not vouch for it: {e}")))
    }

    async fn take_over(&mut self, next: Arc<Credentials>, bundle: &TrustBundle) -> Result<(), RenewError> {
        // A new configuration has an empty session cache: a resumed session would show the old certificate.
        self.identity.replace(&next).map_err(|e| RenewError::Unusable(e.to_string()))?;
        let rotated = self.bundle.replace(bundle);
        let quic = crate::client_config(&self.identity, &self.bundle, &self.limits)?;
        let tls = crate::client_tls(&self.identity, &self.bundle)?;
        {
            let mut ways = self.ways.lock();
            *ways = ways.with_config(quic, tls, &self.limits);
        }
        self.credentials = Arc::clone(&next);
        let outcome = if self.keep(next).await { "ok" } else { "not-stored" };
        self.metrics.renewals.with_label_values(&[outcome]).inc();
        let facts = self.credentials.facts();
        info!(serial = facts.serial, not_after = facts.not_after, roots_changed = rotated, "certificate renewed");
        Ok(())
    }

    async fn keep(&self, credentials: Arc<Credentials>) -> bool {
        let Some(dir) = self.store.clone() else { return true };
        let bundle = self.bundle.clone();
        let stored = tokio::task::spawn_blocking(move || dir.store(&credentials, &bundle)).await;
        match stored {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                error!(%error, "the new certificate is in use but not kept: after a restart the old one is shown");
                false
            }
            Err(_) => false,
        }
    }
}
