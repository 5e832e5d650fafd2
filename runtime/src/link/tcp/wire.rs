//! What yamux reads from and writes to: TLS over TCP, with what passes counted.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use futures::io::{AsyncRead, AsyncWrite};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, ReadBuf},
    net::TcpStream,
    time::Instant,
};
use tokio_rustls::TlsStream;

use crate::link::{LinkEnd, end};

/// Bytes of a yamux header.
const HEADER: usize = 12;
/// The type of a frame with data.
const DATA: u8 = 0;

/// What has passed.
#[derive(Debug)]
pub(super) struct Counts {
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    /// Data of streams among what was sent, without headers.
    pub(super) carried: AtomicU64,
    heard: Mutex<Instant>,
    /// Why nothing passes any more.
    broke: Mutex<Option<LinkEnd>>,
}

impl Counts {
    pub(super) fn new() -> Self {
        Self {
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            carried: AtomicU64::new(0),
            heard: Mutex::new(Instant::now()),
            broke: Mutex::default(),
        }
    }

    /// When something last came.
    pub(super) fn heard(&self) -> Instant {
        *self.heard.lock()
    }

    pub(super) fn broke(&self) -> Option<LinkEnd> {
        self.broke.lock().clone()
    }

    fn note(&self, error: &io::Error) {
        self.broke.lock().get_or_insert_with(|| end::from_io(error));
    }
}

/// TLS over TCP.
pub(super) struct Wire {
    tls: TlsStream<TcpStream>,
    counts: Arc<Counts>,
    frame: Frame,
    /// What was said last is said, and only the peer's end is waited for.
    shut: bool,
}

/// Where in a frame the writer is. yamux writes a frame's header by itself.
#[derive(Default)]
struct Frame {
    header: [u8; HEADER],
    have: usize,
    body: u64,
}

impl Frame {
    /// Follows what was written; returns how much of it was data of streams.
    fn follow(&mut self, mut written: &[u8]) -> u64 {
        let mut data = 0;
        while !written.is_empty() {
            if self.body > 0 {
                let part = self.body.min(written.len() as u64);
                (data, self.body) = (data + part, self.body - part);
                written = &written[usize::try_from(part).unwrap_or(written.len())..];
                continue;
            }
            let part = (HEADER - self.have).min(written.len());
            self.header[self.have..self.have + part].copy_from_slice(&written[..part]);
            self.have += part;
            written = &written[part..];
            if self.have == HEADER {
                self.have = 0;
                let [_, kind, .., a, b, c, d] = self.header;
                self.body = if kind == DATA { u32::from_be_bytes([a, b, c, d]).into() } else { 0 };
            }
        }
        data
    }
}

impl Wire {
    pub(super) fn new(tls: TlsStream<TcpStream>, counts: Arc<Counts>) -> Self {
        Self { tls, counts, frame: Frame::default(), shut: false }
    }

    fn poll_tls(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(out);
        ready!(Pin::new(&mut self.tls).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = ready!(this.poll_tls(cx, out));
        match &result {
            Ok(0) => {}
            Ok(bytes) => {
                this.counts.received.fetch_add(*bytes as u64, Ordering::Relaxed);
                *this.counts.heard.lock() = Instant::now();
            }
            Err(error) => this.counts.note(error),
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.tls).poll_write(cx, data));
        match &result {
            Ok(bytes) => {
                let carried = this.frame.follow(&data[..*bytes]);
                this.counts.sent.fetch_add(*bytes as u64, Ordering::Relaxed);
                this.counts.carried.fetch_add(carried, Ordering::Relaxed);
            }
            Err(error) => this.counts.note(error),
        }
        Poll::Ready(result)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        Pin::new(&mut this.tls).poll_flush(cx).map_err(|error| {
            this.counts.note(&error);
            error
        })
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.shut {
            ready!(Pin::new(&mut this.tls).poll_shutdown(cx))?;
            this.shut = true;
        }
        // A socket that is closed with something unread in it resets the connection, and the last word may be lost.
        let mut void = [0; 4096];
        while ready!(this.poll_tls(cx, &mut void))? > 0 {}
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_data_of_streams_is_counted_however_it_is_cut() {
        let data = [&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3][..], b"abc"].concat();
        let window = vec![0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 9, 9];
        let wire = [data.clone(), window.clone(), window, data].concat();
        for step in [1, 2, 5, 12, 13, 100] {
            let mut frame = Frame::default();
            assert_eq!(wire.chunks(step).map(|part| frame.follow(part)).sum::<u64>(), 6, "{step}");
        }
    }
}
