//! `meshctl diag`: everything that helps to find a fault, in one archive, and no secret in it.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use proto::id::EdgeId;
use runtime::{admin, cert::CertFacts, clock::unix_now, identity::IdentityDir, telemetry};
use serde_json::{Value, json};
use tokio::{process::Command, time::timeout};

use self::archive::Archive;
use super::{Context, netcheck, why};
use crate::{
    failure::Failure,
    out::{self, Form},
    session::{self, Session},
};

mod archive;
mod redact;

/// How long a process may take for a page, and control for an answer.
const ASK: Duration = Duration::from_secs(5);
/// How long the journal may take.
const JOURNAL: Duration = Duration::from_secs(10);
/// Lines of the journal.
const LINES: &str = "1000";
/// Bytes of the end of a log file.
const TAIL: u64 = 256 * 1024;
/// Where the processes of a machine are asked if nothing else is said: control, shard, edge.
const ADMINS: [&str; 3] = ["127.0.0.1:7444", "127.0.0.1:7484", "127.0.0.1:7494"];
/// Where their configurations are looked for.
const CONFIGS: [&str; 3] = ["/etc/causeway/control.toml", "/etc/causeway/shard.toml", "/etc/causeway/edge.toml"];

/// Collects what helps to find a fault into one archive without secrets.
///
/// Versions, configuration (of which only what is known to be harmless), readiness and metrics of the processes on this
/// machine, what control says of shards, ring, edges and policy, the sentences of `meshctl why` and `netcheck`, facts of
/// certificates and never keys, and the last lines of the logs. `manifest.json` in it says what is there and what could
/// not be had.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  meshctl diag                             this machine, and what control knows
  meshctl diag shop-1 --file shop-1.tar.gz  with what is known of that edge
  meshctl diag --config /etc/mesh/edge.toml --log /var/log/mesh-edge.log")]
pub(crate) struct DiagArgs {
    /// The edge that it is about: EDGE or edge/EDGE.
    #[arg(value_parser = edge)]
    edge: Option<EdgeId>,
    /// The archive; made in the present folder, with the time in its name, if none is given.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// A configuration of a process, besides those in /etc/causeway; can be repeated.
    #[arg(long = "config", value_name = "FILE")]
    configs: Vec<PathBuf>,
    /// An admin address of a process, besides the usual ones; can be repeated.
    #[arg(long = "admin", value_name = "HOST:PORT")]
    admins: Vec<SocketAddr>,
    /// A log file whose end is wanted, besides the journal; can be repeated.
    #[arg(long = "log", value_name = "FILE")]
    logs: Vec<PathBuf>,
}

fn edge(text: &str) -> Result<EdgeId, String> {
    text.strip_prefix("edge/").unwrap_or(text).parse().map_err(|e: proto::id::InvalidName| e.to_string())
}

/// Collects, and writes.
///
/// # Errors
/// If the archive cannot be written. What cannot be had is said in it.
pub(crate) async fn run(context: &Context, args: DiagArgs) -> Result<(), Failure> {
    let path = args.file.clone().unwrap_or_else(|| format!("causeway-diag-{}.tar.gz", unix_now()).into());
    let mut archive = Archive::new();
    archive.json("versions.json", "versions of meshctl and of this system", &versions());
    let mut admins: BTreeSet<SocketAddr> = ADMINS.iter().filter_map(|text| text.parse().ok()).collect();
    admins.extend(&args.admins);
    let usual = CONFIGS.map(PathBuf::from).into_iter().filter(|path| path.exists());
    for path in usual.chain(args.configs.iter().cloned()) {
        admins.extend(config(&mut archive, &path));
    }
    for address in admins {
        process(&mut archive, address).await;
    }
    login(context, &mut archive, &args).await;
    logs(&mut archive, &args.logs).await;
    let manifest = archive.write(&path, args.edge.as_ref())?;
    match context.form {
        Form::Json => out::json(&manifest),
        Form::Table => {
            out::line(&format!("{} has {} files without secrets.", path.display(), manifest.files.len()))?;
            out::line("Look into manifest.json in it before you pass it on: it says what is there.")
        }
    }
}

fn versions() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
    let system = read("/etc/os-release").unwrap_or_default();
    let system = system.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    json!({
        "meshctl": telemetry::version(),
        "made": unix_now(),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "system": system.map(|name| name.trim_matches('"')),
        "architecture": std::env::consts::ARCH,
    })
}

/// A configuration, of which only what is known to be harmless, and the certificate that its process shows. Returns its
/// admin address.
fn config(archive: &mut Archive, path: &std::path::Path) -> Option<SocketAddr> {
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let what = "configuration: keys that are known to be harmless; the others are only named";
    let file = format!("config/{name}.json");
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            archive.missing(&file, what, &format!("{}: {error}", path.display()));
            return None;
        }
    };
    let Ok(table) = text.parse::<toml::Table>() else {
        archive.missing(&file, what, &format!("{} is no TOML", path.display()));
        return None;
    };
    archive.json(&file, what, &redact::config(&table));
    if let Some(folder) = table.get("data_dir").and_then(toml::Value::as_str) {
        certificate(archive, &format!("certificates/{name}.json"), folder.as_ref());
    }
    table.get("admin")?.as_str()?.parse().ok()
}

/// What a certificate says; the key is read only to be sure that it is nowhere in the archive.
fn certificate(archive: &mut Archive, file: &str, folder: &std::path::Path) {
    let what = "facts of a certificate; never its key";
    if !folder.is_dir() {
        return archive.missing(file, what, &format!("{} is no folder that can be read", folder.display()));
    }
    let loaded = IdentityDir::open(folder).and_then(|dir| dir.load());
    match loaded {
        Ok(Some((credentials, bundle))) => {
            archive.never(&redact::key_of(folder));
            let roots: Vec<_> = bundle
                .certificates()
                .iter()
                .filter_map(|c| runtime::cert::ca_hash(c).ok())
                .map(|h| h.to_string())
                .collect();
            archive.json(file, what, &json!({ "own": facts(credentials.facts()), "trusts": roots }));
        }
        Ok(None) => archive.missing(file, what, "there is no identity yet"),
        Err(error) => archive.missing(file, what, &error.to_string()),
    }
}

fn facts(facts: &CertFacts) -> Value {
    json!({
        "identity": facts.identity.to_string(),
        "serial": facts.serial,
        "not_before": facts.not_before,
        "not_after": facts.not_after,
        "groups": facts.groups,
        "site": facts.site,
        "now": unix_now(),
    })
}

/// The pages of a process on this machine, if there is one.
async fn process(archive: &mut Archive, address: SocketAddr) {
    let folder = format!("process/{}", address.port());
    for (page, what) in [
        ("readyz", "whether each part of the process is ready"),
        ("metrics", "what the process counts"),
        ("status", "how an edge stands, as it says itself"),
    ] {
        let file = format!("{folder}/{page}");
        match admin::get(address, &format!("/{page}"), ASK).await {
            Ok((200 | 503, body)) => archive.text(&file, what, &String::from_utf8_lossy(&body)),
            // Only edges have a status.
            Ok((404, _)) => {}
            Ok((status, _)) => archive.missing(&file, what, &format!("{address} answered {status}")),
            Err(error) => {
                archive.missing(&file, what, &format!("{address}: {error}"));
                return;
            }
        }
    }
}

/// What can be had with the login: control's answers, and the sentences of other commands.
async fn login(context: &Context, archive: &mut Archive, args: &DiagArgs) {
    if !session::exists(&context.home) {
        let why = "nobody is logged in here, so control was not asked";
        return archive.missing("control/", "what control knows", why);
    }
    certificate(archive, "certificates/login.json", &context.home);
    match context.session().await {
        Ok(session) => control(archive, &session, args.edge.as_ref()).await,
        Err(error) => archive.missing("control/", "what control knows", &error.to_string()),
    }
    if let Some(edge) = &args.edge {
        let what = "the sentence of 'meshctl why'";
        match why::verdict(context, edge).await {
            Ok(verdict) => archive.json("why.json", what, &verdict),
            Err(error) => archive.missing("why.json", what, &error.to_string()),
        }
    }
    let what = "what the network lets through from this machine, as 'meshctl netcheck' says";
    match netcheck::check(context, netcheck::NetcheckArgs::default()).await {
        Ok(report) => archive.json("netcheck.json", what, &json!(report)),
        Err(error) => archive.missing("netcheck.json", what, &error.to_string()),
    }
}

async fn control(archive: &mut Archive, session: &Session, edge: Option<&EdgeId>) {
    let mut asked = vec![
        ("whoami", "/v1/whoami".to_owned(), "who is logged in, and the shards"),
        ("shards", "/v1/shards".to_owned(), "the shards"),
        ("ring", "/v1/ring".to_owned(), "the ring: which shard owns which edge"),
        ("policy", "/v1/policy".to_owned(), "the rules of who may reach what"),
    ];
    match edge {
        Some(edge) => asked.push(("edge", format!("/v1/edges/{edge}"), "the edge that it is about")),
        None => asked.push(("edges", "/v1/edges".to_owned(), "the edges")),
    }
    for (name, path, what) in asked {
        let file = format!("control/{name}.json");
        match timeout(ASK, session.api().get::<Value>(&path)).await {
            Ok(Ok(answer)) => archive.json(&file, what, &answer),
            Ok(Err(error)) => archive.missing(&file, what, &error.to_string()),
            Err(_) => archive.missing(&file, what, "no answer in time"),
        }
    }
}

/// The journal of the processes on this machine, and the ends of log files.
async fn logs(archive: &mut Archive, files: &[PathBuf]) {
    let what = "last lines of the journal";
    let units = ["mesh-edge", "mesh-cloud", "mesh-control"].iter().flat_map(|unit| ["-u", unit]);
    let mut journal = Command::new("journalctl");
    journal.args(units).args(["-n", LINES, "--no-pager", "-q", "-o", "short-iso"]).kill_on_drop(true);
    match timeout(JOURNAL, journal.output()).await {
        Ok(Ok(output)) if output.status.success() => {
            archive.text("logs/journal", what, &redact::log(&String::from_utf8_lossy(&output.stdout)));
        }
        Ok(Ok(output)) => archive.missing("logs/journal", what, &String::from_utf8_lossy(&output.stderr)),
        Ok(Err(error)) => archive.missing("logs/journal", what, &format!("journalctl: {error}")),
        Err(_) => archive.missing("logs/journal", what, "journalctl did not answer in time"),
    }
    for path in files {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (file, what) = (format!("logs/{name}"), "the end of a log file");
        match tail(path) {
            Ok(text) => archive.text(&file, what, &redact::log(&text)),
            Err(error) => archive.missing(&file, what, &format!("{}: {error}", path.display())),
        }
    }
}

fn tail(path: &std::path::Path) -> std::io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(TAIL);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
