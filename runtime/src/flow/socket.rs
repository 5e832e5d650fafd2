//! A connected UDP socket as an end of a flow.

use std::{future::pending, io, net::SocketAddr, sync::Arc};

use bytes::{Bytes, BytesMut};
use proto::code::ResetCode;
use tokio::{io::Interest, net::UdpSocket};

use super::{PacketSink, PacketSource, Side};
use crate::splice::Broken;

/// The longest datagram that there is.
const LONGEST: usize = 65_536;

/// Opens a UDP socket that talks to one address, and can send at once.
///
/// # Errors
/// If there is no way to it, or no descriptor.
pub async fn connect(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = std::net::UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_nonblocking(true)?;
    let socket = UdpSocket::from_std(socket)?;
    // Until the runtime has looked at it, it would seem to have no room.
    socket.writable().await?;
    Ok(socket)
}

/// Makes an end of a connected socket.
#[must_use]
pub fn side(socket: UdpSocket) -> Side<SocketSource, SocketSink> {
    let socket = Arc::new(socket);
    Side {
        source: SocketSource { socket: Arc::clone(&socket), buffer: None },
        sink: SocketSink { socket, dropped: 0, broken: None },
    }
}

/// The host says that nobody listens there, or the socket fails.
fn broken(error: &io::Error) -> Broken {
    let detail = if error.kind() == io::ErrorKind::ConnectionRefused {
        "nothing listens on that UDP port".to_owned()
    } else {
        error.to_string()
    };
    Broken { code: ResetCode::PeerReset, detail }
}

/// What the target sends.
#[derive(Debug)]
pub struct SocketSource {
    socket: Arc<UdpSocket>,
    /// Only there while something comes, so that a silent flow costs no memory.
    buffer: Option<BytesMut>,
}

impl SocketSource {
    /// Waits until something has come, or the network has said that nothing will: that alone makes a socket not readable.
    async fn wait(&self) -> io::Result<()> {
        let ready = self.socket.ready(Interest::READABLE | Interest::ERROR).await?;
        if !ready.is_error() {
            return Ok(());
        }
        if let Some(error) = self.socket.take_error()? {
            return Err(error);
        }
        // Somebody else, who sent, was told of it.
        let nothing = self.socket.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        debug_assert!(nothing.is_err());
        Ok(())
    }
}

impl PacketSource for SocketSource {
    async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            let buffer = self.buffer.get_or_insert_with(|| BytesMut::with_capacity(LONGEST));
            buffer.clear();
            match self.socket.try_recv_buf(buffer) {
                Ok(_) => return Ok(Some(Bytes::copy_from_slice(buffer))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(broken(&e)),
            }
            self.buffer = None;
            self.wait().await.map_err(|e| broken(&e))?;
        }
    }

    fn stop(&mut self, _: ResetCode) {}

    fn dropped(&self) -> u64 {
        0
    }
}

/// What goes to the target.
#[derive(Debug)]
pub struct SocketSink {
    socket: Arc<UdpSocket>,
    dropped: u64,
    broken: Option<Broken>,
}

impl PacketSink for SocketSink {
    fn put(&mut self, payload: Bytes) {
        match self.socket.try_send(&payload) {
            Ok(_) => {}
            // What an earlier datagram met with is told once, in place of sending this one.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => self.broken = Some(broken(&e)),
            // No room, too long for the path, or no way for the moment: lost, as UDP has it.
            Err(_) => self.dropped += 1,
        }
    }

    async fn flush(&mut self) -> Result<(), Broken> {
        match self.broken.take() {
            Some(broken) => Err(broken),
            None => pending().await,
        }
    }

    async fn finish(&mut self) {}

    fn abort(&mut self, _: ResetCode) {}

    fn dropped(&self) -> u64 {
        self.dropped
    }
}
