//! SOCKS5 at the proxy door: `CONNECT` with a user name and an access token, where tokens may be shown without TLS.
//! Names are resolved by the mesh (`socks5h://` in curl); an address means nothing here.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use proto::{code::RefuseCode, stream::Refusal};
use runtime::splice::TcpEnd;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use self::wire::{Bad, Heard, Reply};
use super::{DOOR, ProxyDoor, authorization::Shown, credentials};
use crate::{
    doors::{destination::Destination, visit},
    flow::Opened,
    route,
};

mod wire;

/// First byte of SOCKS5.
pub(super) const SOCKS5: u8 = wire::VERSION;
/// How long the visitor may take to say who it is and where it wants to go.
const HEAD: Duration = Duration::from_secs(10);
/// Most bytes that are taken before the answer.
const MAX_EARLY: usize = 16 * 1024;

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
        Self::Refused(reply(refusal.code), refusal)
    }
}

/// The closest to a code that SOCKS5 has.
const fn reply(code: RefuseCode) -> Reply {
    match code {
        RefuseCode::Unauthenticated | RefuseCode::PolicyDenied | RefuseCode::EdgeDenied => Reply::NotAllowed,
        RefuseCode::EdgeOffline | RefuseCode::LinkLost | RefuseCode::MeshTimeout => Reply::NetworkUnreachable,
        RefuseCode::EdgeUnknown
        | RefuseCode::ServiceUnknown
        | RefuseCode::TargetUnreachable
        | RefuseCode::TargetNameUnknown => Reply::HostUnreachable,
        RefuseCode::TargetRefused => Reply::Refused,
        RefuseCode::TargetTimeout => Reply::Expired,
        RefuseCode::Unsupported => Reply::AddressNotSupported,
        RefuseCode::BadRequest
        | RefuseCode::LimitReached
        | RefuseCode::Draining
        | RefuseCode::Internal
        | RefuseCode::LoopDetected
        | RefuseCode::NotReady => Reply::Failure,
    }
}

/// A visitor's socket, and what has come from it that was not yet understood.
struct Speaker {
    socket: TcpStream,
    early: BytesMut,
}

impl ProxyDoor {
    /// Serves one visitor. `trusted` is whether it may show a token without TLS.
    pub(super) async fn visit_by_socks(self: Arc<Self>, socket: TcpStream, from: String, trusted: bool) {
        let mut speaker = Speaker { socket, early: BytesMut::new() };
        let asking = timeout(HEAD, self.asked(&mut speaker, &from, trusted));
        let asked = match self.stopping.run_until_cancelled(asking).await {
            Some(Ok(asked)) => asked,
            Some(Err(_)) => Err(Away::Silently("socks-timeout")),
            None => return,
        };
        let dialled = match asked {
            Ok(route) => {
                let dial = async { Ok(self.router.open(route).await?.opened().await?) };
                // Whoever goes away while the dial is pending takes it along.
                let there = visit::while_there(&mut speaker.socket, &mut speaker.early, MAX_EARLY, dial).await;
                there.unwrap_or(Err(Away::Silently("gone")))
            }
            Err(away) => Err(away),
        };
        match dialled {
            Ok(opened) => speaker.tunnel(opened).await,
            Err(away) => self.turn_away(speaker.socket, &from, away).await,
        }
    }

    /// Hears who it is and where it wants to go.
    async fn asked(&self, speaker: &mut Speaker, from: &str, trusted: bool) -> Result<route::Request, Away> {
        if !speaker.hear(wire::greeting).await? || !trusted {
            // There is no way to say why: SOCKS5 has one number for it. The log has the sentence.
            return Err(Away::Told(if trusted { "socks-method" } else { "socks-plain" }, &wire::NO_METHODS));
        }
        speaker.say(&wire::SAY_WHO).await?;
        let login = speaker.hear(wire::login).await?;
        self.router.knows_people().await?;
        let state = self.router.state();
        let shown = Shown::Basic { user: login.user, token: login.token };
        let stranger = |_| Away::Told("socks-login", &wire::STRANGER);
        let caller = credentials::by_token(Some(shown), &state).map_err(stranger)?;
        drop(state);
        speaker.say(&wire::WELCOME).await?;
        let request = speaker.hear(wire::request).await?;
        if !request.connect {
            let why = "only CONNECT is served";
            return Err(Away::Refused(Reply::CommandNotSupported, Refusal::because(RefuseCode::Unsupported, why)));
        }
        let destination = Destination { host: request.host, port: request.port };
        let target = destination.target(&self.domain, &self.router.state())?;
        let route = route::Request::new(caller.principal, from.to_owned(), DOOR, target);
        Ok(route::Request { credential: Some(caller.credential), ..route })
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
                visit::farewell(socket, word).await;
            }
            Away::Refused(reply, refusal) => {
                self.turned_away("request");
                tracing::debug!(from, code = %refusal.code, reason = refusal.reason, "refused");
                visit::farewell(socket, &reply.encode()).await;
            }
        }
    }
}

impl Speaker {
    /// Reads until something is understood.
    async fn hear<T>(&mut self, read: fn(&[u8]) -> Heard<T>) -> Result<T, Away> {
        loop {
            if let Some((what, length)) = read(&self.early)? {
                drop(self.early.split_to(length));
                return Ok(what);
            }
            match self.socket.read_buf(&mut self.early).await {
                Ok(0) | Err(_) => return Err(Away::Silently("gone")),
                Ok(_) => {}
            }
        }
    }

    async fn say(&mut self, word: &[u8]) -> Result<(), Away> {
        self.socket.write_all(word).await.map_err(|_| Away::Silently("gone"))
    }

    async fn tunnel(mut self, opened: Opened) {
        if self.say(&Reply::Succeeded.encode()).await.is_err() {
            return;
        }
        let Ok(end) = TcpEnd::new(self.socket, self.early.freeze()) else { return };
        opened.splice(end).await;
    }
}
