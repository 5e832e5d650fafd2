//! Hearing at once what other replicas commit, on PostgreSQL. The poll would find it within a second; a revocation
//! should not wait for that.

use std::time::Duration;

use sqlx::postgres::PgListener;
use tokio::time::{sleep, timeout};

use super::{DEADLINE, Store, StoreError};

/// Where commits are announced.
const CHANNEL: &str = "causeway_control";
/// How long to wait after the connection was lost. The poll finds what is missed meanwhile.
const AGAIN: Duration = Duration::from_secs(1);

/// Announces a commit; it is heard when that has happened.
pub(super) const ANNOUNCE: &str = "NOTIFY causeway_control";

impl Store {
    /// Calls `heard` at each commit of any replica, without end; on SQLite there is only this process.
    pub async fn hear(&self, heard: impl Fn()) {
        let Some(url) = &self.url else { return std::future::pending().await };
        loop {
            if let Err(error) = self.listen(url.reveal(), &heard).await {
                tracing::debug!(%error, "commits of other replicas cannot be heard now; they are looked for every second");
            }
            sleep(AGAIN).await;
        }
    }

    async fn listen(&self, url: &str, heard: &impl Fn()) -> Result<(), StoreError> {
        let connect = async {
            let mut listener = PgListener::connect(url).await?;
            listener.listen(CHANNEL).await?;
            Ok::<_, sqlx::Error>(listener)
        };
        let mut listener = timeout(DEADLINE, connect).await.map_err(|_| StoreError::Deadline)??;
        loop {
            heard();
            // `None` when the connection was lost: something may be missed, and the next call connects anew.
            listener.try_recv().await?;
        }
    }
}
