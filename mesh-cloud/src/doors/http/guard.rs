//! The socket as hyper sees it: screened, with a deadline for heads, and able to end in a reset.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};
use tokio_rustls::server::TlsStream;

use super::screen::Screen;
use crate::flow::io::BrokenOff;

/// How long a head may take from its first byte on.
const HEAD: Duration = Duration::from_secs(15);

/// A connection that can be made to end in a reset.
pub(crate) trait Abrupt: AsyncRead + AsyncWrite + Send + Unpin {
    /// Lets the close that is to come be a reset.
    fn reset_on_close(&self);
}

impl Abrupt for TcpStream {
    fn reset_on_close(&self) {
        // An error means that the socket is broken already.
        let _ = SockRef::from(self).set_linger(Some(Duration::ZERO));
    }
}

impl Abrupt for TlsStream<TcpStream> {
    fn reset_on_close(&self) {
        self.get_ref().0.reset_on_close();
    }
}

/// What hyper is given in place of what is wrong: a byte that fits nowhere, and the end of a head, without which it
/// would wait for more. It answers 400 and closes.
const WRONG: &[u8] = b"\0\r\n\r\n";

/// A guarded connection.
#[derive(Debug)]
pub(crate) struct Guard<T: Abrupt> {
    /// Taken once, when the connection is upgraded.
    inner: Option<T>,
    screen: Screen,
    /// Of the head that is being read.
    deadline: Option<Pin<Box<Sleep>>>,
    /// What is left of [`WRONG`], once something was.
    refused: Option<&'static [u8]>,
    broken_off: BrokenOff,
}

impl<T: Abrupt> Guard<T> {
    /// Guards a connection of which a byte is there to be read.
    pub(crate) fn new(inner: T, broken_off: BrokenOff) -> Self {
        let deadline = Some(Box::pin(sleep(HEAD)));
        Self { inner: Some(inner), screen: Screen::default(), deadline, refused: None, broken_off }
    }

    /// The connection itself, for what comes after HTTP.
    pub(crate) fn into_inner(mut self) -> Option<T> {
        self.inner.take()
    }

    fn inner(&mut self) -> io::Result<Pin<&mut T>> {
        self.inner.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn late(&mut self, cx: &mut Context<'_>) -> bool {
        self.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready())
    }
}

/// Moves as much as there is room for.
fn fill(out: &mut ReadBuf<'_>, left: &mut &'static [u8]) {
    let (now, later) = left.split_at(left.len().min(out.remaining()));
    out.put_slice(now);
    *left = later;
}

impl<T: Abrupt> AsyncRead for Guard<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(left) = &mut self.refused {
            fill(out, left);
            return Poll::Ready(Ok(()));
        }
        let before = out.filled().len();
        match self.inner()?.poll_read(cx, out) {
            Poll::Pending if self.late(cx) => return Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            pending_or_error @ (Poll::Pending | Poll::Ready(Err(_))) => return pending_or_error,
            Poll::Ready(Ok(())) => {}
        }
        if let Err(good) = self.screen.take(&out.filled()[before..]) {
            out.set_filled(before + good);
            fill(out, self.refused.insert(WRONG));
        }
        if !self.screen.in_head() {
            self.deadline = None;
        } else if self.deadline.is_none() {
            self.deadline = Some(Box::pin(sleep(HEAD)));
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: Abrupt> AsyncWrite for Guard<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.inner()?.poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.broken_off.is_so() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.inner()?.poll_shutdown(cx))?;
        Poll::Ready(Ok(()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.inner()?.poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }
}

impl<T: Abrupt> Drop for Guard<T> {
    fn drop(&mut self) {
        if let Some(inner) = &self.inner
            && self.broken_off.is_so()
        {
            inner.reset_on_close();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        time::Instant,
    };

    use super::*;

    impl Abrupt for DuplexStream {
        fn reset_on_close(&self) {}
    }

    fn guarded() -> (DuplexStream, Guard<DuplexStream>) {
        let (client, server) = duplex(1024);
        (client, Guard::new(server, BrokenOff::default()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_its_time_and_a_body_takes_its_own() {
        for head in ["P", "PRI * HTTP/2.0\r\n", "PRI * HTTP/2.0\r\n\r\nSM", "GET / HTTP/1.1\r\nHost: a\r\n"] {
            let (mut client, mut guard) = guarded();
            let begun = Instant::now();
            client.write_all(head.as_bytes()).await.unwrap();
            let mut seen = vec![0; head.len()];
            guard.read_exact(&mut seen).await.unwrap();
            assert_eq!(guard.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut, "{head}");
            assert_eq!(begun.elapsed().as_secs(), HEAD.as_secs(), "{head}");
        }
        let (mut client, mut guard) = guarded();
        let head = b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n";
        client.write_all(head).await.unwrap();
        guard.read_exact(&mut vec![0; head.len()]).await.unwrap();
        sleep(HEAD * 10).await;
        client.write_all(b"ok").await.unwrap();
        assert_eq!(guard.read_u16().await.unwrap(), u16::from_be_bytes(*b"ok"));
    }

    #[tokio::test]
    async fn what_is_wrong_is_replaced_however_little_is_read_at_once() {
        let (mut client, mut guard) = guarded();
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n").await.unwrap();
        let (mut seen, mut small) = (Vec::new(), [0; 3]);
        loop {
            match guard.read(&mut small).await.unwrap() {
                0 => break,
                read => seen.extend_from_slice(&small[..read]),
            }
        }
        let good = seen.strip_suffix(WRONG).expect("it ends in what is wrong");
        assert!(b"GET / HTTP/1.1\r\nHost: a".starts_with(good), "{:?}", String::from_utf8_lossy(&seen));
    }
}
