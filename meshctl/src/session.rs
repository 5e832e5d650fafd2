//! Who the user is: the identity that `meshctl login` left, kept fresh, and what can be asked of control with it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use proto::{
    api::{EnrolRequest, Enrolled, RenewRequest, WhoAmI},
    identity::Role,
    join::JoinLine,
    message::Candidate,
};
use runtime::{
    api::ApiClient,
    cert::CertFacts,
    clock::unix_now,
    identity::{Credentials, IdentityDir, NodeKey, certificates},
    tls::{LiveIdentity, TrustBundle},
};
use serde::{Deserialize, Serialize};

use crate::{failure::Failure, text};

/// The note of where control is.
const CONTROL: &str = "control";
/// The note of which shards there are.
const SHARDS: &str = "shards";
/// Files of a login.
const FILES: [&str; 4] = ["identity.pem", "bundle.pem", CONTROL, SHARDS];
/// How old the note of the shards may be before control is asked again, in seconds.
const SHARDS_FRESH: i64 = 60;
/// How long to wait for control where a note would do.
const HURRY: Duration = Duration::from_secs(3);

/// The shards as control named them last, so that streams can be opened while control is away.
#[derive(Debug, Serialize, Deserialize)]
struct ShardsNote {
    /// When, in seconds since 1970.
    fetched: i64,
    shards: Vec<Candidate>,
}

/// A login that is in use.
#[derive(Debug)]
pub(crate) struct Session {
    dir: IdentityDir,
    identity: LiveIdentity,
    bundle: TrustBundle,
    api: ApiClient,
}

/// Whether somebody is logged in there; nothing is read but the presence of the file.
pub(crate) fn exists(home: &Path) -> bool {
    home.join("identity.pem").exists()
}

/// What to do where nobody is logged in.
pub(crate) fn not_logged_in(home: &Path) -> Failure {
    Failure::Refused(format!(
        "not logged in (there is no identity in {}): get a join line from an administrator, who makes it with \
         'meshctl token create --user NAME', and run 'meshctl login'",
        home.display()
    ))
}

/// Enrols as a user with a join line, and keeps what that gives.
///
/// # Errors
/// If control says no, if the line is not for a user, or if the folder cannot be written.
pub(crate) async fn enrol(home: &Path, join: &JoinLine) -> Result<Arc<CertFacts>, Failure> {
    let dir = IdentityDir::open(home)?;
    let key = NodeKey::generate()?;
    let request = EnrolRequest { token: join.token.clone(), name: join.name.clone(), csr: key.csr_pem(&[])? };
    let enrolled: Enrolled = ApiClient::enrol(join, &request).await?;
    let (credentials, bundle) = taken(key, &enrolled)?;
    let facts = credentials.facts().clone();
    let (article, program) = match facts.identity.role {
        Role::User => {
            dir.store(&credentials, &bundle)?;
            dir.write(CONTROL, &format!("{}\n", join.control))?;
            note_shards(&dir, &enrolled.shards)?;
            return Ok(Arc::new(facts));
        }
        Role::Edge => ("an", "mesh-edge"),
        Role::Shard | Role::Control => ("a", "mesh-cloud"),
    };
    Err(Failure::Usage(format!(
        "this join line is for {article} {}, and is used up now: give a new one to '{program} join', and log in with \
         one from 'meshctl token create --user NAME'",
        facts.identity.role
    )))
}

/// Forgets a login. Returns whether there was one.
///
/// # Errors
/// If a file cannot be removed.
pub(crate) fn forget(home: &Path) -> Result<bool, Failure> {
    let mut found = false;
    for path in FILES.map(|file| home.join(file)) {
        match std::fs::remove_file(&path) {
            Ok(()) => found = true,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Failure::Failed(format!("cannot remove {}: {e}", path.display()))),
        }
    }
    Ok(found)
}

pub(crate) fn no_tls(why: &dyn std::fmt::Display) -> Failure {
    Failure::Failed(format!("TLS cannot be set up: {why}"))
}

fn taken(key: NodeKey, enrolled: &Enrolled) -> Result<(Credentials, TrustBundle), Failure> {
    let chain = certificates(&enrolled.chain).map_err(|e| Failure::Failed(e.to_string()))?;
    let bundle = TrustBundle::from_pem(&enrolled.bundle).map_err(|e| Failure::Failed(e.to_string()))?;
    Ok((Credentials::new(key, chain)?, bundle))
}

/// Keeps a list of shards. An empty one is not kept: those that were alive last may be back before control is.
fn note_shards(dir: &IdentityDir, shards: &[Candidate]) -> Result<(), Failure> {
    if shards.is_empty() {
        return Ok(());
    }
    let note = ShardsNote { fetched: unix_now(), shards: shards.to_vec() };
    let words = serde_json::to_string(&note).map_err(|e| Failure::Failed(e.to_string()))?;
    Ok(dir.write(SHARDS, &words)?)
}

impl Session {
    /// Takes up the login of a home, and renews its certificate if it is time.
    ///
    /// # Errors
    /// If nobody is logged in there, or the certificate has ended.
    pub(crate) async fn open(home: &Path) -> Result<Self, Failure> {
        if !exists(home) {
            return Err(not_logged_in(home));
        }
        let dir = IdentityDir::open(home)?;
        let Some((credentials, bundle)) = dir.load()? else { return Err(not_logged_in(home)) };
        let ended = credentials.facts().not_after;
        if ended <= unix_now() {
            return Err(Failure::Refused(format!(
                "the certificate of {} ended {} ago and cannot be renewed any more: log in again with a new join line, \
                 or set the clock of this machine",
                credentials.facts().identity,
                text::age(ended, unix_now())
            )));
        }
        let control = dir.read(CONTROL)?.unwrap_or_default();
        let control = control.trim().parse().map_err(|e| {
            Failure::Failed(format!(
                "{} does not say where control is ({e}); write its HOST:PORT there, or log in again",
                dir.path().join(CONTROL).display()
            ))
        })?;
        let identity = LiveIdentity::new(&credentials).map_err(|e| no_tls(&e))?;
        let api = ApiClient::new(control, &identity, bundle.clone()).map_err(|e| no_tls(&e))?;
        let session = Self { dir, identity, bundle, api };
        if let Err(e) = session.renew_if_due().await {
            tracing::warn!(error = %e, "the certificate could not be renewed; it is good {}", text::until(ended, unix_now()));
        }
        Ok(session)
    }

    /// Control's API, as this user.
    pub(crate) const fn api(&self) -> &ApiClient {
        &self.api
    }

    /// What the certificate says.
    pub(crate) fn facts(&self) -> Arc<CertFacts> {
        self.identity.facts()
    }

    /// What is shown in handshakes.
    pub(crate) const fn identity(&self) -> &LiveIdentity {
        &self.identity
    }

    /// Whom to trust.
    pub(crate) const fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// Where the login lies.
    pub(crate) fn home(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    /// Gets the next certificate, if 2/3 of the present one's life have passed. Returns whether it did.
    ///
    /// # Errors
    /// If control cannot be reached or says no; the present certificate is still there.
    pub(crate) async fn renew_if_due(&self) -> Result<bool, Failure> {
        if unix_now() < self.facts().renew_at() {
            return Ok(false);
        }
        let key = NodeKey::generate()?;
        let request = RenewRequest { csr: key.csr_pem(&[])? };
        let enrolled: Enrolled = self.api.post("/v1/renew", &request).await?;
        let (credentials, bundle) = taken(key, &enrolled)?;
        self.dir.store(&credentials, &bundle)?;
        self.identity.replace(&credentials).map_err(|e| no_tls(&e))?;
        self.bundle.replace(&bundle);
        note_shards(&self.dir, &enrolled.shards)?;
        Ok(true)
    }

    /// Asks control who this user is, and keeps what it says of the shards.
    ///
    /// # Errors
    /// As every call.
    pub(crate) async fn whoami(&self) -> Result<WhoAmI, Failure> {
        let who: WhoAmI = self.api.get("/v1/whoami").await?;
        note_shards(&self.dir, &who.shards)?;
        Ok(who)
    }

    /// The shards: from the note while it is fresh, else from control, else from the note however old it is.
    ///
    /// # Errors
    /// If control cannot be asked and never was.
    pub(crate) async fn shards(&self) -> Result<Vec<Candidate>, Failure> {
        let note = self.noted_shards();
        match note {
            Some(note) if !note.shards.is_empty() && (0..SHARDS_FRESH).contains(&(unix_now() - note.fetched)) => {
                Ok(note.shards)
            }
            Some(note) => match self.fresh_shards().await {
                Err(e) if !note.shards.is_empty() => {
                    let age = text::age(note.fetched, unix_now());
                    tracing::warn!(error = %e, "going by the shards as they were {age} ago");
                    Ok(note.shards)
                }
                asked => asked,
            },
            None => self.fresh_shards().await,
        }
    }

    /// The shards as control knows them now.
    ///
    /// # Errors
    /// As every call; this one does not wait for long.
    pub(crate) async fn fresh_shards(&self) -> Result<Vec<Candidate>, Failure> {
        match tokio::time::timeout(HURRY, self.whoami()).await {
            Ok(who) => Ok(who?.shards),
            Err(_) => Err(Failure::Unreachable(format!(
                "control at {} did not answer within {}",
                self.api.address(),
                text::span(HURRY)
            ))),
        }
    }

    fn noted_shards(&self) -> Option<ShardsNote> {
        // A note that cannot be read is as good as none: control has the original.
        self.dir.read(SHARDS).ok().flatten().and_then(|words| serde_json::from_str(&words).ok())
    }
}
