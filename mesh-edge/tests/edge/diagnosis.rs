//! What an edge finds out about the network, and what it says of itself: on the machine, and to its shard.

use std::sync::Arc;

use mesh_edge::{
    client_config, client_tls,
    config::{EdgeConfig, ProxyAddress, ProxyConfig},
    netcheck::{Netcheck, Report, Word},
    proxy::Proxies,
    status::{AskError, Status},
    ways::Ways,
};
use runtime::{
    admin,
    link::{
        Carrier,
        quic::{Dialer, LinkLimits},
        tcp::TcpDialer,
    },
    shutdown::Tasks,
    tls::{LiveIdentity, testing::TestCa},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    fake::{FakeShard, LONG, TestEdge, mesh, server, soon},
    relay::Relay,
};

/// Takes every link in and keeps it, as a shard does with those that have not said Hello yet.
fn receive(shard: FakeShard, tasks: &Tasks) {
    let shard = Arc::new(shard);
    tasks.spawn(tasks.token().run_until_cancelled_owned(async move {
        let mut links = Vec::new();
        loop {
            links.extend(shard.try_link().await);
        }
    }));
}

async fn check(ca: &TestCa, shards: &[String], proxy: ProxyAddress) -> Report {
    let credentials = ca.issue("edge/shop-1");
    let (identity, bundle, limits) = (LiveIdentity::new(&credentials).unwrap(), ca.bundle(), LinkLimits::default());
    let quic = Dialer::new(client_config(&identity, &bundle, &limits).unwrap(), &limits);
    let tcp = TcpDialer::new(client_tls(&identity, &bundle).unwrap(), &limits);
    let config = ProxyConfig { url: proxy, ..ProxyConfig::default() };
    let proxies = Proxies::new(&config).unwrap();
    let ways = Ways::from(quic).with_tcp(tcp, proxies, EdgeConfig::default().carriers.head_start);
    let own = credentials.facts().clone();
    let (shards, control) = (shards.to_vec(), None);
    soon("the network is checked", Netcheck { ways, shards, control, bundle, own, seen_as: None }.run()).await
}

fn word(report: &Report, what: &str) -> Word {
    report
        .checks
        .iter()
        .find(|check| check.what == what)
        .map(|check| check.verdict)
        .unwrap_or_else(|| panic!("{report:?}"))
}

#[tokio::test]
async fn a_good_network_is_called_good_and_the_largest_datagram_is_found() {
    let (ca, tasks) = mesh();
    let shard = FakeShard::start(&ca, "s-1");
    let address = shard.address;
    receive(shard.with_tcp(address), &tasks);
    let report = check(&ca, &[address.to_string()], ProxyAddress::Off).await;
    for what in ["certificate", "dns", "udp", "tcp", "mtu"] {
        assert_eq!(word(&report, what), Word::Ok, "{report:?}");
    }
    assert_eq!((report.conclusion.cause.as_str(), report.status()), ("none", 0), "{report:?}");
    assert!(report.text().contains("1452 bytes of UDP payload"), "{}", report.text());
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn each_thing_that_is_in_the_way_has_its_word() {
    let (ca, tasks) = mesh();
    let shard = FakeShard::start(&ca, "s-1");
    let relay = Relay::start(&shard);
    let address = relay.address.to_string();
    receive(shard.with_tcp(relay.address), &tasks);
    relay.swallow();
    let blocked = check(&ca, std::slice::from_ref(&address), ProxyAddress::Off).await;
    assert_eq!((word(&blocked, "udp"), word(&blocked, "tcp")), (Word::Blocked, Word::Ok), "{blocked:?}");
    assert_eq!((blocked.conclusion.cause.as_str(), blocked.status()), ("udp-blocked", 1));

    relay.let_through();
    let proxy = server(&tasks, |mut client| async move {
        let mut head = [0; 16];
        let _ = client.read(&mut head).await;
        let _ = client.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").await;
    })
    .await;
    let refusing = ProxyAddress::At(format!("http://me:swordfish@{proxy}").parse().unwrap());
    let refused = check(&ca, std::slice::from_ref(&address), refusing).await;
    assert_eq!((word(&refused, "proxy"), word(&refused, "udp")), (Word::Rejected, Word::Ok), "{refused:?}");
    assert!(refused.text().contains("407") && !refused.text().contains("swordfish"), "{}", refused.text());

    let stranger = check(&TestCa::new(), &[address], ProxyAddress::Off).await;
    assert_eq!((word(&stranger, "udp"), stranger.conclusion.cause.as_str()), (Word::Wrong, "wrong-ca"), "{stranger:?}");
    assert_eq!((stranger.conclusion.reachable, stranger.status()), (false, 3));

    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let closed = check(&ca, &[nobody.to_string()], ProxyAddress::Off).await;
    assert_eq!((word(&closed, "udp"), word(&closed, "tcp")), (Word::Rejected, Word::Rejected), "{closed:?}");
    assert_eq!(closed.status(), 4);

    let nameless = check(&ca, &["nowhere.invalid:7400".into()], ProxyAddress::Off).await;
    assert_eq!((word(&nameless, "dns"), nameless.conclusion.cause.as_str()), (Word::Wrong, "name-unknown"));
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn a_shard_that_has_second_thoughts_is_not_called_good() {
    let (ca, tasks) = mesh();
    let shard = FakeShard::start(&ca, "s-1");
    let shards = [shard.address.to_string()];
    let turning_away = async {
        let link = shard.link().await.unwrap();
        link.close(proto::code::CloseCode::Revoked, "The certificate is revoked.");
        link.ended().await;
    };
    let (report, ()) = tokio::join!(check(&ca, &shards, ProxyAddress::Off), turning_away);
    let udp = report.checks.iter().find(|check| check.what == "udp").unwrap();
    assert_eq!((udp.verdict, udp.class), (Word::Rejected, "revoked"), "{report:?}");
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn an_edge_tells_its_shard_how_it_came_and_itself_how_it_stands() {
    let (ca, tasks) = mesh();
    let shard = FakeShard::start(&ca, "s-1");
    let relay = Relay::start(&shard);
    let shard = shard.with_tcp(relay.address);
    relay.swallow();
    let edge = TestEdge::start_as(&ca, ca.issue("edge/shop-1"), None, |config| {
        config.shards = vec![relay.address.to_string()];
        config.carriers.tcp = true;
        config.proxy.url = ProxyAddress::Off;
        config.allow = vec!["10.0.0.0/24:80".parse().unwrap()];
    });
    let mut visit = shard.welcome().await;
    assert_eq!(visit.link.carrier(), Carrier::Tcp);
    edge.connected(&shard).await;
    let told = soon("the edge says how it came", async {
        while visit.standing.is_none() {
            visit.hear_once().await;
        }
        visit.standing.clone().unwrap()
    })
    .await;
    assert_eq!((told.carrier.as_str(), told.mtu), ("tcp", 0));
    assert!(told.why.starts_with("QUIC: timed-out"), "{told:?}");
    assert_eq!(told.allows, ["kubelet", "sshd", "kubernetes", "10.0.0.0/24:80"]);
    assert!(told.troubles.iter().any(|trouble| trouble.carrier == "quic"), "{told:?}");

    let status = edge.edge.status();
    assert_eq!((status.state.as_str(), status.carrier.as_str(), status.shard.as_str()), ("connected", "tcp", "s-1"));
    assert_eq!(status.seen_as, "192.0.2.7:4433", "as the shard said in Welcome");
    assert_eq!(status.told().cause, "udp-blocked", "{status:?}");
    let link = visit.keep_alive(&tasks);
    edge.end().await;
    soon("the tunnel ends", link.ended()).await;
    assert_eq!(tasks.drained(LONG).await, 0);
}

#[tokio::test]
async fn an_edge_that_reaches_nobody_says_why_on_its_admin_address() {
    let (ca, tasks) = mesh();
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let edge = TestEdge::start_at(&ca, vec![nobody.to_string()]);
    edge.phase("it waits", |phase| matches!(phase, mesh_edge::life::Phase::Waiting { .. })).await;
    let status = edge.edge.status();
    let page = admin::Page::json("/status", move || serde_json::to_string(&status).unwrap());
    let registry = prometheus::Registry::new();
    let pages = (registry, admin::Ready::new());
    let at = admin::serve_with("127.0.0.1:0".parse().unwrap(), pages, vec![page], &tasks).await.unwrap();
    let asked = Status::ask(at).await.unwrap();
    assert_eq!((asked.told().cause.as_str(), asked.told().connected), ("rejected", false), "{asked:?}");
    assert!(asked.text().contains("Nothing listens on that port"), "{}", asked.text());
    edge.end().await;
    assert_eq!(tasks.drained(LONG).await, 0);
    assert_eq!(Status::ask(at).await, Err(AskError::NotThere(at)));
}
