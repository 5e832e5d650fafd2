//! `mesh-loadtest probes` against a shard and an edge on real sockets.
#![allow(clippy::unwrap_used, reason = "a test wants to stop where something is wrong")]

use std::{net::SocketAddr, process::Stdio, sync::Arc, time::Duration};

use loadtest::cluster::authority::Authority;
use mesh_cloud::{
    Parts,
    config::{DoorsConfig, ShardConfig},
    live::LiveCredentials,
    metrics::Metrics,
    state::MeshState,
};
use mesh_edge::{EdgeParts, config::EdgeConfig, life::Phase};
use prometheus::Registry;
use proto::{api::WatchEvent, policy::Rule};
use rand::{SeedableRng, rngs::StdRng};
use runtime::{
    access::{AccessLog, AccessWriter},
    admin::Ready,
    identity::IdentityDir,
    link::{listen::Listener, quic::Dialer},
    shutdown::Tasks,
    tls::LiveIdentity,
};
use tokio::{
    process::Command,
    sync::{mpsc, watch},
    time::timeout,
};

fn start_shard(authority: &mut Authority, tasks: &Tasks) -> SocketAddr {
    let identity = LiveIdentity::new(&authority.issue("shard/s-1")).unwrap();
    let (bundle, limits) = (authority.bundle(), mesh_cloud::link_limits());
    let server = mesh_cloud::endpoint_config(&identity, &bundle, &limits).unwrap();
    let everything = Rule {
        name: "all".into(),
        from: vec!["user/*".parse().unwrap()],
        to: vec!["edge/*".parse().unwrap()],
        ports: vec!["*".parse().unwrap()],
    };
    let word = WatchEvent { revision: 1, policy: Some(vec![everything]), ..WatchEvent::default() };
    let (_, state) = watch::channel(Arc::new(MeshState::default().after(word)));
    let (renewals, _) = mpsc::channel(1);
    let client = mesh_cloud::peer_config(&identity, &bundle, &mesh_cloud::peer_limits()).unwrap();
    let parts = Parts {
        shard: "s-1".parse().unwrap(),
        peers: Dialer::new(client, &mesh_cloud::peer_limits()),
        identity,
        bundle,
        listener: Listener::bind(SocketAddr::from(([127, 0, 0, 1], 0)), server, &limits).unwrap(),
        state,
        live: LiveCredentials::default(),
        access: AccessWriter::start(&AccessLog::Off, tasks).unwrap(),
        metrics: Arc::new(Metrics::new(&Registry::new()).unwrap()),
        renewals,
        ready: Ready::new().part("doors"),
    };
    let doors = DoorsConfig { proxy: None, http: None, https: None, ..DoorsConfig::default() };
    let config = ShardConfig { doors, drain_secs: 0, ..ShardConfig::default() };
    mesh_cloud::start_with(&config, parts, tasks).unwrap().mesh
}

async fn start_edge(authority: &mut Authority, shard: SocketAddr, tasks: &Tasks) {
    let credentials = authority.issue("edge/e-1");
    let identity = LiveIdentity::new(&credentials).unwrap();
    let config =
        EdgeConfig { shards: vec![shard.to_string()], drain: Duration::from_millis(100), ..EdgeConfig::default() };
    let (bundle, limits) = (authority.bundle(), config.link_limits());
    let parts = EdgeParts {
        config,
        credentials,
        ways: Dialer::new(mesh_edge::client_config(&identity, &bundle, &limits).unwrap(), &limits).into(),
        identity,
        bundle,
        access: AccessWriter::start(&AccessLog::Off, tasks).unwrap(),
        registry: Registry::new(),
        rng: StdRng::seed_from_u64(1),
        store: None,
    };
    let edge = mesh_edge::start_with(parts, tasks.clone()).unwrap();
    let mut phase = edge.phase();
    let connected = phase.wait_for(|phase| matches!(phase, Phase::Connected { .. }));
    timeout(Duration::from_secs(10), connected).await.unwrap().unwrap();
}

#[tokio::test]
async fn probes_measure_and_stalled_ones_do_not_disturb_them() {
    let (tasks, mut authority, home) = (Tasks::new(), Authority::new(), tempfile::tempdir().unwrap());
    let shard = start_shard(&mut authority, &tasks);
    start_edge(&mut authority, shard, &tasks).await;
    IdentityDir::open(home.path()).unwrap().store(&authority.issue("user/u-1"), &authority.bundle()).unwrap();
    let probes = Command::new(env!("CARGO_BIN_EXE_mesh-loadtest"))
        .args(["probes", "--json", "--count=100", "--stall=2", "--interval-ms=100", "--seconds=1.5", "--edge=e-1"])
        .args(["--shard", &shard.to_string()])
        .env("CAUSEWAY_HOME", home.path())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .output();
    let output = timeout(Duration::from_secs(60), probes).await.unwrap().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let figures: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(output.status.success(), "{figures}");
    assert_eq!((&figures["opened"], &figures["broken"], &figures["wrong"]), (&100.into(), &0.into(), &0.into()));
    assert!(figures["echo"]["count"].as_u64().unwrap() >= 1000, "{figures}");
    assert_eq!(tasks.drained(Duration::from_secs(10)).await, 0);
}
