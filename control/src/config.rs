//! Configuration of control. Every key is optional; the defaults stand beside the fields.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use proto::{
    book::ObjectKey,
    id::{EdgeId, TrustDomain},
    identity::Role,
    secret::Secret,
    target::HostPort,
};
use runtime::telemetry::LogConfig;
use serde::Deserialize;

use crate::ca::HostName;

/// Shortest life of a certificate, in seconds.
const MIN_TTL: u64 = 1;
/// Longest life of a certificate, in seconds: 90 days.
const MAX_TTL: u64 = 90 * 86_400;

/// Everything that can be set.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ControlConfig {
    /// Where the API listens. `[::]:7443`
    pub listen: SocketAddr,
    /// Where `/livez`, `/readyz` and `/metrics` are served; in plain text, so better not to the world.
    /// `127.0.0.1:7444`
    pub admin: SocketAddr,
    /// `host:port` under which others reach the API; the first one goes into join lines. None: the first of `names`,
    /// else the address of `listen`.
    pub public: Vec<String>,
    /// Further DNS names and addresses in the API's certificate, for browsers and tools; members of the mesh do not
    /// need them. No shard is ever certified for one of these, nor for the hosts of `public`. None.
    pub names: Vec<String>,
    /// The name in this control's own certificate. `control`
    pub name: EdgeId,
    /// Where CA, database and the first join line lie. `/var/lib/causeway/control`
    pub data_dir: PathBuf,
    /// URL of the database; `sqlite:` or `postgres:`. It may hold a password, so better set it by `database_file` or
    /// by the environment variable `CAUSEWAY_CONTROL_DATABASE`. None: the file `control.db` in `data_dir`.
    pub database: Option<Secret>,
    /// A file whose first line is the URL of the database. None.
    pub database_file: Option<PathBuf>,
    /// The SPIFFE trust domain, which is the name of the mesh. It cannot be changed later. `mesh.local`
    pub trust_domain: TrustDomain,
    /// The certificate authority.
    pub ca: CaConfig,
    /// Life of certificates.
    pub leaf_ttl_secs: LeafTtl,
    /// Longest life of an SSH certificate of a user, in seconds, from 60 to 7776000. `43200`
    pub ssh_certificate_secs: u64,
    /// Kubernetes.
    pub kubernetes: KubernetesConfig,
    /// Access records.
    pub audit: AuditConfig,
    /// Logging.
    pub log: LogConfig,
}

/// What is kept of the access records that shards send, for `meshctl audit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// For how many days; 0 keeps none at all. `30`
    pub keep_days: u32,
    /// How many at most; the oldest go first. `1000000`
    pub keep_records: u32,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self { keep_days: 30, keep_records: 1_000_000 }
    }
}

/// Kubernetes, for a mesh whose edges are nodes of a cluster.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KubernetesConfig {
    /// Whether control follows a cluster. `false`
    pub enabled: bool,
    /// A kubeconfig file, for a control outside of the cluster. None: the service account of its pod.
    pub kubeconfig: Option<PathBuf>,
    /// The context of that file. None: its current one.
    pub context: Option<String>,
    /// The annotation of a node that tells which edge it is; empty on a node that is none. Nodes without it are the edge
    /// of their own name, if there is one. `causeway.dev/edge`
    pub edge_annotation: String,
    /// Service accounts whose pods may enrol as shards, as `namespace/name`. None.
    #[serde(deserialize_with = "accounts")]
    pub shard_accounts: Vec<ObjectKey>,
    /// Where `custom.metrics.k8s.io` is served to kube-apiserver's aggregation layer, for a HorizontalPodAutoscaler. The
    /// certificate is the API's, so `names` must hold the name of the Service. None.
    pub metrics_listen: Option<SocketAddr>,
    /// The audience that their tokens must be made for. `causeway`
    pub audience: String,
}

fn accounts<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<ObjectKey>, D::Error> {
    let account = |text: String| {
        let parts = text.split_once('/').filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty());
        let parts = parts.filter(|(_, name)| !name.contains('/'));
        parts.map(|(namespace, name)| ObjectKey::new(namespace, name)).ok_or_else(|| {
            serde::de::Error::custom(format!("{text:?} is no service account; write \"namespace/name\""))
        })
    };
    Vec::<String>::deserialize(deserializer)?.into_iter().map(account).collect()
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            kubeconfig: None,
            context: None,
            edge_annotation: "causeway.dev/edge".into(),
            shard_accounts: vec![],
            metrics_listen: None,
            audience: "causeway".into(),
        }
    }
}

/// The certificate authority.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaConfig {
    /// A certificate in PEM. Given together with `key`; else `ca.pem` in `data_dir`, made on the first start.
    pub cert: Option<PathBuf>,
    /// Its key in PEM (PKCS#8 or SEC1), readable by this process alone.
    pub key: Option<PathBuf>,
    /// Files with further roots that the mesh trusts, in PEM: the next CA before a rotation, the last one after it.
    /// Files `*.pem` in `data_dir`/roots.d count too, and are read again every two seconds. None.
    pub extra_roots: Vec<PathBuf>,
}

/// Life of certificates by role, in seconds, from 1 to 7776000. They are renewed at 2/3 of it.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LeafTtl {
    /// Of edges. `86400`
    pub edge: u64,
    /// Of shards. `86400`
    pub shard: u64,
    /// Of users. `86400`
    pub user: u64,
    /// Of control itself. `86400`
    pub control: u64,
}

impl Default for LeafTtl {
    fn default() -> Self {
        Self { edge: 86_400, shard: 86_400, user: 86_400, control: 86_400 }
    }
}

impl LeafTtl {
    /// Life of a certificate of this role.
    #[must_use]
    pub const fn of(&self, role: Role) -> Duration {
        Duration::from_secs(match role {
            Role::Edge => self.edge,
            Role::Shard => self.shard,
            Role::User => self.user,
            Role::Control => self.control,
        })
    }
}

impl Default for ControlConfig {
    #[allow(clippy::expect_used, reason = "constants, which a test checks")]
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0; 8], 7443)),
            admin: SocketAddr::from(([127, 0, 0, 1], 7444)),
            public: vec![],
            names: vec![],
            name: "control".parse().expect("a name"),
            data_dir: "/var/lib/causeway/control".into(),
            database: None,
            database_file: None,
            trust_domain: "mesh.local".parse().expect("a name"),
            ca: CaConfig::default(),
            leaf_ttl_secs: LeafTtl::default(),
            ssh_certificate_secs: 12 * 3600,
            kubernetes: KubernetesConfig::default(),
            audit: AuditConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// A configuration that can be read and makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum InvalidConfig {
    /// An address for join lines.
    #[error("public: {given:?} is not host:port: {why}")]
    Public {
        /// What was given.
        given: String,
        /// What is wrong.
        why: String,
    },
    /// A name for the certificate.
    #[error("names: {0:?} is neither a DNS name nor an address")]
    Name(String),
    /// Only one half of a CA.
    #[error("ca.cert and ca.key go together: give both, or neither to have them made in data_dir")]
    HalfCa,
    /// A life that is too short or too long.
    #[error("leaf_ttl_secs.{role} is {given} s; it must be from {MIN_TTL} to {MAX_TTL} s")]
    Ttl {
        /// Whose.
        role: Role,
        /// What was given.
        given: u64,
    },
    /// The same for SSH.
    #[error("ssh_certificate_secs is {0} s; it must be from 60 to {MAX_TTL} s")]
    SshTtl(u64),
    /// Two databases.
    #[error("database and database_file are both set; one of them must go")]
    TwoDatabases,
    /// A file that should name the database.
    #[error("database_file {path}: {why}")]
    DatabaseFile {
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// A password on the command line.
    #[error(
        "--set database would show the database's password to everybody on this machine; put the URL into a file \
         (database_file) or into the environment variable {DATABASE_VARIABLE}"
    )]
    PasswordInArguments,
}

/// The environment variable that sets the URL of the database.
pub const DATABASE_VARIABLE: &str = "CAUSEWAY_CONTROL_DATABASE";

impl ControlConfig {
    /// Checks what the types alone do not say, and fills in what stands in files and in the environment.
    ///
    /// # Errors
    /// If something makes no sense.
    pub fn settle(mut self, database_variable: Option<String>) -> Result<Self, InvalidConfig> {
        if let Some(url) = database_variable.filter(|u| !u.is_empty()) {
            self.database = Some(Secret::new(url));
            self.database_file = None;
        }
        if let Some(path) = self.database_file.take() {
            if self.database.is_some() {
                return Err(InvalidConfig::TwoDatabases);
            }
            self.database = Some(database_from(&path)?);
        }
        self.check()?;
        Ok(self)
    }

    /// Checks what the types alone do not say.
    ///
    /// # Errors
    /// If something makes no sense.
    pub fn check(&self) -> Result<(), InvalidConfig> {
        self.public_addresses()?;
        self.certified_names()?;
        if self.ca.cert.is_some() != self.ca.key.is_some() {
            return Err(InvalidConfig::HalfCa);
        }
        for role in [Role::Edge, Role::Shard, Role::User, Role::Control] {
            let given = self.leaf_ttl_secs.of(role).as_secs();
            if !(MIN_TTL..=MAX_TTL).contains(&given) {
                return Err(InvalidConfig::Ttl { role, given });
            }
        }
        if !(60..=MAX_TTL).contains(&self.ssh_certificate_secs) {
            return Err(InvalidConfig::SshTtl(self.ssh_certificate_secs));
        }
        Ok(())
    }

    /// The addresses of `public`.
    ///
    /// # Errors
    /// If one is none.
    pub fn public_addresses(&self) -> Result<Vec<HostPort>, InvalidConfig> {
        let parse = |given: &String| {
            given.parse().map_err(|e: proto::target::InvalidTarget| InvalidConfig::Public {
                given: given.clone(),
                why: e.to_string(),
            })
        };
        self.public.iter().map(parse).collect()
    }

    /// The names of `names` and the hosts of `public`: those that no shard may be certified for.
    ///
    /// # Errors
    /// If one is none.
    pub fn certified_names(&self) -> Result<Vec<HostName>, InvalidConfig> {
        let hosts = self.public_addresses()?.into_iter().map(|p| p.host);
        hosts.chain(self.names.iter().cloned()).map(|n| HostName::parse(&n).ok_or(InvalidConfig::Name(n))).collect()
    }

    /// Certificate and key of the CA, and whether they may be made.
    #[must_use]
    pub fn ca_files(&self) -> (PathBuf, PathBuf, bool) {
        match (&self.ca.cert, &self.ca.key) {
            (Some(cert), Some(key)) => (cert.clone(), key.clone(), false),
            (Some(_) | None, _) => {
                (self.data_dir.join(crate::ca::files::CERTIFICATE), self.data_dir.join(crate::ca::files::KEY), true)
            }
        }
    }
}

/// Refuses `--set database=...` if it shows a password.
///
/// # Errors
/// If it does.
pub fn refuse_passwords(sets: &[String]) -> Result<(), InvalidConfig> {
    let shows = |set: &String| {
        set.split_once('=').is_some_and(|(key, url)| {
            let authority = url.split_once("://").map_or("", |(_, rest)| rest.split('/').next().unwrap_or_default());
            key.trim() == "database"
                && (authority.contains('@') && authority.contains(':') || url.contains("password="))
        })
    };
    if sets.iter().any(shows) { Err(InvalidConfig::PasswordInArguments) } else { Ok(()) }
}

fn database_from(path: &Path) -> Result<Secret, InvalidConfig> {
    let error = |why: String| InvalidConfig::DatabaseFile { path: path.display().to_string(), why };
    let text = std::fs::read_to_string(path).map_err(|e| error(e.to_string()))?;
    match text.lines().next().map(str::trim) {
        Some(url) if !url.is_empty() => Ok(Secret::new(url.to_owned())),
        Some(_) | None => Err(error("its first line is empty; it must be the URL of the database".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_make_sense_and_an_empty_file_is_enough() {
        let config: ControlConfig = runtime::config::load(None, &[]).unwrap();
        let config = config.settle(None).unwrap();
        assert_eq!(config.listen.to_string(), "[::]:7443");
        assert_eq!(config.leaf_ttl_secs.of(Role::Edge), Duration::from_secs(86_400));
        assert!(config.ca_files().0.ends_with("control/ca.pem"));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let why = |sets: &[&str]| {
            let sets: Vec<_> = sets.iter().map(ToString::to_string).collect();
            let config: ControlConfig = runtime::config::load(None, &sets).map_err(|e| e.to_string())?;
            config.settle(None).map(|_| ()).map_err(|e| e.to_string())
        };
        assert!(why(&["public=['a']"]).unwrap_err().starts_with("public: \"a\""));
        assert!(why(&["names=['a b']"]).unwrap_err().starts_with("names: \"a b\""));
        assert!(why(&["ca.cert=/x"]).unwrap_err().contains("go together"));
        assert!(why(&["leaf_ttl_secs.edge=0"]).unwrap_err().contains("leaf_ttl_secs.edge is 0 s"));
        assert!(why(&["lisden='x'"]).unwrap_err().contains("unknown field"));
    }

    #[test]
    fn a_password_stays_out_of_arguments_and_prints() {
        let sets = |s: &str| refuse_passwords(&[s.to_owned()]);
        assert!(sets("database=postgres://mesh:swordfish@db/mesh").is_err());
        assert!(sets("database=postgres:///mesh?password=swordfish").is_err());
        assert!(sets("database=postgres://db/mesh").is_ok());
        let config = ControlConfig::default().settle(Some("postgres://mesh:swordfish@db/mesh".into())).unwrap();
        assert!(!format!("{config:?}").contains("swordfish"));
    }

    #[test]
    fn the_database_can_stand_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("url");
        std::fs::write(&path, "postgres://mesh:swordfish@db/mesh\n").unwrap();
        let config = ControlConfig { database_file: Some(path), ..ControlConfig::default() };
        assert_eq!(
            config.clone().settle(None).unwrap().database.unwrap().reveal(),
            "postgres://mesh:swordfish@db/mesh"
        );
        assert_eq!(
            config.settle(Some("sqlite::memory:".into())).unwrap().database.unwrap().reveal(),
            "sqlite::memory:"
        );
    }
}
