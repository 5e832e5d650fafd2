//! Why a link ended or never began, classified: the class decides what to do next, the detail is for people.

use std::{fmt, io};

use proto::code::CloseCode;
use quinn::ConnectionError;
use rustls::AlertDescription;

use crate::cert::CertFacts;

/// The end of a link, or of an attempt at one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{cause}: {detail}")]
pub struct LinkEnd {
    /// The class.
    pub cause: EndCause,
    /// More, for people.
    pub detail: String,
}

/// Classes of ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndCause {
    /// Closed here.
    Local,
    /// The peer closed it with this code.
    Closed(CloseCode),
    /// Nothing came back: blocked, or nobody there.
    TimedOut,
    /// The peer's host says that nobody listens there.
    NobodyListens,
    /// The peer restarted and knows nothing of this link.
    PeerRestarted,
    /// This host has no route, or no right to send.
    NoRoute,
    /// The proxy in between does not let us through.
    ProxyRefused,
    /// The address has no such name.
    NameUnknown,
    /// The peer's certificate is not from our CA.
    WrongCa,
    /// The peer's certificate has expired, or is not valid yet: one of the two clocks is wrong.
    PeerExpired,
    /// The peer is somebody else than expected.
    WrongPeer,
    /// Our certificate is not from the peer's CA.
    Distrusted,
    /// Our certificate has expired.
    Expired,
    /// The peer says that our certificate is not valid now, and by this machine's clock it is.
    Clock,
    /// The peer speaks another version of the protocol.
    NoCommonVersion,
    /// Anything else that QUIC, TLS or yamux did not like.
    Transport,
}

impl EndCause {
    /// The word in logs and metrics.
    #[must_use]
    pub const fn slug(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Closed(code) => code.slug(),
            Self::TimedOut => "timed-out",
            Self::NobodyListens => "nobody-listens",
            Self::PeerRestarted => "peer-restarted",
            Self::NoRoute => "no-route",
            Self::ProxyRefused => "proxy-refused",
            Self::NameUnknown => "name-unknown",
            Self::WrongCa => "wrong-ca",
            Self::PeerExpired => "peer-expired",
            Self::WrongPeer => "wrong-peer",
            Self::Distrusted => "distrusted",
            Self::Expired => "expired",
            Self::Clock => "clock",
            Self::NoCommonVersion => "no-common-version",
            Self::Transport => "transport",
        }
    }

    /// The cause with this word; `None` if there is none, as in the words of a newer version.
    #[must_use]
    pub fn from_slug(slug: &str) -> Option<Self> {
        const OURS: [EndCause; 15] = [
            EndCause::Local,
            EndCause::TimedOut,
            EndCause::NobodyListens,
            EndCause::PeerRestarted,
            EndCause::NoRoute,
            EndCause::ProxyRefused,
            EndCause::NameUnknown,
            EndCause::WrongCa,
            EndCause::PeerExpired,
            EndCause::WrongPeer,
            EndCause::Distrusted,
            EndCause::Expired,
            EndCause::Clock,
            EndCause::NoCommonVersion,
            EndCause::Transport,
        ];
        let closed = CloseCode::ALL.iter().map(|code| Self::Closed(*code));
        OURS.into_iter().chain(closed).find(|cause| cause.slug() == slug)
    }

    /// What it means and what to do, in a sentence for people.
    #[must_use]
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::Local => "Closed by this side.",
            Self::Closed(code) => code.sentence(),
            Self::TimedOut => {
                "No answer: the address is wrong, the other side is down, or a firewall drops what goes to that port."
            }
            Self::NobodyListens => "Nothing listens on that port.",
            Self::PeerRestarted => "The other side restarted.",
            Self::NoRoute => "This machine has no route there.",
            Self::ProxyRefused => {
                "The HTTP proxy in between does not let this machine through: look at its rules, and at `proxy` in the configuration."
            }
            Self::NameUnknown => "The name cannot be resolved.",
            Self::WrongCa => {
                "The other side's certificate is from another CA: this is another mesh, or something in between opens the connection."
            }
            Self::PeerExpired => {
                "The other side's certificate is not valid at this time: compare the clocks of both machines."
            }
            Self::WrongPeer => "The other side is not who it should be.",
            Self::Distrusted => "The other side does not trust this machine's CA: enrol again with a new join line.",
            Self::Expired => {
                "This machine's certificate has expired: enrol again with a new join line, and look at its clock."
            }
            Self::Clock => {
                "The other side says that this machine's certificate is not valid now, and by this machine's clock it is: one of the two clocks is wrong."
            }
            Self::NoCommonVersion => "The two sides have no protocol version in common: update the older one.",
            Self::Transport => "The connection broke the rules of QUIC, TLS or yamux, or something in between did.",
        }
    }
}

impl fmt::Display for EndCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.slug())
    }
}

impl LinkEnd {
    /// An end with a detail.
    #[must_use]
    pub fn new(cause: EndCause, detail: impl Into<String>) -> Self {
        Self { cause, detail: detail.into() }
    }

    /// Tells an end of this side's certificate from a clock that is wrong: a peer that takes a certificate for ended
    /// which by this machine's clock is not goes by another time.
    #[must_use]
    pub fn by_own_clock(self, own: &CertFacts, unix_now: i64) -> Self {
        let disputed = matches!(self.cause, EndCause::Expired | EndCause::Closed(CloseCode::Expired))
            && (own.not_before..=own.not_after).contains(&unix_now);
        if disputed { Self { cause: EndCause::Clock, ..self } } else { self }
    }

    /// The code that the peer closed with, if it did.
    #[must_use]
    pub const fn close_code(&self) -> Option<CloseCode> {
        if let EndCause::Closed(code) = self.cause { Some(code) } else { None }
    }

    /// What the peer closed it with.
    pub(super) fn closed(number: u32, reason: &[u8]) -> Self {
        let detail = String::from_utf8_lossy(reason).chars().take(1024).collect::<String>();
        match CloseCode::from_number(number) {
            Some(code) if detail.is_empty() => Self::new(EndCause::Closed(code), code.sentence()),
            Some(code) => Self::new(EndCause::Closed(code), detail),
            None => Self::new(EndCause::Closed(CloseCode::ProtocolError), format!("code {number}: {detail}")),
        }
    }

    pub(super) fn from_connection(error: &ConnectionError) -> Self {
        let cause = match error {
            ConnectionError::LocallyClosed => EndCause::Local,
            ConnectionError::TimedOut => EndCause::TimedOut,
            ConnectionError::Reset => EndCause::PeerRestarted,
            ConnectionError::VersionMismatch => EndCause::NoCommonVersion,
            ConnectionError::CidsExhausted => EndCause::Transport,
            ConnectionError::ApplicationClosed(close) => {
                let number = u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX);
                return Self::closed(number, &close.reason);
            }
            ConnectionError::TransportError(e) => alert_cause(e.code, Side::Ours),
            ConnectionError::ConnectionClosed(close) => alert_cause(close.error_code, Side::Theirs),
        };
        Self::new(cause, error.to_string())
    }
}

/// Who found the fault.
#[derive(Clone, Copy)]
enum Side {
    Ours,
    Theirs,
}

/// QUIC carries TLS alerts as transport error codes 0x100 to 0x1ff (RFC 9001, 4.8).
fn alert_cause(code: quinn::TransportErrorCode, found_by: Side) -> EndCause {
    if let (quinn::TransportErrorCode::CONNECTION_REFUSED, Side::Theirs) = (code, found_by) {
        // What a listener says that has no room for another handshake.
        return EndCause::Closed(CloseCode::Overloaded);
    }
    let Some(alert) = u64::from(code).checked_sub(0x100).and_then(|a| u8::try_from(a).ok()) else {
        return EndCause::Transport;
    };
    of_alert(AlertDescription::from(alert), found_by)
}

fn of_alert(alert: AlertDescription, found_by: Side) -> EndCause {
    #[allow(clippy::wildcard_enum_match_arm, reason = "the list of alerts is open")]
    match (alert, found_by) {
        (AlertDescription::UnknownCA, Side::Ours) => EndCause::WrongCa,
        (AlertDescription::UnknownCA, Side::Theirs) => EndCause::Distrusted,
        (AlertDescription::CertificateExpired, Side::Ours) => EndCause::PeerExpired,
        (AlertDescription::CertificateExpired, Side::Theirs) => EndCause::Expired,
        (AlertDescription::BadCertificate | AlertDescription::CertificateUnknown, Side::Ours) => EndCause::WrongPeer,
        (AlertDescription::BadCertificate | AlertDescription::CertificateUnknown, Side::Theirs) => EndCause::Distrusted,
        (AlertDescription::CertificateRequired, _) => EndCause::Distrusted,
        (AlertDescription::NoApplicationProtocol, _) => EndCause::NoCommonVersion,
        _ => EndCause::Transport,
    }
}

/// Why a TCP connection, or TLS on it, failed.
pub(super) fn from_io(error: &io::Error) -> LinkEnd {
    if let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        return LinkEnd::new(of_tls(tls), error.to_string());
    }
    #[allow(clippy::wildcard_enum_match_arm, reason = "the list of kinds is open")]
    let cause = match error.kind() {
        io::ErrorKind::ConnectionRefused => EndCause::NobodyListens,
        io::ErrorKind::TimedOut => EndCause::TimedOut,
        io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::NetworkDown
        | io::ErrorKind::AddrNotAvailable
        | io::ErrorKind::PermissionDenied => EndCause::NoRoute,
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => EndCause::PeerRestarted,
        _ => EndCause::Transport,
    };
    LinkEnd::new(cause, error.to_string())
}

fn of_tls(error: &rustls::Error) -> EndCause {
    #[allow(clippy::wildcard_enum_match_arm, reason = "the list of errors is open")]
    match error {
        rustls::Error::AlertReceived(alert) => of_alert(*alert, Side::Theirs),
        rustls::Error::InvalidCertificate(why) => of_alert(AlertDescription::from(why.clone()), Side::Ours),
        rustls::Error::NoCertificatesPresented => of_alert(AlertDescription::CertificateRequired, Side::Ours),
        rustls::Error::NoApplicationProtocol => EndCause::NoCommonVersion,
        _ => EndCause::Transport,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_that_only_the_other_clock_ends_is_a_matter_of_clocks() {
        let own = CertFacts {
            identity: "spiffe://mesh.test/edge/shop-1".parse().unwrap(),
            serial: "1".into(),
            not_before: 1000,
            not_after: 2000,
            groups: vec![],
            site: None,
        };
        let told = |cause, now| LinkEnd::new(cause, "x").by_own_clock(&own, now).cause;
        assert_eq!(told(EndCause::Expired, 1500), EndCause::Clock);
        assert_eq!(told(EndCause::Closed(CloseCode::Expired), 1500), EndCause::Clock);
        assert_eq!(told(EndCause::Expired, 2001), EndCause::Expired);
        assert_eq!(told(EndCause::TimedOut, 1500), EndCause::TimedOut);
    }

    #[test]
    fn causes_are_known_by_their_words() {
        for cause in [EndCause::TimedOut, EndCause::Clock, EndCause::Closed(CloseCode::Revoked)] {
            assert_eq!(EndCause::from_slug(cause.slug()), Some(cause));
        }
        assert_eq!(EndCause::from_slug("of-tomorrow"), None);
    }
}
