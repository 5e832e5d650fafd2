//! `meshctl`: people's tool for a mesh.

use std::{path::PathBuf, process::ExitCode};

use clap::{ArgAction, Parser};
use runtime::telemetry::{self, LogConfig};

use crate::{
    commands::{Command, Context},
    failure::Failure,
    out::Form,
};

mod commands;
mod failure;
mod out;
mod reach;
mod session;
mod stdio;
mod table;
mod text;

/// Reaches machines through the mesh, and manages who may.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version = telemetry::version(), after_help = EXAMPLES)]
struct Cli {
    /// The form of results: a table for people, or one JSON document for programs.
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORM", help_heading = GLOBAL)]
    output: Form,

    /// Where the login is kept [default: ~/.config/causeway].
    #[arg(
        long,
        global = true,
        env = "CAUSEWAY_HOME",
        hide_env_values = true,
        value_name = "FOLDER",
        help_heading = GLOBAL
    )]
    home: Option<PathBuf>,

    /// Says more on standard error; twice says everything.
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = GLOBAL)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

/// Where options of every command stand in a help text.
const GLOBAL: &str = "Options of every command";

const EXAMPLES: &str = "\
Examples:
  meshctl dev                                  a whole mesh on this machine, to try things
  meshctl login                                log in with a join line from an administrator
  meshctl token create --edge --name shop-1    let a machine join as edge shop-1
  meshctl ssh root@shop-1                      a shell there
  meshctl forward shop-1 5432:15432            its port 5432 as localhost:15432 here
  meshctl ping shop-1                          is it there, and how far away?
  meshctl why shop-1                           what is wrong with it, and what to do?
  meshctl netcheck                             what does the network here let through?
  meshctl shard ls                             the shards, their load and their share

Exit status: 0 done, 1 failed, 2 wrong usage, 3 refused by policy or for want of trust, 4 somebody cannot be reached.
Results go to standard output, everything else to standard error.";

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            out::error(&failure);
            failure.status()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let level = match cli.verbose {
        0 => "error",
        1 => "info",
        _ => "debug",
    };
    telemetry::init(&LogConfig { level: level.into(), ..LogConfig::default() })
        .map_err(|e| Failure::Failed(e.to_string()))?;
    let context = Context { home: home(cli.home)?, form: cli.output };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::Failed(format!("cannot start: {e}")))?;
    let done = runtime.block_on(cli.command.run(&context));
    // A read of standard input that nobody waits for any more must not hold the process up.
    runtime.shutdown_background();
    done
}

fn home(given: Option<PathBuf>) -> Result<PathBuf, Failure> {
    match (given, std::env::home_dir()) {
        (Some(home), _) => Ok(home),
        (None, Some(user)) if !user.as_os_str().is_empty() => Ok(user.join(".config/causeway")),
        (None, _) => Err(Failure::Usage(
            "there is no home directory to keep the login in: name a folder with --home or CAUSEWAY_HOME".into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_behind_the_edge_is_for_ssh() {
        let cli = Cli::parse_from(["meshctl", "ssh", "-l", "root", "shop-1", "-v", "-o", "X=y", "--", "ls", "-l"]);
        let Command::Ssh(args) = cli.command else { panic!("another command") };
        assert_eq!(args.login.as_deref(), Some("root"));
        assert_eq!(args.words, ["shop-1", "-v", "-o", "X=y", "--", "ls", "-l"]);
        assert_eq!((cli.verbose, cli.output), (0, Form::Table));
    }
}
