//! The search for the shard at which an edge is connected.
//!
//! Who knows is the edge's owner; and an owner that has just become it knows once it has heard every shard that lives on
//! the ring that made it the owner. Others are asked because they may have the edge at the moment. A search ends with the
//! tunnel, or when those who know have said no; if they cannot be asked, it waits a moment for them, and then says just
//! that ([`RefuseCode::NotReady`]) and nothing of the edge.

use std::{cmp::Reverse, collections::BTreeMap};

use proto::{
    code::RefuseCode,
    id::{EdgeId, ShardId},
    stream::{Open, Refusal},
    target::Target,
};
use tokio::time::{Instant, timeout_at};

use super::{
    ASK_AGAIN, MAX_HOPS, NEWS, ON_THE_WAY, Opened, Request, Router, decide, may_be_elsewhere, unknown_service,
};
use crate::{peer::NotThere, session::EdgeHandle, state::MeshState};

/// How often a shard is asked whose link breaks while it is being asked.
const TRIES: u8 = 2;

/// A search for one edge.
pub(super) struct Search<'a> {
    router: &'a Router,
    request: &'a Request,
    edge: &'a EdgeId,
    until: Instant,
    /// What shards said, going by the ring of `epoch`.
    said: BTreeMap<ShardId, Said>,
    epoch: u64,
    /// The tunnel here that broke just now, and the refusal which says so.
    broken: Option<(u64, Refusal)>,
}

/// What a shard said that does not have the edge.
enum Said {
    /// Nothing, so many times.
    Nothing(u8, String),
    /// No.
    No(Refusal),
}

/// A shard that may have the edge.
struct Place {
    shard: ShardId,
    /// Whether it is to answer for its own tunnels only.
    alone: bool,
}

impl<'a> Search<'a> {
    /// A search that ends by this time.
    pub(super) const fn new(router: &'a Router, request: &'a Request, edge: &'a EdgeId, until: Instant) -> Self {
        Self { router, request, edge, until, said: BTreeMap::new(), epoch: 0, broken: None }
    }

    /// Opens a stream to the edge, wherever it is.
    pub(super) async fn run(mut self) -> Result<Opened, Refusal> {
        let parts = &self.router.0;
        let (mut patience, mut last) = (None, false);
        loop {
            // From before the look around, so that what happens meanwhile is not missed.
            let (links, words) = (parts.peers.news(), parts.directory.news());
            let state = self.router.state();
            if self.epoch != state.ring.epoch() {
                self.epoch = state.ring.epoch();
                self.said.clear();
            }
            if let Some(opened) = self.here(&state).await? {
                return Ok(opened);
            }
            // What a service announces is known where the edge is, and so rules on it are for its holder. What is denied
            // here is denied there; asking would only take longer.
            if !matches!(self.request.target, Target::Service { .. }) {
                decide(&state, &self.request.principal, &self.request.target, self.edge, None)?;
            }
            let (opened, asked) = self.elsewhere(&state).await?;
            if let Some(opened) = opened {
                return Ok(opened);
            }
            // It may have come here in the meantime.
            if asked && Instant::now() < self.until {
                continue;
            }
            let Some(doubt) = self.doubt(&state) else { return Err(self.nobody(&state)) };
            if last || !self.may_wait(&state) {
                return Err(doubt);
            }
            let (patience, _) =
                patience.get_or_insert_with(|| (self.until.min(Instant::now() + NEWS), parts.peers.want()));
            let on_the_way = self.on_the_way(&state).filter(|until| *until > *patience);
            let pause = on_the_way.map_or(*patience, |_| Instant::now() + ASK_AGAIN);
            let news = async {
                tokio::select! {
                    biased;
                    () = links => {}
                    () = words => {}
                }
            };
            if timeout_at(pause, news).await.is_err() {
                // Those who said no are asked once more: an edge whose shard is lost comes to one of them.
                self.said.retain(|_, said| matches!(said, Said::Nothing(..)));
                last = on_the_way.is_none();
            }
        }
    }

    /// Until when the edge may be on its way to another shard, if the one that had it was lost just now: it tells nobody
    /// where it goes, and whoever gets it has no owner to tell. Only the shard where the stream entered waits for that.
    fn on_the_way(&self, state: &MeshState) -> Option<Instant> {
        let parts = &self.router.0;
        let told = parts.directory.holder(self.edge).map(|(shard, _)| shard);
        let owner = state.ring.owner(self.edge).map(|m| m.shard.clone());
        let lost = told.into_iter().chain(owner).filter_map(|shard| parts.peers.lost_at(&shard)).max()?;
        let until = self.until.min(lost + ON_THE_WAY);
        (self.request.hops == 0 && until > Instant::now()).then_some(until)
    }

    /// Uses the tunnel that ends here, if there is one.
    async fn here(&mut self, state: &MeshState) -> Result<Option<Opened>, Refusal> {
        let (parts, request) = (&self.router.0, self.request);
        // Whoever died without a word may have come back elsewhere, while its old tunnel still looks alive.
        let newer_elsewhere = |handle: &EdgeHandle| {
            parts.directory.holder(self.edge).is_some_and(|(_, unix_ms)| unix_ms > handle.unix_ms)
        };
        let broke = |handle: &EdgeHandle| self.broken.as_ref().is_some_and(|(one, _)| *one == handle.generation);
        let handle = parts.registry.find(self.edge);
        let Some(handle) = handle.filter(|h| h.link.end().is_none() && !broke(h) && !newer_elsewhere(h)) else {
            return Ok(None);
        };
        let rule = decide(state, &request.principal, &request.target, self.edge, Some(&handle))?;
        if let Target::Service { name, .. } = &request.target
            && !handle.services().iter().any(|s| s.name == *name)
        {
            return Err(unknown_service(&request.target));
        }
        match self.router.here(request, &handle, rule).await {
            Err(refusal) if refusal.code == RefuseCode::LinkLost => {
                self.broken = Some((handle.generation, refusal));
                Ok(None)
            }
            opened => opened.map(Some),
        }
    }

    /// Asks those who have not been asked, one after the other. Says also whether there was anybody to ask.
    async fn elsewhere(&mut self, state: &MeshState) -> Result<(Option<Opened>, bool), Refusal> {
        let (peers, mut asked) = (&self.router.0.peers, false);
        let open = self.router.passed_on(self.request);
        for Place { shard, alone } in self.places(state) {
            let tried = match self.said.get(&shard) {
                None => 0,
                Some(Said::Nothing(times, _)) => *times,
                Some(Said::No(_)) => TRIES,
            };
            if tried >= TRIES || Instant::now() >= self.until || !peers.has(&shard) {
                continue;
            }
            asked = true;
            let open = Open { hops: if alone { MAX_HOPS } else { open.hops }, ..open.clone() };
            let said = match timeout_at(self.until, peers.open(&shard, &open)).await {
                Ok(Ok((stream, routed))) => return Ok((Some((stream, None, routed)), true)),
                Ok(Err(NotThere::Refused(refusal))) => {
                    if !may_be_elsewhere(refusal.code) || refusal.code == RefuseCode::ServiceUnknown {
                        return Err(refusal);
                    }
                    Said::No(refusal)
                }
                Ok(Err(NotThere::Unreached(why))) => Said::Nothing(tried + 1, why),
                Err(_) => Said::Nothing(TRIES, "it did not answer in time".to_owned()),
            };
            tracing::debug!(%shard, %said, "the edge is not there");
            self.said.insert(shard, said);
        }
        Ok((None, asked))
    }

    /// Shards that may have the edge, best guess first: whoever said so, where it was sent, its owner, its owner before
    /// the last change, and the one that it goes to if its owner is lost; then those whose word the owner, which is this
    /// shard, has not heard yet. Among them, those that own nothing come first: they keep what they have.
    fn places(&self, state: &MeshState) -> Vec<Place> {
        let parts = &self.router.0;
        if self.request.hops >= MAX_HOPS {
            return Vec::new();
        }
        let told = parts.directory.holder(self.edge).map(|(shard, _)| shard);
        let sent = parts.directory.trace(self.edge);
        let mut owners: Vec<_> = state.ring.preference(self.edge).take(2).map(|m| m.shard.clone()).collect();
        let next = owners.split_off(owners.len().min(1));
        let before = state.previous.owner(self.edge).map(|m| m.shard.clone());
        let guesses = told.into_iter().chain(sent).chain(owners).chain(before).chain(next);
        let guesses = guesses.map(|shard| Place { shard, alone: false });
        let mut unheard = self.unheard(state);
        unheard.sort_by_key(|shard| Reverse(state.ring.member(shard).is_none()));
        let mut places: Vec<Place> = Vec::new();
        for place in guesses.chain(unheard.into_iter().map(|shard| Place { shard, alone: true })) {
            if self.is_another(&place.shard) && !places.iter().any(|known| known.shard == place.shard) {
                places.push(place);
            }
        }
        places
    }

    /// Neither this shard nor one that passed the stream on to it.
    fn is_another(&self, shard: &ShardId) -> bool {
        *shard != self.router.0.shard && !self.request.via.contains(shard)
    }

    /// Whether this shard is the one that has to know; so is everybody if nobody owns the edge.
    fn is_mine(&self, state: &MeshState) -> bool {
        state.ring.owner(self.edge).is_none_or(|owner| owner.shard == self.router.0.shard)
    }

    /// Shards that live, and of which the owner cannot tell whether they have the edge, if this one is the owner.
    fn unheard(&self, state: &MeshState) -> Vec<ShardId> {
        if !self.is_mine(state) {
            return Vec::new();
        }
        // To an owner that is not there nobody tells anything.
        let heard =
            |shard: &ShardId| !state.ring.is_empty() && self.router.0.directory.has_heard(shard, state.ring.epoch());
        let live = state.shards.iter().map(|c| &c.shard);
        live.filter(|shard| self.is_another(shard) && !heard(shard)).cloned().collect()
    }

    /// Why it cannot be said that the edge is nowhere, if it cannot.
    fn doubt(&self, state: &MeshState) -> Option<Refusal> {
        use RefuseCode as C;
        if !state.edges.contains_key(self.edge) {
            return None;
        }
        let mine = self.is_mine(state);
        let owner = state.ring.owner(self.edge).map(|m| m.shard.clone()).filter(|_| !mine);
        let told = self.router.0.directory.holder(self.edge).map(|(shard, _)| shard);
        for shard in told.into_iter().chain(owner).chain(self.unheard(state)).filter(|s| self.is_another(s)) {
            let why = match self.said.get(&shard) {
                // One that was to answer for itself alone says by these that it is not the one who knows.
                Some(Said::No(no)) if mine && matches!(no.code, C::LoopDetected | C::Draining) => continue,
                Some(Said::No(no)) if matches!(no.code, C::EdgeOffline | C::EdgeUnknown | C::LinkLost) => continue,
                Some(Said::No(no)) => format!("shard {shard} cannot tell where edge/{} is: {}", self.edge, no.reason),
                Some(Said::Nothing(_, why)) => {
                    format!("shard {shard}, which may know where edge/{} is, cannot be asked ({why})", self.edge)
                }
                None if self.request.hops >= MAX_HOPS => return Some(Refusal::new(C::LoopDetected)),
                None => {
                    let edge = self.edge;
                    format!(
                        "shard {shard}, which may know where edge/{edge} is, cannot be asked (there is no link to it)"
                    )
                }
            };
            return Some(Refusal::because(C::NotReady, format!("{}; try again", why.trim_end_matches("; try again"))));
        }
        None
    }

    /// Whether it is this shard that has to wait for those who know: the one where the stream entered, or the owner.
    fn may_wait(&self, state: &MeshState) -> bool {
        self.request.hops == 0 || (self.is_mine(state) && self.request.hops < MAX_HOPS)
    }

    /// What to say if the edge is nowhere.
    fn nobody(self, state: &MeshState) -> Refusal {
        let denied = decide(state, &self.request.principal, &self.request.target, self.edge, None).err();
        if let Some(refusal) = denied.or_else(|| self.broken.map(|(_, refusal)| refusal)) {
            return refusal;
        }
        let (mut lost, mut owners) = (None, None);
        let owner = state.ring.owner(self.edge).map(|m| &m.shard);
        for (shard, said) in self.said {
            match said {
                Said::No(no) if no.code == RefuseCode::LinkLost => lost = Some(no),
                Said::No(no) if no.code == RefuseCode::EdgeOffline && Some(&shard) == owner => owners = Some(no),
                Said::No(_) | Said::Nothing(..) => {}
            }
        }
        // The owner knows best when the edge was last seen.
        lost.or(owners).unwrap_or_else(|| self.router.absent(state, self.edge))
    }
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing(_, why) => f.write_str(why),
            Self::No(refusal) => write!(f, "{}", refusal.code),
        }
    }
}
