//! The DNS door: `<edge>.<domain>`, and names below it, lead to the shards that hold or own the edge. It answers for that
//! zone alone and asks nobody.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use proto::{
    id::{EdgeId, ShardId},
    target::HostPort,
};
use runtime::{link::quic::udp_socket, shutdown::Tasks};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UdpSocket,
    time::{Instant, timeout},
};

use self::{
    limit::{Limit, Verdict},
    zone::{Found, Host, Zone},
};
use super::Visitor;
use crate::{config::DnsConfig, directory::Directory, registry::Registry, route::Router};

mod limit;
mod zone;

/// The name of the door.
pub const DOOR: &str = "dns";
/// The longest question that is taken.
const QUESTION: usize = 4096;
/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(10);
/// Questions that are answered in a row before others get their turn.
const IN_A_ROW: u32 = 32;

/// The door.
#[derive(Debug)]
pub struct DnsDoor {
    router: Router,
    registry: Registry,
    directory: Directory,
    me: ShardId,
    zone: Zone,
    limit: Mutex<Limit>,
}

impl DnsDoor {
    /// Puts it together.
    ///
    /// # Errors
    /// If the domain is none.
    pub fn new(
        config: &DnsConfig,
        domain: &str,
        parts: (Router, Registry, Directory, ShardId),
    ) -> Result<Self, String> {
        let (router, registry, directory, me) = parts;
        let zone = Zone::new(domain, config.ttl_secs)?;
        let limit = Mutex::new(Limit::new(config.answers_per_sec));
        Ok(Self { router, registry, directory, me, zone, limit })
    }

    /// Binds the UDP port.
    ///
    /// # Errors
    /// If it is taken.
    pub fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
        let socket = udp_socket(address)?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }

    /// Answers over UDP until `accepting` stops.
    pub async fn serve(self: Arc<Self>, socket: UdpSocket, accepting: Tasks) {
        let (mut buffer, mut row) = ([0; QUESTION], 0);
        loop {
            let received = tokio::select! {
                biased;
                () = accepting.stopping() => return,
                received = socket.recv_from(&mut buffer) => received,
            };
            // An error is that of an answer to somebody who is gone.
            let Ok((length, from)) = received else { continue };
            let (verdict, question) = (self.limit.lock().judge(from.ip(), Instant::now()), &buffer[..length]);
            let (answer, outcome) = match verdict {
                Verdict::Answer => (self.answer(question, false), "udp"),
                Verdict::ByTcp => (Zone::come_by_tcp(question), "limited"),
                Verdict::Drop => (None, "dropped"),
            };
            self.count(outcome);
            if let Some(answer) = answer {
                // Without room it is lost, and the client asks again.
                let _ = socket.try_send_to(&answer, from);
            }
            row += 1;
            if row == IN_A_ROW {
                row = 0;
                tokio::task::yield_now().await;
            }
        }
    }

    /// Answers one connection, question by question, until it is silent.
    pub async fn visit(self: Arc<Self>, visitor: Visitor, stopping: Tasks) {
        let mut socket = visitor.socket;
        loop {
            let asked = stopping.token().run_until_cancelled_owned(timeout(IDLE, read(&mut socket))).await;
            let Some(Ok(Ok(question))) = asked else { return };
            let Some(answer) = self.answer(&question, true) else { return };
            self.count("tcp");
            let Ok(length) = u16::try_from(answer.len()) else { return };
            let frame = [&length.to_be_bytes()[..], &answer].concat();
            if !matches!(timeout(IDLE, socket.write_all(&frame)).await, Ok(Ok(()))) {
                return;
            }
        }
    }

    fn count(&self, outcome: &str) {
        self.router.metrics().dns.with_label_values(&[outcome]).inc();
    }

    fn answer(&self, question: &[u8], tcp: bool) -> Option<Vec<u8>> {
        let state = self.router.state();
        // Serial numbers only have to change when something does.
        let serial = u32::try_from(state.ring.epoch() & u64::from(u32::MAX)).unwrap_or(0);
        self.zone.answer(question, tcp, serial, |name| self.look(name))
    }

    /// Where a name below the domain leads.
    fn look(&self, name: &str) -> Found {
        let state = self.router.state();
        if state.revision == 0 {
            return Found::NotYet;
        }
        let enrolled = |text: &str| text.parse::<EdgeId>().ok().filter(|edge| state.edges.contains_key(edge));
        let edge = enrolled(name).or_else(|| name.split_once('.').and_then(|(_, edge)| enrolled(edge)));
        let Some(edge) = edge else {
            // The zone's own servers are all shards.
            let all = || state.shards.iter().flat_map(|c| hosts(&c.addresses)).collect();
            return if name == "ns" { Found::Hosts(all()) } else { Found::Nobody };
        };
        let here = self.registry.find(&edge).map(|_| self.me.clone());
        let holder = here.or_else(|| self.directory.holder(&edge).map(|(shard, _)| shard));
        let owner = state.ring.owner(&edge).map(|member| member.shard.clone());
        let mut shards: Vec<ShardId> = holder.into_iter().chain(owner).collect();
        shards.dedup();
        let addresses = |shard: &ShardId| state.shards.iter().find(|c| c.shard == *shard).map(|c| hosts(&c.addresses));
        Found::Hosts(shards.iter().filter_map(addresses).flatten().collect())
    }
}

fn hosts(addresses: &[String]) -> Vec<Host> {
    let host = |address: &String| {
        let host = address.parse::<HostPort>().ok()?.host;
        Some(host.parse().map_or_else(|_| Host::Name(host), Host::Ip))
    };
    addresses.iter().filter_map(host).collect()
}

async fn read(socket: &mut tokio::net::TcpStream) -> io::Result<Vec<u8>> {
    let length = usize::from(socket.read_u16().await?);
    if length > QUESTION {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut question = vec![0; length];
    socket.read_exact(&mut question).await?;
    Ok(question)
}
