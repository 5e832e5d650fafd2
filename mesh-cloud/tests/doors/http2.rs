//! The HTTP door, in HTTP/2 without TLS.

use std::{
    convert::Infallible,
    future::poll_fn,
    net::Ipv4Addr,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{
    HeaderMap, Request, Response, Version,
    body::{Body, Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use crate::mesh::{Mesh, Stage, web};

/// A body that is sent in steps.
struct Pieces(mpsc::Receiver<Frame<Bytes>>);

impl Pieces {
    fn new() -> (mpsc::Sender<Frame<Bytes>>, Self) {
        let (sender, receiver) = mpsc::channel(1);
        (sender, Self(receiver))
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

async fn client<B>(mesh: &Mesh) -> hyper::client::conn::http2::SendRequest<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let socket = TcpStream::connect(mesh.shard.http.unwrap()).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn get(name: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://{name}.shop-1.mesh.test/path")).body(Empty::new()).unwrap()
}

/// A service that speaks HTTP/2 only: echoes the body and ends with a trailer, as gRPC does.
async fn grpc() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let echo = service_fn(|request: Request<Incoming>| async move {
                assert_eq!(request.version(), Version::HTTP_2);
                assert_eq!(request.uri().authority().unwrap(), "grpc.shop-1.mesh.test");
                assert_eq!(request.headers()["te"], "trailers");
                let (sender, body) = Pieces::new();
                tokio::spawn(async move {
                    let mut incoming = request.into_body();
                    while let Some(Ok(frame)) = incoming.frame().await {
                        if let Ok(data) = frame.into_data() {
                            sender.send(Frame::data(data)).await.unwrap();
                        }
                    }
                    let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
                    sender.send(Frame::trailers(trailers)).await.unwrap();
                });
                let response = Response::builder().header("content-type", "application/grpc");
                Ok::<_, Infallible>(response.body(body).unwrap())
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(socket), echo));
        }
    });
    port
}

async fn data(body: &mut Incoming) -> Bytes {
    poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await.unwrap().unwrap().into_data().unwrap()
}

#[tokio::test]
async fn grpc_streams_both_ways_with_its_trailers() {
    let mesh = Mesh::start(&[("grpc", grpc().await)]).await;
    let mut sender = client::<Pieces>(&mesh).await;
    let call = || {
        let (pieces, body) = Pieces::new();
        let request = Request::post("http://grpc.shop-1.mesh.test/a.B/C")
            .header("content-type", "application/grpc+proto")
            .header("te", "trailers")
            .body(body)
            .unwrap();
        (pieces, request)
    };
    let ((pieces, one), (others, two)) = (call(), call());
    let mut response = sender.send_request(one).await.unwrap();
    let mut other = sender.send_request(two).await.unwrap();
    for text in ["first", "second"] {
        pieces.send(Frame::data(Bytes::from_static(text.as_bytes()))).await.unwrap();
        assert_eq!(data(response.body_mut()).await, text, "one message goes there and back before the next");
        others.send(Frame::data(Bytes::from_static(b"beside"))).await.unwrap();
        assert_eq!(data(other.body_mut()).await, "beside");
    }
    drop((pieces, others));
    for response in [response, other] {
        let end = response.into_body().collect().await.unwrap();
        assert_eq!(end.trailers().unwrap()["grpc-status"], "0");
    }
}

#[tokio::test]
async fn services_of_http1_are_reached_too() {
    let mesh = Mesh::start(&[("web", web("web").await)]).await;
    let mut sender = client(&mesh).await;
    let mut answers = Vec::new();
    for _ in 0..20 {
        let mut request = get("web");
        for crumb in ["a=1", "b=2"] {
            request.headers_mut().append("cookie", crumb.parse().unwrap());
        }
        answers.push(tokio::spawn(sender.send_request(request)));
    }
    for answer in answers {
        let response = answer.await.unwrap().unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8_lossy(&body).to_lowercase();
        for text in
            ["web: get /path http/1.1\r\n", "host: web.shop-1.mesh.test\r\n", "cookie: a=1; b=2\r\n", "via: 2 causeway"]
        {
            assert!(body.contains(text), "{text}: {body}");
        }
    }
    let response = sender.send_request(get("none")).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-mesh-error"]),
        (404, &"service-unknown".parse().unwrap())
    );
}

#[tokio::test]
async fn a_response_that_breaks_off_breaks_its_stream_and_no_other() {
    let stage = Stage::new().await;
    let mesh = Mesh::start(&[("web", stage.port()), ("other", web("other").await)]).await;
    let mut sender = client(&mesh).await;
    let answer = tokio::spawn(sender.send_request(get("web")));
    let mut service = stage.enter().await;
    service.head().await;
    service.say("HTTP/1.1 200 OK\r\n\r\nhalf").await;
    let mut response = answer.await.unwrap().unwrap();
    assert_eq!(data(response.body_mut()).await, "half");
    service.reset();
    response.into_body().collect().await.expect_err("a reset, not an end");
    assert_eq!(sender.send_request(get("other")).await.unwrap().status(), 200, "the connection goes on");
}

#[tokio::test]
async fn a_request_that_breaks_off_breaks_at_the_service() {
    let stage = Stage::new().await;
    let mesh = Mesh::start(&[("web", stage.port())]).await;
    let mut sender = client(&mesh).await;
    let pieces = steps([Ok(Frame::data(Bytes::from_static(b"half"))), Err(std::io::Error::other("no more"))]);
    let request = Request::post("http://web.shop-1.mesh.test/").body(pieces).unwrap();
    let answer = tokio::spawn(sender.send_request(request));
    let mut service = stage.enter().await;
    service.head().await;
    let (rest, ended) = service.rest().await;
    assert!(!rest.contains("0\r\n\r\n"), "{rest:?}");
    assert_eq!(ended, crate::mesh::Ended::ByReset);
    answer.await.unwrap().unwrap_err();
}

type Item = Result<Frame<Bytes>, std::io::Error>;

struct Steps(std::vec::IntoIter<Item>);

impl Body for Steps {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Item>> {
        Poll::Ready(self.0.next())
    }
}

fn steps(items: impl IntoIterator<Item = Item>) -> Steps {
    Steps(items.into_iter().collect::<Vec<_>>().into_iter())
}
