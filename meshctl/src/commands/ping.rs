//! `meshctl ping`: is the edge there, by which way, how far away, and what gets lost?

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use clap::Args;
use proto::{
    api::{EdgeView, Presence},
    id::EdgeId,
    target::Target,
};
use runtime::{
    link::{Carrier, Link, LinkStats, StreamError},
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

/// Tells whether an edge is there, by which way, how far away, and what gets lost.
///
/// The pings take the way of every stream, and the edge itself echoes them. A stream loses nothing, so a ping that is
/// lost on the network comes late and not never; what is told as lost packets is what QUIC had to send again between
/// this machine and its shard.
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
    /// What half, nine of ten, and 99 of 100 stayed below.
    p50_ms: Option<f64>,
    p90_ms: Option<f64>,
    p99_ms: Option<f64>,
    /// The way, from here to the edge.
    path: Vec<Hop>,
    /// Packets that this machine sent to its shard meanwhile, and those of them that were lost; none over TCP.
    sent_packets: Option<u64>,
    lost_packets: Option<u64>,
}

/// One link of the way.
#[derive(Debug, PartialEq, Serialize)]
struct Hop {
    from: String,
    to: String,
    /// `quic` or `tcp`; empty if that is not known.
    carrier: String,
    /// As its ends measure it; none if that is not known.
    rtt_ms: Option<f64>,
}

/// How long control may take to say where the edge is.
const ASK: Duration = Duration::from_secs(3);

/// The links from here to the edge: the one to this machine's shard, the one between shards if another one holds the
/// tunnel, and the tunnel.
fn path(edge: &EdgeId, link: (&str, Carrier, Duration), at: Option<&Presence>) -> Vec<Hop> {
    let (shard, carrier, rtt) = link;
    let ms = |rtt: Duration| Some(rtt.as_secs_f64() * 1000.0);
    let hop = |from: &str, to: &str, carrier: &str, rtt_ms| Hop {
        from: from.to_owned(),
        to: to.to_owned(),
        carrier: carrier.to_owned(),
        rtt_ms,
    };
    let mut hops = vec![hop("here", shard, carrier.slug(), ms(rtt))];
    let Some(at) = at else { return hops };
    if at.shard.as_str() != shard {
        // Shards reach each other over QUIC alone.
        hops.push(hop(shard, at.shard.as_str(), Carrier::Quic.slug(), None));
    }
    hops.push(hop(at.shard.as_str(), edge.as_str(), &at.carrier, ms(Duration::from_micros(at.rtt_us))));
    hops
}

/// Where control says that the edge is.
async fn presence(session: &Session, edge: &EdgeId) -> Option<Presence> {
    let view = tokio::time::timeout(ASK, session.api().get::<EdgeView>(&format!("/v1/edges/{edge}"))).await;
    view.ok()?.ok()?.presence
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
    let at = presence(&session, &args.edge).await;
    let mut report = Report::new(args.edge.clone(), &link, at.as_ref());
    let before = link.stats();
    let say = |words: String| if context.form == Form::Table { out::line(&words) } else { Ok(()) };
    say(format!("{} via {}", args.edge, report.way()))?;
    let mut probe = Probe { session, target, link, opened: Some(opened) };
    let done = tokio::select! {
        biased;
        stopped = shutdown::signal() => stopped.map(|_| ()).map_err(Failure::from),
        done = pings(args, &mut probe, &mut report, &say) => done,
    };
    report.lost(&probe.link, before);
    reach::goodbye(&probe.link).await;
    done?;
    report.distribute();
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
    fn new(edge: EdgeId, link: &Link, at: Option<&Presence>) -> Self {
        let shard = link.peer().identity.name.to_string();
        Self {
            path: path(&edge, (&shard, link.carrier(), link.rtt()), at),
            edge,
            shard,
            shard_address: link.remote_address().to_string(),
            carrier: link.carrier().slug(),
            sent: 0,
            received: 0,
            rtt_ms: Vec::new(),
            min_ms: None,
            avg_ms: None,
            max_ms: None,
            p50_ms: None,
            p90_ms: None,
            p99_ms: None,
            sent_packets: None,
            lost_packets: None,
        }
    }

    fn way(&self) -> String {
        let mut way = format!("{} ({}, {})", self.shard, self.carrier, self.shard_address);
        for hop in self.path.iter().skip(1) {
            let rtt = hop.rtt_ms.map(|ms| format!(", {ms:.1} ms")).unwrap_or_default();
            let carrier = if hop.carrier.is_empty() { "unknown" } else { &hop.carrier };
            way += &format!(", {} ({carrier}{rtt})", hop.to);
        }
        way
    }

    /// Notes what the link to the shard had to send again since then.
    fn lost(&mut self, link: &Link, before: LinkStats) {
        let now = link.stats();
        // A link that was dialled anew in between has counts of its own.
        let since = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
        if link.carrier() == Carrier::Quic {
            self.sent_packets = Some(since(now.sent_packets, before.sent_packets));
            self.lost_packets = Some(since(now.lost_packets, before.lost_packets));
        }
    }

    /// Notes how the round trips are distributed.
    fn distribute(&mut self) {
        let mut all: Vec<f64> = self.rtt_ms.iter().flatten().copied().collect();
        all.sort_by(f64::total_cmp);
        let below = |of_hundred: usize| {
            // The smallest that so many of a hundred do not exceed.
            let at = (all.len() * of_hundred).div_ceil(100).max(1) - 1;
            all.get(at).copied()
        };
        (self.p50_ms, self.p90_ms, self.p99_ms) = (below(50), below(90), below(99));
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
        let mut all = match (self.min_ms, self.avg_ms, self.max_ms) {
            (Some(min), Some(avg), Some(max)) => format!("{counts}; min/avg/max {min:.2}/{avg:.2}/{max:.2} ms"),
            _ => counts,
        };
        if let (Some(p50), Some(p90), Some(p99)) = (self.p50_ms, self.p90_ms, self.p99_ms) {
            all += &format!("; p50/p90/p99 {p50:.2}/{p90:.2}/{p99:.2} ms");
        }
        match (self.lost_packets, self.sent_packets) {
            (Some(lost), Some(sent)) => all += &format!("\n{lost} of {sent} QUIC packets to {} lost", self.shard),
            _ => all += &format!("\nover TCP to {}, which does not tell what it lost", self.shard),
        }
        all
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
            p50_ms: None,
            p90_ms: None,
            p99_ms: None,
            path: vec![],
            sent_packets: Some(20),
            lost_packets: Some(1),
        }
    }

    #[test]
    fn the_way_has_every_link_and_round_trips_are_distributed() {
        let at: Presence = serde_json::from_value(serde_json::json!({
            "edge": "shop-1", "shard": "shard-2", "since": 0, "address": "", "version": "", "services": [],
            "rtt_us": 30_000, "streams": 0, "carrier": "tcp"
        }))
        .unwrap();
        let edge: EdgeId = "shop-1".parse().unwrap();
        let link = ("shard-1", Carrier::Quic, Duration::from_millis(5));
        let hops = path(&edge, link, Some(&at));
        let told: Vec<_> = hops.iter().map(|hop| format!("{} {} {}", hop.from, hop.to, hop.carrier)).collect();
        assert_eq!(told, ["here shard-1 quic", "shard-1 shard-2 quic", "shard-2 shop-1 tcp"]);
        assert_eq!(hops[2].rtt_ms, Some(30.0));
        assert_eq!(path(&edge, link, None).len(), 1, "without control nobody knows more");

        let mut report = report();
        for ms in 1..=100 {
            report.came_back(Some(Duration::from_millis(ms)));
        }
        report.distribute();
        assert_eq!((report.p50_ms, report.p90_ms, report.p99_ms), (Some(50.0), Some(90.0), Some(99.0)));
    }

    #[test]
    fn a_report_counts_and_judges() {
        let mut report = report();
        assert!(matches!(report.verdict(), Err(Failure::Unreachable(_))));
        report.came_back(Some(Duration::from_millis(10)));
        report.came_back(None);
        assert!(matches!(report.verdict(), Err(Failure::Failed(_))));
        report.came_back(Some(Duration::from_millis(20)));
        let counts = "3 sent, 2 came back, 1 lost; min/avg/max 10.00/15.00/20.00 ms";
        assert_eq!(report.summary(), format!("{counts}\n1 of 20 QUIC packets to shard-1 lost"));
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
