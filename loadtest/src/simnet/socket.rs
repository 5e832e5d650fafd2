//! quinn's socket over the simulated network.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use parking_lot::Mutex;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};

use super::Net;

/// Datagrams that a receiver's buffer holds: 4 MB of full ones.
const BUFFER: usize = 3000;
/// Datagrams that may be handed over at once, as a kernel with segmentation offload takes them.
const SEGMENTS: usize = 10;

/// Where datagrams wait for a socket.
#[derive(Debug, Default)]
pub(super) struct Inbox(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    datagrams: VecDeque<(SocketAddr, Vec<u8>)>,
    reader: Option<Waker>,
}

impl Inbox {
    /// Returns whether there was room.
    pub(super) fn put(&self, from: SocketAddr, datagram: Vec<u8>) -> bool {
        let mut waiting = self.0.lock();
        if waiting.datagrams.len() >= BUFFER {
            return false;
        }
        waiting.datagrams.push_back((from, datagram));
        if let Some(reader) = waiting.reader.take() {
            reader.wake();
        }
        true
    }
}

/// A UDP socket in the simulated network.
pub(super) struct SimSocket {
    pub(super) net: Net,
    pub(super) number: u64,
    pub(super) inbox: Arc<Inbox>,
}

impl fmt::Debug for SimSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimSocket({})", self.number)
    }
}

impl Drop for SimSocket {
    fn drop(&mut self) {
        self.net.close(self.number);
    }
}

/// There is always room to send: what is too much is lost on the way.
#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for SimSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for datagram in transmit.contents.chunks(size) {
            self.net.send(self.number, transmit.destination, datagram);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut waiting = self.inbox.0.lock();
        let mut count = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta) {
            let Some((from, datagram)) = waiting.datagrams.pop_front() else { break };
            let len = datagram.len().min(buf.len());
            buf[..len].copy_from_slice(&datagram[..len]);
            *meta = RecvMeta { addr: from, len, stride: len, ecn: None, dst_ip: None };
            count += 1;
        }
        if count == 0 {
            waiting.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.net.address_of(self.number).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn max_transmit_segments(&self) -> usize {
        SEGMENTS
    }
}
