//! SOCKS5 at the proxy door: `CONNECT` and `UDP ASSOCIATE` with a user name and an access token, where tokens may be shown
//! without TLS.
//! Names are resolved by the mesh (`socks5h://` in curl); an address means nothing here.

use std::{sync::Arc, time::Duration};

use proto::{
    code::RefuseCode,
    proxy::{
        destination::Destination,
        socks::{self, Bad, Command, Reply},
    },
    stream::Refusal,
    target::Target,
};
use runtime::{
    flow::{
        self,
        port::{UdpPort, Visitor},
    },
    speak::{Speaker, Unheard, farewell, while_there},
    splice::TcpEnd,
};
use tokio::{net::TcpStream, time::timeout};

use super::{
    DOOR, ProxyDoor,
    authorization::Shown,
    credentials::{self, Caller},
};
use crate::{flow::Opened, route};

/// First byte of SOCKS5.
pub(super) const SOCKS5: u8 = socks::VERSION;
/// How long the visitor may take to say who it is and where it wants to go.
const HEAD: Duration = Duration::from_secs(10);
/// Most bytes that are taken before the answer.
const MAX_EARLY: usize = 16 * 1024;

/// Targets that one association talks to at once; of more, the most silent one ends.
const FLOWS: usize = 64;
/// How long datagrams to a target are not listened to that was refused.
const DEAF: Duration = Duration::from_secs(1);

/// What a visitor asks for.
enum Asked {
    /// A connection.
    Connect(route::Request),
    /// A way for datagrams, as this one.
    Associate(Caller),
}

/// Why a visitor is turned away.
enum Away {
    /// It is gone, or has said something that deserves no answer.
    Silently(&'static str),
    /// With these bytes.
    Told(&'static str, &'static [u8]),
    /// With a reply to its request.
    Refused(Reply, Refusal),
}

impl From<Bad> for Away {
    fn from(bad: Bad) -> Self {
        match bad {
            Bad::Version | Bad::Text => Self::Silently("socks"),
            Bad::AddressType(_) => {
                Self::Refused(Reply::AddressNotSupported, Refusal::because(RefuseCode::BadRequest, bad.to_string()))
            }
        }
    }
}

impl From<Refusal> for Away {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Reply::from(refusal.code), refusal)
    }
}

impl From<Unheard<Bad>> for Away {
    fn from(unheard: Unheard<Bad>) -> Self {
        match unheard {
            Unheard::Gone => Self::Silently("gone"),
            Unheard::Bad(bad) => bad.into(),
        }
    }
}

impl From<std::io::Error> for Away {
    fn from(_: std::io::Error) -> Self {
        Self::Silently("gone")
    }
}

impl ProxyDoor {
    /// Serves one visitor. `trusted` is whether it may show a token without TLS.
    pub(super) async fn visit_by_socks(self: Arc<Self>, socket: TcpStream, from: String, trusted: bool) {
        let mut speaker = Speaker::new(socket);
        let asking = timeout(HEAD, self.asked(&mut speaker, &from, trusted));
        let asked = match self.stopping.run_until_cancelled(asking).await {
            Some(Ok(asked)) => asked,
            Some(Err(_)) => Err(Away::Silently("socks-timeout")),
            None => return,
        };
        let dialled = match asked {
            Ok(Asked::Associate(caller)) => return self.associate(speaker, from, caller).await,
            Ok(Asked::Connect(route)) => {
                let dial = async { Ok(self.router.open(route).await?.opened().await?) };
                // Whoever goes away while the dial is pending takes it along.
                let there = while_there(&mut speaker.socket, &mut speaker.early, MAX_EARLY, dial).await;
                there.unwrap_or(Err(Away::Silently("gone")))
            }
            Err(away) => Err(away),
        };
        match dialled {
            Ok(opened) => tunnel(speaker, opened).await,
            Err(away) => self.turn_away(speaker.socket, &from, away).await,
        }
    }

    /// Hears who it is and where it wants to go.
    async fn asked(&self, speaker: &mut Speaker<TcpStream>, from: &str, trusted: bool) -> Result<Asked, Away> {
        if !speaker.hear(socks::greeting).await?.password || !trusted {
            // There is no way to say why: SOCKS5 has one number for it. The log has the sentence.
            return Err(Away::Told(if trusted { "socks-method" } else { "socks-plain" }, &socks::NO_METHODS));
        }
        speaker.say(&socks::SAY_WHO).await?;
        let login = speaker.hear(socks::login).await?;
        self.router.knows_people().await?;
        let state = self.router.state();
        let shown = Shown::Basic { user: login.user, token: login.token };
        let stranger = |_| Away::Told("socks-login", &socks::STRANGER);
        let caller = credentials::by_token(Some(shown), &state).map_err(stranger)?;
        drop(state);
        speaker.say(&socks::WELCOME).await?;
        let request = speaker.hear(socks::request).await?;
        match request.command {
            Command::Connect => {}
            // Where its datagrams come from is only known when they come.
            Command::Associate => return Ok(Asked::Associate(caller)),
            Command::Other(_) => {
                let why = "only CONNECT and UDP ASSOCIATE are served";
                return Err(Away::Refused(Reply::CommandNotSupported, Refusal::because(RefuseCode::Unsupported, why)));
            }
        }
        let target = self.target(&Destination { host: request.host, port: request.port })?;
        let route = route::Request::new(caller.principal, from.to_owned(), DOOR, target);
        Ok(Asked::Connect(route::Request { credential: Some(caller.credential), ..route }))
    }

    fn target(&self, destination: &Destination) -> Result<Target, Refusal> {
        let state = self.router.state();
        destination.target(&self.domain, |edge| state.edges.contains_key(edge))
    }

    /// Carries datagrams for as long as the connection that asked for it is there.
    async fn associate(self: Arc<Self>, mut speaker: Speaker<TcpStream>, from: String, caller: Caller) {
        let opening = || {
            let (local, client) = (speaker.socket.local_addr()?, speaker.socket.peer_addr()?);
            let port = UdpPort::associate(local.ip(), client.ip())?;
            let at = port.local_addr()?;
            Ok::<_, std::io::Error>((port, at))
        };
        let (port, at) = match opening() {
            Ok(open) => open,
            Err(error) => {
                let why = format!("no UDP port can be opened: {error}");
                let away = Away::Refused(Reply::Failure, Refusal::because(RefuseCode::Internal, why));
                return self.turn_away(speaker.socket, &from, away).await;
            }
        };
        if speaker.say(&Reply::associated(at)).await.is_err() {
            return;
        }
        let here = self.tasks.child();
        let door = Arc::clone(&self);
        let carry = move |visitor: Visitor| Arc::clone(&door).carry(visitor, caller.clone());
        let gone = async {
            self.stopping.run_until_cancelled(speaker.gone()).await;
            here.stop();
        };
        tokio::join!(port.run(here.clone(), self.tasks.clone(), FLOWS, carry), gone);
    }

    /// Carries the datagrams of one association to one target.
    async fn carry(self: Arc<Self>, visitor: Visitor, caller: Caller) {
        let Some((host, port)) = visitor.to.clone() else { return };
        let opened = match self.target(&Destination { host, port }) {
            Ok(target) => {
                let route = route::Request::flow(caller.principal, visitor.from.to_string(), DOOR, target);
                self.router.open(route::Request { credential: Some(caller.credential), ..route }).await
            }
            Err(refusal) => Err(refusal),
        };
        match opened {
            Ok(pending) => pending.flow(visitor.side(), Some(flow::IDLE)).await,
            Err(refusal) => {
                self.turned_away("request");
                tracing::debug!(from = %visitor.from, code = %refusal.code, reason = refusal.reason, "refused");
                tokio::time::sleep(DEAF).await;
                drop(visitor);
            }
        }
    }

    async fn turn_away(&self, socket: TcpStream, from: &str, away: Away) {
        match away {
            Away::Silently(why) => self.turned_away(why),
            Away::Told(why, word) => {
                self.turned_away(why);
                tracing::info!(
                    from,
                    why,
                    "a visitor by SOCKS5 was turned away: it takes a user name with an access token, and without \
                     doors.proxy_plain it has to come from this machine"
                );
                farewell(socket, word).await;
            }
            Away::Refused(reply, refusal) => {
                self.turned_away("request");
                tracing::debug!(from, code = %refusal.code, reason = refusal.reason, "refused");
                farewell(socket, &reply.encode()).await;
            }
        }
    }
}

async fn tunnel(mut speaker: Speaker<TcpStream>, opened: Opened) {
    if speaker.say(&Reply::Succeeded.encode()).await.is_err() {
        return;
    }
    let Ok(end) = TcpEnd::new(speaker.socket, speaker.early.freeze()) else { return };
    opened.splice(end).await;
}
