//! `meshctl edge`.

use clap::{Args, Subcommand};
use proto::{
    api::EdgeView,
    id::EdgeId,
    standing::{Standing, Trouble},
};
use runtime::clock::unix_now;

use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    table::{Cell, Table, Tone},
    text,
};

/// Shows and revokes edges.
#[derive(Debug, Args)]
pub(crate) struct EdgeArgs {
    #[command(subcommand)]
    command: EdgeCommand,
}

#[derive(Debug, Subcommand)]
enum EdgeCommand {
    /// Lists the edges.
    Ls,
    /// Shows one edge and its services.
    Show {
        /// The edge.
        name: EdgeId,
    },
    /// Takes an edge's access away: ends its tunnel, and lets it come back with a new token only.
    Revoke {
        /// The edge.
        name: EdgeId,
        /// Does not ask.
        #[arg(short, long)]
        yes: bool,
    },
}

/// Does what is asked for.
///
/// # Errors
/// If control cannot be reached or says no.
pub(crate) async fn run(context: &Context, args: EdgeArgs) -> Result<(), Failure> {
    match args.command {
        EdgeCommand::Ls => {
            let edges: Vec<EdgeView> = context.session().await?.api().get("/v1/edges").await?;
            match context.form {
                Form::Json => out::json(&edges),
                Form::Table => out::table(&table(&edges, unix_now())),
            }
        }
        EdgeCommand::Show { name } => {
            let edge: EdgeView = context.session().await?.api().get(&format!("/v1/edges/{name}")).await?;
            match context.form {
                Form::Json => out::json(&edge),
                Form::Table => show(&edge, unix_now()),
            }
        }
        EdgeCommand::Revoke { name, yes } => {
            if !yes {
                let question = format!("Revoke edge {name}? Its tunnel ends, and it needs a new token to come back.");
                out::confirm(&question, "--yes")?;
            }
            let session = context.session().await?;
            let edge: EdgeView = session.api().post(&format!("/v1/edges/{name}/revoke"), &()).await?;
            match context.form {
                Form::Json => out::json(&edge),
                Form::Table => out::line(&format!(
                    "Edge {name} is revoked. To let it come back: meshctl token create --edge --name {name} --replace"
                )),
            }
        }
    }
}

fn state(edge: &EdgeView) -> Cell {
    match (edge.revoked, &edge.presence) {
        (true, _) => Cell::toned("revoked", Tone::Bad),
        (false, Some(_)) => Cell::toned("online", Tone::Good),
        (false, None) => Cell::toned("offline", Tone::Bad),
    }
}

/// What carries the tunnel, and whether a proxy is in between.
fn carrier(edge: &EdgeView) -> Option<String> {
    let at = edge.presence.as_ref().filter(|at| !at.carrier.is_empty())?;
    let proxied = at.standing.as_ref().is_some_and(|standing| !standing.proxy.is_empty());
    Some(if proxied { format!("{} (proxy)", at.carrier) } else { at.carrier.clone() })
}

fn rtt(edge: &EdgeView) -> Option<String> {
    edge.presence.as_ref().map(|p| text::millis(std::time::Duration::from_micros(p.rtt_us)))
}

fn table(edges: &[EdgeView], now: i64) -> Table {
    let mut table =
        Table::new(&["NAME", "STATE", "SITE", "SHARD", "CARRIER", "RTT", "STREAMS", "SERVICES", "SEEN", "CERT ENDS"]);
    for edge in edges {
        let at = edge.presence.as_ref();
        let services = at.map(|p| p.services.iter().map(|s| s.name.to_string()).collect::<Vec<_>>().join(","));
        table.row(vec![
            edge.name.as_str().into(),
            state(edge),
            Cell::or_dash(edge.site.as_ref()),
            Cell::or_dash(at.map(|p| &p.shard)),
            Cell::or_dash(carrier(edge)),
            Cell::or_dash(rtt(edge)),
            Cell::or_dash(at.map(|p| p.streams)),
            Cell::or_dash(services.filter(|s| !s.is_empty())),
            Cell::or_dash(edge.last_seen.map(|t| format!("{} ago", text::age(t, now)))),
            text::until(edge.not_after, now).into(),
        ]);
    }
    table
}

fn show(edge: &EdgeView, now: i64) -> Result<(), Failure> {
    let mut facts = Table::of_facts();
    facts.fact("edge", edge.name.as_str());
    facts.fact("state", state(edge));
    facts.fact("site", Cell::or_dash(edge.site.as_ref()));
    facts.fact("enrolled", format!("{} ago", text::age(edge.enrolled, now)));
    facts.fact("certificate ends", text::until(edge.not_after, now));
    facts.fact("seen", Cell::or_dash(edge.last_seen.map(|t| format!("{} ago", text::age(t, now)))));
    let Some(at) = &edge.presence else { return out::table(&facts) };
    facts.fact("shard", at.shard.as_str());
    facts.fact("connected for", text::age(at.since, now));
    facts.fact("from", at.address.as_str());
    facts.fact("version", at.version.as_str());
    facts.fact("round trip", Cell::or_dash(rtt(edge)));
    facts.fact("open streams", at.streams.to_string());
    facts.fact("carrier", Cell::or_dash(carrier(edge)));
    for (name, fact) in at.standing.iter().flat_map(standing) {
        facts.fact(name, fact);
    }
    out::table(&facts)?;
    if at.services.is_empty() {
        return out::line("\nIt announces no service.");
    }
    let mut services = Table::new(&["SERVICE", "KIND", "PORT", "LABELS"]);
    for service in &at.services {
        let labels: Vec<_> = service.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        services.row(vec![
            service.name.as_str().into(),
            service.kind.as_str().into(),
            service.port.to_string().into(),
            Cell::or_dash((!labels.is_empty()).then(|| labels.join(","))),
        ]);
    }
    out::line("")?;
    out::table(&services)
}

/// How the edge says that it came here, as names and values.
pub(crate) fn standing(standing: &Standing) -> Vec<(&'static str, String)> {
    let Standing { why, proxy, mtu, loss_percent, skew_ms, away_ms, troubles, allows, allows_more, .. } = standing;
    let mut facts = Vec::new();
    let mut fact = |name, value: Option<String>| facts.extend(value.map(|value| (name, value)));
    let said = |text: &String| (!text.is_empty()).then(|| text.clone());
    fact("why that carrier", said(why));
    fact("proxy", said(proxy));
    fact("largest UDP payload", (*mtu > 0).then(|| format!("{mtu} bytes")));
    fact("lost by the path", (*loss_percent > 0).then(|| format!("{loss_percent} % of what it sent lately")));
    let skew = std::time::Duration::from_millis(skew_ms.unsigned_abs());
    let side = if *skew_ms > 0 { "behind" } else { "ahead of" };
    fact("its clock", (skew.as_secs() > 0).then(|| format!("{} {side} the shard's", text::span(skew))));
    let away = std::time::Duration::from_millis(*away_ms);
    fact("had been away for", (*away_ms > 0).then(|| text::span(away)));
    for Trouble { cause, carrier, address, detail, times, .. } in troubles {
        let by = if carrier.is_empty() { String::new() } else { format!(" over {carrier}") };
        let often = text::counted((*times).into(), "time");
        fact("trouble before", Some(format!("{address}{by}: {cause} ({detail}), {often}")));
    }
    let more = if *allows_more { ", and more" } else { "" };
    fact("allows by itself", (!allows.is_empty()).then(|| format!("{}{more}", allows.join(", "))));
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_told_apart_at_a_glance() {
        let edges: Vec<EdgeView> = serde_json::from_str(
            r#"[
            {"name": "shop-1", "site": "berlin", "enrolled": 0, "not_after": 90000, "revoked": false, "last_seen": 990,
             "presence": {"edge": "shop-1", "shard": "shard-1", "since": 500, "address": "192.0.2.7:4433",
                          "version": "1.0.0", "rtt_us": 12345, "streams": 2, "carrier": "tcp",
                          "services": [{"name": "web", "kind": "http", "port": 8080}]}},
            {"name": "shop-2", "site": null, "enrolled": 0, "not_after": 900, "revoked": false, "last_seen": null,
             "presence": null},
            {"name": "shop-3", "site": null, "enrolled": 0, "not_after": 900, "revoked": true, "last_seen": 1,
             "presence": null}
        ]"#,
        )
        .unwrap();
        let text = table(&edges, 1000).render(false);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0],
            "NAME    STATE    SITE    SHARD    CARRIER  RTT      STREAMS  SERVICES  SEEN     CERT ENDS"
        );
        assert_eq!(lines[1], "shop-1  online   berlin  shard-1  tcp      12.3 ms  2        web       10s ago  in 24h");
        assert_eq!(lines[2], "shop-2  offline  -       -        -        -        -        -         -        over");
        assert!(lines[3].starts_with("shop-3  revoked"));
    }
}
