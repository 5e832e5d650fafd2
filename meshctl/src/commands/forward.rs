//! `meshctl forward`: ports of this machine that lead to targets in the mesh.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use proto::target::Target;
use runtime::{
    flow::port::UdpPort,
    shutdown::{self, Tasks},
    splice::{Meter, TcpEnd, splice},
};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use self::{line::Line, spec::Forward};
use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    reach,
};

mod line;
mod spec;
mod udp;

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 1024;
/// How long connections may take to end after Ctrl-C.
const DRAIN: Duration = Duration::from_secs(1);
/// How long to wait where no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Makes local ports that lead to targets in the mesh.
#[derive(Debug, Args)]
#[command(after_help = "With an edge or a host behind it, a port is the remote one, and the local one behind a colon:
  meshctl forward shop-1 5432                    localhost:5432 leads to port 5432 of shop-1
  meshctl forward shop-1 5432:15432              localhost:15432 leads to port 5432 of shop-1
  meshctl forward shop-1 22:2222 5432:15432      both
  meshctl forward shop-1/10.0.0.5 80:8080        a host that shop-1 can reach
With a service, or with a port in the target, it is the local one:
  meshctl forward shop-1/web 8080
  meshctl forward '*/web' 8080                   of any edge that announces it
  meshctl forward shop-1:5432 15432
A local port 0, or none with a service, takes a free one. Ctrl-C ends it.
With --udp all of them are UDP ports, with one flow for each program that talks to them:
  meshctl forward --udp shop-1 53:5353
  meshctl forward --udp shop-1/dns 5353")]
pub(crate) struct ForwardArgs {
    /// EDGE, EDGE/HOST, EDGE/SERVICE, EDGE:PORT or */SERVICE.
    target: String,
    /// Ports: LOCAL, or REMOTE:LOCAL.
    #[arg(value_name = "PORTS")]
    ports: Vec<String>,
    /// UDP in place of TCP.
    #[arg(long)]
    udp: bool,
    /// With --udp, seconds of silence after which a flow ends.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=86_400), requires = "udp")]
    idle: u32,
}

/// Forwards until Ctrl-C.
///
/// # Errors
/// If a port is taken, if no shard can be reached at the start, or if the user is revoked.
pub(crate) async fn run(context: &Context, args: ForwardArgs) -> Result<(), Failure> {
    let forwards = spec::parse(&args.target, &args.ports).map_err(Failure::Usage)?;
    let session = context.session().await?;
    let tasks = Tasks::new();
    let (line, keeper) = Line::open(session).await?;
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let mut told = Vec::new();
    for Forward { target, local } in forwards.iter().filter(|_| args.udp) {
        let target = target.clone().over_udp();
        let ports = udp::listen(*local)?;
        told.push((target.clone(), ports.iter().map(UdpPort::local_addr).collect::<io::Result<Vec<_>>>()?));
        for port in ports {
            let idle = Duration::from_secs(args.idle.into());
            let door = udp::Door { target: target.clone(), line: line.clone(), idle, ending: tasks.token() };
            tasks.spawn(door.serve(port, tasks.clone()));
        }
    }
    for forward in forwards.into_iter().filter(|_| !args.udp) {
        let listeners = listen(forward.local).await?;
        let addresses = listeners.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>()?;
        told.push((forward.target.clone(), addresses));
        for listener in listeners {
            let door = Door { target: forward.target.clone(), line: line.clone(), permits: Arc::clone(&permits) };
            tasks.spawn(door.serve(listener, tasks.clone()));
        }
    }
    tell(context.form, &told)?;
    let done = tokio::select! {
        biased;
        stopped = shutdown::signal() => stopped.map(|_| ()).map_err(Failure::from),
        lost = keeper.keep() => Err(lost),
    };
    tasks.drained(DRAIN).await;
    if let Some(link) = line.now() {
        reach::goodbye(&link).await;
    }
    done
}

fn tell(form: Form, told: &[(Target, Vec<SocketAddr>)]) -> Result<(), Failure> {
    if form == Form::Json {
        let forwards: Vec<_> =
            told.iter().map(|(target, at)| json!({ "target": target.to_string(), "listen": at })).collect();
        return out::json_line(&json!({ "forwards": forwards }));
    }
    for (target, addresses) in told {
        let at: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        out::line(&format!("Forwarding {} to {target}", at.join(" and ")))?;
    }
    out::line("Ctrl-C ends it.")
}

/// Listens on both loopback addresses, on the same port; on one where the machine has only one.
async fn listen(port: u16) -> Result<Vec<TcpListener>, Failure> {
    let taken = |e: io::Error| {
        Failure::Failed(format!(
            "cannot listen on localhost:{port}: {e}; choose another local port, or 0 for any that is free"
        ))
    };
    let first = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.map_err(taken)?;
    let port = first.local_addr()?.port();
    match TcpListener::bind((Ipv6Addr::LOCALHOST, port)).await {
        Ok(second) => Ok(vec![first, second]),
        Err(e) => {
            tracing::info!(error = %e, port, "not listening on [::1]");
            Ok(vec![first])
        }
    }
}

/// One listening port.
struct Door {
    target: Target,
    line: Line,
    permits: Arc<Semaphore>,
}

impl Door {
    async fn serve(self, listener: TcpListener, tasks: Tasks) {
        let door = Arc::new(self);
        loop {
            let accepted = tokio::select! {
                biased;
                () = tasks.stopping() => return,
                accepted = door.accept(&listener) => accepted,
            };
            let Some((socket, peer, permit)) = accepted else { continue };
            let (door, group) = (Arc::clone(&door), tasks.clone());
            tasks.spawn(async move {
                let _permit = permit;
                if let Err(why) = door.carry(socket, &group).await {
                    out::note(&format!("{peer} to {}: {why}", door.target));
                }
            });
        }
    }

    async fn accept(
        &self,
        listener: &TcpListener,
    ) -> Option<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok()?;
        match listener.accept().await {
            Ok((socket, peer)) => Some((socket, peer, permit)),
            Err(e) => {
                out::note(&format!("cannot accept a connection to {}: {e}", self.target));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                None
            }
        }
    }

    /// Carries one connection. What goes wrong resets it, so that its user does not take it for an end.
    async fn carry(&self, socket: TcpStream, tasks: &Tasks) -> Result<(), String> {
        let local = TcpEnd::new(socket, Bytes::new()).map_err(|e| e.to_string())?;
        let opened = tokio::select! {
            biased;
            () = tasks.stopping() => return Ok(()),
            opened = self.open() => opened?,
        };
        let meter = Arc::new(Meter::default());
        let done = splice(local, opened.stream, &meter, &tasks.token()).await;
        tracing::info!(target = %self.target, sent = meter.up(), received = meter.down(), "connection closed");
        match done {
            Err(e) if !tasks.is_stopping() => Err(format!("the connection broke: {} ({e})", e.code.sentence())),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    async fn open(&self) -> Result<reach::Opened, String> {
        let link = self.line.link().await?;
        reach::open(&link, &self.target).await.map_err(|e| e.to_string())
    }
}

impl Forward {
    #[cfg(test)]
    fn as_text(&self) -> String {
        format!("{} <- {}", self.target, self.local)
    }
}
