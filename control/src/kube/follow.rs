//! Following one kind of objects: a list, then changes, again after every failure. What is known stays meanwhile.

use std::{collections::HashSet, fmt, pin::pin, sync::Arc, time::Duration};

use futures::StreamExt;
use kube::{
    Api, Client,
    runtime::watcher::{self, Event},
};
use parking_lot::Mutex;
use proto::{backoff::Backoff, book::ObjectKey};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use super::{
    health::Health,
    shelf::{Shelf, Shelved, key_of},
};

/// Bounds of the pause after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// A watch that has been tried again and says nothing for so long works: there is no news.
const SETTLED: Duration = Duration::from_secs(15);
/// How long one watch lasts, in seconds. A connection that died silently is noticed soon after.
const WATCH: u32 = 60;

/// Follows without end.
pub(super) async fn follow<K>(client: Client, shelf: Arc<Mutex<Shelf>>, health: Health, kind: &'static str)
where
    K: Shelved + Clone + fmt::Debug + DeserializeOwned + Send + 'static,
{
    let mut stream = pin!(watcher::watcher(Api::<K>::all(client), watcher::Config::default().timeout(WATCH)));
    let mut backoff = Backoff::new(RETRY.0, RETRY.1);
    let mut listed: Option<HashSet<ObjectKey>> = None;
    let mut since = Instant::now();
    loop {
        let next = match timeout(SETTLED, stream.next()).await {
            Ok(Some(next)) => next,
            // It never ends by itself.
            Ok(None) => return,
            Err(_) => {
                if listed.is_none() {
                    health.well(kind);
                }
                continue;
            }
        };
        match next {
            Ok(event) => {
                take(event, &shelf, &mut listed);
                if listed.is_none() {
                    health.well(kind);
                }
            }
            Err(error) => {
                health.ill(kind, &explain(&error));
                backoff.link_lived(since.elapsed());
                tokio::time::sleep(backoff.next_delay(rand::random())).await;
                since = Instant::now();
            }
        }
    }
}

fn take<K: Shelved>(event: Event<K>, shelf: &Mutex<Shelf>, listed: &mut Option<HashSet<ObjectKey>>) {
    let mut shelf = shelf.lock();
    match event {
        Event::Init => *listed = Some(HashSet::new()),
        Event::InitApply(object) => {
            if let Some(listed) = listed {
                listed.insert(key_of(&object));
            }
            object.put(&mut shelf);
        }
        Event::InitDone => {
            let listed = listed.take().unwrap_or_default();
            for key in K::all(&shelf).iter().filter(|key| !listed.contains(key)) {
                K::remove(key, &mut shelf);
            }
            K::listed(&mut shelf);
        }
        Event::Apply(object) => object.put(&mut shelf),
        Event::Delete(object) => K::remove(&key_of(&object), &mut shelf),
    }
}

/// What went wrong, with what can be done about it where that is known.
fn explain(error: &watcher::Error) -> String {
    let remedy = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => match status.code {
            401 => "; its credentials are refused: look at kubernetes.kubeconfig, or at the pod's service account",
            403 => "; its service account may not list and watch this: the ClusterRole of the chart has what it needs",
            _ => "",
        },
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchError(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => "",
    };
    // The causes say more than kube's own sentence.
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text + remedy
}
