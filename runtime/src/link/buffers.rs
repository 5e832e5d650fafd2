//! The buffers of UDP sockets: as large as the system grants. While a process is busy, a buffer is all that stands between
//! a burst of packets and their loss.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
};

use socket2::SockRef;

/// Wanted size of a UDP socket's buffers in bytes.
pub const WANTED: usize = 4 * 1024 * 1024;

/// What the system grants, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpBuffers {
    /// For packets that have come.
    pub receive: usize,
    /// For packets that are to go.
    pub send: usize,
}

/// Asks for large buffers. Less is slower and still right.
pub(super) fn enlarge(socket: &UdpSocket) {
    let handle = SockRef::from(socket);
    let _ = handle.set_recv_buffer_size(WANTED);
    let _ = handle.set_send_buffer_size(WANTED);
    #[cfg(target_os = "linux")]
    {
        use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
        // Past the system's bound, which takes CAP_NET_ADMIN.
        let granted = UdpBuffers::of(socket).unwrap_or(UdpBuffers { receive: 0, send: 0 });
        if granted.receive < WANTED {
            let _ = set_socket_recv_buffer_size_force(socket, WANTED);
        }
        if granted.send < WANTED {
            let _ = set_socket_send_buffer_size_force(socket, WANTED);
        }
    }
}

impl UdpBuffers {
    /// What a socket is granted that is opened now as those of links are.
    ///
    /// # Errors
    /// If there can be no UDP socket.
    pub fn granted() -> io::Result<Self> {
        let socket = UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        enlarge(&socket);
        Self::of(&socket)
    }

    fn of(socket: &UdpSocket) -> io::Result<Self> {
        let handle = SockRef::from(socket);
        // Linux keeps its books beside the packets in a buffer, and says twice what was asked for.
        let books = if cfg!(any(target_os = "linux", target_os = "android")) { 2 } else { 1 };
        Ok(Self { receive: handle.recv_buffer_size()? / books, send: handle.send_buffer_size()? / books })
    }

    /// What to say to whoever runs this machine; `None` if the buffers are as large as wanted.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        let small = |size| size < WANTED;
        (small(self.receive) || small(self.send)).then(|| {
            format!(
                "UDP sockets get only {} bytes to receive and {} to send, of {WANTED}; bursts of packets are lost. \
                 sysctl -w net.core.rmem_max={WANTED} net.core.wmem_max={WANTED}",
                self.receive, self.send
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_granted_is_at_most_what_is_wanted_and_advice_names_the_sysctl() {
        let granted = UdpBuffers::granted().unwrap();
        assert!(granted.receive > 1000 && granted.receive <= 2 * WANTED, "{granted:?}");
        assert_eq!(UdpBuffers { receive: WANTED, send: WANTED }.advice(), None);
        let advice = UdpBuffers { receive: 212_992, send: WANTED }.advice().unwrap();
        assert!(advice.contains("sysctl -w net.core.rmem_max=4194304 net.core.wmem_max=4194304"), "{advice}");
    }
}
