//! `meshctl completions`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::{failure::Failure, out};

/// Prints the completion script for a shell.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  meshctl completions bash > /etc/bash_completion.d/meshctl
  meshctl completions zsh > \"${fpath[1]}/_meshctl\"
  meshctl completions fish > ~/.config/fish/completions/meshctl.fish")]
pub(crate) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Prints the script.
///
/// # Errors
/// If nobody reads it.
pub(crate) fn run(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "meshctl", &mut script);
    out::text(&String::from_utf8_lossy(&script))
}
