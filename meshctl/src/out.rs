//! Words to people and data to programs: results go to standard output, everything else to standard error.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::{
    failure::Failure,
    table::{Table, Tone, paint},
};

/// The form of what a command says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// For people.
    #[default]
    Table,
    /// For programs: one document.
    Json,
}

fn colour(to_terminal: bool) -> bool {
    to_terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Writes text to standard output as it is.
///
/// # Errors
/// If nobody reads it, or the disk is full.
pub(crate) fn text(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Writes a line to standard output.
///
/// # Errors
/// As [`text`].
pub(crate) fn line(words: &str) -> Result<(), Failure> {
    text(&format!("{words}\n"))
}

/// Writes a table to standard output.
///
/// # Errors
/// As [`text`].
pub(crate) fn table(table: &Table) -> Result<(), Failure> {
    text(&table.render(colour(io::stdout().is_terminal())))
}

/// Writes one JSON document to standard output.
///
/// # Errors
/// As [`text`].
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let words = serde_json::to_string_pretty(value).map_err(|e| Failure::Failed(e.to_string()))?;
    line(&words)
}

/// Writes one JSON document to standard output, on one line.
///
/// # Errors
/// As [`text`].
pub(crate) fn json_line(value: &impl Serialize) -> Result<(), Failure> {
    line(&serde_json::to_string(value).map_err(|e| Failure::Failed(e.to_string()))?)
}

/// Says something beside the result.
pub(crate) fn note(words: &str) {
    // Nobody is left to hear that nobody hears.
    let _ = writeln!(io::stderr().lock(), "{words}");
}

/// Says what went wrong.
pub(crate) fn error(failure: &Failure) {
    if !matches!(failure, Failure::Quiet | Failure::Told(_)) {
        note(&format!("{} {failure}", paint("meshctl:", Tone::Bad, colour(io::stderr().is_terminal()))));
    }
}

/// Asks a yes-or-no question.
///
/// # Errors
/// If there is nobody to ask, with `flag` as the way to answer beforehand; or if the answer is not yes.
pub(crate) fn confirm(question: &str, flag: &str) -> Result<(), Failure> {
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Err(Failure::Usage(format!("{question} There is no terminal to ask at: say yes with {flag}.")));
    }
    let _ = write!(io::stderr().lock(), "{question} [y/N] ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    if matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        Ok(())
    } else {
        Err(Failure::Failed("nothing was changed".into()))
    }
}
