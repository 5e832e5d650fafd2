//! `meshctl proxy`: standard input and output as one stream, for ssh's `ProxyCommand` and for pipes.

use std::{
    io,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use proto::{code::ResetCode, target::Target};
use runtime::{
    link::{Link, StreamError},
    splice::{Broken, IoEnd, Meter, splice},
};
use tokio::signal::unix::{self, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::Context;
use crate::{
    failure::{self, Failure},
    reach::{self, Opened},
    session::Session,
    stdio::EndingStdout,
};

/// How long a stream may take to end by itself after ssh has hung up.
const HANG_UP: Duration = Duration::from_millis(500);
/// Silence after which a stream that the other side no longer reads is over.
const LINGER: Duration = Duration::from_secs(1);

/// Connects standard input and output with a target.
///
/// Each direction ends by itself.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 both directions ended cleanly, 1 the stream broke, 3 refused, 4 cannot be reached.

Examples:
  meshctl proxy shop-1:22
  meshctl proxy shop-1/10.0.0.5:9100
  printf 'GET / HTTP/1.0\\r\\n\\r\\n' | meshctl proxy shop-1/web
  ssh -o ProxyCommand='meshctl proxy %h:%p' root@shop-1"
)]
pub(crate) struct ProxyArgs {
    /// EDGE:PORT, EDGE/HOST:PORT, EDGE/SERVICE or */SERVICE.
    target: Target,
}

/// Moves bytes until both directions have ended.
///
/// # Errors
/// If the stream is refused, or breaks.
pub(crate) async fn run(context: &Context, args: &ProxyArgs) -> Result<(), Failure> {
    let session = context.session().await?;
    let mut signals = Signals::new()?;
    let (link, opened) = connect(&session, args, &mut signals).await?;
    tracing::info!(edge = %opened.edge, address = %opened.address, shard = %link.peer().identity.name, "open");
    // Standard input may be silent for long: that nobody wants its bytes any more is told at once.
    let unwanted = opened.stream.send.refused();
    let local = IoEnd::new(tokio::io::stdin(), EndingStdout::new(), Bytes::new());
    let (meter, cancel) = (Arc::new(Meter::default()), CancellationToken::new());
    let mut bytes = pin!(splice(local, opened.stream, &meter, &cancel));
    let done = tokio::select! {
        biased;
        by_user = signals.next() => match by_user {
            Signal::HangUp => match tokio::time::timeout(HANG_UP, &mut bytes).await {
                Ok(done) => done.map_err(|e| broke(&e)),
                Err(_) => Err(Failure::Quiet),
            },
            Signal::End => Err(Failure::Quiet),
        },
        why = unwanted => match while_bytes_come(bytes.as_mut(), &meter).await {
            Some(Err(e)) => Err(broke(&e)),
            Some(Ok(())) | None => Err(of_stream(&why)),
        },
        done = &mut bytes => done.map_err(|e| broke(&e)),
    };
    tracing::info!(sent = meter.up(), received = meter.down(), "closed");
    reach::goodbye(&link).await;
    done
}

/// The other side reads no more, but what it still sends is to arrive.
async fn while_bytes_come<F>(mut bytes: Pin<&mut F>, meter: &Meter) -> Option<F::Output>
where
    F: Future,
{
    loop {
        let before = meter.down();
        match tokio::time::timeout(LINGER, &mut bytes).await {
            Ok(done) => return Some(done),
            Err(_) if meter.down() == before => return None,
            Err(_) => {}
        }
    }
}

/// Opens the stream. A signal in the middle of it leaves no connection behind.
async fn connect(session: &Session, args: &ProxyArgs, signals: &mut Signals) -> Result<(Link, Opened), Failure> {
    let mut connecting = pin!(session.connect(&args.target));
    tokio::select! {
        biased;
        _ = signals.next() => {
            if let Ok(Ok((link, _))) = tokio::time::timeout(HANG_UP, connecting).await {
                reach::goodbye(&link).await;
            }
            Err(Failure::Quiet)
        }
        done = &mut connecting => done,
    }
}

/// What ends a proxy from outside.
enum Signal {
    /// ssh is done with its proxy.
    HangUp,
    /// Somebody wants the process to end.
    End,
}

/// Signals, caught from the beginning: a process that just died would leave its connection to be found by silence.
struct Signals {
    hang_up: unix::Signal,
    interrupt: unix::Signal,
    terminate: unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            hang_up: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            biased;
            _ = self.interrupt.recv() => Signal::End,
            _ = self.terminate.recv() => Signal::End,
            _ = self.hang_up.recv() => Signal::HangUp,
        }
    }
}

fn broke(broken: &Broken) -> Failure {
    match broken.code {
        ResetCode::Revoked => Failure::Refused(broken.code.sentence().to_owned()),
        ResetCode::PeerReset
        | ResetCode::LinkLost
        | ResetCode::Shutdown
        | ResetCode::Stalled
        | ResetCode::Cancelled
        | ResetCode::ProtocolError
        | ResetCode::Refused => {
            Failure::Failed(format!("the stream broke: {} ({})", broken.code.sentence(), broken.detail))
        }
    }
}

fn of_stream(error: &StreamError) -> Failure {
    match error {
        StreamError::Link(end) => Failure::Failed(format!("the stream broke: {}", failure::of_link(end))),
        StreamError::Reset(_) | StreamError::Ended => {
            broke(&Broken { code: error.reset_code(), detail: error.to_string() })
        }
    }
}
