//! Who lets whom in, and what each side is told when it does not.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use proto::{ALPN_MESH, ALPN_PEER, identity::Role};
use runtime::{
    identity::Credentials,
    link::{
        EndCause, Link, LinkEnd,
        listen::Listener,
        quic::{self, Dialer, LinkLimits},
    },
    tls::{LiveIdentity, MeshVerifier, TrustBundle, client_config, server_config, testing::TestCa},
};

/// Both sides' outcome of one dial.
async fn dial(
    server: (&Credentials, &TrustBundle),
    client: (&Credentials, &TrustBundle),
    alpn: &[u8],
) -> (Result<Link, LinkEnd>, Option<EndCause>) {
    let limits = LinkLimits::default();
    let identity = LiveIdentity::new(server.0).unwrap();
    let tls = server_config(&identity, MeshVerifier::of_clients(server.1.clone(), true), &[ALPN_MESH]).unwrap();
    let listener =
        Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), quic::server_config(tls, &limits).unwrap(), &limits)
            .unwrap();
    let identity = LiveIdentity::new(client.0).unwrap();
    let verifier = Arc::new(MeshVerifier::of_servers(client.1.clone(), Role::Shard));
    let tls = client_config(Some(&identity), verifier, &[alpn]).unwrap();
    let dialer = Dialer::new(quic::client_config(tls, &limits).unwrap(), &limits);
    let address = listener.local_addr().unwrap();
    let accepting = async {
        let result = listener.accept().await.unwrap().accept().await;
        result.map(|link| (link.peer().identity.to_string(), link)).map_err(|e| e.cause)
    };
    let dialing = async {
        let link = dialer.dial(address, "s1").await?;
        // In TLS 1.3 the server judges after the client has finished: either it takes the bytes, or it ends the link.
        let mut stream = link.open().await?;
        let sent = stream.send.write_one(bytes::Bytes::from_static(b"!")).await;
        stream.send.finish();
        match sent.and(stream.send.delivered().await) {
            Ok(()) => Ok(link),
            Err(_) => Err(link.ended().await),
        }
    };
    let (near, far) = tokio::join!(dialing, accepting);
    (near, far.err())
}

fn cause(result: Result<Link, LinkEnd>) -> EndCause {
    result.map(|link| link.peer().clone()).unwrap_err().cause
}

#[tokio::test]
async fn members_of_one_mesh_let_each_other_in() {
    let ca = TestCa::new();
    let (near, far) =
        dial((&ca.issue("shard/s1"), &ca.bundle()), (&ca.issue("edge/e1"), &ca.bundle()), ALPN_MESH).await;
    assert_eq!(near.unwrap().peer().identity.to_string(), "spiffe://mesh.test/shard/s1");
    assert_eq!(far, None);
}

#[tokio::test]
async fn a_server_of_another_mesh_is_a_wrong_ca() {
    let (ca, other) = (TestCa::new(), TestCa::new());
    let (near, _) =
        dial((&other.issue("shard/s1"), &other.bundle()), (&ca.issue("edge/e1"), &ca.bundle()), ALPN_MESH).await;
    assert_eq!(cause(near), EndCause::WrongCa);
}

#[tokio::test]
async fn a_client_of_another_mesh_is_told_that_it_is_not_trusted() {
    let (ca, other) = (TestCa::new(), TestCa::new());
    let (near, far) =
        dial((&ca.issue("shard/s1"), &ca.bundle()), (&other.issue("edge/e1"), &ca.bundle()), ALPN_MESH).await;
    assert_eq!(cause(near), EndCause::Distrusted);
    assert_eq!(far, Some(EndCause::WrongCa));
}

#[tokio::test]
async fn a_client_whose_certificate_has_expired_is_told_so() {
    let ca = TestCa::new();
    let expired = ca.issue_with("edge/e1", |params| params.not_after = rcgen::date_time_ymd(2020, 1, 1));
    let (near, far) = dial((&ca.issue("shard/s1"), &ca.bundle()), (&expired, &ca.bundle()), ALPN_MESH).await;
    assert_eq!(cause(near), EndCause::Expired);
    assert_eq!(far, Some(EndCause::PeerExpired));
}

#[tokio::test]
async fn a_server_that_is_no_shard_is_the_wrong_peer() {
    let ca = TestCa::new();
    let (near, _) = dial((&ca.issue("edge/evil"), &ca.bundle()), (&ca.issue("edge/e1"), &ca.bundle()), ALPN_MESH).await;
    assert_eq!(cause(near), EndCause::WrongPeer);
}

#[tokio::test]
async fn another_protocol_version_is_named() {
    let ca = TestCa::new();
    let (near, _) = dial((&ca.issue("shard/s1"), &ca.bundle()), (&ca.issue("edge/e1"), &ca.bundle()), ALPN_PEER).await;
    assert_eq!(cause(near), EndCause::NoCommonVersion);
}

#[tokio::test]
async fn during_a_rotation_both_roots_are_good() {
    let (old, new) = (TestCa::new(), TestCa::new());
    let both = [old.bundle().certificates(), new.bundle().certificates()].concat();
    let both = TrustBundle::from_der(both).unwrap();
    let (near, far) = dial((&new.issue("shard/s1"), &both), (&old.issue("edge/e1"), &both), ALPN_MESH).await;
    assert!(near.is_ok() && far.is_none(), "{near:?} {far:?}");
}
