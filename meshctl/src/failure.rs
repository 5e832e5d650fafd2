//! What can go wrong, in sentences for people, and the exit status that goes with it.

use std::{io, process::ExitCode};

use proto::{
    api::ApiCode,
    code::{CloseCode, Fault, RefuseCode, Retry},
    stream::Refusal,
};
use runtime::{
    api::ApiClientError,
    identity::IdentityError,
    link::{EndCause, LinkEnd},
};

use crate::text;

/// A command did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// It did not work out. Status 1.
    #[error("{0}")]
    Failed(String),
    /// It was asked for in a way that makes no sense. Status 2, as with what clap refuses.
    #[error("{0}")]
    Usage(String),
    /// Rules, or trust, say no: another try will not help before somebody changes something. Status 3.
    #[error("{0}")]
    Refused(String),
    /// Somebody on the way does not answer. Status 4.
    #[error("{0}")]
    Unreachable(String),
    /// There is nobody left to tell: the reader of standard output went away, or a signal ended the command. Status 1.
    #[error("ended early")]
    Quiet,
    /// The result says it already; only the status is left.
    #[error("status {0}")]
    Told(u8),
}

impl Failure {
    /// The exit status of the process.
    pub(crate) fn status(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Failed(_) | Self::Quiet => 1,
            Self::Usage(_) => 2,
            Self::Refused(_) => 3,
            Self::Unreachable(_) => 4,
            Self::Told(status) => *status,
        })
    }

    /// The same failure, with words before it.
    pub(crate) fn within(self, what: &str) -> Self {
        let put = |why: String| format!("{what}: {why}");
        match self {
            Self::Failed(why) => Self::Failed(put(why)),
            Self::Usage(why) => Self::Usage(put(why)),
            Self::Refused(why) => Self::Refused(put(why)),
            Self::Unreachable(why) => Self::Unreachable(put(why)),
            Self::Quiet => Self::Quiet,
            Self::Told(status) => Self::Told(status),
        }
    }

    /// The kind of failure that an end of a link is, with a sentence.
    pub(crate) fn link(end: &LinkEnd, why: String) -> Self {
        match end.cause {
            EndCause::Closed(
                CloseCode::Revoked | CloseCode::Expired | CloseCode::WrongRole | CloseCode::NameMismatch,
            )
            | EndCause::WrongCa
            | EndCause::PeerExpired
            | EndCause::WrongPeer
            | EndCause::Distrusted
            | EndCause::Expired
            | EndCause::Clock => Self::Refused(why),
            EndCause::Closed(_)
            | EndCause::TimedOut
            | EndCause::NobodyListens
            | EndCause::PeerRestarted
            | EndCause::NoRoute
            | EndCause::ProxyRefused
            | EndCause::NameUnknown => Self::Unreachable(why),
            EndCause::Local | EndCause::NoCommonVersion | EndCause::Transport => Self::Failed(why),
        }
    }
}

/// Cause and remedy of an end of a link, for people, to stand inside or at the end of a line.
pub(crate) fn of_link(end: &LinkEnd) -> String {
    let words = match end.cause {
        EndCause::Closed(CloseCode::Revoked | CloseCode::Expired) | EndCause::Expired | EndCause::Distrusted => {
            format!("{} (for people: 'meshctl login')", end.cause.sentence())
        }
        // What the other side said is more than what its code says.
        EndCause::Closed(_) => end.detail.clone(),
        EndCause::WrongPeer | EndCause::Transport | EndCause::NoCommonVersion | EndCause::ProxyRefused => {
            format!("{} ({})", end.cause.sentence(), end.detail)
        }
        EndCause::Local
        | EndCause::TimedOut
        | EndCause::NobodyListens
        | EndCause::PeerRestarted
        | EndCause::NoRoute
        | EndCause::NameUnknown
        | EndCause::WrongCa
        | EndCause::PeerExpired
        | EndCause::Clock => end.cause.sentence().to_owned(),
    };
    words.trim_end_matches('.').to_owned()
}

/// A refusal with whose fault it is and when to try again.
pub(crate) fn of_refusal(refusal: &Refusal) -> String {
    let retry = match refusal.retry() {
        Retry::Now => "try again now".to_owned(),
        Retry::After(wait) => format!("try again in {}", text::span(wait)),
        Retry::Never => "trying again will not help".to_owned(),
    };
    let reason = refusal.reason.trim_end_matches('.');
    format!("{reason} [{}; fault: {}; {retry}]", refusal.code, refusal.code.fault())
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let why = of_refusal(&refusal);
        match (refusal.code, refusal.code.fault()) {
            (RefuseCode::Unauthenticated, _) | (_, Fault::Policy) => Self::Refused(why),
            (RefuseCode::Draining | RefuseCode::LimitReached | RefuseCode::NotReady, _)
            | (_, Fault::Edge | Fault::Target) => Self::Unreachable(why),
            (_, Fault::Client | Fault::Mesh) => Self::Failed(why),
        }
    }
}

impl From<ApiClientError> for Failure {
    fn from(error: ApiClientError) -> Self {
        let why = error.to_string();
        match error {
            ApiClientError::Unreachable { .. } => Self::Unreachable(why),
            ApiClientError::WrongCa { .. } => Self::Refused(why),
            ApiClientError::Tls { .. } => {
                Self::Refused(format!("{why}; look at the clock of this machine, or log in again with a new join line"))
            }
            ApiClientError::Nonsense { .. } => Self::Failed(why),
            ApiClientError::Refused(e) => match e.code {
                ApiCode::Unauthenticated
                | ApiCode::Forbidden
                | ApiCode::TokenUnknown
                | ApiCode::TokenExpired
                | ApiCode::TokenUsed
                | ApiCode::TokenMismatch
                | ApiCode::Revoked
                | ApiCode::BadProof => Self::Refused(why),
                ApiCode::BadRequest
                | ApiCode::NotFound
                | ApiCode::NameTaken
                | ApiCode::Busy
                | ApiCode::StoreUnavailable
                | ApiCode::Internal => Self::Failed(why),
            },
        }
    }
}

impl From<IdentityError> for Failure {
    fn from(error: IdentityError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::Quiet
        } else {
            Self::Failed(format!("cannot read or write: {error}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_reason_fault_and_retry() {
        let offline = Refusal::because(RefuseCode::EdgeOffline, "edge shop-1 was last seen 3 min ago.");
        assert_eq!(
            of_refusal(&offline),
            "edge shop-1 was last seen 3 min ago [edge-offline; fault: edge; try again in 5s]"
        );
        assert!(matches!(Failure::from(offline), Failure::Unreachable(_)));
        let denied = Refusal::new(RefuseCode::PolicyDenied);
        assert!(of_refusal(&denied).contains("fault: policy; trying again will not help"));
        assert!(matches!(Failure::from(denied), Failure::Refused(_)));
        assert!(matches!(Failure::from(Refusal::new(RefuseCode::EdgeUnknown)), Failure::Failed(_)));
    }

    #[test]
    fn who_is_not_trusted_is_refused_and_who_does_not_answer_is_unreachable() {
        let kind = |cause| Failure::link(&LinkEnd::new(cause, ""), String::new());
        assert!(matches!(kind(EndCause::Distrusted), Failure::Refused(_)));
        assert!(matches!(kind(EndCause::Closed(CloseCode::Revoked)), Failure::Refused(_)));
        assert!(matches!(kind(EndCause::Closed(CloseCode::Drained)), Failure::Unreachable(_)));
        assert!(matches!(kind(EndCause::TimedOut), Failure::Unreachable(_)));
    }
}
