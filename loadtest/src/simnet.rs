//! A network in memory, for simulations on tokio's paused clock.
//!
//! Every address is one of [`Net::endpoint`]'s; between two addresses' hosts there are two directed links, each with its
//! latency, jitter, loss and rate, and with chance of its own: what happens on one link never changes what chance holds
//! for another. The same seed gives the same [`Log`], as long as the programs above do the same.
//!
//! It shows nothing of a kernel: no segmentation offload, no path MTU, no ICMP.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use quinn::{Endpoint, EndpointConfig, ServerConfig, TokioRuntime};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use runtime::shutdown::Tasks;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};

mod log;
mod socket;
#[cfg(test)]
mod tests;

pub use log::{Entry, Fate, Log};
use socket::{Inbox, SimSocket};

/// Pauses before a message is sent again, as TCP makes them: the first, and the longest.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(4));

/// One direction between two hosts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Path {
    /// Of every datagram.
    pub latency: Duration,
    /// Added by chance, uniform from 0 to this, so that datagrams overtake each other.
    pub jitter: Duration,
    /// Part that is lost, from 0 to 1.
    pub loss: f64,
    /// Bytes in a second; `None` is without bound.
    pub rate: Option<u64>,
    /// How much a link with a rate holds back before it drops, as the time that it takes to send.
    pub queue: Duration,
}

impl Default for Path {
    /// A good wide area: 10 to 12 ms one way, nothing lost.
    fn default() -> Self {
        Self {
            latency: Duration::from_millis(10),
            jitter: Duration::from_millis(2),
            loss: 0.0,
            rate: None,
            queue: Duration::from_millis(200),
        }
    }
}

/// The network. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Net {
    world: Arc<Mutex<World>>,
    sooner: Arc<Notify>,
}

#[derive(Debug)]
struct World {
    seed: u64,
    began: Instant,
    usual: Path,
    lines: BTreeMap<(IpAddr, IpAddr), Line>,
    frozen: BTreeSet<IpAddr>,
    /// When a host last had a trouble of its own.
    troubled: BTreeMap<IpAddr, Instant>,
    plugs: BTreeMap<SocketAddr, u64>,
    sockets: BTreeMap<u64, Plugged>,
    flying: BinaryHeap<Reverse<Flight>>,
    sent: u64,
    opened: u64,
    log: Log,
}

#[derive(Debug)]
struct Plugged {
    address: SocketAddr,
    inbox: Arc<Inbox>,
}

/// One direction, with its state.
#[derive(Debug)]
struct Line {
    path: Path,
    cut: bool,
    /// When it was last cut, healed or changed.
    touched: Instant,
    chance: StdRng,
    busy_until: Instant,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flight {
    due: Instant,
    number: u64,
    from: SocketAddr,
    to: SocketAddr,
    datagram: Vec<u8>,
}

/// A number that depends on the seed and on what it is for.
#[must_use]
pub fn seed_for(seed: u64, what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    (seed, what).hash(&mut hasher);
    hasher.finish()
}

impl Net {
    /// A network in which links are as `usual` until told otherwise. Its clock begins now; datagrams travel until
    /// `tasks` stop.
    #[must_use]
    pub fn new(seed: u64, usual: Path, tasks: &Tasks) -> Self {
        let world = World {
            seed,
            began: Instant::now(),
            usual,
            lines: BTreeMap::new(),
            frozen: BTreeSet::new(),
            troubled: BTreeMap::new(),
            plugs: BTreeMap::new(),
            sockets: BTreeMap::new(),
            flying: BinaryHeap::new(),
            sent: 0,
            opened: 0,
            log: Log::default(),
        };
        let net = Self { world: Arc::new(Mutex::new(world)), sooner: Arc::new(Notify::new()) };
        tasks.spawn(tasks.token().run_until_cancelled_owned(net.clone().deliver()));
        net
    }

    /// The seed of its chance.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.world.lock().seed
    }

    /// Opens an endpoint; whoever had the address before is cut off, as by the death of its host.
    ///
    /// # Errors
    /// Never; quinn states it as possible.
    pub fn endpoint(&self, address: SocketAddr, server: Option<ServerConfig>) -> io::Result<Endpoint> {
        self.endpoint_with(EndpointConfig::default(), address, server)
    }

    /// Opens an endpoint with a configuration of its own.
    ///
    /// # Errors
    /// As [`Net::endpoint`].
    pub fn endpoint_with(
        &self,
        mut config: EndpointConfig,
        address: SocketAddr,
        server: Option<ServerConfig>,
    ) -> io::Result<Endpoint> {
        let inbox = Arc::new(Inbox::default());
        let (number, seed) = {
            let mut world = self.world.lock();
            world.opened += 1;
            let number = world.opened;
            if let Some(before) = world.plugs.insert(address, number) {
                world.sockets.remove(&before);
            }
            world.sockets.insert(number, Plugged { address, inbox: Arc::clone(&inbox) });
            (number, seed_for(world.seed, (address, number)))
        };
        let mut bytes = [0; 32];
        StdRng::seed_from_u64(seed).fill(&mut bytes);
        config.rng_seed(Some(bytes));
        let socket = Arc::new(SimSocket { net: self.clone(), number, inbox });
        Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))
    }

    /// Pulls the plug of an address: nothing leaves it or reaches it any more, and its program never hears of it.
    pub fn unplug(&self, address: SocketAddr) {
        let mut world = self.world.lock();
        world.trouble(address.ip());
        if let Some(number) = world.plugs.remove(&address) {
            world.sockets.remove(&number);
        }
    }

    /// A NAT in front of an address forgets it: from now on its datagrams come from another one.
    pub fn roam(&self, from: SocketAddr, to: SocketAddr) {
        let mut world = self.world.lock();
        if let Some(number) = world.plugs.remove(&from) {
            world.plugs.insert(to, number);
            if let Some(plugged) = world.sockets.get_mut(&number) {
                plugged.address = to;
            }
        }
    }

    /// Changes both directions between two hosts.
    pub fn set_path(&self, a: IpAddr, b: IpAddr, path: Path) {
        self.both(a, b, |line| line.path = path);
    }

    /// Changes every link, those to come included.
    pub fn set_all(&self, path: Path) {
        let mut world = self.world.lock();
        world.usual = path;
        world.lines.values_mut().for_each(|line| line.change(|line| line.path = path));
    }

    /// Swallows everything between two hosts, without a word to either.
    pub fn cut(&self, a: IpAddr, b: IpAddr) {
        self.both(a, b, |line| line.cut = true);
    }

    /// Swallows everything in one direction.
    pub fn cut_one_way(&self, from: IpAddr, to: IpAddr) {
        self.world.lock().line(from, to).change(|line| line.cut = true);
    }

    /// Lets datagrams pass again.
    pub fn heal(&self, a: IpAddr, b: IpAddr) {
        self.both(a, b, |line| line.cut = false);
    }

    /// Lets datagrams pass everywhere, to and from hosts that were frozen as well.
    pub fn heal_all(&self) {
        let mut world = self.world.lock();
        world.lines.values_mut().filter(|line| line.cut).for_each(|line| line.change(|line| line.cut = false));
        for host in std::mem::take(&mut world.frozen) {
            world.trouble(host);
        }
    }

    /// Lets nothing in or out of a host, whoever the other side is.
    pub fn freeze(&self, host: IpAddr) {
        let mut world = self.world.lock();
        world.frozen.insert(host);
        world.trouble(host);
    }

    /// The end of [`Net::freeze`].
    pub fn thaw(&self, host: IpAddr) {
        let mut world = self.world.lock();
        if world.frozen.remove(&host) {
            world.trouble(host);
        }
    }

    /// Notes that a host has a trouble of its own: its process died, or was started.
    pub fn trouble(&self, host: IpAddr) {
        self.world.lock().trouble(host);
    }

    /// Whether nothing passes from one host to another now.
    #[must_use]
    pub fn is_cut(&self, from: IpAddr, to: IpAddr) -> bool {
        self.world.lock().is_cut(from, to)
    }

    /// Whether two hosts had nothing to suffer since then, neither on the way between them nor themselves.
    #[must_use]
    pub fn is_undisturbed(&self, a: IpAddr, b: IpAddr, since: Instant) -> bool {
        let world = self.world.lock();
        let line = |from, to| world.lines.get(&(from, to)).is_none_or(|line| !line.cut && line.touched <= since);
        let host = |host| !world.frozen.contains(&host) && world.troubled.get(&host).is_none_or(|when| *when <= since);
        line(a, b) && line(b, a) && host(a) && host(b)
    }

    /// Carries a message from host to host as TCP does: what is lost is sent again, ever less often. Completes when it
    /// is there, and not as long as there is no way.
    pub async fn carry(&self, from: IpAddr, to: IpAddr) {
        let mut pause = AGAIN.0;
        loop {
            let fate = self.world.lock().message(from, to);
            if let Fate::Flies(after) = fate {
                sleep(after).await;
                if !self.is_cut(from, to) {
                    return;
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(AGAIN.1);
        }
    }

    /// Sends datagrams of random length with random bytes, from an address that nobody has.
    pub fn shout(&self, from: SocketAddr, to: SocketAddr, count: usize) {
        let mut world = self.world.lock();
        let mut chance = StdRng::seed_from_u64(seed_for(world.seed, (from, to, count)));
        for _ in 0..count {
            let mut datagram = vec![0; chance.random_range(1..1500)];
            chance.fill(&mut datagram[..]);
            world.launch(from, to, &datagram);
        }
        self.sooner.notify_one();
    }

    /// Writes something into the log.
    pub fn note(&self, what: impl Into<String>) {
        let mut world = self.world.lock();
        let (at, what) = (world.began.elapsed(), what.into());
        world.log.push(Entry::Note { at, what });
    }

    /// Everything that happened.
    #[must_use]
    pub fn log(&self) -> Log {
        self.world.lock().log.clone()
    }

    /// Simulated time since the beginning.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.world.lock().began.elapsed()
    }

    /// Sockets that are open and plugged in.
    #[must_use]
    pub fn sockets(&self) -> usize {
        self.world.lock().sockets.len()
    }

    fn both(&self, a: IpAddr, b: IpAddr, change: impl Fn(&mut Line)) {
        let mut world = self.world.lock();
        world.line(a, b).change(&change);
        world.line(b, a).change(&change);
    }

    fn address_of(&self, number: u64) -> Option<SocketAddr> {
        self.world.lock().sockets.get(&number).map(|p| p.address)
    }

    fn close(&self, number: u64) {
        let mut world = self.world.lock();
        if let Some(plugged) = world.sockets.remove(&number) {
            world.plugs.remove(&plugged.address);
        }
    }

    fn send(&self, socket: u64, to: SocketAddr, datagram: &[u8]) {
        let mut world = self.world.lock();
        let Some(from) = world.sockets.get(&socket).map(|p| p.address) else { return };
        if world.launch(from, to, datagram) {
            self.sooner.notify_one();
        }
    }

    /// Carries datagrams for ever.
    async fn deliver(self) {
        loop {
            let next = self.world.lock().land();
            let due = async {
                match next {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.sooner.notified() => {}
                () = due => {}
            }
        }
    }
}

impl World {
    fn line(&mut self, from: IpAddr, to: IpAddr) -> &mut Line {
        let (path, chance) = (self.usual, seed_for(self.seed, (from, to)));
        self.lines.entry((from, to)).or_insert_with(|| Line {
            path,
            cut: false,
            touched: self.began,
            chance: StdRng::seed_from_u64(chance),
            busy_until: Instant::now(),
        })
    }

    fn trouble(&mut self, host: IpAddr) {
        self.troubled.insert(host, Instant::now());
    }

    fn is_cut(&mut self, from: IpAddr, to: IpAddr) -> bool {
        self.frozen.contains(&from) || self.frozen.contains(&to) || self.line(from, to).cut
    }

    /// What becomes of so many bytes that are sent now.
    fn fate(&mut self, from: IpAddr, to: IpAddr, size: usize) -> Fate {
        let (now, frozen) = (Instant::now(), self.frozen.contains(&from) || self.frozen.contains(&to));
        self.line(from, to).fate(now, size, frozen)
    }

    fn message(&mut self, from: IpAddr, to: IpAddr) -> Fate {
        let (fate, at) = (self.fate(from, to, 0), self.began.elapsed());
        self.log.push(Entry::Message { at, from, to, fate });
        fate
    }

    /// Sends a datagram on its way. Returns whether it is the next to arrive.
    fn launch(&mut self, from: SocketAddr, to: SocketAddr, datagram: &[u8]) -> bool {
        let (now, size) = (Instant::now(), datagram.len());
        let fate = self.fate(from.ip(), to.ip(), size);
        let at = now - self.began;
        self.log.push(Entry::Datagram { at, from, to, size, fate });
        let Fate::Flies(after) = fate else { return false };
        self.sent += 1;
        let flight = Flight { due: now + after, number: self.sent, from, to, datagram: datagram.to_vec() };
        let first = self.flying.peek().is_none_or(|Reverse(head)| flight.due < head.due);
        self.flying.push(Reverse(flight));
        first
    }

    /// Hands over what is due. Returns when the next is.
    fn land(&mut self) -> Option<Instant> {
        let now = Instant::now();
        loop {
            let due = self.flying.peek().map(|Reverse(head)| head.due)?;
            if due > now {
                return Some(due);
            }
            let Reverse(Flight { from, to, datagram, .. }) = self.flying.pop()?;
            let (at, size) = (now - self.began, datagram.len());
            let cut = self.is_cut(from.ip(), to.ip());
            let inbox = self.plugs.get(&to).and_then(|number| self.sockets.get(number)).map(|p| &p.inbox);
            let fate = match inbox {
                _ if cut => Fate::Cut,
                None => Fate::Nobody,
                Some(inbox) if inbox.put(from, datagram) => continue,
                Some(_) => Fate::Overrun,
            };
            self.log.push(Entry::Datagram { at, from, to, size, fate });
        }
    }
}

impl Line {
    fn change(&mut self, change: impl FnOnce(&mut Self)) {
        self.touched = Instant::now();
        change(self);
    }

    fn fate(&mut self, now: Instant, size: usize, frozen: bool) -> Fate {
        // Drawn for every datagram, so that a cut or a change of the path does not shift what chance holds for later.
        let (lost, jitter) = (self.chance.random::<f64>(), self.chance.random::<f64>());
        if self.cut || frozen {
            return Fate::Cut;
        }
        if lost < self.path.loss {
            return Fate::Lost;
        }
        let mut wait = Duration::ZERO;
        if let Some(rate) = self.path.rate {
            let begins = self.busy_until.max(now);
            if begins - now > self.path.queue {
                return Fate::Queued;
            }
            self.busy_until = begins + Duration::from_secs_f64(size as f64 / rate.max(1) as f64);
            wait = self.busy_until - now;
        }
        Fate::Flies(wait + self.path.latency + self.path.jitter.mul_f64(jitter))
    }
}
