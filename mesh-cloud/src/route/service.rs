//! The search for some edge that announces a service: one of those here and elsewhere, by chance.

use std::sync::Arc;

use proto::{
    code::RefuseCode,
    id::{ServiceName, ShardId},
    stream::Refusal,
};
use rand::{RngExt, seq::IndexedRandom};
use tokio::time::{Instant, timeout_at};

use super::{NEWS, Opened, Request, Router, decide, may_be_elsewhere, unknown_service};
use crate::{peer::NotThere, session::EdgeHandle, state::MeshState};

/// An edge that may be used, or where to ask for one.
enum Way {
    /// It is here.
    Here(Arc<EdgeHandle>, String),
    /// These have some.
    Elsewhere(Elsewhere),
}

/// Where to ask, and what to do if nobody there has one.
struct Elsewhere {
    places: Vec<ShardId>,
    /// An edge that is here, and that would do as well.
    or: Option<(Arc<EdgeHandle>, String)>,
    nobody: Refusal,
}

impl Router {
    /// Opens a stream to an edge that announces a service.
    pub(super) async fn to_service(
        &self,
        request: &Request,
        name: &ServiceName,
        until: Instant,
    ) -> Result<Opened, Refusal> {
        let mut patience = None;
        loop {
            let (links, words) = (self.0.peers.news(), self.0.directory.news());
            let state = self.state();
            let nobody = match self.provider(&state, request, name) {
                Ok(Way::Here(handle, rule)) => return self.here(request, &handle, rule).await,
                Ok(Way::Elsewhere(elsewhere)) => return self.ask_providers(request, elsewhere, until).await,
                Err(nobody) => nobody,
            };
            let silent = self.silent(&state, name);
            // A shard that was asked by another one answers for its own edges.
            let (RefuseCode::ServiceUnknown, 0, Some(silent)) = (nobody.code, request.hops, silent) else {
                return Err(nobody);
            };
            let (patience, _) = patience.get_or_insert_with(|| (until.min(Instant::now() + NEWS), self.0.peers.want()));
            let news = async {
                tokio::select! {
                    biased;
                    () = links => {}
                    () = words => {}
                }
            };
            if timeout_at(*patience, news).await.is_err() {
                let reason =
                    format!("nobody is known to announce {name}, but shard {silent} cannot be asked; try again");
                return Err(Refusal::because(RefuseCode::NotReady, reason));
            }
        }
    }

    /// A shard whose edges' services are not known here, or that cannot be asked for one of them.
    fn silent(&self, state: &MeshState, name: &ServiceName) -> Option<ShardId> {
        let parts = &self.0;
        let provides = |shard: &ShardId| parts.directory.providers(name).iter().any(|(other, _)| other == shard);
        let silent =
            |shard: &&ShardId| **shard != parts.shard && (!parts.directory.knows_services(shard) || provides(shard));
        state.shards.iter().map(|c| &c.shard).find(silent).cloned()
    }

    fn provider(&self, state: &MeshState, request: &Request, name: &ServiceName) -> Result<Way, Refusal> {
        let (mut allowed, mut missing) = (Vec::new(), None);
        for handle in self.0.registry.announcing(name) {
            match decide(state, &request.principal, &request.target, &handle.id, Some(&handle)) {
                Ok(rule) => allowed.push((handle, rule)),
                Err(refusal) => missing = Some(refusal),
            }
        }
        let others = if request.hops == 0 { self.0.directory.providers(name) } else { Vec::new() };
        let mut others: Vec<_> = others.into_iter().filter(|(shard, _)| self.0.peers.has(shard)).collect();
        let here = u32::try_from(allowed.len()).unwrap_or(u32::MAX);
        let everywhere = others.iter().fold(here, |sum, (_, count)| sum.saturating_add(*count));
        let mut rng = rand::rng();
        let or = allowed.choose(&mut rng).cloned();
        if let Some((handle, rule)) = &or
            && rng.random_range(0..everywhere.max(1)) < here
        {
            return Ok(Way::Here(Arc::clone(handle), rule.clone()));
        }
        let nobody = missing.unwrap_or_else(|| unknown_service(&request.target));
        // The first by chance and weight, the rest as they come: they are asked only if it fails.
        let first = others.choose_weighted(&mut rng, |(_, count)| *count).map(|(shard, _)| shard.clone()).ok();
        others.sort_by_key(|(shard, _)| Some(shard) != first.as_ref());
        if others.is_empty() {
            return Err(nobody);
        }
        let places = others.into_iter().map(|(shard, _)| shard).collect();
        Ok(Way::Elsewhere(Elsewhere { places, or, nobody }))
    }

    async fn ask_providers(
        &self,
        request: &Request,
        Elsewhere { places, or, nobody }: Elsewhere,
        until: Instant,
    ) -> Result<Opened, Refusal> {
        let (open, mut silent) = (self.passed_on(request), None);
        for shard in places {
            match timeout_at(until, self.0.peers.open(&shard, &open)).await {
                Ok(Ok((stream, routed))) => return Ok((stream, None, routed)),
                Ok(Err(NotThere::Refused(refusal))) if may_be_elsewhere(refusal.code) => {}
                Ok(Err(NotThere::Refused(refusal))) => return Err(refusal),
                Ok(Err(NotThere::Unreached(why))) => silent = Some(format!("shard {shard} cannot be asked ({why})")),
                Err(_) => silent = Some(format!("shard {shard} did not answer in time")),
            }
        }
        match (or, silent) {
            (Some((handle, rule)), _) => self.here(request, &handle, rule).await,
            (None, Some(why)) => Err(Refusal::because(RefuseCode::NotReady, format!("{why}; try again"))),
            (None, None) => Err(nobody),
        }
    }
}
