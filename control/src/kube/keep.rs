//! The book in the database: read at a start, written by the replica that leads.

use std::{collections::HashMap, time::Duration};

use proto::book::{BookChange, BookSpec};
use runtime::shutdown::Tasks;
use tokio::time::sleep;

use crate::{
    store::{
        Store, StoreError,
        book::{Kept, name_of},
    },
    watch::{
        Hub,
        book::{Entry, Key, Seen},
    },
};

/// How often what changed is written down.
const WRITE: Duration = Duration::from_secs(5);
/// Entries in one transaction.
const BATCH: usize = 500;

/// Puts what is in the database into the book.
///
/// # Errors
/// If the database cannot be read.
pub(super) async fn load(hub: &Hub, store: &Store) -> Result<(), StoreError> {
    let kept = store.book().await?;
    if kept.is_empty() {
        return Ok(());
    }
    let entries: Vec<Entry> = kept.iter().filter_map(|kept| kept.read().ok()).collect();
    if entries.len() < kept.len() {
        let lost = kept.len() - entries.len();
        tracing::warn!(lost, "some entries of the kept address book cannot be read; Kubernetes will tell them again");
    }
    tracing::info!(entries = entries.len(), "the address book begins with what was known last");
    hub.book().put(entries);
    hub.book().complete();
    Ok(())
}

/// Writes the book down while this replica leads, until the tasks stop.
pub(super) async fn run(hub: Hub, store: Store, tasks: Tasks) {
    let mut leads = hub.leads();
    let work = async {
        while leads.wait_for(|leads| *leads).await.is_ok() {
            if let Err(error) = write(&hub, &store).await {
                tracing::debug!(%error, "the address book cannot be written down now");
            }
            sleep(WRITE).await;
        }
    };
    tasks.token().run_until_cancelled(work).await;
}

/// Writes down what changed for as long as this replica leads. What is in the database by then is compared once.
async fn write(hub: &Hub, store: &Store) -> Result<(), StoreError> {
    let leads = hub.leads();
    let mut there: HashMap<String, String> =
        store.book().await?.into_iter().map(|kept| (kept.name, kept.entry)).collect();
    let (mut seen, mut whole) = (Seen::default(), false);
    while *leads.borrow() {
        while let Some(change) = hub.book().next(&mut seen) {
            if change.fresh && whole {
                // So much went that its names are forgotten: compare again.
                return Ok(());
            }
            let last = !change.more;
            let (mut put, mut gone) = rows(change);
            put.retain(|kept| there.remove(&kept.name).is_none_or(|before| before != kept.entry));
            if last && !whole {
                gone.extend(std::mem::take(&mut there).into_keys());
                whole = true;
            }
            for put in put.chunks(BATCH) {
                store.keep_book(put, &[]).await?;
            }
            for gone in gone.chunks(BATCH) {
                store.keep_book(&[], gone).await?;
            }
        }
        sleep(WRITE).await;
    }
    Ok(())
}

fn rows(change: BookChange) -> (Vec<Kept>, Vec<String>) {
    let BookSpec { nodes, pods, services } = change.put;
    let entries = nodes.into_iter().map(Entry::Node).chain(pods.into_iter().map(Entry::Pod));
    let entries = entries.chain(services.into_iter().map(Entry::Service));
    let gone = change.gone;
    let keys = gone.nodes.into_iter().map(Key::Node).chain(gone.pods.into_iter().map(Key::Pod));
    let keys = keys.chain(gone.services.into_iter().map(Key::Service));
    (entries.filter_map(|entry| Kept::of(&entry).ok()).collect(), keys.map(|key| name_of(&key)).collect())
}
