//! Enrolling: a join line in, an identity on disk out. The key is made here and never leaves.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use proto::{
    api::{ApiCode, EnrolRequest, Enrolled, WhoAmI},
    backoff::Backoff,
    id::EdgeId,
    identity::{Identity, Role},
    join::{InvalidJoin, JoinLine},
    target::HostPort,
};
use runtime::{
    api::{ApiClient, ApiClientError},
    identity::{Credentials, IdentityDir, IdentityError, NodeKey},
    tls::{LiveIdentity, TrustBundle},
};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::dice::Dice;

/// The environment variable that may carry a join line.
pub const JOIN_VARIABLE: &str = "CAUSEWAY_JOIN";
/// The environment variable that may carry the name to enrol under.
pub const NAME_VARIABLE: &str = "CAUSEWAY_NAME";
/// The note that says where control is.
pub const CONTROL_NOTE: &str = "control";
/// The note with the addresses of the shards, one a line.
pub const SHARDS_NOTE: &str = "shards";
/// Pauses between tries.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Enrolling did not work.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The line is none.
    #[error(transparent)]
    Line(#[from] InvalidJoin),
    /// The line could not be read.
    #[error("cannot read the join line from {from}: {error}")]
    Read {
        /// A file, or standard input.
        from: String,
        /// Why.
        error: io::Error,
    },
    /// Control said no, or could not be asked.
    #[error("{error}{remedy}")]
    Control {
        /// What happened.
        error: ApiClientError,
        /// What to do, if that is not said yet.
        remedy: &'static str,
    },
    /// The identity could not be made or kept.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// There is one already.
    #[error(
        "this machine is {identity} already (in {dir}); to give it another identity, use 'mesh-edge join --replace'"
    )]
    Already {
        /// Who it is.
        identity: Identity,
        /// Where that lies.
        dir: PathBuf,
    },
    /// Control sent something that is no identity of an edge.
    #[error("control answered with an identity that cannot be used: {0}")]
    Unusable(String),
    /// No name to enrol under.
    #[error(
        "the join line names no edge, and this machine's host name {0:?} is no edge name; use --name NAME or CAUSEWAY_NAME"
    )]
    NoName(String),
}

impl EnrolError {
    fn from_control(error: ApiClientError) -> Self {
        let code = if let ApiClientError::Refused(e) = &error { Some(e.code) } else { None };
        #[allow(clippy::wildcard_enum_match_arm, reason = "the others say all that there is to say")]
        let remedy = match code {
            // Control has said it.
            Some(_) if error.to_string().contains("meshctl") => "",
            Some(ApiCode::TokenUsed | ApiCode::TokenExpired | ApiCode::TokenUnknown) => {
                "; get a new join line with 'meshctl token create'"
            }
            Some(ApiCode::TokenMismatch) => "; enrol under the token's own name, or get a join line for an edge",
            Some(ApiCode::NameTaken) => {
                "; choose another name with --name, or get a line with 'meshctl token create --replace' if this machine takes over that name"
            }
            _ => "",
        };
        Self::Control { error, remedy }
    }

    /// Whether the same may work later without anybody changing anything.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::Control { error, .. } => error.is_transient(),
            Self::Line(_)
            | Self::Read { .. }
            | Self::Identity(_)
            | Self::Already { .. }
            | Self::Unusable(_)
            | Self::NoName(_) => false,
        }
    }

    /// The kind, as in the metric `mesh_edge_identity_errors_total` and in logs.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Control { error: ApiClientError::WrongCa { .. }, .. } => "wrong-ca-hash",
            Self::Control { .. } => "not-enrolled",
            Self::Line(_) | Self::Read { .. } => "no-join-line",
            Self::Identity(_) | Self::Unusable(_) => "unusable-identity",
            Self::Already { .. } => "already-enrolled",
            Self::NoName(_) => "no-name",
        }
    }
}

/// Reads a join line: from the file if one is given, else from the environment, else from standard input, with a
/// prompt if a person sits there.
///
/// # Errors
/// If it cannot be read or is none.
pub fn read_line(file: Option<&Path>) -> Result<JoinLine, EnrolError> {
    let from = |what: &dyn std::fmt::Display| {
        let from = what.to_string();
        |error| EnrolError::Read { from, error }
    };
    if let Some(path) = file {
        return Ok(fs::read_to_string(path).map_err(from(&path.display()))?.parse()?);
    }
    if let Some(line) = line_from_environment()? {
        return Ok(line);
    }
    if io::stdin().is_terminal() {
        // Nobody is harmed if the prompt cannot be shown.
        let _ = io::stderr().write_all(b"Join line (from 'meshctl token create'): ");
    }
    let mut text = String::new();
    io::stdin().read_line(&mut text).map_err(from(&"standard input"))?;
    Ok(text.parse()?)
}

/// The join line in the environment, if there is one.
///
/// # Errors
/// If it is there and is none.
pub fn line_from_environment() -> Result<Option<JoinLine>, EnrolError> {
    match std::env::var(JOIN_VARIABLE) {
        Ok(line) if !line.trim().is_empty() => Ok(Some(line.parse()?)),
        Ok(_) | Err(_) => Ok(None),
    }
}

/// Enrols and keeps the identity. Returns who this machine now is.
///
/// # Errors
/// If there is an identity already and `replace` is not set, if control refuses, or if nothing can be kept.
pub async fn join(
    dir: &IdentityDir,
    line: &JoinLine,
    name: Option<EdgeId>,
    replace: bool,
) -> Result<Identity, EnrolError> {
    if let (false, Some((present, _))) = (replace, dir.load()?) {
        let identity = present.facts().identity.clone();
        return Err(EnrolError::Already { identity, dir: dir.path().to_owned() });
    }
    let name = match name.or_else(|| line.name.clone()) {
        Some(name) => name,
        None => host_name()?,
    };
    let key = NodeKey::generate()?;
    let request = EnrolRequest { token: line.token.clone(), name: Some(name), csr: key.csr_pem(&[])? };
    let enrolled = ApiClient::enrol(line, &request).await.map_err(EnrolError::from_control)?;
    keep(dir, line, &key, &enrolled)
}

fn keep(dir: &IdentityDir, line: &JoinLine, key: &NodeKey, enrolled: &Enrolled) -> Result<Identity, EnrolError> {
    let credentials = Credentials::from_pem(&key.to_pem(), &enrolled.chain)?;
    let bundle = TrustBundle::from_pem(&enrolled.bundle).map_err(IdentityError::from)?;
    let identity = credentials.facts().identity.clone();
    if identity.role != Role::Edge {
        return Err(EnrolError::Unusable(format!("{identity} is no edge; get a join line for an edge")));
    }
    bundle.vouches_for(&credentials).map_err(|e| EnrolError::Unusable(e.to_string()))?;
    let shards: Vec<&str> = enrolled.shards.iter().flat_map(|s| &s.addresses).map(String::as_str).collect();
    // The notes first: an identity without them could not find the mesh.
    dir.write(CONTROL_NOTE, &line.control.to_string())?;
    dir.write(SHARDS_NOTE, &shards.join("\n"))?;
    dir.store(&credentials, &bundle)?;
    info!(%identity, shards = shards.len(), "enrolled");
    Ok(identity)
}

/// Enrols if there is no identity yet, and tries again as long as that may help.
///
/// # Errors
/// If a person has to change something.
pub async fn until_joined(
    dir: &IdentityDir,
    line: &JoinLine,
    name: Option<EdgeId>,
    dice: &Dice,
) -> Result<(), EnrolError> {
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    loop {
        match join(dir, line, name.clone(), false).await {
            Ok(_) | Err(EnrolError::Already { .. }) => return Ok(()),
            Err(error) if error.is_transient() => {
                let pause = backoff.next_delay(dice.fraction());
                warn!(%error, kind = error.kind(), next_s = pause.as_secs_f32(), "not enrolled yet");
                sleep(pause).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// The addresses of shards that enrolment noted.
///
/// # Errors
/// If the note cannot be read.
pub fn noted_shards(dir: &IdentityDir) -> Result<Vec<String>, IdentityError> {
    let text = dir.read(SHARDS_NOTE)?.unwrap_or_default();
    Ok(text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect())
}

/// Where control was when this machine enrolled.
///
/// # Errors
/// If the note cannot be read.
pub fn noted_control(dir: &IdentityDir) -> Result<Option<HostPort>, IdentityError> {
    Ok(dir.read(CONTROL_NOTE)?.and_then(|text| text.trim().parse().ok()))
}

/// Asks control for the addresses of shards, and notes them: for an edge that enrolled before there was a shard.
///
/// # Errors
/// If control is not known, or does not answer.
pub async fn ask_for_shards(
    dir: &IdentityDir,
    identity: &LiveIdentity,
    bundle: &TrustBundle,
) -> Result<Vec<String>, EnrolError> {
    let Some(control) = noted_control(dir)? else { return Ok(Vec::new()) };
    let unusable = |e: &dyn std::fmt::Display| EnrolError::Unusable(e.to_string());
    let client = ApiClient::new(control, identity, bundle.clone()).map_err(|e| unusable(&e))?;
    let answer: WhoAmI = client.get("/v1/whoami").await.map_err(EnrolError::from_control)?;
    let shards: Vec<String> = answer.shards.into_iter().flat_map(|s| s.addresses).collect();
    dir.write(SHARDS_NOTE, &shards.join("\n"))?;
    Ok(shards)
}

fn host_name() -> Result<EdgeId, EnrolError> {
    let text = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let text = text.trim().to_ascii_lowercase();
    text.parse().map_err(|_| EnrolError::NoName(text))
}

#[cfg(test)]
mod tests {
    use proto::api::ApiError;

    use super::*;

    #[test]
    fn a_refusal_says_what_to_do() {
        let refused =
            |code| EnrolError::from_control(ApiClientError::Refused(ApiError::new(code, "the token has been used")));
        assert!(refused(ApiCode::TokenUsed).to_string().ends_with("'meshctl token create'"));
        assert!(refused(ApiCode::NameTaken).to_string().contains("--name"));
        assert!(!refused(ApiCode::TokenUsed).is_transient() && refused(ApiCode::Busy).is_transient());
        let wrong = EnrolError::from_control(ApiClientError::WrongCa { address: "h:1".into() });
        assert_eq!((wrong.kind(), wrong.is_transient()), ("wrong-ca-hash", false));
    }

    #[test]
    fn a_line_in_a_file_is_read_and_a_bad_one_does_not_leak() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("join");
        let line = format!("causeway://secret@[::1]:7443?ca=sha256:{}&name=shop-1\n", "0f".repeat(32));
        fs::write(&path, &line).unwrap();
        assert_eq!(read_line(Some(&path)).unwrap().name.unwrap().as_str(), "shop-1");
        fs::write(&path, line.replace('@', "")).unwrap();
        let error = read_line(Some(&path)).unwrap_err().to_string();
        assert!(!error.contains("secret") && error.contains("no join line"), "{error}");
    }
}
