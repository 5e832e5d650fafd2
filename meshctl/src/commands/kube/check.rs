//! One line of what was found.

use serde::Serialize;

/// What was looked at, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    /// Kind of the check.
    pub(super) check: &'static str,
    /// The node, or nothing.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) about: String,
    pub(super) verdict: Verdict,
    /// What was found.
    pub(super) says: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) remedy: Option<String>,
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// Well.
    Ok,
    /// It may work, and somebody should look.
    Warn,
    /// exec and logs do not work.
    Fail,
    /// It could not be looked at.
    Skip,
}

impl Verdict {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
            Self::Skip => "skip",
        }
    }
}

impl Check {
    pub(super) fn ok(check: &'static str, about: &str, says: String) -> Self {
        Self { check, about: about.to_owned(), verdict: Verdict::Ok, says, remedy: None }
    }

    pub(super) fn fail(check: &'static str, about: &str, says: String, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, remedy: Some(remedy.into()), ..Self::ok(check, about, says) }
    }

    pub(super) fn warn(check: &'static str, about: &str, says: String, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warn, ..Self::fail(check, about, says, remedy) }
    }

    pub(super) fn skip(check: &'static str, about: &str, says: String) -> Self {
        Self { verdict: Verdict::Skip, ..Self::ok(check, about, says) }
    }
}
