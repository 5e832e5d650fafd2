//! One connection of HTTPConnect: a head, a dial, an answer, and then nothing but bytes.
//!
//! kube-apiserver waits for the answer without any deadline, so that one always comes. It refuses an answer that has a
//! single byte behind it, so that nothing of the target is passed on before it has had time to read the answer.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use proto::{
    proxy::connect::{self as head, BadHead, MAX_HEAD},
    target::HostPort,
};
use runtime::splice::IoEnd;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::{Instant, timeout, timeout_at},
};

use super::{EgressDoor, answer::Failure};
use crate::{doors::visit, flow::Opened};

/// Exactly this, with nothing behind it.
const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection Established\r\n\r\n";
/// How long the head may take.
const HEAD: Duration = Duration::from_secs(10);
/// How long bytes of a target that speaks first are held back, unless the client has spoken.
const HOLD: Duration = Duration::from_millis(250);
/// How long a client may take to read a refusal.
const FAREWELL: Duration = Duration::from_secs(2);
/// Most bytes that are taken in front of the answer.
const MAX_EARLY: usize = MAX_HEAD;

impl EgressDoor {
    /// Serves one connection. With `denied`, whatever it asks for is refused.
    pub(super) async fn connect<C>(self: Arc<Self>, mut client: C, from: String, denied: Option<Failure>)
    where
        C: AsyncRead + AsyncWrite + Send + Unpin,
    {
        let mut early = BytesMut::new();
        let asked = {
            let reading = timeout(HEAD, read_head(&mut client, &mut early));
            match self.stopping.run_until_cancelled(reading).await {
                Some(Ok(Some(asked))) => asked,
                Some(Ok(None)) | None => return,
                Some(Err(_)) => Err(Failure::new(408, "head-timeout", "no request came within 10 s")),
            }
        };
        let dialled = match asked.and_then(|to| denied.map_or(Ok(to), Err)) {
            Ok(to) => {
                let deadline = Instant::now() + self.within;
                let dialling = self.dial(&to, &from, deadline);
                // Whoever goes away while the dial is pending takes it along.
                match visit::while_there(&mut client, &mut early, MAX_EARLY, dialling).await {
                    Some(dialled) => dialled,
                    None => {
                        self.turned_away("gone");
                        tracing::debug!(%from, %to, "the client went away before its dial had ended");
                        return;
                    }
                }
            }
            Err(failure) => Err(failure),
        };
        match dialled {
            Ok(opened) => tunnel(client, early, opened).await,
            Err(failure) => {
                self.turned_away(failure.slug);
                tracing::info!(%from, status = failure.status, code = failure.slug, reason = failure.sentence, "a dial of the egress door failed");
                farewell(client, &failure.encode()).await;
            }
        }
    }
}

/// Where it wants to go; `None` if it went away. What comes behind the head stays in `early`.
async fn read_head<C>(client: &mut C, early: &mut BytesMut) -> Option<Result<HostPort, Failure>>
where
    C: AsyncRead + Unpin,
{
    loop {
        match head::read(early) {
            Ok(Some((to, length))) => {
                drop(early.split_to(length));
                return Some(Ok(to));
            }
            Ok(None) => {}
            Err(bad) => {
                let (status, slug) = match bad {
                    BadHead::Method(_) => (405, "method-not-allowed"),
                    BadHead::TooLong => (431, "bad-request"),
                    BadHead::NotHttp | BadHead::Target(_) => (400, "bad-request"),
                };
                return Some(Err(Failure::new(status, slug, bad.to_string())));
            }
        }
        match client.read_buf(early).await {
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}

async fn tunnel<C>(mut client: C, mut early: BytesMut, opened: Opened)
where
    C: AsyncRead + AsyncWrite + Send + Unpin,
{
    let told = async {
        client.write_all(ESTABLISHED).await?;
        client.flush().await?;
        if early.is_empty() {
            // An end is seen again by whoever reads next.
            timeout_at(Instant::now() + HOLD, client.read_buf(&mut early)).await.unwrap_or(Ok(0))?;
        }
        Ok::<_, std::io::Error>(())
    };
    if let Err(error) = told.await {
        tracing::debug!(%error, "the client went away when its tunnel was open");
        return;
    }
    let (reader, writer) = tokio::io::split(client);
    opened.splice(IoEnd::new(reader, writer, early.freeze())).await;
}

/// Says a last word and waits until it has been read, or the client is tired of it.
async fn farewell<C>(mut client: C, word: &[u8])
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let closing = async {
        client.write_all(word).await?;
        client.shutdown().await?;
        let mut thrown = [0; 1024];
        while client.read(&mut thrown).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    // A client that is gone, or stays, misses nothing that it wanted.
    let _ = timeout(FAREWELL, closing).await;
}
