//! The little services behind the edges of `meshctl dev`: a page that names its edge, and an echo.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, header, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::id::EdgeId;
use runtime::shutdown::Tasks;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

/// Connections at once on each service; more wait in the kernel's queue.
const CONNECTIONS: usize = 256;

/// Serves the page.
///
/// # Errors
/// If no port is free.
pub(super) async fn web(edge: EdgeId, tasks: &Tasks) -> io::Result<SocketAddr> {
    serve(tasks, move |socket| {
        let edge = edge.clone();
        async move {
            let service = service_fn(move |request| {
                let page = page(&edge, &request);
                async move { Ok::<_, Infallible>(page) }
            });
            let connection =
                http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(socket), service);
            if let Err(e) = connection.await {
                tracing::debug!(error = %e, "a page was not read to its end");
            }
        }
    })
    .await
}

fn page(edge: &EdgeId, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let text = format!("Hello from {edge}: you asked for {}.\n", request.uri().path());
    let mut response = Response::new(Full::new(Bytes::from(text)));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Serves the echo.
///
/// # Errors
/// If no port is free.
pub(super) async fn echo(tasks: &Tasks) -> io::Result<SocketAddr> {
    serve(tasks, |mut socket| async move {
        let (mut reader, mut writer) = socket.split();
        let copied = tokio::io::copy(&mut reader, &mut writer).await;
        if let Err(e) = copied.and(writer.shutdown().await) {
            tracing::debug!(error = %e, "an echo broke");
        }
    })
    .await
}

async fn serve<F>(tasks: &Tasks, visit: impl Fn(TcpStream) -> F + Send + 'static) -> io::Result<SocketAddr>
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    let (group, permits) = (tasks.clone(), Arc::new(Semaphore::new(CONNECTIONS)));
    tasks.spawn(tasks.token().run_until_cancelled_owned(async move {
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            let Ok((socket, _)) = listener.accept().await else { return };
            let work = visit(socket);
            group.spawn(group.token().run_until_cancelled_owned(async move {
                let _permit = permit;
                work.await;
            }));
        }
    }));
    Ok(address)
}
