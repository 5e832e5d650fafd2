//! The SSH door: a jump host for stock OpenSSH, `ssh -J SHARD:2222 root@EDGE`.
//!
//! Users show a certificate that control has signed, or a key that is registered. The name before the `@` of the jump host
//! is not looked at: who somebody is comes from the key alone. Only `direct-tcpip` channels are served, each of which is a
//! stream like any other: policy decides about it, and it leaves a record. What goes through it is SSH again, between the
//! user and the edge's own sshd, so the shard sees none of it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use runtime::shutdown::Tasks;
use russh::{
    Disconnect,
    server::{self, Handle, RunningSession},
};
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use self::{connection::Connection, handler::Visit, host::Host, socket::Socket};
use super::{Visitor, visit};
use crate::{
    fair::{Shares, UserShares},
    live::Lease,
    route::Router,
};

mod connection;
mod handler;
pub mod host;
mod lane;
mod room;
mod socket;
mod who;

/// The name of the door.
const DOOR: &str = "ssh";
/// How long it may take from the connection to the login, a passphrase that is typed included.
const LOGIN: Duration = Duration::from_secs(60);
/// Connections of one address that may be about to log in. More than one person may sit behind an address.
pub const STRANGERS: usize = 32;
/// How long a last word may take to arrive.
const LAST_WORD: Duration = Duration::from_secs(2);
/// What those hear for whom there is no room. A line before the first of SSH's own is allowed (RFC 4253, 4.2).
const CROWDED: &[u8] = b"This shard has too many SSH connections that have not logged in; try again in a moment.\r\n";

/// The door.
#[derive(Debug)]
pub struct SshDoor {
    /// Opens streams.
    pub router: Router,
    /// The domain below which services have names.
    pub domain: String,
    /// Cancelled when the shard wants no new visitors.
    pub stopping: CancellationToken,
    /// Runs channels.
    pub tasks: Tasks,
    /// Who the shard is.
    pub host: Arc<Host>,
    /// Connections that have not logged in, altogether.
    pub strangers: Arc<Semaphore>,
    /// The same by address.
    pub strangers_from: Shares<IpAddr>,
    /// Links of each user.
    pub user_links: UserShares,
    /// Streams of each user.
    pub user_streams: UserShares,
}

/// Why the shard ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Farewell {
    Revoked,
    Leaving,
}

impl Farewell {
    const fn sentence(self) -> &'static str {
        match self {
            Self::Revoked => "the key or certificate of this connection was revoked; log in again",
            Self::Leaving => "this shard is leaving, and no channel is open; connect again to reach another one",
        }
    }
}

impl SshDoor {
    /// Serves a visitor's channels until it leaves, or the shard does.
    pub async fn visit(self: Arc<Self>, visitor: Visitor) {
        let Visitor { socket, from } = visitor;
        let permit = Arc::clone(&self.strangers).try_acquire_owned();
        let (Ok(permit), Some(share)) = (permit, self.strangers_from.take(&from.ip())) else {
            self.turned_away("crowd");
            return visit::farewell(socket, CROWDED).await;
        };
        let cut = CancellationToken::new();
        let connection = Arc::new(Connection::new());
        let deadline = Instant::now() + LOGIN;
        let begun =
            self.stopping.run_until_cancelled(timeout_at(deadline, self.begin(socket, from, &connection, &cut)));
        let Some(Ok(Ok(mut session))) = begun.await else {
            return self.turned_away("hello");
        };
        let over = tokio::select! {
            biased;
            () = connection.let_in.cancelled() => None,
            // It is gone, and its end must not be asked for again.
            _ = &mut session => return self.turned_away("login"),
            () = self.stopping.cancelled() => Some("leaving"),
            () = tokio::time::sleep_until(deadline) => Some("slow"),
        };
        drop((permit, share));
        if let Some(why) = over {
            self.turned_away(why);
            cut.cancel();
            // Its socket fails from now on.
            let _ = timeout(LAST_WORD, session).await;
            return;
        }
        let ended = self.serve(&mut session, &connection).await;
        cut.cancel();
        connection.end();
        if !ended {
            let _ = timeout(LAST_WORD, session).await;
        }
    }

    async fn begin(
        self: &Arc<Self>,
        socket: TcpStream,
        from: SocketAddr,
        connection: &Arc<Connection>,
        cut: &CancellationToken,
    ) -> Result<RunningSession<Visit>, russh::Error> {
        let socket = Socket::new(socket, Arc::clone(&connection.gate), cut).map_err(russh::Error::IO)?;
        let visit = Visit { door: Arc::clone(self), connection: Arc::clone(connection), from };
        server::run_stream(self.host.config(), socket, visit).await
    }

    /// Serves somebody who was let in. Returns whether russh has ended.
    async fn serve(&self, session: &mut RunningSession<Visit>, connection: &Connection) -> bool {
        let handle = session.handle();
        let lease = connection.admitted().map(|admitted| self.router.lease(&admitted.credential));
        let farewell = match &lease {
            Some(Ok(lease)) => tokio::select! {
                biased;
                _ = &mut *session => return true,
                farewell = self.farewell(lease, connection) => farewell,
                never = connection.keep_room() => match never {},
            },
            Some(Err(_)) | None => Farewell::Revoked,
        };
        tracing::debug!(why = ?farewell, "ending an SSH connection");
        let parting = async {
            part(&handle, farewell).await;
            let _ = session.await;
        };
        timeout(LAST_WORD, parting).await.is_ok()
    }

    /// Waits for a reason to end a connection.
    async fn farewell(&self, lease: &Lease, connection: &Connection) -> Farewell {
        let leaving = async {
            self.stopping.cancelled().await;
            connection.idle().await;
        };
        tokio::select! {
            biased;
            () = lease.ended().cancelled() => Farewell::Revoked,
            () = leaving => Farewell::Leaving,
        }
    }

    fn turned_away(&self, reason: &str) {
        self.router.metrics().door_refusals.with_label_values(&[DOOR, reason]).inc();
    }
}

async fn part(handle: &Handle, farewell: Farewell) {
    let said = handle.disconnect(Disconnect::ByApplication, farewell.sentence().to_owned(), "en".to_owned());
    // Who is gone misses nothing.
    let _ = said.await;
}
