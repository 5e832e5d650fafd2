//! The UDP door: a port that leads to a target, with one flow for each address that sends to it.

use std::{sync::Arc, time::Duration};

use proto::principal::Principal;
use runtime::flow::port::Visitor;

use crate::{
    config::UdpDoorConfig,
    route::{Request, Router},
};

/// How long whoever was refused is not listened to, so that a stream of datagrams is not as many requests.
const DEAF: Duration = Duration::from_secs(1);

/// Carries the datagrams of one visitor. A refusal looks like loss, since UDP has no words.
pub async fn visit(visitor: Visitor, router: Router, door: Arc<UdpDoorConfig>) {
    let who = Principal::Door { name: door.name.clone() };
    let request = Request::flow(who, visitor.from.to_string(), &door.name, door.target.clone());
    match router.open(request).await {
        Ok(pending) => pending.flow(visitor.side(), Some(door.idle())).await,
        Err(refusal) => {
            router.metrics().door_refusals.with_label_values(&[door.name.as_str(), "request"]).inc();
            tracing::debug!(door = door.name, code = %refusal.code, reason = refusal.reason, "refused");
            tokio::time::sleep(DEAF).await;
            drop(visitor);
        }
    }
}
