//! Where programs on this machine enter the mesh: a proxy on loopback, and ports that lead to targets. Each connection
//! becomes a stream on the tunnel, opened as this edge; policy decides at the shard and at the edge that serves it.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use proto::{
    code::RefuseCode,
    stream::{Open, Refusal},
    target::Target,
};
use runtime::{
    flow::{
        PacketSink, Terms,
        port::{UdpPort, Visitor},
        relay, stream,
    },
    link::Link,
    open::{OpenError, Opened, open},
    shutdown::Tasks,
    splice::{Meter, TcpEnd, splice},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::timeout,
};

use crate::{
    config::{DoorsConfig, ForwardConfig},
    life::Line,
    load::{InFlight, Load},
    metrics::Metrics,
};

mod forward;
mod proxy;

/// Connections at once on all doors of an edge; more wait in the kernel's queue.
const CONNECTIONS: usize = 256;
/// Flows at once on each UDP forward, and of each association of the proxy.
const FLOWS: usize = 64;
/// How long a connection waits for a tunnel.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause after a failed accept, for lack of descriptors as a rule.
const PAUSE: Duration = Duration::from_millis(50);

/// What all doors share.
#[derive(Debug)]
pub struct Doors {
    line: watch::Receiver<Line>,
    domain: String,
    idle: Duration,
    permits: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    tasks: Tasks,
}

/// A stream that leads to a target; the tunnel counts it until it is dropped.
struct Way {
    opened: Opened,
    _flight: InFlight,
}

/// Where the doors of an edge are.
#[derive(Clone, Debug, Default)]
pub struct DoorAddresses {
    /// The proxy; `None` if it is shut.
    pub proxy: Option<SocketAddr>,
    /// The forwards, as configured.
    pub forwards: Vec<SocketAddr>,
}

impl Doors {
    /// What is needed to open them.
    #[must_use]
    pub fn new(
        config: &DoorsConfig,
        line: watch::Receiver<Line>,
        idle: Duration,
        shared: (Arc<Metrics>, Tasks),
    ) -> Self {
        let (metrics, tasks) = shared;
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        Self { line, domain: config.domain.clone(), idle, permits, metrics, tasks }
    }

    /// Opens what the configuration names. A proxy at its default address that is taken, as by another edge on this
    /// machine, stays shut; that is said in the log.
    ///
    /// # Errors
    /// If another address is taken.
    pub async fn open(self, config: &DoorsConfig) -> anyhow::Result<DoorAddresses> {
        let (doors, mut addresses) = (Arc::new(self), DoorAddresses::default());
        if let Some(at) = config.proxy.address() {
            match TcpListener::bind(at).await {
                Ok(listener) => {
                    addresses.proxy = Some(listener.local_addr()?);
                    let door = Arc::clone(&doors);
                    doors.listen(listener, move |socket, from| proxy::visit(Arc::clone(&door), socket, from));
                }
                Err(error) if config.proxy.is_default() => {
                    tracing::warn!(%at, %error, "the proxy door stays shut; set doors.proxy to a free address or to \"none\"");
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot open the proxy door on {at}; set doors.proxy"));
                }
            }
        }
        for forward in &config.forward {
            let what = || format!("cannot forward {}; set another `listen`", forward.listen);
            addresses.forwards.push(doors.forward(forward).await.with_context(what)?);
        }
        Ok(addresses)
    }

    async fn forward(self: &Arc<Self>, forward: &ForwardConfig) -> io::Result<SocketAddr> {
        let (door, target) = (Arc::clone(self), forward.target.clone());
        if forward.udp {
            let port = UdpPort::bind(forward.listen)?;
            let (address, target) = (port.local_addr()?, target.over_udp());
            let carry = move |visitor| forward::carry(Arc::clone(&door), visitor, target.clone());
            self.tasks.spawn(port.run(self.tasks.clone(), self.tasks.clone(), FLOWS, carry));
            return Ok(address);
        }
        let listener = TcpListener::bind(forward.listen).await?;
        let address = listener.local_addr()?;
        self.listen(listener, move |socket, from| forward::visit(Arc::clone(&door), socket, from, target.clone()));
        Ok(address)
    }

    fn listen<F>(self: &Arc<Self>, listener: TcpListener, visit: impl Fn(TcpStream, SocketAddr) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let doors = Arc::clone(self);
        self.tasks.spawn(async move {
            loop {
                let accepted = async {
                    let permit = Arc::clone(&doors.permits).acquire_owned().await;
                    (permit, listener.accept().await)
                };
                let (permit, accepted) = tokio::select! {
                    biased;
                    () = doors.tasks.stopping() => return,
                    accepted = accepted => accepted,
                };
                match accepted {
                    Ok((socket, from)) => {
                        let (visit, metrics) = (visit(socket, from), Arc::clone(&doors.metrics));
                        metrics.door_connections.inc();
                        doors.tasks.spawn(async move {
                            visit.await;
                            metrics.door_connections.dec();
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a door cannot accept");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        });
    }

    /// Opens a stream to a target over the tunnel that serves, and waits for the answer.
    async fn reach(&self, head: Open) -> Result<Way, Refusal> {
        let target = head.target.clone();
        let opened = match self.link().await {
            Some((link, load)) => {
                let flight = load.enter();
                let opened = open(&link, head).await;
                opened.map(|opened| Way { opened, _flight: flight }).map_err(|e| refusal(&target, e))
            }
            None => {
                let why = "this edge has no tunnel to the mesh now; /readyz on its admin address says why";
                Err(Refusal::because(RefuseCode::EdgeOffline, why))
            }
        };
        let outcome = opened.as_ref().map_or_else(|refusal| refusal.code.slug(), |_| "opened");
        self.metrics.door_streams.with_label_values(&[outcome]).inc();
        opened
    }

    /// The tunnel; waits for it a while.
    async fn link(&self) -> Option<(Link, Load)> {
        let mut line = self.line.clone();
        let up = line.wait_for(|line| line.link.as_ref().is_some_and(|link| link.end().is_none()));
        let line = timeout(PATIENCE, up).await.ok()?.ok()?;
        line.link.clone().zip(line.load.clone())
    }

    async fn carry(&self, end: TcpEnd, way: Way) {
        let meter = Arc::new(Meter::default());
        let result = splice(end, way.opened.stream, &meter, &self.tasks.token()).await;
        tracing::debug!(up = meter.up(), down = meter.down(), ?result, "a connection of a door ended");
    }

    async fn carry_flow(&self, visitor: Visitor, way: Way) {
        let (mut local, mut mesh) = (visitor.side(), stream::side(way.opened.stream));
        mesh.sink.opened();
        let (meter, cancel) = (Meter::default(), self.tasks.token());
        let terms = Terms { meter: &meter, idle: Some(self.idle), cancel: &cancel };
        let (result, tally) = relay(&mut local, &mut mesh, &terms).await;
        tracing::debug!(?tally, ?result, "a flow of a door ended");
    }
}

fn refusal(target: &Target, error: OpenError) -> Refusal {
    match error {
        OpenError::Refused(refusal) => refusal,
        OpenError::Link(end) => Refusal::because(RefuseCode::LinkLost, format!("the tunnel of this edge broke: {end}")),
        OpenError::Nonsense(why) => {
            Refusal::because(RefuseCode::Internal, format!("the shard did not answer as it should on {target}: {why}"))
        }
        OpenError::TimedOut => {
            Refusal::because(RefuseCode::MeshTimeout, format!("the mesh did not answer in time on {target}"))
        }
    }
}
