//! The HTTPS door: TLS by its server name, passed through untouched. The shard reads the ClientHello and holds no key.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use proto::{
    code::{Fault, RefuseCode},
    hostname,
    id::ServiceName,
    principal::Principal,
    stream::Refusal,
    target::Target,
};
use runtime::splice::TcpEnd;
use rustls::server::Acceptor;
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{Visitor, visit};
use crate::route::{Request, Router};

/// The name of the door, and of the service that `<edge>.<domain>` means.
const DOOR: &str = "https";
/// How long a ClientHello may take.
const HELLO: Duration = Duration::from_secs(10);
/// Longest ClientHello with its record headers, in bytes.
const MAX_HELLO: usize = 64 * 1024;
/// Size of a read in bytes.
const READ: usize = 4 * 1024;

/// The door.
#[derive(Debug)]
pub struct HttpsDoor {
    /// Opens streams.
    pub router: Router,
    /// The domain below which services have names.
    pub domain: String,
    /// Cancelled when the shard wants no new visitors.
    pub stopping: CancellationToken,
}

/// Alerts of RFC 8446, 6, as fatal ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alert {
    AccessDenied = 49,
    DecodeError = 50,
    InternalError = 80,
    UnrecognizedName = 112,
}

impl Alert {
    const fn record(self) -> [u8; 7] {
        [21, 3, 3, 0, 2, 2, self as u8]
    }

    const fn of(code: RefuseCode) -> Self {
        match (code, code.fault()) {
            (RefuseCode::EdgeUnknown | RefuseCode::ServiceUnknown | RefuseCode::BadRequest, _) => {
                Self::UnrecognizedName
            }
            (_, Fault::Policy) => Self::AccessDenied,
            (_, Fault::Client | Fault::Mesh | Fault::Edge | Fault::Target) => Self::InternalError,
        }
    }
}

/// A visitor who does not come in.
#[derive(Debug)]
struct Rejected {
    why: String,
    alert: Vec<u8>,
}

impl Rejected {
    fn new(alert: Alert, why: impl Into<String>) -> Self {
        Self { why: why.into(), alert: alert.record().to_vec() }
    }

    /// For whom an alert would be a riddle: it has gone, or is slow.
    fn silently(why: impl Into<String>) -> Self {
        Self { why: why.into(), alert: Vec::new() }
    }
}

impl From<Refusal> for Rejected {
    fn from(refusal: Refusal) -> Self {
        Self::new(Alert::of(refusal.code), format!("{}: {}", refusal.code, refusal.reason))
    }
}

impl HttpsDoor {
    /// Lets a visitor through to the service that its ClientHello names. What it has sent goes behind the Open, without
    /// waiting for the service.
    pub async fn visit(self: Arc<Self>, visitor: Visitor) {
        if visit::first_byte(&visitor.socket, &self.stopping).await.is_some() {
            // In a box of its own, so that a visitor who says nothing does not occupy the room that a tunnel needs.
            Box::pin(self.admit(visitor)).await;
        }
    }

    async fn admit(self: Arc<Self>, Visitor { mut socket, from }: Visitor) {
        let mut head = BytesMut::new();
        let hello = match timeout(HELLO, server_name(&mut socket, &mut head)).await {
            Ok(hello) => hello,
            Err(_) => Err(Rejected::silently("no whole ClientHello in time")),
        };
        let opened = match hello.and_then(|name| self.target(&name)) {
            Ok(target) => {
                let principal = Principal::Door { name: DOOR.into() };
                let request = Request::new(principal, from.to_string(), DOOR, target);
                self.router.open(request).await.map_err(Rejected::from)
            }
            Err(rejected) => Err(rejected),
        };
        match opened {
            Ok(pending) => {
                if let Ok(end) = TcpEnd::new(socket, head.freeze()) {
                    pending.splice(end).await;
                }
            }
            Err(Rejected { why, alert }) => {
                self.router.metrics().door_refusals.with_label_values(&[DOOR, "hello"]).inc();
                tracing::debug!(%from, why, "the https door turned a visitor away");
                visit::farewell(socket, &alert).await;
            }
        }
    }

    fn target(&self, name: &str) -> Result<Target, Rejected> {
        let door: ServiceName = DOOR.parse().map_err(|e| Rejected::silently(format!("{e}")))?;
        hostname::target_of(name, &self.domain, &door)
            .map_err(|e| Rejected::new(Alert::UnrecognizedName, e.to_string()))
    }
}

/// Reads until the ClientHello is whole, however it is cut into segments and records. Every byte that was read is in
/// `head`.
async fn server_name(socket: &mut TcpStream, head: &mut BytesMut) -> Result<String, Rejected> {
    let mut acceptor = Acceptor::default();
    loop {
        let before = head.len();
        head.reserve(READ);
        match socket.read_buf(head).await {
            Ok(0) => return Err(Rejected::silently("it left before its ClientHello was whole")),
            Ok(_) => {}
            Err(e) => return Err(Rejected::silently(e.to_string())),
        }
        let mut fresh = &head[before..];
        while !fresh.is_empty() {
            // In memory; an error is rustls' own bound on what it holds.
            let taken =
                acceptor.read_tls(&mut fresh).map_err(|e| Rejected::new(Alert::InternalError, e.to_string()))?;
            match acceptor.accept() {
                Ok(None) if taken == 0 => break,
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().map(str::to_owned);
                    return name.ok_or_else(|| {
                        Rejected::new(Alert::UnrecognizedName, "its ClientHello names no server (SNI)")
                    });
                }
                Err((error, mut alert)) => {
                    let mut word = Vec::new();
                    // Into memory, which takes everything.
                    let _ = alert.write_all(&mut word);
                    if word.is_empty() {
                        word.extend_from_slice(&Alert::DecodeError.record());
                    }
                    return Err(Rejected { why: error.to_string(), alert: word });
                }
            }
        }
        if head.len() > MAX_HELLO {
            return Err(Rejected::new(Alert::InternalError, "its ClientHello is too long"));
        }
    }
}
