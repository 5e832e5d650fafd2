//! The egress door over gRPC, with a client that is not ours: h2, and packets put together by hand.

use std::{
    future::poll_fn,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{RecvStream, SendStream, client::SendRequest};
use hyper::{Method, Request};
use prost::Message;
use proto::egress::{CloseDial, CloseRequest, Data, DialRequest, DialResponse, Packet, PacketType, packet::Payload};
use tokio::{net::UnixStream, time::timeout};

use crate::{
    egress::{Folder, mesh},
    mesh::{BLACK_HOLE, Mesh, PATIENCE, Stage, echo, until},
};

/// As kube-apiserver makes it of the path of the socket.
const AUTHORITY: &str = "%2Fetc%2Fkubernetes%2Fmesh%2Fgrpc.sock@localhost";

async fn grpc(folder: &Folder, hook: u16) -> (Mesh, SendRequest<Bytes>) {
    let path = folder.file("grpc.sock@localhost");
    let mesh = mesh(folder, hook, |egress| egress.grpc_socket = Some(path.clone())).await;
    let client = client(&path).await;
    (mesh, client)
}

async fn client(path: &Path) -> SendRequest<Bytes> {
    let socket = UnixStream::connect(path).await.unwrap();
    let (client, connection) = h2::client::handshake(socket).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    client
}

/// One call.
struct Call {
    up: SendStream<Bytes>,
    down: RecvStream,
    heard: BytesMut,
}

impl Call {
    async fn new(client: &SendRequest<Bytes>) -> Self {
        let uri = format!("http://{AUTHORITY}/ProxyService/Proxy");
        let request = Request::builder().method(Method::POST).uri(uri).header("content-type", "application/grpc");
        let mut client = client.clone().ready().await.unwrap();
        let (response, up) = client.send_request(request.body(()).unwrap(), false).unwrap();
        let response = timeout(PATIENCE, response).await.expect("an answer in time").unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/grpc");
        Self { up, down: response.into_body(), heard: BytesMut::new() }
    }

    async fn send(&mut self, kind: PacketType, payload: Payload) {
        let body = Packet { r#type: kind.into(), payload: Some(payload) }.encode_to_vec();
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(u32::try_from(body.len()).unwrap());
        frame.put_slice(&body);
        while !frame.is_empty() {
            self.up.reserve_capacity(frame.len());
            let mut room = self.up.capacity();
            if room == 0 {
                let waiting = poll_fn(|cx| self.up.poll_capacity(cx));
                room = timeout(PATIENCE, waiting).await.expect("room in time").expect("a living call").unwrap();
            }
            let piece = frame.split_to(room.min(frame.len())).freeze();
            self.up.send_data(piece, false).unwrap();
        }
    }

    /// The next packet; `None` at the end.
    async fn hear(&mut self) -> Option<Payload> {
        loop {
            if self.heard.len() >= 5 {
                let length = usize::try_from((&self.heard[1..5]).get_u32()).unwrap();
                if self.heard.len() >= 5 + length {
                    self.heard.advance(5);
                    return Packet::decode(self.heard.split_to(length)).unwrap().payload;
                }
            }
            let bytes = timeout(PATIENCE, self.down.data()).await.expect("a word in time")?.ok()?;
            self.down.flow_control().release_capacity(bytes.len()).unwrap();
            self.heard.extend_from_slice(&bytes);
        }
    }

    async fn ask(&mut self, address: &str) {
        let request = DialRequest { protocol: "tcp".into(), address: address.into(), random: 4711 };
        self.send(PacketType::DialReq, Payload::DialRequest(request)).await;
    }

    async fn dial(&mut self, address: &str) -> Result<i64, String> {
        self.ask(address).await;
        let Some(Payload::DialResponse(DialResponse { error, connect_id, random })) = self.hear().await else {
            panic!("no answer to a dial")
        };
        assert_eq!(random, 4711);
        assert_eq!(error.is_empty(), connect_id != 0);
        if error.is_empty() { Ok(connect_id) } else { Err(error) }
    }

    async fn say(&mut self, id: i64, bytes: &[u8]) {
        let data = Data { connect_id: id, error: String::new(), data: Bytes::copy_from_slice(bytes) };
        self.send(PacketType::Data, Payload::Data(data)).await;
    }

    async fn data(&mut self, id: i64, length: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < length {
            match self.hear().await {
                Some(Payload::Data(data)) if data.connect_id == id => all.extend_from_slice(&data.data),
                other => panic!("after {} bytes: {other:?}", all.len()),
            }
        }
        all
    }

    async fn close(&mut self, id: i64) {
        self.send(PacketType::CloseReq, Payload::CloseRequest(CloseRequest { connect_id: id })).await;
        loop {
            match self.hear().await {
                Some(Payload::CloseResponse(closed)) => {
                    assert_eq!((closed.connect_id, closed.error.as_str()), (id, ""));
                    break;
                }
                Some(Payload::Data(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_call_dials_carries_and_closes() {
    let folder = Folder::new("grpc");
    let port = echo().await;
    let (mut mesh, client) = grpc(&folder, port).await;
    let mut call = Call::new(&client).await;
    let id = call.dial(&format!("shop-1:{port}")).await.unwrap();
    let many: Vec<u8> = (0..200_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    for piece in many.chunks(30_000) {
        call.say(id, piece).await;
    }
    assert_eq!(call.data(id, many.len()).await, many);
    call.close(id).await;
    assert!(call.hear().await.is_none());
    let trailers = timeout(PATIENCE, call.down.trailers()).await.unwrap().unwrap().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
    let record = mesh.record().await;
    assert_eq!((record.who.as_str(), &*record.outcome, record.up), ("apiserver", "finished", many.len() as u64));
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    until(|| edge.streams() == 0).await;
}

#[tokio::test]
async fn a_refused_dial_says_why_in_words_that_go_programs_look_for() {
    let folder = Folder::new("grpc-no");
    let (_mesh, client) = grpc(&folder, 1).await;
    for (address, expected) in [
        ("shop-1:2", "connect: connection refused: target-refused "),
        ("nowhere:1", "no such host: unknown-host nowhere:1 is no node, "),
        ("shop-2:10250", "edge-offline edge/shop-2 is not connected"),
        ("192.168.1.5:10250", "ambiguous ambiguous node address 192.168.1.5: shop-1, shop-2; "),
        ("nonsense", "bad-request "),
    ] {
        let error = Call::new(&client).await.dial(address).await.unwrap_err();
        assert!(error.starts_with(expected), "{address}: {error}");
    }
    let request = Request::post(format!("http://{AUTHORITY}/Other/Call")).body(()).unwrap();
    let (response, _) = client.clone().ready().await.unwrap().send_request(request, true).unwrap();
    assert_eq!(response.await.unwrap().headers()["grpc-status"], "12");
}

#[tokio::test]
async fn the_targets_end_closes_the_call_with_everything_delivered() {
    let folder = Folder::new("grpc-end");
    let (_mesh, client) = grpc(&folder, 1).await;
    let stage = Stage::new().await;
    let mut call = Call::new(&client).await;
    let id = call.dial(&format!("shop-1:{}", stage.port())).await.unwrap();
    let mut target = stage.enter().await;
    let many = vec![5_u8; 1_000_000];
    let sending = async {
        target.say_bytes(&many).await;
        target.finish().await;
    };
    let (heard, ()) = tokio::join!(call.data(id, many.len()), sending);
    assert_eq!(heard, many);
    assert!(
        matches!(call.hear().await, Some(Payload::CloseResponse(closed)) if closed.connect_id == id && closed.error.is_empty())
    );
    assert_eq!(target.rest().await.0, "");

    // And the client's: all that it said arrives before its end.
    let mut call = Call::new(&client).await;
    let id = call.dial(&format!("shop-1:{}", stage.port())).await.unwrap();
    let mut target = stage.enter().await;
    let sending = async {
        for piece in many.chunks(32 * 1024) {
            call.say(id, piece).await;
        }
        call.close(id).await;
    };
    let (heard, ()) = tokio::join!(target.rest(), sending);
    assert_eq!(heard.0.len(), many.len());
}

#[tokio::test]
async fn a_call_whose_target_does_not_read_does_not_hold_up_the_others() {
    let folder = Folder::new("grpc-slow");
    let port = echo().await;
    let (mesh, client) = grpc(&folder, port).await;
    let stage = Stage::new().await;
    // Its target never reads, its client never stops.
    let mut stuck = Call::new(&client).await;
    let id = stuck.dial(&format!("shop-1:{}", stage.port())).await.unwrap();
    let _target = stage.enter().await;
    let poured = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&poured);
    let pouring = tokio::spawn(async move {
        loop {
            stuck.say(id, &[0; 32 * 1024]).await;
            counted.fetch_add(32 * 1024, Ordering::Relaxed);
        }
    });
    // Its target never stops, its client never reads.
    let mut deaf = Call::new(&client).await;
    let id = deaf.dial(&format!("shop-1:{port}")).await.unwrap();
    deaf.say(id, &[0; 60_000]).await;
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    until(|| edge.streams() == 2).await;
    // As much as a stream may hold that nobody reads.
    until(|| poured.load(Ordering::Relaxed) >= 512 * 1024).await;
    for round in 0..50 {
        let mut call = Call::new(&client).await;
        let id = call.dial(&format!("shop-1:{port}")).await.unwrap();
        call.say(id, b"ping").await;
        assert_eq!(call.data(id, 4).await, b"ping", "{round}");
        call.close(id).await;
    }
    pouring.abort();
}

#[tokio::test]
async fn a_dial_that_is_given_up_frees_its_stream() {
    let folder = Folder::new("grpc-gone");
    let (mut mesh, client) = grpc(&folder, 1).await;
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    let mut call = Call::new(&client).await;
    call.ask(&format!("shop-1:{BLACK_HOLE}")).await;
    until(|| edge.streams() == 1).await;
    call.send(PacketType::DialCls, Payload::CloseDial(CloseDial { random: 4711 })).await;
    until(|| edge.streams() == 0).await;
    assert_eq!(mesh.record().await.outcome, "cancelled");
    drop(call);

    // As does one whose client vanishes.
    let mut call = Call::new(&client).await;
    call.ask(&format!("shop-1:{BLACK_HOLE}")).await;
    until(|| edge.streams() == 1).await;
    drop((call, client));
    until(|| edge.streams() == 0).await;
    let inside = mesh.shard.router.metrics().door_connections.with_label_values(&["egress"]);
    until(|| inside.get() == 0).await;
}
