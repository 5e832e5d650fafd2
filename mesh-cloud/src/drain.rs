//! The end of a shard, in the order that loses nothing: unready, out of the ring, no edge is taken, those that are here
//! are sent away in waves, the doors close, streams have their time, the rest is cut.

use std::{sync::Arc, time::Duration};

use proto::{api::ShardState, code::CloseCode, id::ShardId, message::ShardToEdge, ring::Ring};
use runtime::{admin::ReadyPart, link::listen::Listener, shutdown::Tasks};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{admit::candidates, metrics::Metrics, registry::Registry, session::EdgeHandle, state::MeshState};

/// How long control may take to make a ring without this shard before its edges are sent away all the same.
const LEAVE: Duration = Duration::from_millis(1500);
/// Edges that are sent away in one second, unless the time is too short for that.
const WAVES: f64 = 100.0;
/// Share of the drain time in which all edges have been told.
const TELL: f64 = 0.5;
/// How often a wave goes out.
const WAVE: Duration = Duration::from_millis(100);
/// How long what is left at the deadline of a drain may take to say its last word.
const LAST_WORD: Duration = Duration::from_secs(1);

/// What the end of a shard needs.
#[derive(Debug)]
pub struct Drain {
    /// This shard.
    pub me: ShardId,
    /// Its socket.
    pub listener: Listener,
    /// Its tunnels.
    pub registry: Registry,
    /// The ring.
    pub state: watch::Receiver<Arc<MeshState>>,
    /// Tells control, and whoever arrives.
    pub standing: watch::Sender<ShardState>,
    /// The doors.
    pub accepting: Tasks,
    /// Streams.
    pub streams: Tasks,
    /// Links.
    pub sessions: Tasks,
    /// Cancelled when no new streams are taken.
    pub closing: CancellationToken,
    /// Cancelled when streams must end.
    pub ending: CancellationToken,
    /// Says that the shard accepts.
    pub ready: ReadyPart,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// How long all of it may take.
    pub time: Duration,
    /// How long doors stay open, so that load balancers have time to look elsewhere.
    pub linger: Duration,
}

impl Drain {
    /// Ends the shard.
    pub async fn run(mut self) {
        let begun = Instant::now();
        let deadline = begun + self.time;
        self.ready.down("draining");
        self.standing.send_replace(ShardState::Draining);
        tracing::info!(streams = self.streams.running(), edges = self.registry.len(), "draining");
        let others = self.out_of_the_ring().await;
        let doors = async {
            sleep_until(begun + self.linger.min(self.time / 2)).await;
            self.accepting.stop();
            self.closing.cancel();
        };
        // What enters elsewhere for an edge that is still here is served until it has left.
        tokio::join!(self.send_edges_away(&others, deadline), doors);
        self.listener.refuse_new();
        let left = self.streams.finished(deadline.saturating_duration_since(Instant::now())).await;
        if left > 0 {
            tracing::warn!(streams = left, "the drain time is over; what is left is cut");
        } else {
            self.edges_gone(&others, deadline).await;
        }
        self.ending.cancel();
        self.streams.finished(LAST_WORD).await;
        for edge in self.registry.all() {
            edge.link.close(CloseCode::Drained, CloseCode::Drained.sentence());
        }
        self.sessions.stop();
        self.listener.close(CloseCode::Shutdown);
        self.sessions.finished(LAST_WORD).await;
        // Peers that are gone do not answer; waiting for them is a courtesy.
        let _ = timeout(LAST_WORD, self.listener.idle()).await;
        tracing::info!(seconds = begun.elapsed().as_secs_f32(), "drained");
    }

    /// Waits until control has made a ring without this shard. Returns the ring by which edges leave.
    async fn out_of_the_ring(&mut self) -> Ring {
        let me = self.me.clone();
        let out = self.state.wait_for(|state| state.ring.member(&me).is_none());
        if !matches!(timeout(LEAVE, out).await, Ok(Ok(_))) {
            tracing::warn!(
                "control has not taken this shard out of the ring in time; edges are sent away all the same"
            );
        }
        let mut spec = self.state.borrow().ring.spec();
        spec.members.retain(|m| m.shard != self.me);
        Ring::new(spec)
    }

    /// Tells the edges to leave: idle ones first, a few at a time, all of them in good time before the deadline.
    async fn send_edges_away(&self, others: &Ring, deadline: Instant) {
        if others.is_empty() {
            return;
        }
        let mut edges = self.registry.all();
        edges.sort_by_cached_key(|e| (e.streams() > 0, Ring::position(&e.id)));
        #[allow(clippy::cast_precision_loss, reason = "a number of edges")]
        let count = edges.len() as f64;
        let whole = (count / WAVES).min(deadline.saturating_duration_since(Instant::now()).as_secs_f64() * TELL);
        let waves = (whole / WAVE.as_secs_f64()).ceil().max(1.0);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at least one and at most all")]
        let per_wave = (count / waves).ceil().max(1.0) as usize;
        for wave in edges.chunks(per_wave) {
            for edge in wave {
                self.send_away(edge, others, deadline);
            }
            sleep(WAVE).await;
        }
    }

    fn send_away(&self, edge: &EdgeHandle, others: &Ring, deadline: Instant) {
        let candidates = candidates(others, &self.me, &edge.id);
        let deadline = deadline.saturating_duration_since(Instant::now());
        if edge.order(ShardToEdge::Drain { reconnect_in: Duration::ZERO, deadline, candidates }) {
            self.metrics.moves.with_label_values(&["drain"]).inc();
        }
    }

    /// Waits until the edges that could leave have left: each says Bye when it has its next tunnel.
    async fn edges_gone(&self, others: &Ring, deadline: Instant) {
        if others.is_empty() {
            return;
        }
        let changes = self.registry.changes();
        let gone = async {
            while !self.registry.is_empty() {
                changes.some().await;
            }
        };
        if timeout_at(deadline, gone).await.is_err() {
            tracing::warn!(
                edges = self.registry.len(),
                "these edges did not leave in time; they find another shard by themselves"
            );
        }
    }
}
