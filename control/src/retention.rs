//! Forgets access records that are too old or too many, a portion at a time.

use std::time::Duration;

use runtime::{clock::unix_now, shutdown::Tasks};
use tokio::time::sleep;

use crate::{config::AuditConfig, store::Store};

/// How often to look.
const LOOK: Duration = Duration::from_secs(60);
/// Pause between two portions, so that others who write get their turn.
const BREATH: Duration = Duration::from_millis(50);

/// The oldest that is kept, in milliseconds since 1970.
#[must_use]
pub fn oldest_ms(config: AuditConfig, now: i64) -> i64 {
    (now - i64::from(config.keep_days) * 86_400).max(0) * 1000
}

/// Forgets until the tasks stop.
pub async fn run(store: Store, config: AuditConfig, tasks: Tasks) {
    let work = async {
        loop {
            sleep(LOOK).await;
            loop {
                match store.forget_access(oldest_ms(config, unix_now()), config.keep_records.into()).await {
                    Ok(0) => break,
                    Ok(gone) => tracing::debug!(gone, "old access records are forgotten"),
                    Err(error) => {
                        tracing::debug!(%error, "old access records could not be forgotten now");
                        break;
                    }
                }
                sleep(BREATH).await;
            }
        }
    };
    let _: Option<()> = tasks.token().run_until_cancelled(work).await;
}
