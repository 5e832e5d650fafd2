//! `meshctl login`, `logout` and `whoami`.

use std::{
    io::{self, BufRead, IsTerminal, Read},
    path::{Path, PathBuf},
};

use clap::Args;
use proto::{join::JoinLine, secret::Secret};
use runtime::{clock::unix_now, identity::IdentityDir};
use serde_json::json;

use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    session::{self, Session},
    table::Table,
    text,
};

/// Longest join line in bytes.
const MAX_LINE: u64 = 4096;

/// Logs in with a join line.
///
/// The line is a secret, so it comes by standard input, a file, or CAUSEWAY_JOIN, and never by an argument.
#[derive(Debug, Args)]
#[command(after_help = "An administrator makes the join line: meshctl token create --user NAME

Examples:
  meshctl login                    asks for the line
  meshctl login < join.txt
  meshctl login --file join.txt    the same")]
pub(crate) struct LoginArgs {
    /// A file whose first line is the join line.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Gives up the login that is there.
    #[arg(long)]
    replace: bool,
}

/// Forgets the login of this machine.
#[derive(Debug, Args)]
pub(crate) struct LogoutArgs {}

/// Shows who is logged in.
#[derive(Debug, Args)]
pub(crate) struct WhoamiArgs {}

/// Enrols as a user.
///
/// # Errors
/// If the line is none, somebody is logged in already, or control says no.
pub(crate) async fn login(context: &Context, args: LoginArgs) -> Result<(), Failure> {
    if !args.replace {
        refuse_second_login(&context.home)?;
    }
    let join = join_line(args.file.as_deref())?;
    let facts = session::enrol(&context.home, &join).await?;
    match context.form {
        Form::Json => out::json(&json!({ "identity": facts.identity.to_string(), "not_after": facts.not_after })),
        Form::Table => out::line(&format!(
            "Logged in as {} of {}; the certificate ends {} and is renewed while you use it.",
            facts.identity.name,
            facts.identity.domain,
            text::until(facts.not_after, unix_now()),
        )),
    }
}

fn refuse_second_login(home: &Path) -> Result<(), Failure> {
    if !session::exists(home) {
        return Ok(());
    }
    match IdentityDir::open(home)?.load() {
        Ok(Some((credentials, _))) if credentials.facts().not_after > unix_now() => Err(Failure::Usage(format!(
            "already logged in as {}: run 'meshctl logout' first, or say --replace",
            credentials.facts().identity
        ))),
        // What has ended or cannot be read is no loss.
        Ok(_) | Err(_) => Ok(()),
    }
}

fn join_line(file: Option<&Path>) -> Result<JoinLine, Failure> {
    let words = match (file, std::env::var("CAUSEWAY_JOIN")) {
        (Some(path), _) => std::fs::File::open(path)
            .and_then(first_line)
            .map_err(|e| Failure::Failed(format!("cannot read {}: {e}", path.display())))?,
        (None, Ok(line)) if !line.is_empty() => Secret::new(line),
        (None, _) => {
            if io::stdin().is_terminal() {
                out::note("Paste the join line that 'meshctl token create --user NAME' printed, and press Enter:");
            }
            first_line(io::stdin())?
        }
    };
    words.reveal().parse().map_err(|e: proto::join::InvalidJoin| Failure::Usage(e.to_string()))
}

fn first_line(from: impl Read) -> io::Result<Secret> {
    let mut line = String::new();
    io::BufReader::new(from.take(MAX_LINE)).read_line(&mut line)?;
    Ok(Secret::new(line))
}

/// Removes the login from this machine.
///
/// # Errors
/// If a file cannot be removed.
pub(crate) fn logout(context: &Context, _: &LogoutArgs) -> Result<(), Failure> {
    let name = IdentityDir::open(&context.home)?.load().ok().flatten();
    let found = session::forget(&context.home)?;
    let name = name.map(|(credentials, _)| credentials.facts().identity.name.to_string());
    match (context.form, found) {
        (Form::Json, _) => out::json(&json!({ "logged_out": name })),
        (Form::Table, false) => out::line("Nobody was logged in."),
        (Form::Table, true) => {
            out::line(&format!("Logged out {}; key and certificate are removed.", name.unwrap_or_default()))
        }
    }
}

/// Shows the login, with control's view of it if control can be reached.
///
/// # Errors
/// If nobody is logged in, or control says no.
pub(crate) async fn whoami(context: &Context, _: &WhoamiArgs) -> Result<(), Failure> {
    let session = context.session().await?;
    let trouble = match session.whoami().await {
        Ok(_) => None,
        Err(Failure::Unreachable(why)) => Some(why),
        Err(e) => return Err(e),
    };
    let shards = session.shards().await.unwrap_or_default();
    let facts = session.facts();
    match context.form {
        Form::Json => out::json(&json!({
            "identity": facts.identity.to_string(),
            "groups": facts.groups,
            "not_after": facts.not_after,
            "home": session.home(),
            "control": session.api().address().to_string(),
            "control_reachable": trouble.is_none(),
            "shards": shards,
        })),
        Form::Table => {
            out::table(&facts_of(&session, &shards))?;
            if let Some(why) = trouble {
                out::note(&format!("note: {why}; streams go on, changes must wait"));
            }
            Ok(())
        }
    }
}

fn facts_of(session: &Session, shards: &[proto::message::Candidate]) -> Table {
    let facts = session.facts();
    let listed = |items: Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
    let mut table = Table::of_facts();
    table.fact("user", facts.identity.name.as_str());
    table.fact("mesh", facts.identity.domain.as_str());
    table.fact("groups", listed(facts.groups.iter().map(ToString::to_string).collect()));
    table.fact("certificate ends", text::until(facts.not_after, unix_now()));
    table.fact("control", session.api().address().to_string());
    table.fact("shards", listed(shards.iter().map(|s| format!("{} ({})", s.shard, s.addresses.join(", "))).collect()));
    table.fact("home", session.home().display().to_string());
    table
}
