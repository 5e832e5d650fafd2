//! What kube-apiserver may reach on an edge by itself, and others may not.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use proto::{code::RefuseCode, principal::Principal, stream::Open};
use runtime::{
    link::{Link, Stream},
    shutdown::Tasks,
};
use tokio::{io::AsyncWriteExt, net::TcpListener};

use crate::fake::{FakeShard, LONG, TestEdge, mesh, open, open_as, read_to_end};

/// An address of this machine that is not loopback, if it has one; nothing is sent to find it.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(("192.0.2.1", 9)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

async fn as_apiserver(link: &Link, to: SocketAddr) -> Result<(Stream, String), RefuseCode> {
    let target = format!("shop-1/{to}").parse().unwrap();
    let open = Open { principal: Some(Principal::Apiserver), door: "egress".into(), ..Open::new(target) };
    open_as(link, open, b"").await.map_err(|refusal| refusal.code)
}

/// A server that says its name and ends; the port is free if 0.
async fn speaker(tasks: &Tasks, address: SocketAddr, name: &'static str) -> Option<SocketAddr> {
    let listener = TcpListener::bind(address).await.ok()?;
    let address = listener.local_addr().unwrap();
    tasks.spawn(tasks.token().run_until_cancelled_owned(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.write_all(name.as_bytes()).await;
        }
    }));
    Some(address)
}

#[tokio::test]
async fn the_machine_and_kubelet_are_open_to_kube_apiserver_alone() {
    let Some(own) = own_address() else { return };
    let (servers, (ca, tasks)) = (Tasks::new(), mesh());
    let shard = FakeShard::start(&ca, "s-1");
    let edge = TestEdge::start(&ca, &[&shard], |config| config.sshd = false);
    let link = shard.welcome().await.keep_alive(&tasks);
    edge.connected(&shard).await;

    let exporter = speaker(&servers, SocketAddr::new(own, 0), "exporter").await.unwrap();
    let (mut stream, address) = as_apiserver(&link, exporter).await.unwrap();
    assert_eq!(address, exporter.to_string());
    assert_eq!(read_to_end(&mut stream.recv).await, b"exporter", "everything, and then the end");
    stream.send.finish();
    assert_eq!(open(&link, &format!("shop-1/{exporter}")).await.unwrap_err().code, RefuseCode::EdgeDenied);

    let local = speaker(&servers, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), "private").await.unwrap();
    assert_eq!(as_apiserver(&link, local).await.unwrap_err(), RefuseCode::EdgeDenied, "loopback is not the cluster's");
    let elsewhere = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 7), 80));
    assert_eq!(as_apiserver(&link, elsewhere).await.unwrap_err(), RefuseCode::EdgeDenied);

    // kubelet may listen on loopback only. Another one may run on this machine, and then this cannot be tried.
    if let Some(kubelet) = speaker(&servers, SocketAddr::from((Ipv4Addr::LOCALHOST, 10250)), "kubelet").await {
        let (mut stream, address) = as_apiserver(&link, SocketAddr::new(own, 10250)).await.unwrap();
        assert_eq!(address, kubelet.to_string());
        assert_eq!(read_to_end(&mut stream.recv).await, b"kubelet");
        stream.send.finish();
    }
    edge.end().await;
    assert_eq!(tasks.drained(LONG).await, 0);
    assert_eq!(servers.drained(LONG).await, 0);
}
