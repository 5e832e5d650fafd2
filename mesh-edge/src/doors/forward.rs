//! Ports of this machine that lead to targets in the mesh.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use proto::{stream::Open, target::Target};
use runtime::{flow::port::Visitor, splice::TcpEnd};
use tokio::net::TcpStream;

use super::Doors;

/// How long a program whose flow was refused is not listened to.
const DEAF: Duration = Duration::from_secs(1);

/// Carries one connection; a refusal resets it, since TCP has no words.
pub(super) async fn visit(doors: Arc<Doors>, socket: TcpStream, from: SocketAddr, target: Target) {
    let Ok(end) = TcpEnd::new(socket, Bytes::new()) else { return };
    match doors.reach(Open::new(target)).await {
        Ok(way) => doors.carry(end, way).await,
        Err(refusal) => tracing::info!(%from, code = %refusal.code, reason = refusal.reason, "refused"),
    }
}

/// Carries the datagrams of one program; a refusal looks like loss.
pub(super) async fn carry(doors: Arc<Doors>, visitor: Visitor, target: Target) {
    let from = visitor.from;
    match doors.reach(Open::flow(target)).await {
        Ok(way) => doors.carry_flow(visitor, way).await,
        Err(refusal) => {
            tracing::info!(%from, code = %refusal.code, reason = refusal.reason, "a flow was refused");
            doors.tasks.token().run_until_cancelled(tokio::time::sleep(DEAF)).await;
            drop(visitor);
        }
    }
}
