//! Where traffic enters a shard. Each door finds out who is meant and ends in [`crate::route::Router::open`].

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use runtime::shutdown::Tasks;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use crate::metrics::Metrics;

pub mod dns;
pub mod egress;
pub mod http;
pub mod https;
pub mod proxy;
pub mod ssh;
pub mod tcp;
pub mod udp;
mod visit;

/// Connections that the kernel holds for a door before it is accepted.
const BACKLOG: i32 = 1024;
/// Pause after a failed accept, for lack of descriptors as a rule.
const PAUSE: Duration = Duration::from_millis(50);

/// A listening door: accepts within its bound and hands each connection to its handler in a task of its own.
#[derive(Debug)]
pub struct Door {
    name: String,
    listener: TcpListener,
    permits: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

/// A connection that came through a door.
#[derive(Debug)]
pub struct Visitor {
    /// The connection.
    pub socket: TcpStream,
    /// From where; an IPv4 address is never dressed up as IPv6.
    pub from: SocketAddr,
}

impl Door {
    /// Opens a door for at most `connections` at once; `[::]` takes IPv4 as well.
    ///
    /// # Errors
    /// If the address is taken or not of this host.
    pub fn open(name: &str, address: SocketAddr, connections: usize, metrics: Arc<Metrics>) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(!address.ip().is_unspecified())?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from_std(socket.into())?;
        Ok(Self { name: name.to_owned(), listener, permits: Arc::new(Semaphore::new(connections)), metrics })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the socket cannot tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts until `accepting` stops; each visitor is handled in a task of `tasks`. A visitor for whom there is no
    /// room waits in the kernel's queue, and so hinders nobody who is inside.
    pub async fn run<F>(self, accepting: Tasks, tasks: Tasks, handle: impl Fn(Visitor) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let inside = self.metrics.door_connections.with_label_values(&[&self.name]);
        loop {
            let next = async {
                let permit = Arc::clone(&self.permits).acquire_owned().await;
                (permit, self.listener.accept().await)
            };
            let (permit, accepted) = tokio::select! {
                biased;
                () = accepting.stopping() => return,
                next = next => next,
            };
            match accepted {
                Ok((socket, from)) => {
                    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
                    let (visit, inside) = (handle(Visitor { socket, from }), inside.clone());
                    inside.inc();
                    tasks.spawn(async move {
                        visit.await;
                        inside.dec();
                        drop(permit);
                    });
                }
                Err(e) => {
                    self.metrics.door_refusals.with_label_values(&[self.name.as_str(), "accept"]).inc();
                    tracing::warn!(door = self.name, error = %e, "the door cannot accept");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}
