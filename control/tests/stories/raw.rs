//! HTTP by hand, for what a proper client would never do.

use std::sync::Arc;

use proto::{api::ApiError, identity::Role};
use runtime::tls::{LiveIdentity, MeshVerifier, TrustBundle, client_config};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    stories::facts,
    world::{Member, World},
};

/// A connection to the API.
#[derive(Debug)]
pub(crate) struct Tls(TlsStream<TcpStream>);

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn error(&self) -> ApiError {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }
}

impl Tls {
    pub(crate) async fn anonymous(world: &World) -> Self {
        Self::connect(world, None).await
    }

    pub(crate) async fn member(world: &World, member: &Member) -> Self {
        Self::connect(world, Some(&member.live)).await
    }

    async fn connect(world: &World, identity: Option<&LiveIdentity>) -> Self {
        let bundle = TrustBundle::from_pem(&world.control.bundle_pem()).unwrap();
        let verifier = Arc::new(MeshVerifier::of_servers(bundle, Role::Control));
        let config = client_config(identity, verifier, &[b"http/1.1"]).unwrap();
        let socket = TcpStream::connect(world.control.api_addr).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        Self(TlsConnector::from(Arc::new(config)).connect(name, socket).await.unwrap())
    }

    pub(crate) fn server_serial(&self) -> String {
        facts(&self.0.get_ref().1.peer_certificates().unwrap()[0]).serial
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
        self.0.flush().await.unwrap();
    }

    pub(crate) async fn read_to_end(&mut self) -> String {
        let mut bytes = vec![];
        // A connection that is cut off ends without TLS' farewell, which is an error here and none of ours.
        let _ = self.0.read_to_end(&mut bytes).await;
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub(crate) async fn get(&mut self, path: &str) -> Answer {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: control\r\n\r\n").as_bytes()).await;
        self.answer().await
    }

    pub(crate) async fn post(&mut self, path: &str, body: &str) -> Answer {
        let head = format!("POST {path} HTTP/1.1\r\nhost: control\r\ncontent-length: {}\r\n\r\n", body.len());
        self.send(head.as_bytes()).await;
        // A server that has seen enough closes while the rest is still being sent.
        let _ = self.0.write_all(body.as_bytes()).await;
        let _ = self.0.flush().await;
        self.answer().await
    }

    async fn answer(&mut self) -> Answer {
        let mut head = vec![];
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.0.read_u8().await.expect("a whole head"));
        }
        let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")).unwrap().parse().unwrap();
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).await.unwrap();
        Answer { status, body }
    }
}

/// Sends bytes without TLS, and reads what comes back until the end.
pub(crate) async fn plain(world: &World, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(world.control.api_addr).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    socket.shutdown().await.unwrap();
    let mut answer = vec![];
    let _ = socket.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}
