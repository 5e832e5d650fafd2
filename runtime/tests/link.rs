//! What a dialled link learns from its network, and how it is resumed.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use proto::{
    ALPN_MESH,
    connection_id::{Place, ShardTag},
    identity::Role,
};
use runtime::{
    link::{
        EndCause, Link, Stream,
        listen::Listener,
        quic::{self, Dialer, LinkLimits},
    },
    tls::{LiveIdentity, MeshVerifier, client_config, server_config, testing::TestCa},
};
use rustls::{
    DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    server::ProducesTickets,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(10);
const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    timeout(LONG, future).await.unwrap_or_else(|_| panic!("did not happen: {what}"))
}

/// Counts how often a server had to prove who it is: a session that is resumed asks for no proof.
#[derive(Debug)]
struct Counting(MeshVerifier, Arc<AtomicUsize>);

impl ServerCertVerifier for Counting {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.verify_server_cert(leaf, intermediates, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// A shard's door, and the ways to it.
struct Door {
    ca: TestCa,
    shown: LiveIdentity,
    tickets: Arc<dyn ProducesTickets>,
}

impl Door {
    fn new() -> Self {
        let ca = TestCa::new();
        let shown = LiveIdentity::new(&ca.issue("shard/s1")).unwrap();
        Self { ca, shown, tickets: rustls::crypto::aws_lc_rs::Ticketer::new().unwrap() }
    }

    fn config(&self) -> rustls::ServerConfig {
        let clients = MeshVerifier::of_clients(self.ca.bundle(), true);
        let mut tls = server_config(&self.shown, clients, &[ALPN_MESH]).unwrap();
        tls.ticketer = Arc::clone(&self.tickets);
        tls
    }

    fn open(&self) -> Listener {
        let limits = LinkLimits::default();
        Listener::bind(ANY, quic::server_config(self.config(), &limits).unwrap(), &limits).unwrap()
    }

    fn open_at(&self, place: Place) -> Listener {
        let limits = LinkLimits::default();
        let config = quic::server_config(self.config(), &limits).unwrap();
        Listener::bind_again(ANY, config, &limits, (&[7; 64], place)).unwrap()
    }

    fn dialer(&self, who: &str, proofs: &Arc<AtomicUsize>) -> Dialer {
        let identity = LiveIdentity::new(&self.ca.issue(who)).unwrap();
        let servers = MeshVerifier::of_servers(self.ca.bundle(), Role::Shard);
        let verifier = Arc::new(Counting(servers, Arc::clone(proofs)));
        let limits = LinkLimits::default();
        let tls = client_config(Some(&identity), verifier, &[ALPN_MESH]).unwrap();
        Dialer::new(quic::client_config(tls, &limits).unwrap(), &limits)
    }
}

/// Both ends of a link.
async fn link(dialer: &Dialer, listener: &Listener) -> (Link, Link) {
    let address = listener.local_addr().unwrap();
    let accept = async { listener.accept().await.unwrap().accept().await.unwrap() };
    let (near, far) = soon("a link", async { tokio::join!(dialer.dial(address, "s1"), accept) }).await;
    (near.unwrap(), far)
}

async fn say(stream: &mut Stream, far: &mut Stream, text: &'static [u8]) {
    stream.send.write_one(Bytes::from_static(text)).await.unwrap();
    assert_eq!(soon("bytes", far.recv.chunk(64)).await.unwrap().unwrap(), text);
}

/// A stream that has carried something each way, so that everything the handshake left has come in.
async fn stream(near: &Link, far: &Link) -> (Stream, Stream) {
    let mut here = near.open().await.unwrap();
    here.send.write_one(Bytes::from_static(b"!")).await.unwrap();
    let mut there = soon("a stream", far.accept()).await.unwrap();
    assert_eq!(soon("bytes", there.recv.chunk(64)).await.unwrap().unwrap(), b"!"[..]);
    say(&mut there, &mut here, b"?").await;
    (here, there)
}

#[tokio::test]
async fn the_second_dial_to_a_shard_resumes_and_one_with_another_certificate_does_not() {
    let (door, proofs) = (Door::new(), Arc::new(AtomicUsize::new(0)));
    let (dialer, listener) = (door.dialer("edge/e1", &proofs), door.open());
    let (near, far) = link(&dialer, &listener).await;
    assert_eq!(near.alpn().unwrap(), ALPN_MESH);
    assert_eq!(far.alpn().unwrap(), ALPN_MESH);
    stream(&near, &far).await;
    assert_eq!(proofs.load(Ordering::Relaxed), 1);

    let serial = far.peer().serial.clone();
    let (near, far) = link(&dialer, &listener).await;
    assert_eq!(proofs.load(Ordering::Relaxed), 1, "resumed");
    assert_eq!(near.peer().identity.to_string(), "spiffe://mesh.test/shard/s1", "and yet it is known who it is");
    assert_eq!(far.peer().serial, serial);
    stream(&near, &far).await;

    // A shard that was started again, or another one under the same name, opens tickets of the same key.
    let (near, far) = link(&dialer, &door.open()).await;
    assert_eq!(proofs.load(Ordering::Relaxed), 1, "resumed by another process");
    stream(&near, &far).await;

    // What an edge does when it has renewed its certificate.
    let config = dialer.with_config({
        let identity = LiveIdentity::new(&door.ca.issue("edge/e1")).unwrap();
        let verifier = Counting(MeshVerifier::of_servers(door.ca.bundle(), Role::Shard), Arc::clone(&proofs));
        let tls = client_config(Some(&identity), Arc::new(verifier), &[ALPN_MESH]).unwrap();
        quic::client_config(tls, &LinkLimits::default()).unwrap()
    });
    let (_near, far) = link(&config, &listener).await;
    assert_eq!(proofs.load(Ordering::Relaxed), 2, "not resumed");
    assert_ne!(far.peer().serial, serial);
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_known_at_once() {
    let door = Door::new();
    let dialer = door.dialer("edge/e1", &Arc::default());
    let nobody = UdpSocket::bind(ANY).unwrap().local_addr().unwrap();
    let began = tokio::time::Instant::now();
    let end = soon("the end of the attempt", dialer.dial(nobody, "s1")).await.unwrap_err();
    assert_eq!(end.cause, EndCause::NobodyListens, "{end}");
    assert!(began.elapsed() < LinkLimits::default().handshake / 2, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_link_goes_on_from_a_new_socket() {
    let door = Door::new();
    let (dialer, listener) = (door.dialer("edge/e1", &Arc::default()), door.open_at(place()));
    let (near, far) = link(&dialer, &listener).await;
    let (mut here, mut there) = stream(&near, &far).await;
    let before = far.remote_address();
    assert!(near.rebind().unwrap());
    say(&mut here, &mut there, b"from the new one").await;
    say(&mut there, &mut here, b"to the new one").await;
    assert_ne!(far.remote_address(), before);
    assert!(!far.rebind().unwrap(), "a listener's socket is everybody's");
    assert!(far.signs().is_none());
}

fn place() -> Place {
    Place { shard: ShardTag::of(&"s1".parse().unwrap()), worker: 7 }
}

#[tokio::test]
async fn what_is_sent_to_a_shard_names_it_and_goes_on_doing_so_from_a_new_socket() {
    let door = Door::new();
    let (dialer, listener) = (door.dialer("edge/e1", &Arc::default()), door.open_at(place()));
    let front = tokio::net::UdpSocket::bind(ANY).await.unwrap();
    let back = tokio::net::UdpSocket::bind(ANY).await.unwrap();
    back.connect(listener.local_addr().unwrap()).await.unwrap();
    let address = front.local_addr().unwrap();
    let mut named = Vec::new();
    let mut note = |datagram: &[u8]| named.push(Place::of_datagram(datagram));

    let accept = async { listener.accept().await.unwrap().accept().await.unwrap() };
    let both = async { tokio::join!(dialer.dial(address, "s1"), accept) };
    let (near, far) = soon("a link", tap(&front, &back, both, &mut note)).await;
    let near = near.unwrap();
    let (mut here, mut there) = soon("a stream", tap(&front, &back, stream(&near, &far), &mut note)).await;
    assert_eq!(named.first(), Some(&None), "the first packet of a client has an id of its own making");
    assert_eq!(named.last(), Some(&Some(place())));

    let mut named = Vec::new();
    assert!(near.rebind().unwrap());
    let said = say(&mut here, &mut there, b"from elsewhere");
    tap(&front, &back, said, &mut |datagram| named.push(Place::of_datagram(datagram))).await;
    assert!(!named.is_empty() && named.iter().all(|named| *named == Some(place())), "{named:?}");
}

#[tokio::test]
async fn a_port_that_closes_is_a_sign_and_not_the_end() {
    let door = Door::new();
    let (dialer, listener) = (door.dialer("edge/e1", &Arc::default()), door.open());
    let front = tokio::net::UdpSocket::bind(ANY).await.unwrap();
    let (address, behind) = (front.local_addr().unwrap(), listener.local_addr().unwrap());
    let back = tokio::net::UdpSocket::bind(ANY).await.unwrap();
    back.connect(behind).await.unwrap();

    let accept = async { listener.accept().await.unwrap().accept().await.unwrap() };
    let both = async { tokio::join!(dialer.dial(address, "s1"), accept) };
    let (near, far) = soon("a link", pass(&front, &back, both)).await;
    let near = near.unwrap();
    let mut signs = near.signs().unwrap();
    let (mut here, mut there) = soon("a stream", pass(&front, &back, stream(&near, &far))).await;
    assert_eq!(signs.borrow_and_update().refused, 0);

    // What the client talks to is closed, and later opened again at the same address.
    drop(front);
    here.send.write_one(Bytes::from_static(b"into the void")).await.unwrap();
    soon("a sign", signs.wait_for(|signs| signs.refused > 0)).await.unwrap();
    assert!(near.end().is_none(), "anybody could have sent that");

    let front = tokio::net::UdpSocket::bind(address).await.unwrap();
    let arrives = pass(&front, &back, there.recv.chunk(64));
    assert_eq!(soon("what was lost is sent again", arrives).await.unwrap().unwrap(), b"into the void"[..]);
}

/// Passes datagrams between a client and a server until the work is done.
async fn pass<F: Future>(front: &tokio::net::UdpSocket, back: &tokio::net::UdpSocket, work: F) -> F::Output {
    tap(front, back, work, &mut |_| ()).await
}

/// The same, and shows what the client sends.
async fn tap<F: Future>(
    front: &tokio::net::UdpSocket,
    back: &tokio::net::UdpSocket,
    work: F,
    seen: &mut dyn FnMut(&[u8]),
) -> F::Output {
    tokio::pin!(work);
    let (mut up, mut down) = (vec![0; 65536], vec![0; 65536]);
    let mut client = None;
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            Ok((length, from)) = front.recv_from(&mut up) => {
                client = Some(from);
                seen(&up[..length]);
                back.send(&up[..length]).await.unwrap();
            }
            Ok(length) = back.recv(&mut down) => if let Some(client) = client {
                front.send_to(&down[..length], client).await.unwrap();
            },
        }
    }
}
