//! konnectivity's gRPC egress: each call of `/ProxyService/Proxy` is one connection to a target.
//!
//! Spoken directly on HTTP/2: one call of one method is less than a gRPC library would be. What a client sends is taken
//! from its stream only when the target takes it, so that HTTP/2's own windows hold a fast sender back, call by call.

use std::{future::poll_fn, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use h2::{
    RecvStream, SendStream,
    server::{Builder, SendResponse},
};
use hyper::{
    HeaderMap, Method, Request, Response,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
};
use proto::egress::{CloseResponse, Data, DialRequest, DialResponse, Packet, PacketType, packet::Payload};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, timeout},
};

use self::frames::Messages;
use super::{EgressDoor, answer::Failure, unix};
use crate::flow::io::RecordedIo;

mod frames;

/// The one method. The authority is whatever the client made of the socket's path, and means nothing.
const PROXY: &str = "/ProxyService/Proxy";
/// How long the preface of HTTP/2, and then the first packet of a call, may take.
const FIRST: Duration = Duration::from_secs(10);
/// What one call may have on its way that the target has not taken, in bytes.
const STREAM_WINDOW: u32 = 256 * 1024;
/// What a connection may: as much as all its calls, since one that stands still must not hold up the others.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * CALLS;
/// Calls at once on a connection.
const CALLS: u32 = 1024;
/// Bytes of a target that go into one packet.
const CHUNK: usize = 32 * 1024;
/// How long a target may go on after the client has closed.
const LINGER: Duration = Duration::from_secs(1);
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The call is over on the client's side, or broken.
#[derive(Debug, thiserror::Error)]
enum CallError {
    /// Its end came without a word.
    #[error("the client went away")]
    Gone,
    /// HTTP/2 says so.
    #[error(transparent)]
    H2(#[from] h2::Error),
    /// It does not keep to the protocol.
    #[error(transparent)]
    Bad(#[from] frames::BadMessage),
}

/// What a client sends.
struct Incoming {
    body: RecvStream,
    messages: Messages,
}

/// What it is sent.
struct Outgoing {
    body: SendStream<Bytes>,
    /// What is still to be sent of a packet, should the sender be interrupted.
    unsent: Bytes,
}

/// How a connection to a target ended.
enum End {
    /// The client closed it.
    Closed,
    /// The target did.
    Ended,
    /// It broke on the target's side.
    Broken(String),
    /// The call broke.
    Lost(CallError),
}

impl EgressDoor {
    /// Serves the calls of one connection.
    pub(super) async fn serve_grpc(self: Arc<Self>, socket: UnixStream) {
        let from = unix::who(&socket);
        let mut builder = Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(CALLS)
            .max_header_list_size(16 * 1024);
        let mut connection = match timeout(FIRST, builder.handshake::<_, Bytes>(socket)).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return tracing::debug!(%from, %error, "no HTTP/2 at the egress door"),
            Err(_) => return self.turned_away("head-timeout"),
        };
        let mut stopping = false;
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.stopping.cancelled(), if !stopping => {
                    stopping = true;
                    connection.graceful_shutdown();
                    continue;
                }
                accepted = connection.accept() => accepted,
            };
            match accepted {
                Some(Ok((request, respond))) => {
                    let call = Arc::clone(&self).call(request, respond, from.clone());
                    self.tasks.spawn(call);
                }
                Some(Err(error)) => return tracing::debug!(%from, %error, "a gRPC connection broke"),
                None => return,
            }
        }
    }

    async fn call(self: Arc<Self>, request: Request<RecvStream>, mut respond: SendResponse<Bytes>, from: String) {
        let known = request.uri().path() == PROXY && request.method() == Method::POST;
        let mut response = Response::new(());
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        if !known {
            response.headers_mut().insert(GRPC_STATUS, HeaderValue::from_static("12"));
            let message = HeaderValue::from_static("only /ProxyService/Proxy is served here");
            response.headers_mut().insert(GRPC_MESSAGE, message);
        }
        let Ok(body) = respond.send_response(response, !known) else { return };
        if !known {
            return self.turned_away("unknown-method");
        }
        let mut outgoing = Outgoing { body, unsent: Bytes::new() };
        let mut incoming = Incoming { body: request.into_body(), messages: Messages::default() };
        let result = self.talk(&mut incoming, &mut outgoing, &from).await;
        match result {
            Ok(()) => outgoing.finish(),
            // Clients often leave as soon as they have what they wanted.
            Err(error) => tracing::debug!(%from, %error, "a call broke off"),
        }
    }

    async fn talk(&self, incoming: &mut Incoming, outgoing: &mut Outgoing, from: &str) -> Result<(), CallError> {
        let Ok(first) = timeout(FIRST, incoming.next()).await else {
            self.turned_away("head-timeout");
            return Err(CallError::Gone);
        };
        let Some(Payload::DialRequest(request)) = first?.and_then(|packet| packet.payload) else {
            return Err(CallError::Bad(frames::BadMessage::NoPacket));
        };
        let random = request.random;
        let Some(dialled) = self.dial_call(incoming, request, from).await? else {
            self.turned_away("gone");
            return Ok(());
        };
        let (io, answer) = match dialled {
            Ok(io) => {
                let connect_id = i64::try_from(self.next_id()).unwrap_or(1);
                (Some((io, connect_id)), DialResponse { error: String::new(), connect_id, random })
            }
            Err(failure) => {
                self.turned_away(failure.slug);
                tracing::info!(%from, code = failure.slug, reason = failure.sentence, "a dial of the egress door failed");
                (None, DialResponse { error: failure.for_go(), connect_id: 0, random })
            }
        };
        outgoing.send(PacketType::DialRsp, Payload::DialResponse(answer)).await?;
        match io {
            Some((io, id)) => carry(io, id, incoming, outgoing).await,
            None => Ok(()),
        }
    }

    /// Dials for as long as the client wants it; `None` if it gave up.
    async fn dial_call(
        &self,
        incoming: &mut Incoming,
        request: DialRequest,
        from: &str,
    ) -> Result<Option<Result<RecordedIo, Failure>>, CallError> {
        let dialling = async {
            if request.protocol != "tcp" {
                return Err(Failure::new(
                    501,
                    "unsupported",
                    format!("{:?} is not served, only tcp", request.protocol),
                ));
            }
            let to = request.address.parse().map_err(|e| Failure::new(400, "bad-request", format!("{e}")))?;
            Ok(self.dial(&to, from, Instant::now() + self.within).await?.into_io())
        };
        tokio::pin!(dialling);
        loop {
            let packet = tokio::select! {
                biased;
                dialled = &mut dialling => return Ok(Some(dialled)),
                packet = incoming.next() => packet?,
            };
            match packet.map(|packet| packet.payload) {
                None => return Ok(None),
                Some(Some(Payload::CloseDial(close))) if close.random == request.random => return Ok(None),
                Some(_) => {}
            }
        }
    }
}

/// Moves bytes until one side has ended. konnectivity knows no end of one direction alone.
async fn carry(io: RecordedIo, id: i64, incoming: &mut Incoming, outgoing: &mut Outgoing) -> Result<(), CallError> {
    let (mut reader, mut writer) = tokio::io::split(io);
    let end = {
        let up = async {
            loop {
                match incoming.next().await.map(|packet| packet.map(|packet| packet.payload)) {
                    Ok(Some(Some(Payload::Data(data)))) if data.connect_id == id => {
                        if let Err(error) = writer.write_all(&data.data).await {
                            return End::Broken(error.to_string());
                        }
                    }
                    Ok(Some(Some(Payload::CloseRequest(close)))) if close.connect_id == id => return End::Closed,
                    Ok(Some(Some(Payload::DialRequest(again)))) => {
                        tracing::debug!(address = again.address, "a second dial in one call is not served");
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => return End::Closed,
                    Err(error) => return End::Lost(error),
                }
            }
        };
        let down = async {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(CHUNK);
                match reader.read_buf(&mut buffer).await {
                    Ok(0) => return End::Ended,
                    Ok(_) => {
                        let data = Data { connect_id: id, error: String::new(), data: buffer.split().freeze() };
                        if let Err(error) = outgoing.send(PacketType::Data, Payload::Data(data)).await {
                            return End::Lost(error);
                        }
                    }
                    Err(error) => return End::Broken(error.to_string()),
                }
            }
        };
        tokio::select! {
            biased;
            end = down => end,
            end = up => end,
        }
    };
    let error = match end {
        End::Lost(error) => return Err(error),
        End::Broken(error) => error,
        End::Closed | End::Ended => {
            // Everything that came before has been written; a target that is gone already is gone.
            let _ = writer.shutdown().await;
            String::new()
        }
    };
    let closed = CloseResponse { error, connect_id: id };
    outgoing.send(PacketType::CloseRsp, Payload::CloseResponse(closed)).await?;
    // What the target still says is for nobody; it is heard out for its own sake, so that it ends as it wants to.
    let rest = async { while reader.read(&mut [0; 1024]).await.is_ok_and(|read| read > 0) {} };
    let _ = timeout(LINGER, rest).await;
    Ok(())
}

impl Incoming {
    /// The next packet; `None` at the end. Cancel-safe.
    async fn next(&mut self) -> Result<Option<Packet>, CallError> {
        loop {
            if let Some(packet) = self.messages.next()? {
                return Ok(Some(packet));
            }
            let Some(bytes) = self.body.data().await.transpose()? else { return Ok(None) };
            // The next piece is asked for when this one has been used, so that nothing piles up but a message.
            self.body.flow_control().release_capacity(bytes.len())?;
            self.messages.push(&bytes);
        }
    }
}

impl Outgoing {
    /// Sends a packet. If it is interrupted, the next one waits for the rest of this one.
    async fn send(&mut self, kind: PacketType, payload: Payload) -> Result<(), CallError> {
        self.flush().await?;
        self.unsent = frames::encode(&Packet { r#type: kind.into(), payload: Some(payload) });
        self.flush().await
    }

    async fn flush(&mut self) -> Result<(), CallError> {
        while !self.unsent.is_empty() {
            self.body.reserve_capacity(self.unsent.len());
            let mut room = self.body.capacity();
            if room == 0 {
                room = poll_fn(|cx| self.body.poll_capacity(cx)).await.ok_or(CallError::Gone)??;
            }
            let piece = self.unsent.split_to(room.min(self.unsent.len()));
            if !piece.is_empty() {
                self.body.send_data(piece, false)?;
            }
        }
        Ok(())
    }

    fn finish(mut self) {
        let mut trailers = HeaderMap::new();
        trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
        // An error means that the client has gone, and misses nothing.
        let _ = self.body.send_trailers(trailers);
    }
}
