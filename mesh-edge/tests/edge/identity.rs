//! Who the edge is: renewing it, and the many ways in which it can be wrong.

use std::time::Duration;

use bytes::Bytes;
use mesh_edge::life::Phase;
use proto::{
    code::CloseCode,
    message::{EdgeToShard, Refuse, Renewal, ShardToEdge},
};
use runtime::{identity::IdentityDir, tls::testing::TestCa};

use crate::fake::{FakeShard, LONG, TestEdge, Visit, echo, mesh, open, soon};

fn short_lived(params: &mut rcgen::CertificateParams) {
    params.not_before = rcgen::date_time_ymd(2000, 1, 1);
    params.not_after = rcgen::date_time_ymd(2027, 6, 1);
}

async fn renew_request(visit: &mut Visit) -> proto::message::Renew {
    loop {
        if let EdgeToShard::Renew(renew) = visit.expect("Renew").await {
            return renew;
        }
    }
}

fn renewed(ca: &TestCa, leaf: Vec<u8>) -> ShardToEdge {
    let roots = ca.bundle().certificates().iter().map(|c| Bytes::copy_from_slice(c)).collect();
    ShardToEdge::Renewed(Ok(Renewal { chain: vec![leaf.into()], roots }))
}

#[tokio::test]
async fn a_renewal_is_kept_shown_and_breaks_no_stream() {
    let (ca, tasks) = mesh();
    let folder = tempfile::tempdir().unwrap();
    let shard = FakeShard::start(&ca, "s-1");
    let address = shard.address.to_string();
    let edge = TestEdge::start_as(&ca, ca.issue_with("edge/shop-1", short_lived), Some(folder.path()), |config| {
        config.shards = vec![address];
    });
    let mut visit = shard.welcome().await;
    edge.connected(&shard).await;
    let old = visit.link.peer().serial.clone();
    let (mut stream, _) = open(&visit.link, "shop-1/(probe)").await.unwrap();

    // Control says no for now; the edge asks again.
    let first = renew_request(&mut visit).await;
    assert!(!first.signature.is_empty());
    let busy =
        Refuse { retry_after: Some(Duration::from_millis(10)), ..Refuse::because(CloseCode::Overloaded, "busy") };
    visit.say(ShardToEdge::Renewed(Err(busy))).await;

    // A certificate for somebody else, or from another CA, is not taken.
    let request = renew_request(&mut visit).await;
    visit.say(renewed(&ca, ca.sign("edge/shop-2", &request.csr))).await;
    let request = renew_request(&mut visit).await;
    visit.say(renewed(&ca, TestCa::new().sign("edge/shop-1", &request.csr))).await;

    let request = renew_request(&mut visit).await;
    assert_eq!(edge.edge.identity().facts().serial, old);
    visit.say(renewed(&ca, ca.sign("edge/shop-1", &request.csr))).await;
    soon("the renewal", async {
        while edge.edge.identity().facts().serial == old {
            let _ = tokio::time::timeout(Duration::from_millis(5), visit.hear()).await;
        }
    })
    .await;
    echo(&mut stream, b"nothing broke").await;
    soon("the note of it", async {
        while edge.sample("mesh_edge_renewals_total{outcome=\"ok\"}").is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (kept, _) = IdentityDir::open(folder.path()).unwrap().load().unwrap().unwrap();
    assert_eq!(kept.facts().serial, edge.edge.identity().facts().serial);
    stream.send.finish();

    // The next handshake shows the new one, and does not resume a session of the old one.
    visit.link.close(CloseCode::Shutdown, "");
    let second = shard.welcome().await;
    assert_eq!(second.link.peer().serial, kept.facts().serial);
    second.keep_alive(&tasks);
    assert_eq!(edge.sample("mesh_edge_renewals_total{outcome=\"refused\"}"), Some(1.0));
    assert_eq!(edge.sample("mesh_edge_renewals_total{outcome=\"unusable\"}"), Some(2.0));
    edge.end().await;
    assert_eq!(tasks.drained(LONG).await, 0);
}

async fn refused(edge: &TestEdge, kind: &str, remedy: &str) {
    let phase = edge.phase(kind, |phase| matches!(phase, Phase::Refused { .. })).await;
    let Phase::Refused { kind: found, why, until } = phase else { unreachable!() };
    assert_eq!(found, kind);
    assert!(why.contains(remedy), "{why}");
    if kind != "wrong-ca" && kind != "peer-expired" && kind != "wrong-peer" {
        assert!(until - tokio::time::Instant::now() > Duration::from_secs(50), "slowly");
    }
    assert_eq!(edge.sample(&format!("mesh_edge_identity_errors_total{{kind=\"{kind}\"}}")), Some(1.0));
}

#[tokio::test]
async fn what_a_shard_says_about_an_identity_is_told_with_its_remedy() {
    for (code, remedy) in [
        (CloseCode::Revoked, "enrol again"),
        (CloseCode::DuplicateIdentity, "enrol one of the two anew"),
        (CloseCode::NameMismatch, "not the one in the certificate"),
    ] {
        // Said before the tunnel serves, and by closing one that does.
        let (ca, _) = mesh();
        let shard = FakeShard::start(&ca, "s-1");
        let edge = TestEdge::start(&ca, &[&shard], |_| ());
        shard.visit().await.dismiss(ShardToEdge::Refuse(Refuse::because(code, code.sentence()))).await;
        refused(&edge, code.slug(), remedy).await;
        edge.end().await;

        let edge = TestEdge::start(&ca, &[&shard], |_| ());
        let visit = shard.welcome().await;
        edge.connected(&shard).await;
        visit.link.close(code, code.sentence());
        refused(&edge, code.slug(), remedy).await;
        edge.end().await;
    }
}

#[tokio::test]
async fn what_a_handshake_says_about_an_identity_is_told_with_its_remedy() {
    let (ca, tasks) = mesh();
    let other = TestCa::new();
    let past = |params: &mut rcgen::CertificateParams| params.not_after = rcgen::date_time_ymd(2001, 1, 1);
    let cases = [
        (ca.issue("shard/s-1"), other.issue("edge/shop-1"), "distrusted", "enrol again"),
        (ca.issue("shard/s-1"), ca.issue_with("edge/shop-1", past), "expired", "enrol again"),
        (other.issue("shard/s-1"), ca.issue("edge/shop-1"), "wrong-ca", "another CA"),
        (ca.issue_with("shard/s-1", past), ca.issue("edge/shop-1"), "peer-expired", "compare the clocks"),
    ];
    for (theirs, ours, kind, remedy) in cases {
        let shard = FakeShard::start_as(&ca, &theirs, "s-1");
        let address = shard.address.to_string();
        let edge = TestEdge::start_as(&ca, ours, None, |config| config.shards = vec![address]);
        let group = tasks.clone();
        tasks.spawn(async move {
            let accept = async {
                loop {
                    // Whether the handshake worked is what the edge is asked about.
                    let _ = shard.link().await;
                }
            };
            group.token().run_until_cancelled_owned(accept).await;
        });
        refused(&edge, kind, remedy).await;
        edge.end().await;
    }
    assert_eq!(tasks.drained(LONG).await, 0);
}
