//! What the door answers when there is no way: a status by who is at fault, as konnectivity has it, and the cause in
//! the reason phrase, since that and the status are all that people see of it in `kubectl`. Pure.

use proto::{book::Unresolved, code::RefuseCode, stream::Refusal};

/// Longest reason phrase in bytes.
const MAX_PHRASE: usize = 240;

/// There is no way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{slug}: {sentence}")]
pub(crate) struct Failure {
    /// Of HTTP.
    pub(crate) status: u16,
    /// The kind, for programs and metrics.
    pub(crate) slug: &'static str,
    /// The cause, for people.
    pub(crate) sentence: String,
}

impl Failure {
    /// Puts one together.
    pub(crate) fn new(status: u16, slug: &'static str, sentence: impl Into<String>) -> Self {
        Self { status, slug, sentence: sentence.into() }
    }

    /// The whole answer.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let phrase = phrase(self.slug, &self.sentence);
        let body = format!("{}\n", self.sentence);
        format!(
            "HTTP/1.1 {} {phrase}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nX-Mesh-Error: {}\r\nConnection: close\r\n\r\n{body}",
            self.status,
            body.len(),
            self.slug
        )
        .into_bytes()
    }

    /// The cause in the words of Go's net package in front, which programs on the other side look for.
    pub(crate) fn for_go(&self) -> String {
        let go = match self.slug {
            "target-refused" => "connect: connection refused: ",
            "target-timeout" | "mesh-timeout" => "i/o timeout: ",
            "target-name-unknown" | "unknown-host" => "no such host: ",
            _ => "",
        };
        format!("{go}{} {}", self.slug, self.sentence)
    }
}

/// A reason phrase: visible ASCII and spaces only, so that nothing in it can end the line, and not too long.
fn phrase(slug: &str, sentence: &str) -> String {
    let visible = |c: char| if c == ' ' || c.is_ascii_graphic() { c } else { '?' };
    let text: String = sentence.chars().map(visible).collect();
    let text = text.strip_prefix(slug).map_or(&*text, str::trim_start);
    let mut whole = format!("{slug} {text}");
    if whole.len() > MAX_PHRASE {
        whole.truncate(MAX_PHRASE - 3);
        whole.push_str("...");
    }
    whole
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        use RefuseCode as C;
        let status = match refusal.code {
            // What the mesh does not know is to kube-apiserver what a name without an address is.
            C::EdgeUnknown | C::ServiceUnknown | C::LoopDetected => 502,
            C::Unauthenticated => 403,
            C::BadRequest
            | C::PolicyDenied
            | C::EdgeDenied
            | C::EdgeOffline
            | C::TargetRefused
            | C::TargetTimeout
            | C::TargetUnreachable
            | C::TargetNameUnknown
            | C::LimitReached
            | C::Draining
            | C::MeshTimeout
            | C::Internal
            | C::Unsupported
            | C::LinkLost => refusal.code.http_status(),
        };
        Self { status, slug: refusal.code.slug(), sentence: refusal.reason }
    }
}

impl From<Unresolved> for Failure {
    fn from(unresolved: Unresolved) -> Self {
        let (status, slug) = match unresolved {
            Unresolved::Ambiguous { .. } => (502, "ambiguous"),
            Unresolved::NoEdge { .. } => (502, "no-edge"),
            Unresolved::NoPort { .. } => (502, "no-port"),
            Unresolved::NoEndpoint { .. } => (503, "no-endpoint"),
            Unresolved::Unknown { .. } => (502, "unknown-host"),
            Unresolved::Invalid(_) => (400, "bad-request"),
        };
        Self::new(status, slug, unresolved.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_stands_in_the_first_line_and_cannot_end_it() {
        let evil = Failure::new(503, "edge-offline", "edge/x is not\r\nX-Evil: 1\u{85}\u{2028} connected");
        let text = String::from_utf8(evil.encode()).unwrap();
        assert!(text.starts_with("HTTP/1.1 503 edge-offline edge/x is not??X-Evil: 1?? connected\r\nContent-Type: "));
        let head = text.split_once("\r\n\r\n").unwrap().0;
        assert_eq!(head.lines().count(), 5, "{head}");
        let long = Failure::new(502, "no-edge", "ü".repeat(10_000));
        let text = String::from_utf8(long.encode()).unwrap();
        assert!(text.lines().next().unwrap().len() <= "HTTP/1.1 502 ".len() + MAX_PHRASE);
        assert!(text.ends_with(&format!("{}\n", "ü".repeat(10_000))), "the body has all of it");
    }

    #[test]
    fn every_refusal_is_an_error_and_says_its_own_name() {
        for code in RefuseCode::ALL {
            let failure = Failure::from(Refusal::new(*code));
            assert!((400..600).contains(&failure.status), "{code}");
            assert_eq!(failure.slug, code.slug());
        }
    }
}
