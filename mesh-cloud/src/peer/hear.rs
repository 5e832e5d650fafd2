//! What comes in over a link that another shard dialled: its word on edges, and the streams that it passes on.

use proto::{code::CloseCode, frame::MAX_SHARD_TO_SHARD, id::ShardId, peer::ShardToShard};
use runtime::{
    frames::{FrameReader, ReadFrameError},
    link::{Link, LinkEnd, RecvHalf, Stream},
};

use crate::directory::{Conversation, Directory};

/// A peer's link, from this side.
#[derive(Debug)]
pub struct Hearing {
    /// Who speaks.
    pub peer: ShardId,
    /// Its link.
    pub link: Link,
    /// Where its word goes.
    pub directory: Directory,
}

impl Hearing {
    /// Listens until the link ends; each stream that the peer passes on goes to `serve`, which must not wait.
    pub async fn run(self, serve: impl Fn(Stream) + Send) -> LinkEnd {
        let mut control = match self.link.accept().await {
            Ok(stream) => stream,
            Err(end) => return end,
        };
        let conversation = self.directory.listen(self.peer.clone());
        let listening = listen(&mut control.recv, &conversation);
        let accepting = async {
            loop {
                match self.link.accept().await {
                    Ok(stream) => serve(stream),
                    Err(end) => return end,
                }
            }
        };
        tokio::pin!(accepting);
        tokio::select! {
            biased;
            end = &mut accepting => return end,
            heard = listening => match heard {
                Ok(()) | Err(ReadFrameError::Stream(_)) => {}
                Err(error @ (ReadFrameError::Frame(_) | ReadFrameError::Truncated)) => {
                    tracing::warn!(%error, "a peer says what cannot be understood");
                    self.link.close(CloseCode::ProtocolError, &error.to_string());
                }
            },
        }
        // What it said is over with its control stream; what it passes on still counts.
        drop(conversation);
        accepting.await
    }
}

async fn listen(recv: &mut RecvHalf, conversation: &Conversation) -> Result<(), ReadFrameError> {
    let mut reader = FrameReader::new(MAX_SHARD_TO_SHARD);
    while let Some(body) = reader.next(recv).await? {
        match ShardToShard::decode(body)? {
            Some(ShardToShard::Greeting { epoch, version }) => {
                tracing::debug!(epoch, version, "a peer goes by this ring");
                conversation.greeted(epoch);
            }
            Some(ShardToShard::Held { all, edges }) => conversation.held(all, edges),
            Some(ShardToShard::Released(edges)) => conversation.released(&edges),
            Some(ShardToShard::Announced(services)) => conversation.announced(services),
            None => tracing::debug!("a message of a newer version was skipped"),
        }
    }
    Ok(())
}
