//! Local UDP ports that lead to targets in the mesh: one flow for each program that talks to them.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use proto::target::Target;
use runtime::{
    flow::{
        PacketSink, Terms,
        port::{UdpPort, Visitor},
        relay, stream,
    },
    shutdown::Tasks,
    splice::Meter,
};
use tokio_util::sync::CancellationToken;

use super::line::Line;
use crate::{failure::Failure, out, reach};

/// Flows of a port at once.
const FLOWS: usize = 256;
/// How long whoever could not be carried is not listened to.
const DEAF: Duration = Duration::from_secs(1);

/// Binds both loopback addresses, on the same port; one where the machine has only one.
///
/// # Errors
/// If the port is taken.
pub(super) fn listen(port: u16) -> Result<Vec<UdpPort>, Failure> {
    let taken = |e: io::Error| {
        Failure::Failed(format!(
            "cannot listen on UDP localhost:{port}: {e}; choose another local port, or 0 for any that is free"
        ))
    };
    let first = UdpPort::bind((Ipv4Addr::LOCALHOST, port).into()).map_err(taken)?;
    let port = first.local_addr()?.port();
    match UdpPort::bind((Ipv6Addr::LOCALHOST, port).into()) {
        Ok(second) => Ok(vec![first, second]),
        Err(e) => {
            tracing::info!(error = %e, port, "not listening on UDP [::1]");
            Ok(vec![first])
        }
    }
}

/// One local port.
#[derive(Clone)]
pub(super) struct Door {
    /// Where it leads.
    pub(super) target: Target,
    /// The link.
    pub(super) line: Line,
    /// Silence after which a flow ends.
    pub(super) idle: Duration,
    /// Cancelled when flows have to end.
    pub(super) ending: CancellationToken,
}

impl Door {
    pub(super) async fn serve(self, port: UdpPort, tasks: Tasks) {
        let door = Arc::new(self);
        let carry = move |visitor: Visitor| {
            let door = Arc::clone(&door);
            async move {
                let from = visitor.from;
                if let Err(why) = door.carry(visitor).await {
                    out::note(&format!("{from} to {}: {why}", door.target));
                }
            }
        };
        port.run(tasks.clone(), tasks, FLOWS, carry).await;
    }

    async fn carry(&self, visitor: Visitor) -> Result<(), String> {
        let opening =
            async { reach::open_flow(&self.line.link().await?, &self.target).await.map_err(|e| e.to_string()) };
        let opened = match self.ending.run_until_cancelled(opening).await {
            None => return Ok(()),
            Some(Ok(opened)) => opened,
            Some(Err(why)) => {
                self.ending.run_until_cancelled(tokio::time::sleep(DEAF)).await;
                drop(visitor);
                return Err(why);
            }
        };
        let (mut local, mut mesh) = (visitor.side(), stream::side(opened.stream));
        mesh.sink.opened();
        let meter = Meter::default();
        let terms = Terms { meter: &meter, idle: Some(self.idle), cancel: &self.ending };
        let (result, tally) = relay(&mut local, &mut mesh, &terms).await;
        tracing::info!(target = %self.target, sent = tally.up, received = tally.down, dropped = tally.dropped, "flow ended");
        match result {
            Err(e) if !self.ending.is_cancelled() => Err(format!("the flow broke: {} ({e})", e.code.sentence())),
            Ok(_) | Err(_) => Ok(()),
        }
    }
}
