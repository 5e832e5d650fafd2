//! What the stories stand on: a control of its own on port 0 with a database of its own, and members of its mesh.

use std::{sync::Arc, time::Duration};

use control::{
    Control,
    config::{ControlConfig, LeafTtl},
    start,
};
use proto::{
    api::{ApiCode, EnrolRequest, Enrolled, TokenCreated, TokenKind, TokenRequest},
    join::JoinLine,
    message::Renew,
    secret::Secret,
    target::HostPort,
};
use runtime::{
    api::{ApiClient, ApiClientError, Watch},
    identity::{self, Credentials, NodeKey},
    shutdown::Tasks,
    tls::{LiveIdentity, TrustBundle},
};
use sqlx::{AssertSqlSafe, Connection};
use tempfile::TempDir;

/// The variable that names a server for the tests.
const POSTGRES: &str = "CAUSEWAY_TEST_POSTGRES";

/// Which database a world has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Sqlite,
    Postgres,
}

/// A database of PostgreSQL that is dropped in the end.
#[derive(Debug)]
pub(crate) struct Database {
    server: String,
    name: String,
}

impl Database {
    async fn create() -> Self {
        sqlx::any::install_default_drivers();
        let server = std::env::var(POSTGRES).unwrap_or_else(|_| {
            panic!("{POSTGRES} names no server; run this by scripts/with-postgres cargo test -p control")
        });
        let name = format!("control_{:016x}", rand::random::<u64>());
        let database = Self { server, name };
        database.server_does(&format!("CREATE DATABASE {}", database.name)).await;
        database
    }

    /// Lets the server do something that is not for the database itself.
    pub(crate) async fn server_does(&self, sql: &str) {
        let mut connection = sqlx::AnyConnection::connect(&self.server).await.expect("the server of the tests");
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.expect(sql);
        connection.close().await.unwrap();
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn url(&self) -> Secret {
        let (scheme, rest) = self.server.split_once("://").unwrap();
        let (authority, rest) = rest.split_once('/').unwrap_or((rest, ""));
        let query = rest.split_once('?').map(|(_, q)| format!("?{q}")).unwrap_or_default();
        Secret::new(format!("{scheme}://{authority}/{}{query}", self.name))
    }
}

/// A control, and all that is needed to talk to it.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) control: Control,
    pub(crate) config: ControlConfig,
    pub(crate) dir: TempDir,
    pub(crate) database: Option<Arc<Database>>,
    tasks: Tasks,
}

impl World {
    pub(crate) async fn new(kind: Kind) -> Self {
        Self::with(kind, |_| ()).await
    }

    pub(crate) async fn with(kind: Kind, change: impl FnOnce(&mut ControlConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let database = match kind {
            Kind::Sqlite => None,
            Kind::Postgres => Some(Arc::new(Database::create().await)),
        };
        let mut config = ControlConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            admin: "127.0.0.1:0".parse().unwrap(),
            data_dir: dir.path().join("data"),
            database: database.as_ref().map(|d| d.url()),
            trust_domain: "mesh.test".parse().unwrap(),
            leaf_ttl_secs: LeafTtl { edge: 3600, ..LeafTtl::default() },
            ..ControlConfig::default()
        };
        change(&mut config);
        let tasks = Tasks::new();
        let control = start(config.clone(), tasks.clone()).await.unwrap();
        Self { control, config, dir, database, tasks }
    }

    /// Another control on the same database and CA.
    pub(crate) async fn replica(&self) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = self.config.clone();
        config.data_dir = dir.path().join("data");
        let of_first = |file: &str| Some(self.config.data_dir.join(file));
        (config.ca.cert, config.ca.key) = (of_first("ca.pem"), of_first("ca.key"));
        let tasks = Tasks::new();
        let control = start(config.clone(), tasks.clone()).await.unwrap();
        Self { control, config, dir, database: self.database.clone(), tasks }
    }

    /// Another control on the same database and CA that can be killed.
    pub(crate) async fn doomed(&self) -> Doomed {
        let dir = tempfile::tempdir().unwrap();
        let mut config = self.config.clone();
        config.data_dir = dir.path().join("data");
        let of_first = |file: &str| Some(self.config.data_dir.join(file));
        (config.ca.cert, config.ca.key) = (of_first("ca.pem"), of_first("ca.key"));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let control = runtime.spawn(start(config, Tasks::new())).await.unwrap().unwrap();
        Doomed { control, runtime, _dir: dir }
    }

    /// Stops it as a signal would, and starts it again.
    pub(crate) async fn restarted(self, change: impl FnOnce(&mut ControlConfig)) -> Self {
        self.stopped().await.started(change).await
    }

    /// Stops it as a signal would.
    pub(crate) async fn stopped(self) -> Stopped {
        let Self { control, config, dir, database, tasks } = self;
        assert_eq!(tasks.drained(Duration::from_secs(10)).await, 0, "everything ends in time");
        control.close().await;
        Stopped { config, dir, database }
    }

    /// The end of each story: nothing is left running.
    pub(crate) async fn end(self) {
        assert_eq!(self.tasks.drained(Duration::from_secs(10)).await, 0, "everything ends in time");
        self.control.close().await;
        if let Some(database) = self.database.and_then(Arc::into_inner) {
            database.server_does(&format!("DROP DATABASE {} WITH (FORCE)", database.name)).await;
        }
    }

    pub(crate) fn address(&self) -> HostPort {
        self.control.api_addr.to_string().parse().unwrap()
    }

    pub(crate) async fn token(&self, kind: TokenKind, change: impl FnOnce(&mut TokenRequest)) -> TokenCreated {
        let mut request =
            TokenRequest { kind, name: None, uses: 1, ttl_secs: 600, groups: vec![], site: None, replace: false };
        change(&mut request);
        self.control.create_token(&request).await.unwrap()
    }

    pub(crate) async fn join(&self, kind: TokenKind, change: impl FnOnce(&mut TokenRequest)) -> JoinLine {
        self.token(kind, change).await.join.unwrap().reveal().parse().unwrap()
    }

    /// A new member of this kind.
    pub(crate) async fn member(&self, kind: TokenKind, name: &str) -> Member {
        let join = self.join(kind, |r| r.name = Some(name.parse().unwrap())).await;
        self.enrol(&join, None, &[]).await.unwrap()
    }

    pub(crate) async fn admin(&self) -> Member {
        let join = self.control.admin_join().await.unwrap();
        self.enrol(&join, None, &[]).await.unwrap()
    }

    pub(crate) async fn enrol(
        &self,
        join: &JoinLine,
        name: Option<&str>,
        hosts: &[&str],
    ) -> Result<Member, ApiClientError> {
        let key = NodeKey::generate().unwrap();
        let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
        let request = EnrolRequest {
            token: join.token.clone(),
            name: name.map(|n| n.parse().unwrap()),
            csr: key.csr_pem(&hosts).unwrap(),
        };
        let enrolled = ApiClient::enrol(join, &request).await?;
        Ok(Member::new(&self.address(), key, &enrolled))
    }
}

/// A control between two lives.
#[derive(Debug)]
pub(crate) struct Stopped {
    config: ControlConfig,
    dir: TempDir,
    database: Option<Arc<Database>>,
}

impl Stopped {
    pub(crate) async fn started(self, change: impl FnOnce(&mut ControlConfig)) -> World {
        let Self { mut config, dir, database } = self;
        change(&mut config);
        let tasks = Tasks::new();
        let control = start(config.clone(), tasks.clone()).await.unwrap();
        World { control, config, dir, database, tasks }
    }
}

/// A control that is not going to end well.
#[derive(Debug)]
pub(crate) struct Doomed {
    pub(crate) control: Control,
    runtime: tokio::runtime::Runtime,
    _dir: TempDir,
}

impl Doomed {
    pub(crate) fn address(&self) -> HostPort {
        self.control.api_addr.to_string().parse().unwrap()
    }

    /// From one moment to the next nothing of it runs any more.
    pub(crate) fn kill(self) {
        self.runtime.shutdown_background();
    }
}

/// A member of the mesh.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) client: ApiClient,
    pub(crate) credentials: Credentials,
    pub(crate) live: LiveIdentity,
    pub(crate) bundle: TrustBundle,
}

impl Member {
    pub(crate) fn new(address: &HostPort, key: NodeKey, enrolled: &Enrolled) -> Self {
        let credentials = Credentials::new(key, identity::certificates(&enrolled.chain).unwrap()).unwrap();
        let bundle = TrustBundle::from_pem(&enrolled.bundle).unwrap();
        let live = LiveIdentity::new(&credentials).unwrap();
        assert_eq!(credentials.facts().identity.to_string(), enrolled.identity);
        assert_eq!(credentials.facts().not_after, enrolled.not_after);
        let client = ApiClient::new(address.clone(), &live, bundle.clone()).unwrap();
        Self { client, credentials, live, bundle }
    }

    /// The same member, talking to another control.
    pub(crate) fn at(&self, address: &HostPort) -> ApiClient {
        ApiClient::new(address.clone(), &self.live, self.bundle.clone()).unwrap()
    }

    pub(crate) fn name(&self) -> String {
        self.credentials.facts().identity.name.to_string()
    }

    pub(crate) fn serial(&self) -> &str {
        &self.credentials.facts().serial
    }

    pub(crate) fn proof(&self) -> (NodeKey, Renew) {
        self.credentials.renewal(&[]).unwrap()
    }
}

/// The code of a refusal.
pub(crate) fn code<T>(result: Result<T, ApiClientError>) -> ApiCode {
    match result {
        Err(ApiClientError::Refused(error)) => {
            assert!(error.message.len() > 10, "a refusal explains itself: {error}");
            error.code
        }
        Err(other) => panic!("no refusal but: {other}"),
        Ok(_) => panic!("this should have been refused"),
    }
}

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, limit: Duration, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(limit, waiting).await.unwrap_or_else(|_| panic!("{what}: not within {limit:?}"));
}

/// Follows a watch until an event fits.
pub(crate) async fn event(
    watch: &mut Watch,
    limit: Duration,
    fits: impl Fn(&proto::api::WatchEvent) -> bool,
) -> proto::api::WatchEvent {
    let found = async {
        loop {
            let event = watch.next().await.unwrap();
            if fits(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(limit, found).await.expect("an event within the limit")
}
