//! What comes after HTTP on a connection: CONNECT's tunnel, WebSocket, and any other protocol. From here on the bytes
//! are the mesh's own business, and hyper is out of the way.

use std::time::Duration;

use bytes::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::{rt::TokioIo, server::conn::auto};
use runtime::splice::{IoEnd, TcpEnd};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::server::TlsStream;

use super::guard::{Abrupt, Guard};
use crate::flow::{Opened, io::RecordedIo};

/// How long the client may take to read the head that announces the change.
const CHANGE: Duration = Duration::from_secs(30);

/// Waits until the client's side has changed, and moves bytes between it and the flow. Whatever the client sent early
/// goes first.
pub(crate) async fn tunnel(client: OnUpgrade, opened: Opened) {
    match timeout(CHANGE, client).await {
        Ok(Ok(upgraded)) => splice(upgraded, opened).await,
        Ok(Err(error)) => tracing::debug!(%error, "the client went away before its tunnel was open"),
        Err(_) => tracing::debug!("the client does not read that its tunnel is open"),
    }
}

/// As [`tunnel`], between a client and a service that have both agreed to change.
pub(crate) async fn join(client: OnUpgrade, service: OnUpgrade) {
    let Ok(Ok(service)) = timeout(CHANGE, service).await else { return };
    let Ok(parts) = service.downcast::<TokioIo<RecordedIo>>() else { return };
    if let Some(opened) = parts.io.into_inner().into_opened(parts.read_buf) {
        tunnel(client, opened).await;
    }
}

async fn splice(upgraded: Upgraded, opened: Opened) {
    // The HTTP door's server wraps its sockets, to look at the first bytes.
    let upgraded = match auto::upgrade::downcast::<TokioIo<Guard<TcpStream>>>(upgraded) {
        Ok(parts) => return over_tcp(parts.io, parts.read_buf, opened).await,
        Err(upgraded) => upgraded,
    };
    let upgraded = match upgraded.downcast::<TokioIo<Guard<TcpStream>>>() {
        Ok(parts) => return over_tcp(parts.io, parts.read_buf, opened).await,
        Err(upgraded) => upgraded,
    };
    if let Ok(parts) = upgraded.downcast::<TokioIo<Guard<TlsStream<TcpStream>>>>()
        && let Some(tls) = inner(parts.io)
    {
        let (reader, writer) = tokio::io::split(tls);
        opened.splice(IoEnd::new(reader, writer, parts.read_buf)).await;
    }
}

async fn over_tcp(io: TokioIo<Guard<TcpStream>>, head: Bytes, opened: Opened) {
    if let Some(Ok(end)) = inner(io).map(|socket| TcpEnd::new(socket, head)) {
        opened.splice(end).await;
    }
}

fn inner<T: Abrupt>(io: TokioIo<Guard<T>>) -> Option<T> {
    io.into_inner().into_inner()
}
