//! Whether the addresses and routes of this host change: what a roaming machine needs to know at once, since a socket that
//! was connected before goes on with an address that leads nowhere.

use tokio::sync::watch;

use crate::shutdown::Tasks;

/// Changes of this host's addresses or routes. The number means nothing; a new one does.
pub type Whereabouts = watch::Receiver<u64>;

/// Watches this host's addresses and routes until the tasks stop. Where the system cannot tell (no netlink, or forbidden),
/// nothing is ever reported, and links notice by their own errors and by silence, which takes longer.
#[must_use]
pub fn watch(tasks: &Tasks) -> Whereabouts {
    let (changes, seen) = watch::channel(0);
    follow(tasks, changes);
    seen
}

#[cfg(not(target_os = "linux"))]
fn follow(_: &Tasks, _: watch::Sender<u64>) {}

#[cfg(target_os = "linux")]
fn follow(tasks: &Tasks, changes: watch::Sender<u64>) {
    match netlink::open() {
        Ok(socket) => drop(tasks.spawn(tasks.token().run_until_cancelled_owned(netlink::read(socket, changes)))),
        Err(error) => {
            tracing::warn!(%error, "no netlink: a change of address is noticed later; allow AF_NETLINK to this process");
        }
    }
}

#[cfg(target_os = "linux")]
mod netlink {
    use std::{io, os::unix::net::UnixDatagram as StdDatagram, time::Duration};

    use rustix::{
        io::Errno,
        net::{AddressFamily, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, socket_with},
    };
    use tokio::{net::UnixDatagram, sync::watch, time::sleep};

    /// Groups of rtnetlink(7): addresses and routes, of IPv4 and IPv6.
    const GROUPS: u32 = 0x10 | 0x40 | 0x100 | 0x400;
    /// Changes come in heaps, as when an interface goes down; one word for so long a time is enough.
    const HEAP: Duration = Duration::from_millis(50);

    /// The type is that of another family: what is used of it, waiting and receiving, is the same for every kind of
    /// datagram, and tokio has no other that takes a socket from elsewhere without unsafe code.
    pub(super) fn open() -> io::Result<UnixDatagram> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        // No protocol is the number 0, which is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        UnixDatagram::from_std(StdDatagram::from(socket))
    }

    /// Tells of every change until nobody listens. What it was is not read: whoever cares looks for himself.
    pub(super) async fn read(socket: UnixDatagram, changes: watch::Sender<u64>) {
        while socket.readable().await.is_ok() {
            if !took_all(&socket) {
                continue;
            }
            changes.send_modify(|count| *count += 1);
            tokio::select! {
                biased;
                () = changes.closed() => return,
                () = sleep(HEAP) => {}
            }
        }
    }

    /// Takes everything off. Returns whether there was anything.
    fn took_all(socket: &UnixDatagram) -> bool {
        let mut any = false;
        loop {
            match socket.try_recv(&mut [0; 4096]) {
                Ok(_) => any = true,
                // Some did not fit into the queue: all the more has changed.
                Err(error) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => any = true,
                Err(_) => return any,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn watching_ends_with_the_tasks() {
        let tasks = Tasks::new();
        let seen = watch(&tasks);
        assert_eq!(*seen.borrow(), 0);
        tasks.stop();
        assert_eq!(tasks.finished(std::time::Duration::from_secs(5)).await, 0);
    }
}
