//! What doors do alike with a fresh connection: wait for its first byte at no cost, see whether it is still there, and
//! end it with a last word.

use std::time::Duration;

pub(super) use runtime::speak::{farewell, while_there};
use tokio::{net::TcpStream, time::timeout};
use tokio_util::sync::CancellationToken;

/// How long a visitor may be silent before the first byte.
const FIRST_BYTE: Duration = Duration::from_secs(30);

/// Waits for the first byte without taking it, and without a buffer: ten thousand silent visitors are ten thousand
/// sockets and nothing more. `None` if it does not come in time or the door closes.
pub(super) async fn first_byte(socket: &TcpStream, stopping: &CancellationToken) -> Option<u8> {
    let peek = async {
        let mut first = [0];
        match socket.peek(&mut first).await {
            Ok(1) => Some(first[0]),
            Ok(_) | Err(_) => None,
        }
    };
    stopping.run_until_cancelled(timeout(FIRST_BYTE, peek)).await?.ok()?
}
