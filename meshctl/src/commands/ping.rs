//! `meshctl ping`: is the edge there, and how far away?

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use clap::Args;
use proto::{id::EdgeId, target::Target};
use runtime::{
    link::{Link, StreamError},
    shutdown,
};
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    reach::{self, Opened},
    session::Session,
    text,
};

/// Bytes of one ping: its number, and filling.
const SIZE: usize = 64;

/// Tells whether an edge is there, and how far away.
///
/// The pings take the way of every stream, and the edge itself echoes them.
#[derive(Debug, Args)]
#[command(after_help = "Exit status: 0 every ping came back, 1 some were lost, 3 refused, 4 none came back.

Examples:
  meshctl ping shop-1
  meshctl ping shop-1 -c 0 -i 5         until Ctrl-C, every five seconds
  meshctl ping shop-1 -o json")]
pub(crate) struct PingArgs {
    /// The edge.
    edge: EdgeId,
    /// How many; 0 for no end.
    #[arg(short, long, default_value_t = 4)]
    count: u64,
    /// Seconds from one to the next.
    #[arg(short, long, default_value = "1", value_parser = seconds, value_name = "SECONDS")]
    interval: Duration,
    /// Seconds after which one counts as lost.
    #[arg(short = 'W', long, default_value = "5", value_parser = seconds, value_name = "SECONDS")]
    wait: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no number of seconds from 0.01 to 86400");
    let number: f64 = text.parse().map_err(|_| wrong())?;
    if (0.01..=86_400.0).contains(&number) { Ok(Duration::from_secs_f64(number)) } else { Err(wrong()) }
}

/// What came of all pings.
#[derive(Debug, Serialize)]
struct Report {
    edge: EdgeId,
    shard: String,
    shard_address: String,
    carrier: &'static str,
    sent: u64,
    received: u64,
    /// In milliseconds, in the order of sending; none for a lost one.
    rtt_ms: Vec<Option<f64>>,
    min_ms: Option<f64>,
    avg_ms: Option<f64>,
    max_ms: Option<f64>,
}

/// Most round trips that a report names one by one.
const MOST_RTTS: usize = 10_000;

/// Pings, and tells.
///
/// # Errors
/// If the edge cannot be reached, or a ping is lost.
pub(crate) async fn run(context: &Context, args: &PingArgs) -> Result<(), Failure> {
    let session = context.session().await?;
    let target = Target::Probe { edge: args.edge.clone() };
    let (link, opened) = session.connect(&target).await?;
    let mut report = Report::new(args.edge.clone(), &link);
    let say = |words: String| if context.form == Form::Table { out::line(&words) } else { Ok(()) };
    say(format!("{} via {}", args.edge, report.way()))?;
    let mut probe = Probe { session, target, link, opened: Some(opened) };
    let done = tokio::select! {
        biased;
        stopped = shutdown::signal() => stopped.map(|_| ()).map_err(Failure::from),
        done = pings(args, &mut probe, &mut report, &say) => done,
    };
    reach::goodbye(&probe.link).await;
    done?;
    match context.form {
        Form::Json => out::json(&report)?,
        Form::Table => out::line(&report.summary())?,
    }
    report.verdict()
}

async fn pings(
    args: &PingArgs,
    probe: &mut Probe,
    report: &mut Report,
    say: &impl Fn(String) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut ticks = interval(args.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut number = 0;
    while args.count == 0 || number < args.count {
        ticks.tick().await;
        number += 1;
        report.sent = number;
        match probe.ping(number, args.wait).await {
            Ok(rtt) => {
                report.came_back(Some(rtt));
                say(format!("ping {number}: {}", text::millis(rtt)))?;
            }
            // Who may not ping now may not ping later.
            Err(e @ Failure::Refused(_)) => return Err(e),
            Err(e) => {
                report.came_back(None);
                say(format!("ping {number}: lost: {e}"))?;
            }
        }
    }
    Ok(())
}

/// A stream that echoes, opened anew when it breaks.
struct Probe {
    session: Session,
    target: Target,
    link: Link,
    opened: Option<Opened>,
}

impl Probe {
    async fn ping(&mut self, number: u64, wait: Duration) -> Result<Duration, Failure> {
        let deadline = Instant::now() + wait;
        let late = || Failure::Unreachable(format!("no answer within {} s", wait.as_secs_f32()));
        let mut opened = match self.opened.take() {
            Some(opened) => opened,
            None => timeout_at(deadline, self.reopen()).await.map_err(|_| late())??,
        };
        let start = Instant::now();
        let echo = timeout_at(deadline, echo(&mut opened, number)).await.map_err(|_| late())?;
        echo.map_err(|e| Failure::Unreachable(e.to_string()))?;
        self.opened = Some(opened);
        Ok(start.elapsed())
    }

    async fn reopen(&mut self) -> Result<Opened, Failure> {
        let (link, opened) = self.session.connect(&self.target).await?;
        self.link = link;
        Ok(opened)
    }
}

async fn echo(opened: &mut Opened, number: u64) -> Result<(), StreamError> {
    let mut ping = BytesMut::zeroed(SIZE);
    ping[..8].copy_from_slice(&number.to_be_bytes());
    let ping: Bytes = ping.freeze();
    opened.stream.send.write_one(ping.clone()).await?;
    let mut back = BytesMut::with_capacity(SIZE);
    while back.len() < SIZE {
        match opened.stream.recv.chunk(SIZE - back.len()).await? {
            Some(bytes) => back.extend_from_slice(&bytes),
            None => return Err(StreamError::Ended),
        }
    }
    if back == ping { Ok(()) } else { Err(StreamError::Reset(proto::code::ResetCode::ProtocolError)) }
}

impl Report {
    fn new(edge: EdgeId, link: &Link) -> Self {
        Self {
            edge,
            shard: link.peer().identity.name.to_string(),
            shard_address: link.remote_address().to_string(),
            carrier: "quic",
            sent: 0,
            received: 0,
            rtt_ms: Vec::new(),
            min_ms: None,
            avg_ms: None,
            max_ms: None,
        }
    }

    fn way(&self) -> String {
        format!("{} ({}, {})", self.shard, self.carrier, self.shard_address)
    }

    fn came_back(&mut self, rtt: Option<Duration>) {
        let ms = rtt.map(|r| r.as_secs_f64() * 1000.0);
        if self.rtt_ms.len() < MOST_RTTS {
            self.rtt_ms.push(ms);
        }
        let Some(ms) = ms else { return };
        self.received += 1;
        self.min_ms = Some(self.min_ms.map_or(ms, |m| m.min(ms)));
        self.max_ms = Some(self.max_ms.map_or(ms, |m| m.max(ms)));
        let before = self.avg_ms.unwrap_or(ms);
        #[allow(clippy::cast_precision_loss, reason = "nobody sends 2^52 pings")]
        let count = self.received as f64;
        self.avg_ms = Some(before + (ms - before) / count);
    }

    fn summary(&self) -> String {
        let lost = self.sent - self.received;
        let counts = format!("{} sent, {} came back, {lost} lost", self.sent, self.received);
        match (self.min_ms, self.avg_ms, self.max_ms) {
            (Some(min), Some(avg), Some(max)) => format!("{counts}; min/avg/max {min:.2}/{avg:.2}/{max:.2} ms"),
            _ => counts,
        }
    }

    fn verdict(&self) -> Result<(), Failure> {
        match (self.received, self.sent) {
            (received, sent) if received == sent => Ok(()),
            (0, _) => Err(Failure::Unreachable(format!(
                "no ping to {} came back; 'meshctl edge show {}' tells when it was last seen",
                self.edge, self.edge
            ))),
            (received, sent) => Err(Failure::Failed(format!("{} of {sent} pings were lost", sent - received))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            edge: "shop-1".parse().unwrap(),
            shard: "shard-1".into(),
            shard_address: "192.0.2.1:7400".into(),
            carrier: "quic",
            sent: 3,
            received: 0,
            rtt_ms: vec![],
            min_ms: None,
            avg_ms: None,
            max_ms: None,
        }
    }

    #[test]
    fn a_report_counts_and_judges() {
        let mut report = report();
        assert!(matches!(report.verdict(), Err(Failure::Unreachable(_))));
        report.came_back(Some(Duration::from_millis(10)));
        report.came_back(None);
        assert!(matches!(report.verdict(), Err(Failure::Failed(_))));
        report.came_back(Some(Duration::from_millis(20)));
        assert_eq!(report.summary(), "3 sent, 2 came back, 1 lost; min/avg/max 10.00/15.00/20.00 ms");
        report.came_back(Some(Duration::from_millis(30)));
        assert!(report.verdict().is_ok());
    }

    #[test]
    fn seconds_have_bounds() {
        assert_eq!(seconds("0.2"), Ok(Duration::from_millis(200)));
        for bad in ["0", "-1", "nan", "inf", "1e9", ""] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
