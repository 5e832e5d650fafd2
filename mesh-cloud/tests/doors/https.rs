//! The HTTPS door.

use std::{
    io,
    net::Ipv4Addr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use proto::identity::Role;
use runtime::tls::{self, LiveIdentity, MeshVerifier};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::mesh::Mesh;

/// Writes one byte at a time, each in a segment of its own.
struct Dripping(TcpStream);

impl AsyncRead for Dripping {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, out)
    }
}

impl AsyncWrite for Dripping {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let one = &data[..data.len().min(1)];
        Pin::new(&mut self.0).poll_write(cx, one)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A TLS service whose key the shard never sees. It echoes. Returns its listener to be run by [`serve`].
async fn mesh() -> Mesh {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mesh = Mesh::start(&[("tls", port), ("https", port)]).await;
    let identity = LiveIdentity::new(&mesh.ca.issue("edge/service")).unwrap();
    let clients = MeshVerifier::of_clients(mesh.ca.bundle(), false);
    let acceptor = TlsAcceptor::from(Arc::new(tls::server_config(&identity, clients, &[]).unwrap()));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(tls) = acceptor.accept(socket).await else { return };
                let (mut reader, mut writer) = tokio::io::split(tls);
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            });
        }
    });
    mesh
}

fn connector(mesh: &Mesh) -> TlsConnector {
    let verifier = Arc::new(MeshVerifier::of_servers(mesh.ca.bundle(), Role::Edge));
    TlsConnector::from(Arc::new(tls::client_config(None, verifier, &[]).unwrap()))
}

#[tokio::test]
async fn tls_passes_untouched_however_its_hello_is_cut() {
    let mut mesh = mesh().await;
    for name in ["tls.shop-1.mesh.test", "shop-1.mesh.test", "TLS.Shop-1.mesh.test"] {
        let socket = TcpStream::connect(mesh.shard.https.unwrap()).await.unwrap();
        socket.set_nodelay(true).unwrap();
        let mut tls = connector(&mesh).connect(name.try_into().unwrap(), Dripping(socket)).await.unwrap();
        tls.write_all(b"question").await.unwrap();
        tls.shutdown().await.unwrap();
        let mut answer = Vec::new();
        tls.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"question");
        drop(tls);
        let record = mesh.record().await;
        assert_eq!((record.who.as_str(), &*record.outcome), ("door/https", "finished"));
    }
}

#[tokio::test]
async fn who_is_not_let_in_gets_an_alert() {
    let mesh = mesh().await;
    for (name, alert) in [
        ("tls.shop-1.other.test", "UnrecognisedName"),
        ("none.shop-1.mesh.test", "UnrecognisedName"),
        ("tls.shop-9.mesh.test", "UnrecognisedName"),
        ("tls.shop-2.mesh.test", "InternalError"),
        // An address is no server name, so the hello has none.
        ("127.0.0.1", "UnrecognisedName"),
    ] {
        let socket = TcpStream::connect(mesh.shard.https.unwrap()).await.unwrap();
        let error = connector(&mesh).connect(name.try_into().unwrap(), socket).await.unwrap_err();
        assert!(error.to_string().contains(alert), "{name}: {error}");
    }
}

#[tokio::test]
async fn garbage_ends_in_an_alert_and_the_door_stays_open() {
    let mesh = mesh().await;
    let mut half = mesh.https().await;
    half.say_bytes(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc").await;
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16\x03\x01\x00\x05hello", b"\x00\x00\x00\x00\x00\x00", &[0xff; 70_000]]
    {
        let mut talk = mesh.https().await;
        talk.say_bytes(garbage).await;
        let (heard, _) = talk.rest().await;
        assert!(heard.as_bytes().starts_with(b"\x15\x03"), "{:?}: {heard:?}", &garbage[..6]);
    }
    // A record that never ends is not read for ever.
    let mut talk = mesh.https().await;
    let hello = b"\x16\x03\x01\x40\x00\x01\x00\xff\xfc";
    let mut endless = hello.to_vec();
    endless.resize(5 + 0x4000, 0);
    for _ in 0..6 {
        talk.say_bytes(&endless).await;
        endless[5..9].fill(0);
    }
    talk.rest().await;
    let socket = TcpStream::connect(mesh.shard.https.unwrap()).await.unwrap();
    connector(&mesh).connect("tls.shop-1.mesh.test".try_into().unwrap(), socket).await.unwrap();
}
