//! Readiness: an edge is ready while its shard answers.

use std::time::Duration;

use runtime::admin::ReadyPart;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::life::{Line, Phase};

/// An edge whose shard has not answered a ping for so long is not ready.
const FRESH: Duration = Duration::from_secs(15);
/// How often to look.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps the part up to date until it is dropped.
pub async fn keep(part: ReadyPart, mut phase: watch::Receiver<Phase>, line: watch::Receiver<Line>) {
    loop {
        let heard = line.borrow().pulse.as_ref().and_then(|pulse| *pulse.borrow());
        match state(&phase.borrow_and_update(), heard, Instant::now()) {
            Ok(text) => part.detail(text),
            Err(text) => part.down(text),
        }
        tokio::select! {
            biased;
            changed = phase.changed() => if changed.is_err() {
                return;
            },
            () = sleep(LOOK) => {}
        }
    }
}

/// Ready or not, with what to say about it.
fn state(phase: &Phase, heard: Option<Instant>, now: Instant) -> Result<String, String> {
    match phase {
        Phase::Starting => Err("starting".into()),
        Phase::Dialing { attempt, address } => Err(format!("dialing {address}, attempt {attempt}")),
        Phase::Waiting { until, why } => {
            Err(format!("next try in {} s; {why}", until.saturating_duration_since(now).as_secs()))
        }
        Phase::Refused { kind, why, until } => {
            Err(format!("{kind}: {why} Next try in {} s", until.saturating_duration_since(now).as_secs()))
        }
        Phase::Stopped => Err("stopped".into()),
        Phase::Connected { shard, .. } => match heard.map(|at| now - at) {
            Some(age) if age <= FRESH => Ok(format!("shard {shard} answered {:.1} s ago", age.as_secs_f32())),
            Some(age) => Err(format!("shard {shard} last answered {} s ago", age.as_secs())),
            None => Err(format!("shard {shard} has not answered a ping yet")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ready_is_whose_shard_answered_a_moment_ago() {
        let start = Instant::now();
        let phase = Phase::Connected { shard: "s-1".parse().unwrap(), since: start };
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(state(&phase, None, start), Err("shard s-1 has not answered a ping yet".into()));
        assert_eq!(state(&phase, Some(start), after(15)), Ok("shard s-1 answered 15.0 s ago".into()));
        assert_eq!(state(&phase, Some(start), after(16)), Err("shard s-1 last answered 16 s ago".into()));
        let phase = Phase::Refused { kind: "revoked", why: "The certificate is revoked.".into(), until: after(60) };
        assert_eq!(state(&phase, None, start), Err("revoked: The certificate is revoked. Next try in 60 s".into()));
    }
}
