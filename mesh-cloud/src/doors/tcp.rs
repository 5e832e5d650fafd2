//! The TCP door: a port that leads to a target.

use proto::{principal::Principal, target::Target};
use runtime::splice::TcpEnd;

use super::Visitor;
use crate::route::{Request, Router};

/// Lets a visitor through. Its first bytes go behind the Open without waiting for the target; a refusal ends its
/// connection with a reset, since TCP has no words.
pub async fn visit(visitor: Visitor, router: Router, name: String, target: Target) {
    let Ok(end) = TcpEnd::new(visitor.socket, bytes::Bytes::new()) else { return };
    let request = Request::new(Principal::Door { name: name.clone() }, visitor.from.to_string(), &name, target);
    match router.open(request).await {
        Ok(pending) => pending.splice(end).await,
        Err(refusal) => tracing::debug!(door = name, code = %refusal.code, reason = refusal.reason, "refused"),
    }
}
