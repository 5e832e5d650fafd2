//! What is known of one SSH connection: who is at its end, and which channels it has.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use proto::{
    code::{RefuseCode, ResetCode},
    id::UserId,
    principal::Principal,
    stream::Refusal,
};
use russh::ChannelId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{SshDoor, lane::Lane, room::Gate};
use crate::fair::Share;

/// Most channels of one connection.
pub(super) const CHANNELS: usize = 128;

/// Who was let in.
#[derive(Clone, Debug)]
pub(super) struct Admitted {
    /// As whom.
    pub(super) principal: Principal,
    /// By which credential.
    pub(super) credential: String,
    /// Last second of the credential, if it has one.
    pub(super) not_after: Option<i64>,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// Its channels.
    pub(super) lanes: Mutex<HashMap<ChannelId, Arc<Lane>>>,
    /// Cancelled once somebody is let in.
    pub(super) let_in: CancellationToken,
    /// Whether its socket is read.
    pub(super) gate: Arc<Gate>,
    /// Cancelled when there is nobody any more to whom channels could be.
    pub(super) over: CancellationToken,
    admitted: Mutex<Option<(Admitted, Share<UserId>)>>,
    channels: watch::Sender<usize>,
}

/// A channel that is counted, until dropped.
#[derive(Debug)]
pub(super) struct Held {
    channels: watch::Sender<usize>,
    _share: Share<UserId>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.channels.send_modify(|count| *count -= 1);
    }
}

impl Connection {
    /// A connection of nobody yet.
    pub(super) fn new() -> Self {
        Self {
            lanes: Mutex::default(),
            let_in: CancellationToken::new(),
            gate: Arc::default(),
            over: CancellationToken::new(),
            admitted: Mutex::new(None),
            channels: watch::channel(0).0,
        }
    }

    /// Lets somebody in, as one more connection of this user.
    pub(super) fn admit(&self, admitted: Admitted, door: &SshDoor) -> Result<(), String> {
        let Principal::User { name, .. } = &admitted.principal else {
            return Err(format!("{} is no user", admitted.principal));
        };
        let share = door.user_links.take(name).ok_or_else(|| {
            format!("user/{name} has as many links to this shard as one user may (limits.links_per_user)")
        })?;
        *self.admitted.lock() = Some((admitted, share));
        self.let_in.cancel();
        Ok(())
    }

    /// Who was let in.
    pub(super) fn admitted(&self) -> Option<Admitted> {
        self.admitted.lock().as_ref().map(|(admitted, _)| admitted.clone())
    }

    /// Counts one more channel.
    pub(super) fn take_channel(&self, door: &SshDoor) -> Result<Held, Refusal> {
        let admitted = self.admitted();
        let Some(Principal::User { name, .. }) = admitted.map(|a| a.principal) else {
            return Err(Refusal::new(RefuseCode::Unauthenticated));
        };
        if *self.channels.borrow() >= CHANNELS {
            let reason = format!("this SSH connection has {CHANNELS} channels, which is the most; open another one");
            return Err(Refusal::because(RefuseCode::LimitReached, reason));
        }
        let share = door.user_streams.take(&name).ok_or_else(|| {
            let reason =
                format!("user/{name} has as many streams open at this shard as one user may (limits.streams_per_user)");
            Refusal::because(RefuseCode::LimitReached, reason)
        })?;
        self.channels.send_modify(|count| *count += 1);
        Ok(Held { channels: self.channels.clone(), _share: share })
    }

    /// Waits until it has no channel.
    pub(super) async fn idle(&self) {
        // The sender is ours.
        let _ = self.channels.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Nobody is there any more: whatever is open breaks.
    pub(super) fn end(&self) {
        self.over.cancel();
        for lane in self.lanes.lock().values() {
            lane.break_off(ResetCode::PeerReset, "the SSH connection ended before the channel did");
        }
    }
}
