//! Kubernetes, as far as control has to do with it: the address book that shards resolve kube-apiserver's requests with,
//! service accounts that enrol as shards, and the metrics by which a HorizontalPodAutoscaler scales shards.
//!
//! Every replica follows kube-apiserver for itself, so that none depends on another one for what it tells its shards; the
//! one that leads writes the book down for the next start. When Kubernetes is away, the last book stays in force.

mod follow;
mod front;
mod health;
mod hpa;
mod keep;
mod objects;
pub mod review;
mod shelf;
#[cfg(test)]
mod tests;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use parking_lot::Mutex;
use runtime::{admin::Ready, shutdown::Tasks, tls::LiveIdentity};
use tokio::{
    net::TcpListener,
    time::{MissedTickBehavior, interval},
};

use self::{
    health::Health,
    review::{Reviewer, Rules},
    shelf::Shelf,
};
use crate::{config::KubernetesConfig, metrics::Metrics, presence::Presence, store::Store, watch::Hub};

/// Longest time until kube-apiserver takes a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How often `/readyz` and the metrics are brought up to date.
const TELL: Duration = Duration::from_secs(2);

const NODES: &str = "nodes";
const PODS: &str = "pods";
const SERVICES: &str = "services";
const SLICES: &str = "endpointslices";

/// Makes a client. Nothing is connected yet.
///
/// # Errors
/// If the configuration leads nowhere; the error names the key and what to do.
pub async fn client(config: &KubernetesConfig) -> anyhow::Result<Client> {
    let mut found = match &config.kubeconfig {
        Some(path) => {
            let text = Kubeconfig::read_from(path)
                .with_context(|| format!("cannot read {} (kubernetes.kubeconfig)", path.display()))?;
            let options = KubeConfigOptions { context: config.context.clone(), ..KubeConfigOptions::default() };
            Config::from_custom_kubeconfig(text, &options)
                .await
                .with_context(|| format!("cannot use {} (kubernetes.kubeconfig)", path.display()))?
        }
        None => Config::incluster().context(
            "kubernetes.enabled is set, and this process has no service account of a pod; set kubernetes.kubeconfig \
             if it does not run in the cluster",
        )?,
    };
    found.connect_timeout = Some(CONNECT);
    Client::try_from(found).context("cannot set up TLS to kube-apiserver")
}

/// Who asks about tokens of service accounts, if any may enrol shards.
#[must_use]
pub fn reviewer(config: &KubernetesConfig, client: &Client) -> Option<Reviewer> {
    let accounts = config.shard_accounts.clone();
    let rules = Rules { audience: config.audience.clone(), accounts };
    (!rules.accounts.is_empty()).then(|| Reviewer::new(client.clone(), rules))
}

/// Serves the metrics of shards to kube-apiserver, if an address is set. Returns it with its port.
///
/// # Errors
/// If the address cannot be bound.
pub async fn serve_metrics(
    config: &KubernetesConfig,
    client: &Client,
    (presence, identity): (&Arc<Presence>, &LiveIdentity),
    ready: &Ready,
    tasks: &Tasks,
) -> anyhow::Result<Option<SocketAddr>> {
    let Some(address) = config.metrics_listen else { return Ok(None) };
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} (kubernetes.metrics_listen)"))?;
    let address = listener.local_addr()?;
    let source = (Arc::clone(presence), client.clone());
    front::start(listener, identity.clone(), source, ready.part("metrics-api"), tasks);
    Ok(Some(address))
}

/// Follows the cluster until the tasks stop.
///
/// # Errors
/// If the database cannot be read.
pub async fn start(
    config: &KubernetesConfig,
    client: Client,
    (hub, store): (&Hub, &Store),
    (metrics, ready): (&Metrics, &Ready),
    tasks: &Tasks,
) -> anyhow::Result<()> {
    keep::load(hub, store).await?;
    let kinds = [NODES, PODS, SERVICES, SLICES];
    let health = Health::new(&kinds, hub.book().clone(), metrics.clone(), ready.part("kubernetes"));
    let shelf = Arc::new(Mutex::new(Shelf::new(hub.book().clone(), config.edge_annotation.clone())));
    shelf.lock().enrol(hub.state().edges());
    let token = tasks.token();
    macro_rules! follow {
        ($type:ident, $kind:expr) => {
            let run = follow::follow::<objects::$type>(client.clone(), Arc::clone(&shelf), health.clone(), $kind);
            tasks.spawn(token.clone().run_until_cancelled_owned(run));
        };
    }
    follow!(Node, NODES);
    follow!(Pod, PODS);
    follow!(Service, SERVICES);
    follow!(EndpointSlice, SLICES);
    tasks.spawn(token.clone().run_until_cancelled_owned(enrolled(hub.clone(), Arc::clone(&shelf))));
    tasks.spawn(token.run_until_cancelled_owned(tell(hub.clone(), health)));
    tasks.spawn(keep::run(hub.clone(), store.clone(), tasks.clone()));
    Ok(())
}

/// Nodes become edges when they enrol, and are none any more when they are revoked.
async fn enrolled(hub: Hub, shelf: Arc<Mutex<Shelf>>) {
    let mut changes = hub.changes();
    let mut known = hub.state().edges();
    loop {
        // Control stops when nobody changes the state any more.
        let Ok(edges) = changes.wait_for(|state| !Arc::ptr_eq(&state.edges(), &known)).await.map(|state| state.edges())
        else {
            return;
        };
        known = Arc::clone(&edges);
        shelf.lock().enrol(edges);
    }
}

async fn tell(hub: Hub, health: Health) {
    let mut ticks = interval(TELL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if health.is_whole() {
            hub.book().complete();
        }
        health.tell();
    }
}
