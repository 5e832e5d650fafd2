//! A UDP port that many talk to, with one flow for each of them; or one of SOCKS5, with one for each of whom one talks to.

use std::{
    collections::HashMap,
    future::pending,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use proto::{code::ResetCode, proxy::socks};
use tokio::net::UdpSocket;

use super::{PacketSink, PacketSource, Side, queue::Queue};
use crate::{link::quic::udp_socket, shutdown::Tasks, splice::Broken};

/// The longest datagram that there is.
const LONGEST: usize = 65_536;
/// Datagrams that are taken in a row before others get their turn.
const IN_A_ROW: u32 = 64;

/// A bound UDP socket.
#[derive(Debug)]
pub struct UdpPort {
    socket: Arc<UdpSocket>,
    clients: Clients,
    /// Whose association it is, if datagrams say for whom they are.
    associate: Option<IpAddr>,
}

/// Who sends, and what it says about for whom.
type Key = (SocketAddr, Bytes);

#[derive(Clone, Debug, Default)]
struct Clients(Arc<Mutex<HashMap<Key, Client>>>);

#[derive(Debug)]
struct Client {
    queue: Arc<Queue>,
    /// Number of the last datagram that came from it, among all that came.
    last: u64,
    number: u64,
}

impl UdpPort {
    /// Binds it; `[::]` takes IPv4 as well. On a host with several addresses an answer from `[::]` or `0.0.0.0` comes
    /// from the one that the route back prefers: name the address where that matters.
    ///
    /// # Errors
    /// If the address is taken or not of this host.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        Self::open(address, None)
    }

    /// Binds a port of its own for one client of SOCKS5, whose datagrams say for whom they are (RFC 1928, 7). What comes
    /// from another address is dropped, and so is a fragment.
    ///
    /// # Errors
    /// If there is no port, or the address is not of this host.
    pub fn associate(local: IpAddr, client: IpAddr) -> io::Result<Self> {
        Self::open(SocketAddr::new(local.to_canonical(), 0), Some(client.to_canonical()))
    }

    fn open(address: SocketAddr, associate: Option<IpAddr>) -> io::Result<Self> {
        let socket = udp_socket(address)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: Arc::new(UdpSocket::from_std(socket)?), clients: Clients::default(), associate })
    }

    /// Where it is bound.
    ///
    /// # Errors
    /// If the socket cannot tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Takes datagrams until `accepting` stops, and ends all flows then. Whoever is new gets a flow of its own, in a task
    /// of `tasks`; when there are more than `flows`, the one that has been silent for longest ends.
    pub async fn run<F>(self, accepting: Tasks, tasks: Tasks, flows: usize, serve: impl Fn(Visitor) -> F + Send)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.receive(&accepting, &tasks, flows, serve).await;
        for (_, client) in self.clients.0.lock().drain() {
            client.queue.close();
        }
    }

    async fn receive<F>(&self, accepting: &Tasks, tasks: &Tasks, flows: usize, serve: impl Fn(Visitor) -> F + Send)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (mut buffer, mut count, mut row) = (BytesMut::new(), 0, 0);
        loop {
            tokio::select! {
                biased;
                () = accepting.stopping() => return,
                ready = self.socket.readable() => if ready.is_err() { return },
            }
            buffer.reserve(LONGEST);
            loop {
                buffer.clear();
                match self.socket.try_recv_buf_from(&mut buffer) {
                    Ok((_, from)) => {
                        count += 1;
                        if let Some(visitor) = self.take(from, &buffer, count, flows) {
                            tasks.spawn(serve(visitor));
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    // What an answer to somebody met with. It concerns nobody else.
                    Err(error) => tracing::trace!(%error, "UDP"),
                }
                row += 1;
                if row == IN_A_ROW {
                    row = 0;
                    tokio::task::yield_now().await;
                    if accepting.is_stopping() {
                        return;
                    }
                }
            }
        }
    }

    /// Hands a datagram to the flow of its sender; to a new one, which is returned, if it has none.
    fn take(&self, from: SocketAddr, datagram: &[u8], count: u64, most: usize) -> Option<Visitor> {
        let (to, length) = match self.associate {
            None => (None, 0),
            Some(client) if client == from.ip().to_canonical() => {
                let (to, length) = socks::addressed(datagram)?;
                (Some(to), length)
            }
            Some(_) => return None,
        };
        let (head, payload) = datagram.split_at(length);
        let key = (from, Bytes::copy_from_slice(head));
        let mut clients = self.clients.0.lock();
        if let Some(client) = clients.get_mut(&key) {
            client.last = count;
            client.queue.push(payload);
            return None;
        }
        if clients.len() >= most {
            let oldest = clients.iter().min_by_key(|(_, client)| client.last).map(|(key, _)| key.clone());
            if let Some(client) = oldest.and_then(|oldest| clients.remove(&oldest)) {
                client.queue.close();
            }
        }
        let queue = Arc::new(Queue::default());
        queue.push(payload);
        let client = Client { queue: Arc::clone(&queue), last: count, number: count };
        clients.insert(key.clone(), client);
        drop(clients);
        let entry = Entry { clients: self.clients.clone(), key, number: count };
        let socket = Arc::clone(&self.socket);
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        Some(Visitor { from, to, queue, socket, entry })
    }
}

/// The place of a flow in its port, until dropped.
#[derive(Debug)]
struct Entry {
    clients: Clients,
    key: Key,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut clients = self.clients.0.lock();
        // It may have been evicted, and have come again.
        if clients.get(&self.key).is_some_and(|client| client.number == self.number) {
            clients.remove(&self.key);
        }
    }
}

/// Somebody who has sent a first datagram to a port.
#[derive(Debug)]
pub struct Visitor {
    /// From where; an IPv4 address is never dressed up as IPv6.
    pub from: SocketAddr,
    /// For whom its datagrams are, if they say so: a name or an address, and a port.
    pub to: Option<(String, u16)>,
    queue: Arc<Queue>,
    socket: Arc<UdpSocket>,
    entry: Entry,
}

impl Visitor {
    /// As an end of a flow.
    #[must_use]
    pub fn side(self) -> Side<QueueSource, PortSink> {
        let Self { queue, socket, entry, .. } = self;
        Side { source: QueueSource { queue }, sink: PortSink { socket, entry, dropped: 0 } }
    }
}

/// Datagrams that somebody else puts into a queue.
#[derive(Debug)]
pub struct QueueSource {
    queue: Arc<Queue>,
}

impl QueueSource {
    /// What is put into this queue.
    #[must_use]
    pub const fn new(queue: Arc<Queue>) -> Self {
        Self { queue }
    }
}

impl PacketSource for QueueSource {
    async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        Ok(self.queue.next().await)
    }

    fn stop(&mut self, _: ResetCode) {
        self.queue.close();
    }

    fn dropped(&self) -> u64 {
        self.queue.dropped()
    }
}

/// Answers to a visitor.
#[derive(Debug)]
pub struct PortSink {
    socket: Arc<UdpSocket>,
    entry: Entry,
    dropped: u64,
}

impl PacketSink for PortSink {
    fn put(&mut self, payload: Bytes) {
        // An error may be that of somebody else's datagram, and there is no room for this one if it is not.
        let (to, head) = &self.entry.key;
        let sent = if head.is_empty() {
            self.socket.try_send_to(&payload, *to)
        } else {
            self.socket.try_send_to(&[&head[..], &payload].concat(), *to)
        };
        if sent.is_err() {
            self.dropped += 1;
        }
    }

    async fn flush(&mut self) -> Result<(), Broken> {
        pending().await
    }

    async fn finish(&mut self) {}

    fn abort(&mut self, _: ResetCode) {}

    fn dropped(&self) -> u64 {
        self.dropped
    }
}
