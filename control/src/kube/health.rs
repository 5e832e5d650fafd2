//! Whether the book is up to date, for `/readyz` and metrics. Control is ready without Kubernetes: it has the last book.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use runtime::admin::ReadyPart;
use tokio::time::Instant;

use crate::{metrics::Metrics, watch::book::SharedBook};

/// What is followed, and how that goes. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct Health(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kinds: Mutex<BTreeMap<&'static str, State>>,
    book: SharedBook,
    metrics: Metrics,
    ready: ReadyPart,
}

#[derive(Clone, Debug)]
enum State {
    /// It was not read yet, for this reason if one is known.
    Waiting(Instant, Option<String>),
    /// It is up to date.
    Well,
    /// It was up to date then.
    Stale(Instant, String),
}

impl Health {
    pub(super) fn new(kinds: &[&'static str], book: SharedBook, metrics: Metrics, ready: ReadyPart) -> Self {
        let now = Instant::now();
        let kinds = kinds.iter().map(|kind| (*kind, State::Waiting(now, None))).collect();
        let health = Self(Arc::new(Inner { kinds: Mutex::new(kinds), book, metrics, ready }));
        health.tell();
        health
    }

    pub(super) fn well(&self, kind: &'static str) {
        let before = self.0.kinds.lock().insert(kind, State::Well);
        if let Some(State::Stale(since, _) | State::Waiting(since, Some(_))) = before {
            tracing::info!(kind, secs = since.elapsed().as_secs(), "Kubernetes can be followed again");
        }
    }

    pub(super) fn ill(&self, kind: &'static str, why: &str) {
        self.0.metrics.kube_errors.with_label_values(&[kind]).inc();
        let mut kinds = self.0.kinds.lock();
        let (state, new) = match kinds.get(kind) {
            Some(State::Well) | None => (State::Stale(Instant::now(), why.to_owned()), true),
            Some(State::Stale(since, _)) => (State::Stale(*since, why.to_owned()), false),
            Some(State::Waiting(since, told)) => (State::Waiting(*since, Some(why.to_owned())), told.is_none()),
        };
        kinds.insert(kind, state);
        drop(kinds);
        if new {
            tracing::warn!(kind, why, "Kubernetes cannot be followed; the address book stays as it is");
        }
    }

    /// Whether all has been read at least once.
    pub(super) fn is_whole(&self) -> bool {
        !self.0.kinds.lock().values().any(|state| matches!(state, State::Waiting(..)))
    }

    /// Says it to `/readyz` and the metrics.
    pub(super) fn tell(&self) {
        let kinds = self.0.kinds.lock().clone();
        let mut worst: Option<(Instant, String)> = None;
        for (kind, state) in kinds {
            let (since, why) = match state {
                State::Well => {
                    self.0.metrics.kube_stale.with_label_values(&[kind]).set(0);
                    continue;
                }
                State::Waiting(since, why) => {
                    (since, format!("{kind} not read yet: {}", why.as_deref().unwrap_or("no answer so far")))
                }
                State::Stale(since, why) => (since, format!("{kind} cannot be followed: {why}")),
            };
            let secs = i64::try_from(since.elapsed().as_secs()).unwrap_or(i64::MAX);
            self.0.metrics.kube_stale.with_label_values(&[kind]).set(secs.max(1));
            if worst.as_ref().is_none_or(|(before, _)| since < *before) {
                worst = Some((since, why));
            }
        }
        let [edges, nodes, pods, services] = self.0.book.size();
        for (what, count) in [("edges", edges), ("nodes", nodes), ("pods", pods), ("services", services)] {
            self.0.metrics.book_entries.with_label_values(&[what]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let size = format!("{edges} edges among {nodes} nodes, {pods} pods, {services} services");
        self.0.ready.detail(match worst {
            None => size,
            Some((since, why)) if self.0.book.is_known() => {
                format!("the last book, {} s old, is in force ({size}); {why}", since.elapsed().as_secs())
            }
            Some((_, why)) => format!("there is no address book yet; {why}"),
        });
    }
}
