//! The proxy on loopback: CONNECT, and SOCKS5 without a login, on one port. Whoever may talk to this machine's loopback
//! speaks for the edge.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use proto::{
    code::RefuseCode,
    proxy::{
        connect::{self, MAX_HEAD},
        destination::Destination,
        socks::{self, Bad, Command, Reply},
    },
    stream::{Open, Refusal},
    target::Target,
};
use runtime::{
    flow::port::{UdpPort, Visitor},
    shutdown::Tasks,
    speak::{Speaker, Unheard, farewell, while_there},
    splice::TcpEnd,
};
use tokio::{net::TcpStream, time::timeout};

use super::{Doors, FLOWS, Way, forward};

/// How long a program may take to say where it wants to go.
const HEAD: Duration = Duration::from_secs(10);
/// Most bytes that are taken before the answer.
const MAX_EARLY: usize = MAX_HEAD;

/// What a program asked for.
enum Asked {
    Connect(Target),
    Associate,
}

/// Why it is turned away.
enum Away {
    Silently,
    Told(Vec<u8>),
}

impl<E: Into<Self>> From<Unheard<E>> for Away {
    fn from(unheard: Unheard<E>) -> Self {
        match unheard {
            Unheard::Gone => Self::Silently,
            Unheard::Bad(bad) => bad.into(),
        }
    }
}

impl From<Bad> for Away {
    fn from(bad: Bad) -> Self {
        match bad {
            Bad::Version | Bad::Text => Self::Silently,
            Bad::AddressType(_) => Self::Told(Reply::AddressNotSupported.encode().into()),
        }
    }
}

impl From<io::Error> for Away {
    fn from(_: io::Error) -> Self {
        Self::Silently
    }
}

impl From<Infallible> for Away {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// How a refusal is said.
#[derive(Clone, Copy)]
enum Tongue {
    Socks,
    Http,
}

impl Tongue {
    fn refusal(self, refusal: &Refusal) -> Vec<u8> {
        match self {
            Self::Socks => Reply::from(refusal.code).encode().into(),
            Self::Http => answer(refusal.code.http_status(), refusal.code.slug(), &refusal.reason),
        }
    }

    const fn opened(self) -> &'static [u8] {
        match self {
            Self::Socks => const { &Reply::Succeeded.encode() },
            Self::Http => b"HTTP/1.1 200 Connection Established\r\n\r\n",
        }
    }
}

/// Serves one program.
pub(super) async fn visit(doors: Arc<Doors>, socket: TcpStream, from: SocketAddr) {
    let mut speaker = Speaker::new(socket);
    let stop = doors.tasks.token();
    let asking = timeout(HEAD, asked(&doors, &mut speaker));
    let (tongue, asked) = match stop.run_until_cancelled(asking).await {
        Some(Ok(Ok(asked))) => asked,
        Some(Ok(Err(Away::Told(word)))) => return farewell(speaker.socket, &word).await,
        Some(Ok(Err(Away::Silently)) | Err(_)) | None => return,
    };
    let target = match asked {
        Asked::Connect(target) => target,
        Asked::Associate => return associate(doors, speaker).await,
    };
    let reaching = doors.reach(Open::new(target.clone()));
    // Whoever goes away while the dial is pending takes it along.
    match while_there(&mut speaker.socket, &mut speaker.early, MAX_EARLY, reaching).await {
        Some(Ok(way)) => tunnel(&doors, speaker, way, tongue).await,
        Some(Err(refusal)) => {
            tracing::info!(%from, %target, code = %refusal.code, reason = refusal.reason, "refused");
            farewell(speaker.socket, &tongue.refusal(&refusal)).await;
        }
        None => {}
    }
}

async fn tunnel(doors: &Doors, mut speaker: Speaker<TcpStream>, way: Way, tongue: Tongue) {
    if speaker.say(tongue.opened()).await.is_err() {
        return;
    }
    let Ok(end) = TcpEnd::new(speaker.socket, speaker.early.freeze()) else { return };
    doors.carry(end, way).await;
}

async fn asked(doors: &Doors, speaker: &mut Speaker<TcpStream>) -> Result<(Tongue, Asked), Away> {
    let first = speaker.hear(|bytes| Ok::<_, Infallible>(bytes.first().map(|first| (*first, 0)))).await?;
    if first == socks::VERSION {
        return Ok((Tongue::Socks, by_socks(doors, speaker).await?));
    }
    let told = |code: RefuseCode, why: String| Away::Told(Tongue::Http.refusal(&Refusal::because(code, why)));
    let heard = speaker.hear(connect::read).await;
    let to = heard.map_err(|unheard| match unheard {
        Unheard::Gone => Away::Silently,
        Unheard::Bad(bad) => told(RefuseCode::BadRequest, bad.to_string()),
    })?;
    let destination = Destination { host: to.host, port: to.port };
    let target = destination.target(&doors.domain, |_| false);
    let target = target.map_err(|refusal| Away::Told(Tongue::Http.refusal(&refusal)))?;
    Ok((Tongue::Http, Asked::Connect(target)))
}

async fn by_socks(doors: &Doors, speaker: &mut Speaker<TcpStream>) -> Result<Asked, Away> {
    if !speaker.hear(socks::greeting).await?.nothing {
        return Err(Away::Told(socks::NO_METHODS.into()));
    }
    speaker.say(&socks::GO_ON).await?;
    let request = speaker.hear(socks::request).await?;
    match request.command {
        Command::Connect => {}
        Command::Associate => return Ok(Asked::Associate),
        Command::Other(_) => return Err(Away::Told(Reply::CommandNotSupported.encode().into())),
    }
    let destination = Destination { host: request.host, port: request.port };
    let target = destination.target(&doors.domain, |_| false);
    target.map(Asked::Connect).map_err(|refusal| Away::Told(Tongue::Socks.refusal(&refusal)))
}

/// Carries datagrams for as long as the connection that asked for it is there.
async fn associate(doors: Arc<Doors>, mut speaker: Speaker<TcpStream>) {
    let port = async {
        let (local, client) = (speaker.socket.local_addr()?, speaker.socket.peer_addr()?);
        let port = UdpPort::associate(local.ip(), client.ip())?;
        let at = port.local_addr()?;
        Ok::<_, io::Error>((port, at))
    };
    let (port, at) = match port.await {
        Ok(open) => open,
        Err(error) => {
            tracing::warn!(%error, "no UDP port can be opened for a program");
            return farewell(speaker.socket, &Reply::Failure.encode()).await;
        }
    };
    if speaker.say(&Reply::associated(at)).await.is_err() {
        return;
    }
    let here: Tasks = doors.tasks.child();
    let carrying = Arc::clone(&doors);
    let carry = move |visitor: Visitor| {
        let doors = Arc::clone(&carrying);
        async move {
            let Some((host, port)) = visitor.to.clone() else { return };
            match (Destination { host, port }).target(&doors.domain, |_| false) {
                Ok(target) => forward::carry(doors, visitor, target.over_udp()).await,
                Err(refusal) => tracing::info!(reason = refusal.reason, "a flow was refused"),
            }
        }
    };
    let gone = async {
        here.token().run_until_cancelled(speaker.gone()).await;
        here.stop();
    };
    tokio::join!(port.run(here.clone(), doors.tasks.clone(), FLOWS, carry), gone);
}

fn answer(status: u16, slug: &str, reason: &str) -> Vec<u8> {
    let length = reason.len() + 1;
    format!(
        "HTTP/1.1 {status} {slug}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{reason}\n"
    )
    .into_bytes()
}
