//! A way to a server on this machine that can be cut, as networks are: nothing comes through any more, and nobody is
//! told.

use std::net::{Ipv4Addr, SocketAddr};

use runtime::shutdown::Tasks;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// The way.
#[derive(Debug)]
pub(crate) struct Way {
    /// Where it begins, on the loopback.
    pub(crate) port: u16,
    cut: watch::Sender<bool>,
}

impl Way {
    /// Opens a way to a port of the loopback.
    pub(crate) async fn to(port: u16, tasks: &Tasks) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let way = Self { port: listener.local_addr()?.port(), cut: watch::Sender::new(false) };
        let (cut, group) = (way.cut.subscribe(), tasks.clone());
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        tasks.spawn(tasks.token().run_until_cancelled_owned(async move {
            while let Ok((near, _)) = listener.accept().await {
                let relay = relay(near, to, cut.clone());
                group.spawn(group.token().run_until_cancelled_owned(relay));
            }
        }));
        Ok(way)
    }

    /// Cuts it, or opens it again.
    pub(crate) fn cut(&self, on: bool) {
        self.cut.send_replace(on);
    }
}

async fn relay(near: TcpStream, to: SocketAddr, mut cut: watch::Receiver<bool>) {
    // An error means that the whole run ends.
    let _ = cut.wait_for(|cut| !cut).await;
    let Ok(far) = TcpStream::connect(to).await else { return };
    // Who waits for an answer would wait for the system's timer as well.
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let ((from_near, to_near), (from_far, to_far)) = (near.into_split(), far.into_split());
    tokio::join!(pass(from_near, to_far, cut.clone()), pass(from_far, to_near, cut));
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut cut: watch::Receiver<bool>) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(count) = from.read(&mut buffer).await {
        if cut.wait_for(|cut| !cut).await.is_err() || count == 0 || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_way_that_is_cut_is_silent_and_goes_on_when_it_is_opened() {
        let tasks = Tasks::new();
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let way = Way::to(server.local_addr().unwrap().port(), &tasks).await.unwrap();
        let mut client = TcpStream::connect(("127.0.0.1", way.port)).await.unwrap();
        let (mut inside, _) = server.accept().await.unwrap();
        let mut byte = [0];
        client.write_all(b"a").await.unwrap();
        inside.read_exact(&mut byte).await.unwrap();
        way.cut(true);
        client.write_all(b"b").await.unwrap();
        assert!(timeout(Duration::from_millis(100), inside.read_exact(&mut byte)).await.is_err());
        way.cut(false);
        inside.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"b");
        drop((client, inside));
        assert_eq!(tasks.drained(Duration::from_secs(5)).await, 0);
    }
}
