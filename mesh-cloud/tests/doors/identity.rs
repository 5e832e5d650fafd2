//! Who an edge is comes from its certificate, whatever it says.

use std::sync::Arc;

use proto::{
    ALPN_MESH,
    code::CloseCode,
    identity::Role,
    message::{EdgeToShard, Hello},
};
use runtime::{
    clock,
    link::{
        EndCause,
        quic::{self, Dialer, LinkLimits},
    },
    tls::{self, LiveIdentity, MeshVerifier},
};

use crate::mesh::{Mesh, until};

#[tokio::test]
async fn an_edge_that_claims_another_name_is_refused_and_counted_and_takes_nothing_over() {
    let mesh = Mesh::start(&[]).await;
    let victim = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap().generation;

    let identity = LiveIdentity::new(&mesh.ca.issue("edge/evil")).unwrap();
    let verifier = Arc::new(MeshVerifier::of_servers(mesh.ca.bundle(), Role::Shard));
    let config = tls::client_config(Some(&identity), verifier, &[ALPN_MESH]).unwrap();
    let limits = LinkLimits::default();
    let dialer = Dialer::new(quic::client_config(config, &limits).unwrap(), &limits);
    let link = dialer.dial(mesh.shard.mesh, "shard").await.unwrap();
    let mut control = link.open().await.unwrap();
    let name = "shop-1".parse().unwrap();
    let hello =
        Hello { name, instance: 2, version: "test".into(), unix_ms: clock::unix_millis(), epoch: 0, avoid: vec![] };
    control.send.write_one(EdgeToShard::Hello(hello).encode().unwrap()).await.unwrap();

    let end = link.ended().await;
    assert_eq!(end.cause, EndCause::Closed(CloseCode::NameMismatch));
    assert_eq!(end.detail, "the certificate is edge/evil's, and the message says edge/shop-1");
    let metrics = mesh.shard.router.metrics();
    until(|| metrics.session_ends.with_label_values(&["name-mismatch"]).get() == 1).await;
    let still = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap().generation;
    assert_eq!((still, mesh.shard.registry.len()), (victim, 1));
}
