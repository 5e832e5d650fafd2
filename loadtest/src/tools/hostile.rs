//! Those whom a door must bear: many who say nothing, or little by little, and those who talk nonsense.

use std::{net::Ipv4Addr, time::Duration};

use clap::Args;
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use runtime::shutdown;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream, UdpSocket},
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::say;

/// Connections from one address of 127.0.0.0/8; more than this and its ports run out. Each run has addresses of its own,
/// because ports rest for a minute after their use.
const PER_ADDRESS: usize = 10_000;
/// Connections that are being opened at once.
const AT_ONCE: usize = 200;

/// Whom to keep busy.
#[derive(Debug, Args)]
pub(crate) struct HoldArgs {
    /// Where
    #[arg(long, value_name = "HOST:PORT")]
    connect: std::net::SocketAddr,
    /// How many
    #[arg(long, default_value_t = 10_000)]
    count: usize,
    /// What to say on each; `\n` and `\r` are line ends
    #[arg(long, default_value = "")]
    say: String,
    /// Says one more byte every second on each
    #[arg(long)]
    drip: bool,
}

/// Opens them, prints `held N`, and holds them until a signal or the end of standard input comes; then says how many
/// were still open.
pub(crate) async fn hold(args: HoldArgs) -> anyhow::Result<()> {
    let words = args.say.replace("\\n", "\n").replace("\\r", "\r");
    let (mut held, mut tasks, mut begun) = (Vec::with_capacity(args.count), JoinSet::new(), 0);
    let (began, network) = (Instant::now(), rand::random());
    while held.len() < args.count {
        while begun < args.count && tasks.len() < AT_ONCE {
            let (to, words) = (args.connect, words.clone());
            tasks.spawn(async move {
                let mut socket = open(to, network, begun).await?;
                socket.write_all(words.as_bytes()).await?;
                std::io::Result::Ok(socket)
            });
            begun += 1;
        }
        match tasks.join_next().await {
            Some(socket) => held.push(socket??),
            None => break,
        }
    }
    say(format_args!("held={} seconds={:.2}", held.len(), began.elapsed().as_secs_f64()))?;
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let told = async {
        let mut stdin = tokio::io::stdin();
        while matches!(stdin.read(&mut [0; 64]).await, Ok(1..)) {}
    };
    tokio::pin!(told);
    let signal = shutdown::signal();
    tokio::pin!(signal);
    loop {
        tokio::select! {
            biased;
            _ = &mut signal => break,
            () = &mut told => break,
            _ = tick.tick() => {
                if args.drip {
                    held.retain(|socket| socket.try_write(b"x").is_ok());
                }
            }
        }
    }
    let open = held.iter().filter(|socket| is_open(socket)).count();
    say(format_args!("open={open}"))?;
    // A read of standard input that waits in a thread would hold the end up.
    std::process::exit(0);
}

fn is_open(socket: &TcpStream) -> bool {
    let mut buffer = [0; 1024];
    loop {
        match socket.try_read(&mut buffer) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(e) => return e.kind() == std::io::ErrorKind::WouldBlock,
        }
    }
}

async fn open(to: std::net::SocketAddr, [a, b]: [u8; 2], number: usize) -> std::io::Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if to.ip().is_loopback() && to.is_ipv4() {
        #[allow(clippy::cast_possible_truncation, reason = "a handful of addresses")]
        let from = Ipv4Addr::new(127, a.max(1), b, 1 + (number / PER_ADDRESS) as u8);
        socket.bind((from, 0).into())?;
    }
    socket.connect(to).await
}

/// Whom to annoy.
#[derive(Debug, Args)]
pub(crate) struct GarbageArgs {
    /// A TCP port; can be repeated
    #[arg(long, value_name = "ADDRESS:PORT")]
    tcp: Vec<std::net::SocketAddr>,
    /// A UDP port; can be repeated
    #[arg(long, value_name = "ADDRESS:PORT")]
    udp: Vec<std::net::SocketAddr>,
    /// For how long
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
}

/// Sends random bytes, some of which begin like something that belongs there, and prints how much of it.
pub(crate) async fn garbage(args: GarbageArgs) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs_f64(args.seconds);
    let mut tasks = JoinSet::new();
    for to in args.tcp {
        for _ in 0..8 {
            tasks.spawn(tcp_garbage(to, until));
        }
    }
    for to in args.udp {
        tasks.spawn(udp_garbage(to, until));
    }
    let (mut tries, mut bytes) = (0, 0);
    while let Some(done) = tasks.join_next().await {
        let (some, sent) = done?;
        tries += some;
        bytes += sent;
    }
    Ok(say(format_args!("tries={tries} bytes={bytes}"))?)
}

/// Beginnings of what doors understand: HTTP, TLS, and frames of a length that nobody has.
const BEGINNINGS: [&[u8]; 9] = [
    b"",
    b"GET / HTTP/1.1\r\nHost: ",
    b"CONNECT a:1 HTTP/1.1\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x16\x03\x01\xff\xff",
    b"\x05\x01\x00",
    b"\xff\xff\xff\xff",
];

async fn tcp_garbage(to: std::net::SocketAddr, until: Instant) -> (u64, u64) {
    let (mut random, mut tries, mut sent) = (SmallRng::from_rng(&mut rand::rng()), 0, 0);
    while Instant::now() < until {
        let Ok(mut socket) = TcpStream::connect(to).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        tries += 1;
        let mut bytes = BEGINNINGS[random.random_range(0..BEGINNINGS.len())].to_vec();
        let mut noise = vec![0; random.random_range(0..20_000)];
        random.fill_bytes(&mut noise);
        bytes.extend_from_slice(&noise);
        // Being thrown out is what one expects.
        if socket.write_all(&bytes).await.is_ok() {
            sent += bytes.len() as u64;
            let _ = timeout(Duration::from_millis(20), socket.read(&mut [0; 512])).await;
        }
    }
    (tries, sent)
}

async fn udp_garbage(to: std::net::SocketAddr, until: Instant) -> (u64, u64) {
    let (mut random, mut tries, mut sent) = (SmallRng::from_rng(&mut rand::rng()), 0, 0);
    let from = if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
    let Ok(socket) = UdpSocket::bind(from).await else { return (0, 0) };
    while Instant::now() < until {
        let mut datagram = vec![0; random.random_range(1..1452)];
        random.fill_bytes(&mut datagram);
        // Half of them look like the first packet of a QUIC connection.
        if datagram.len() > 5 && random.random() {
            datagram[..5].copy_from_slice(&[0xc3, 0, 0, 0, 1]);
        }
        if socket.send_to(&datagram, to).await.is_ok() {
            tries += 1;
            sent += datagram.len() as u64;
        }
        if tries % 50 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    (tries, sent)
}
