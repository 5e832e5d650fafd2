//! `meshctl audit`: who reached what, when, and how it ended.

use std::time::Duration;

use clap::Args;
use proto::{
    audit::{AccessPage, AccessRecord, KeptRecord},
    id::{EdgeId, UserId},
};
use runtime::{clock::unix_now, shutdown};
use tokio::time::sleep;

use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    session::Session,
    table::{Cell, Table, Tone},
    text,
};

/// How often to ask while following.
const FOLLOW: Duration = Duration::from_secs(1);

/// Lists the access records that control keeps: one for each stream, with who, what, how much and how it ended.
///
/// The newest come last. For administrators.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  meshctl audit                                 the last hundred
  meshctl audit --user alice --since 1d         what alice did since yesterday
  meshctl audit --edge shop-1 --outcome refused
  meshctl audit --outcome policy-denied         by a code
  meshctl audit --follow -o json                one line of JSON for each, as they come")]
pub(crate) struct AuditArgs {
    /// Of this user.
    #[arg(long, conflicts_with = "who")]
    user: Option<UserId>,
    /// Of whoever this is: user/NAME, edge/NAME, door/NAME or apiserver.
    #[arg(long)]
    who: Option<String>,
    /// Those that this edge served.
    #[arg(long)]
    edge: Option<EdgeId>,
    /// Not older than this: 90s, 30m, 12h, 7d.
    #[arg(long, value_parser = text::parse_span, value_name = "SPAN")]
    since: Option<Duration>,
    /// finished, reset, refused, cancelled, or the code of a refusal or a reset.
    #[arg(long)]
    outcome: Option<String>,
    /// How many at most.
    #[arg(short, long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    number: u32,
    /// Older than this record: the page before, as the last line says.
    #[arg(long, value_name = "NUMBER", conflicts_with = "follow")]
    before: Option<i64>,
    /// Goes on with those that come, until Ctrl-C.
    #[arg(short, long)]
    follow: bool,
}

impl AuditArgs {
    /// The query, without where to begin and how many.
    fn query(&self) -> String {
        let mut query = String::new();
        let mut term = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                query += &format!("&{name}={}", escaped(&value));
            }
        };
        let who = self.user.as_ref().map(|user| format!("user/{user}"));
        term("who", who.or_else(|| self.who.clone()));
        term("edge", self.edge.as_ref().map(ToString::to_string));
        term("outcome", self.outcome.clone());
        term("since_secs", self.since.map(|since| since.as_secs().to_string()));
        query
    }
}

/// As it stands in a URL.
fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}

/// Asks control, and shows.
///
/// # Errors
/// If control cannot be reached, or this user is no administrator.
pub(crate) async fn run(context: &Context, args: AuditArgs) -> Result<(), Failure> {
    let session = context.session().await?;
    let page = last(&session, &args).await?;
    match (context.form, args.follow) {
        (Form::Json, false) => return out::json(&page),
        (Form::Json, true) => page.records.iter().try_for_each(out::json_line)?,
        (Form::Table, follow) => {
            if !page.records.is_empty() || !follow {
                out::table(&table(&page.records, unix_now()))?;
            }
            if page.lost > 0 {
                out::note(&format!("{} are missing: shards had no room for them.", text::counted(page.lost, "record")));
            }
            if let Some(before) = page.before {
                out::note(&format!("There are older ones: --before {before}"));
            }
        }
    }
    if !args.follow {
        return Ok(());
    }
    tokio::select! {
        biased;
        stopped = shutdown::signal() => stopped.map(|_| ()).map_err(Failure::from),
        done = follow(context, &session, (&args, page)) => done,
    }
}

/// The newest, over as many pages as it takes.
async fn last(session: &Session, args: &AuditArgs) -> Result<AccessPage, Failure> {
    let (query, mut before) = (args.query(), args.before);
    let mut all = AccessPage::default();
    loop {
        let wanted = args.number - u32::try_from(all.records.len()).unwrap_or(args.number);
        let from = before.map(|number| format!("&before={number}")).unwrap_or_default();
        let page: AccessPage =
            session.api().get(&format!("/v1/access?limit={}{from}{query}", wanted.min(1000))).await?;
        let newer = std::mem::replace(&mut all.records, page.records);
        all.records.extend(newer);
        (all.before, all.lost, before) = (page.before, page.lost, page.before);
        if before.is_none() || all.records.len() >= args.number as usize {
            return Ok(all);
        }
    }
}

async fn follow(context: &Context, session: &Session, (args, page): (&AuditArgs, AccessPage)) -> Result<(), Failure> {
    let query = args.query();
    let mut seen = match page.records.last() {
        Some(last) => last.number,
        // Where there was none of the wanted ones, everything that comes is new.
        None => newest(session).await?,
    };
    loop {
        let page: AccessPage = session.api().get(&format!("/v1/access?limit=1000&after={seen}{query}")).await?;
        if let Some(last) = page.records.last() {
            seen = last.number;
        }
        match context.form {
            Form::Json => page.records.iter().try_for_each(out::json_line)?,
            Form::Table => page.records.iter().try_for_each(|kept| out::line(&line(kept)))?,
        }
        if page.records.len() < 1000 {
            sleep(FOLLOW).await;
        }
    }
}

async fn newest(session: &Session) -> Result<i64, Failure> {
    let page: AccessPage = session.api().get("/v1/access?limit=1").await?;
    Ok(page.records.last().map_or(0, |kept| kept.number))
}

fn outcome(entry: &AccessRecord) -> Cell {
    let words =
        if entry.code.is_empty() { entry.outcome.to_string() } else { format!("{} {}", entry.outcome, entry.code) };
    Cell::toned(words, if entry.outcome == "finished" { Tone::Good } else { Tone::Bad })
}

fn bytes(count: u64) -> String {
    match count {
        0..10_000 => format!("{count} B"),
        10_000..10_000_000 => format!("{} kB", count / 1000),
        10_000_000..10_000_000_000 => format!("{} MB", count / 1_000_000),
        _ => format!("{} GB", count / 1_000_000_000),
    }
}

fn table(records: &[KeptRecord], now: i64) -> Table {
    let mut table =
        Table::new(&["ENDED", "WHO", "DOOR", "TARGET", "EDGE", "CARRIER", "RULE", "UP", "DOWN", "LASTED", "OUTCOME"]);
    for KeptRecord { entry, .. } in records {
        let said = |text: &str| Cell::or_dash((!text.is_empty()).then_some(text));
        let ended = i64::try_from(entry.unix_ms / 1000).unwrap_or(i64::MAX);
        table.row(vec![
            format!("{} ago", text::age(ended, now)).into(),
            entry.who.as_str().into(),
            said(&entry.door),
            entry.target.as_str().into(),
            said(&entry.edge),
            said(&entry.carrier),
            said(&entry.rule),
            bytes(entry.up).into(),
            bytes(entry.down).into(),
            text::millis(Duration::from_millis(entry.duration_ms)).into(),
            outcome(entry),
        ]);
    }
    table
}

/// One that came while following.
fn line(kept: &KeptRecord) -> String {
    let AccessRecord { who, door, target, edge, up, down, duration_ms, outcome, code, detail, .. } = &kept.entry;
    let more = [code.as_ref(), detail].into_iter().filter(|text| !text.is_empty()).map(|text| format!(" {text}"));
    let more: String = more.collect();
    let (up, down, took) = (bytes(*up), bytes(*down), text::millis(Duration::from_millis(*duration_ms)));
    format!("{who} {door} {target} at {edge}: {up} up, {down} down, {took}, {outcome}{more}")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        audit: AuditArgs,
    }

    #[test]
    fn what_is_asked_for_goes_into_the_query() {
        let query = |words: &[&str]| {
            let words = ["audit"].iter().chain(words);
            Cli::try_parse_from(words).map(|cli| cli.audit.query()).map_err(|e| e.kind())
        };
        assert_eq!(query(&["--user", "alice", "--since", "1h"]).unwrap(), "&who=user%2Falice&since_secs=3600");
        assert_eq!(query(&["--who", "door/a b", "--edge", "shop-1"]).unwrap(), "&who=door%2Fa%20b&edge=shop-1");
        assert!(query(&["--user", "alice", "--who", "apiserver"]).is_err());
        assert!(query(&["--follow", "--before", "7"]).is_err());
        assert_eq!(query(&[]).unwrap(), "");
    }

    #[test]
    fn records_are_told_at_a_glance() {
        let entry = AccessRecord {
            unix_ms: 995_000,
            who: "user/alice".into(),
            door: "proxy".into(),
            target: "shop-1:22".into(),
            edge: "shop-1".into(),
            rule: "ops".into(),
            up: 12,
            down: 12_345,
            duration_ms: 5,
            outcome: "refused".into(),
            code: "policy-denied".into(),
            ..AccessRecord::default()
        };
        let kept = KeptRecord { number: 7, entry };
        let text = table(std::slice::from_ref(&kept), 1000).render(false);
        let row =
            "5s ago  user/alice  proxy  shop-1:22  shop-1  -        ops   12 B  12 kB  5.00 ms  refused policy-denied";
        assert_eq!(text.lines().nth(1), Some(row));
        assert!(line(&kept).starts_with("user/alice proxy shop-1:22 at shop-1: 12 B up, 12 kB down"));
    }
}
