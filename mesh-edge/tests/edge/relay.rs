//! What stands between an edge and a shard: a port that can close and open again, a path that swallows everything, a
//! NAT that forgets.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use proto::message::Candidate;
use runtime::shutdown::Tasks;
use tokio::{
    net::UdpSocket,
    sync::{mpsc, oneshot},
    task::JoinSet,
};

use crate::fake::{FakeShard, LONG, on_free_port, soon};

/// A UDP port in front of a shard. It is closed and everything behind it is gone when it is told so, or dropped.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    shard: SocketAddr,
    name: String,
    swallow: Arc<AtomicBool>,
    orders: mpsc::Sender<Order>,
    tasks: Tasks,
}

enum Order {
    /// Nothing passes any more for those who are known.
    Forget(oneshot::Sender<()>),
}

impl Relay {
    pub(crate) fn start(shard: &FakeShard) -> Self {
        let front = on_free_port(std::net::UdpSocket::bind::<SocketAddr>);
        front.set_nonblocking(true).unwrap();
        let front = UdpSocket::from_std(front).unwrap();
        let (address, shard, name) = (front.local_addr().unwrap(), shard.address, shard.name.clone());
        let (orders, tasks) = (mpsc::channel(1).0, Tasks::new());
        let mut relay = Self { address, shard, name, swallow: Arc::default(), orders, tasks };
        relay.run(front);
        relay
    }

    /// The shard, at this port.
    pub(crate) fn candidate(&self) -> Candidate {
        Candidate { shard: self.name.parse().unwrap(), addresses: vec![self.address.to_string()] }
    }

    /// Closes the port: whoever sends to it is told by ICMP.
    pub(crate) async fn close(&mut self) {
        assert_eq!(self.tasks.drained(LONG).await, 0);
    }

    /// Opens the port again.
    pub(crate) async fn open(&mut self) {
        let front = UdpSocket::bind(self.address).await.unwrap();
        self.tasks = Tasks::new();
        self.run(front);
    }

    /// Takes everything and passes on nothing, from now on.
    pub(crate) fn swallow(&self) {
        self.swallow.store(true, Ordering::Relaxed);
    }

    /// Passes everything on again.
    pub(crate) fn let_through(&self) {
        self.swallow.store(false, Ordering::Relaxed);
    }

    /// Forgets who is behind which port, as a NAT does that was restarted: whoever comes from an old one is swallowed.
    pub(crate) async fn forget(&self) {
        let (done, told) = oneshot::channel();
        assert!(self.orders.send(Order::Forget(done)).await.is_ok());
        soon("the relay forgets", told).await.unwrap();
    }

    fn run(&mut self, front: UdpSocket) {
        let (orders, inbox) = mpsc::channel(1);
        self.orders = orders;
        let work = pass(Arc::new(front), self.shard, Arc::clone(&self.swallow), inbox);
        self.tasks.spawn(self.tasks.token().run_until_cancelled_owned(work));
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

async fn pass(front: Arc<UdpSocket>, shard: SocketAddr, swallow: Arc<AtomicBool>, mut orders: mpsc::Receiver<Order>) {
    // `None` is somebody who was forgotten.
    let mut clients: HashMap<SocketAddr, Option<Arc<UdpSocket>>> = HashMap::new();
    let (mut back, mut buffer) = (JoinSet::new(), vec![0; 65536]);
    loop {
        let (length, from) = tokio::select! {
            biased;
            Some(Order::Forget(done)) = orders.recv() => {
                clients.values_mut().for_each(|behind| *behind = None);
                back.shutdown().await;
                let _ = done.send(());
                continue;
            }
            Ok(got) = front.recv_from(&mut buffer) => got,
        };
        if swallow.load(Ordering::Relaxed) {
            continue;
        }
        let behind = match clients.get(&from) {
            Some(known) => known.clone(),
            None => {
                let socket = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
                socket.connect(shard).await.unwrap();
                clients.insert(from, Some(Arc::clone(&socket)));
                back.spawn(answers(Arc::clone(&socket), Arc::clone(&front), from, Arc::clone(&swallow)));
                Some(socket)
            }
        };
        if let Some(behind) = behind {
            // Whether it arrives is nobody's promise.
            let _ = behind.send(&buffer[..length]).await;
        }
    }
}

async fn answers(behind: Arc<UdpSocket>, front: Arc<UdpSocket>, to: SocketAddr, swallow: Arc<AtomicBool>) {
    let mut buffer = vec![0; 65536];
    loop {
        let Ok(length) = behind.recv(&mut buffer).await else { continue };
        if !swallow.load(Ordering::Relaxed) {
            let _ = front.send_to(&buffer[..length], to).await;
        }
    }
}
