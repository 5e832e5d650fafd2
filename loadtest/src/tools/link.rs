//! A link emulator in user space: two TUN devices, and each packet that goes into one comes out of the other as the
//! [`bottleneck`](loadtest::bottleneck) says. Whoever starts it moves the devices into network namespaces.
//!
//! What it is like can be changed while it runs, by lines to a Unix socket ([`words`]).

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use loadtest::bottleneck::{Conditions, Lane};
use parking_lot::Mutex;
use runtime::shutdown;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    time::{Instant, timeout},
};
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::say;

mod words;

use words::{Order, Side};

/// The largest IP packet.
const MOST: usize = 65_535;
/// Packets that are read before those that are due are written.
const BATCH: usize = 32;
/// How long a forwarder sleeps at most: it then sees that it is to stop, or that the link has been changed.
const NAP: u64 = 20_000_000;
/// Packets that the kernel holds for a device: the queue is to be the emulator's own.
const DEVICE_QUEUE: u32 = 2000;
/// How long an order may take to come.
const ORDER: Duration = Duration::from_secs(5);
/// Longest order in bytes.
const LONGEST: u64 = 4096;

/// What to do with an emulated link.
#[derive(Debug, Subcommand)]
pub(crate) enum LinkCommand {
    /// Makes the two devices and forwards between them until it is told to stop; prints `ready`
    Run(RunArgs),
    /// Sends an order to one that runs: `both delay=100ms loss=5% rate=20mbit`, `a mtu=1280`, `stats`, `forget`
    Tell(TellArgs),
}

/// Which devices.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Name of one device; what is sent into it is direction `a`
    #[arg(long, value_name = "DEVICE")]
    a: String,
    /// Name of the other; what is sent into it is direction `b`
    #[arg(long, value_name = "DEVICE")]
    b: String,
    /// Where it takes orders
    #[arg(long, value_name = "FILE")]
    socket: PathBuf,
    /// Seed of its chance
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What it is like at first, as in `tell`
    order: Vec<String>,
}

/// An order.
#[derive(Debug, Args)]
pub(crate) struct TellArgs {
    /// Where the emulator takes orders
    #[arg(long, value_name = "FILE")]
    socket: PathBuf,
    /// SIDE (a, b or both) and NAME=VALUE: delay, jitter, loss, burst, rate, queue, reorder, policer, mtu; `clear` before
    /// them for a wire
    #[arg(required = true)]
    order: Vec<String>,
}

type SharedLane = Arc<Mutex<Lane<Vec<u8>>>>;

/// Both directions.
#[derive(Clone, Debug)]
struct Lanes {
    a: SharedLane,
    b: SharedLane,
}

/// Runs one, or talks to one.
///
/// # Errors
/// If there can be no devices, or an order is not understood.
pub(crate) async fn run(command: LinkCommand) -> anyhow::Result<()> {
    match command {
        LinkCommand::Run(args) => emulate(args).await,
        LinkCommand::Tell(args) => {
            let answer = timeout(ORDER, tell(&args.socket, &args.order.join(" "))).await.context("no answer")??;
            say(&answer)?;
            if answer.starts_with("error") { bail!("the order was not followed") } else { Ok(()) }
        }
    }
}

async fn emulate(args: RunArgs) -> anyhow::Result<()> {
    let lane = |seed| Arc::new(Mutex::new(Lane::new(Conditions::default(), seed)));
    let lanes = Lanes { a: lane(args.seed), b: lane(args.seed ^ 0x5eed) };
    if !args.order.is_empty() {
        lanes.follow(&args.order.join(" ")).map_err(anyhow::Error::msg)?;
    }
    let (a, b) = (Arc::new(device(&args.a)?), Arc::new(device(&args.b)?));
    let orders = UnixListener::bind(&args.socket).with_context(|| format!("{}", args.socket.display()))?;
    let (began, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
    let forward = |from: &Arc<SyncDevice>, to: &Arc<SyncDevice>, lane: &SharedLane| {
        let (from, to, lane, stop) = (Arc::clone(from), Arc::clone(to), Arc::clone(lane), Arc::clone(&stop));
        let forwarder = Forwarder { from, to, lane, began, stop };
        std::thread::spawn(move || forwarder.run())
    };
    let forwarders = [forward(&a, &b, &lanes.a), forward(&b, &a, &lanes.b)];
    say("ready")?;
    let ended = tokio::select! {
        biased;
        ended = shutdown::signal() => ended.map(drop).map_err(anyhow::Error::from),
        ended = take_orders(&orders, &lanes) => ended.map_err(anyhow::Error::from),
    };
    stop.store(true, Ordering::Relaxed);
    forwarders.into_iter().try_for_each(join)?;
    let _ = std::fs::remove_file(&args.socket);
    ended
}

fn join(forwarder: JoinHandle<io::Result<()>>) -> anyhow::Result<()> {
    match forwarder.join() {
        Ok(ended) => Ok(ended?),
        Err(_) => bail!("a forwarder panicked"),
    }
}

fn device(name: &str) -> anyhow::Result<SyncDevice> {
    let device = DeviceBuilder::new().name(name).enable(false).build_sync();
    let device = device.with_context(|| format!("TUN device {name} (it takes root, and /dev/net/tun)"))?;
    device.set_tx_queue_len(DEVICE_QUEUE)?;
    device.set_nonblocking(true)?;
    Ok(device)
}

/// One direction, in a thread of its own.
struct Forwarder {
    from: Arc<SyncDevice>,
    to: Arc<SyncDevice>,
    lane: SharedLane,
    began: Instant,
    stop: Arc<AtomicBool>,
}

impl Forwarder {
    fn run(&self) -> io::Result<()> {
        let mut room = vec![0; MOST];
        while !self.stop.load(Ordering::Relaxed) {
            let next = self.lane.lock().next();
            let nap = next.map_or(NAP, |at| at.saturating_sub(self.now()).min(NAP));
            let mut fds = [PollFd::from_borrowed_fd(self.from.as_fd(), PollFlags::IN)];
            #[allow(clippy::cast_possible_wrap, reason = "less than a second")]
            match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: nap as i64 })) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.read(&mut room)?;
            self.write();
        }
        Ok(())
    }

    fn read(&self, room: &mut [u8]) -> io::Result<()> {
        for _ in 0..BATCH {
            match self.from.recv(room) {
                Ok(size) => self.lane.lock().put(self.now(), size as u64, room[..size].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // The device is down.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write(&self) {
        loop {
            let due = self.lane.lock().take(self.now());
            let Some(packet) = due else { return };
            // A device that is down, or a namespace that is gone: as if nobody were there.
            let _ = self.to.send(&packet);
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// One order at a time: a line, and a line back.
async fn take_orders(orders: &UnixListener, lanes: &Lanes) -> io::Result<()> {
    loop {
        let (socket, _) = orders.accept().await?;
        // Whoever breaks off is no concern of the link.
        let _ = timeout(ORDER, answer(socket, lanes)).await;
    }
}

async fn answer(socket: UnixStream, lanes: &Lanes) -> io::Result<()> {
    let (read, mut write) = socket.into_split();
    let mut line = String::new();
    BufReader::new(read.take(LONGEST)).read_line(&mut line).await?;
    let answer = lanes.follow(line.trim()).unwrap_or_else(|why| format!("error: {why}"));
    write.write_all(answer.as_bytes()).await?;
    write.shutdown().await
}

async fn tell(socket: &Path, order: &str) -> anyhow::Result<String> {
    let stream = UnixStream::connect(socket).await.with_context(|| format!("{}", socket.display()))?;
    let (mut read, mut write) = stream.into_split();
    write.write_all(format!("{order}\n").as_bytes()).await?;
    let mut answer = String::new();
    read.read_to_string(&mut answer).await?;
    Ok(answer)
}

impl Lanes {
    /// Does as an order says. Returns what to answer.
    fn follow(&self, order: &str) -> Result<String, String> {
        match order.parse()? {
            Order::Stats => Ok(format!("{}\n{}", stats("a", &self.a), stats("b", &self.b))),
            Order::Forget => {
                self.of(Side::Both).for_each(|lane| lane.lock().forget());
                Ok("ok".into())
            }
            Order::Change(side, change) => {
                self.of(side).try_for_each(|lane| {
                    let mut lane = lane.lock();
                    let next = change.applied(lane.conditions())?;
                    lane.change(next);
                    Ok::<_, String>(())
                })?;
                Ok("ok".into())
            }
        }
    }

    fn of(&self, side: Side) -> impl Iterator<Item = &SharedLane> {
        let (a, b) = (side != Side::B, side != Side::A);
        a.then_some(&self.a).into_iter().chain(b.then_some(&self.b))
    }
}

fn stats(side: &str, lane: &SharedLane) -> String {
    let lane = lane.lock();
    let (counts, delays) = lane.seen();
    format!(
        "side={side} offered={} sent={} sent_bytes={} dropped={} policed={} lost={} too_big={} queue_p50_ms={:.2} queue_p99_ms={:.2}",
        counts.offered,
        counts.sent,
        counts.sent_bytes,
        counts.dropped,
        counts.policed,
        counts.lost,
        counts.too_big,
        delays.share_ms(0.5),
        delays.share_ms(0.99),
    )
}
