//! Numbered outcomes. Each code has one meaning, one HTTP status, one sentence for people, and says whether to try
//! again. The tables here are the documentation of the codes; `docs/protocol.md` repeats them and a test compares.

use std::{fmt, time::Duration};

/// Whether the same thing is worth another try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// At once: it was bad luck, and another path exists.
    Now,
    /// After this long, with jitter.
    After(Duration),
    /// Not before somebody has changed something.
    Never,
}

/// Who would have to act. Doors say it, so that nobody searches in the wrong place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The one who asked.
    Client,
    /// The rules say no.
    Policy,
    /// A shard, control, or the path between them.
    Mesh,
    /// The edge or its link.
    Edge,
    /// What the edge was to dial.
    Target,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Policy => "policy",
            Self::Mesh => "mesh",
            Self::Edge => "edge",
            Self::Target => "target",
        })
    }
}

const SOON: Retry = Retry::After(Duration::from_secs(1));
const LATER: Retry = Retry::After(Duration::from_secs(5));
const MUCH_LATER: Retry = Retry::After(Duration::from_secs(60));

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $number:literal, $slug:literal, $status:literal, $fault:ident, $retry:expr, $sentence:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$vdoc])* #[doc = concat!("\n\n`", $slug, "`, HTTP ", $status, ": ", $sentence)] $variant = $number,)*
        }

        impl $name {
            /// Every code, in the order of the numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The number on the wire.
            #[must_use]
            pub const fn number(self) -> u32 {
                self as u32
            }

            /// The code of a number; `None` for one that a newer version may have sent.
            #[must_use]
            pub const fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The name in logs, metrics and HTTP reason phrases: lower case with hyphens.
            #[must_use]
            pub const fn slug(self) -> &'static str {
                match self { $(Self::$variant => $slug,)* }
            }

            /// The HTTP status that a door answers with.
            #[must_use]
            pub const fn http_status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// Whose fault it is.
            #[must_use]
            pub const fn fault(self) -> Fault {
                match self { $(Self::$variant => Fault::$fault,)* }
            }

            /// Whether to try again.
            #[must_use]
            pub const fn retry(self) -> Retry {
                match self { $(Self::$variant => $retry,)* }
            }

            /// What it means, in a sentence for people.
            #[must_use]
            pub const fn sentence(self) -> &'static str {
                match self { $(Self::$variant => $sentence,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.slug())
            }
        }
    };
}

codes! {
    /// Why a stream was not opened.
    RefuseCode {
        /// The `Open` could not be understood.
        BadRequest = 1, "bad-request", 400, Client, Retry::Never, "The request could not be understood.";
        /// No or wrong credentials at a door.
        Unauthenticated = 2, "unauthenticated", 407, Client, Retry::Never, "The door asks for a client certificate or a token.";
        /// Default deny at the shard.
        PolicyDenied = 3, "policy-denied", 403, Policy, Retry::Never, "No policy rule allows this.";
        /// The edge's own list.
        EdgeDenied = 4, "edge-denied", 403, Policy, Retry::Never, "The edge itself does not allow this target.";
        /// Nobody by that name is enrolled.
        EdgeUnknown = 5, "edge-unknown", 404, Client, Retry::Never, "No edge of that name is enrolled.";
        /// Enrolled, and not connected now.
        EdgeOffline = 6, "edge-offline", 503, Edge, LATER, "The edge is not connected.";
        /// No connected edge announces it.
        ServiceUnknown = 7, "service-unknown", 404, Client, LATER, "No connected edge announces that service.";
        /// The target answered with a reset.
        TargetRefused = 8, "target-refused", 502, Target, SOON, "The target refused the connection: nothing listens on that port.";
        /// The target did not answer.
        TargetTimeout = 9, "target-timeout", 504, Target, LATER, "The target did not answer in time.";
        /// The edge has no route to it.
        TargetUnreachable = 10, "target-unreachable", 502, Target, LATER, "The edge cannot reach the target.";
        /// The edge cannot resolve the name.
        TargetNameUnknown = 11, "target-name-unknown", 502, Target, LATER, "The edge cannot resolve the target's name.";
        /// A limit of the shard or of the edge.
        LimitReached = 12, "limit-reached", 503, Mesh, SOON, "A limit is reached; try again in a moment.";
        /// The shard is leaving.
        Draining = 13, "draining", 503, Mesh, Retry::Now, "This shard is draining; another one serves.";
        /// The edge did not answer the `Open` in time.
        MeshTimeout = 14, "mesh-timeout", 504, Edge, LATER, "The edge did not answer in time.";
        /// A fault of ours.
        Internal = 15, "internal", 500, Mesh, LATER, "The mesh failed to handle this; its log says why.";
        /// Passed on too often.
        LoopDetected = 16, "loop-detected", 508, Mesh, SOON, "The stream was passed on too often; the shards disagree on the owner.";
        /// Not in this version.
        Unsupported = 17, "unsupported", 501, Client, Retry::Never, "This kind of target is not supported here.";
        /// The link broke while the stream was being opened.
        LinkLost = 18, "link-lost", 503, Edge, SOON, "The link to the edge broke while the stream was being opened.";
        /// Where the edge is cannot be told now: this shard has not heard from control, or cannot ask a shard that knows.
        NotReady = 19, "not-ready", 503, Mesh, Retry::Now, "This shard cannot tell yet where the edge is; another one may.";
    }
}

codes! {
    /// Why a link was closed; the application error code of QUIC's CONNECTION_CLOSE.
    CloseCode {
        /// Nothing more to do.
        Done = 0, "done", 200, Client, Retry::Never, "Closed by its user.";
        /// The process ends.
        Shutdown = 1, "shutdown", 503, Mesh, Retry::Now, "The other side shut down.";
        /// The drain deadline has passed.
        Drained = 2, "drained", 503, Mesh, Retry::Now, "The shard was drained.";
        /// A newer connection of the same process took over.
        Replaced = 3, "replaced", 409, Edge, Retry::Never, "A newer connection of this edge took over.";
        /// Two machines use one identity.
        DuplicateIdentity = 4, "duplicate-identity", 409, Edge, MUCH_LATER, "Another machine is connected with the same identity; enrol one of the two anew under a name of its own.";
        /// The certificate was revoked.
        Revoked = 5, "revoked", 403, Policy, Retry::Never, "The certificate is revoked; enrol again with a new token.";
        /// A message named somebody else than the certificate does.
        NameMismatch = 6, "name-mismatch", 403, Client, Retry::Never, "The name in the message is not the one in the certificate.";
        /// The peer broke the protocol.
        ProtocolError = 7, "protocol-error", 400, Client, LATER, "The other side broke the protocol.";
        /// The certificate ran out while the link lived.
        Expired = 8, "expired", 403, Edge, LATER, "The certificate has expired; it is renewed at 2/3 of its life as long as control can be reached.";
        /// The certificate is of a kind that has no business here.
        WrongRole = 9, "wrong-role", 403, Client, Retry::Never, "A certificate of this kind may not connect here.";
        /// The shard is full.
        Overloaded = 10, "overloaded", 503, Mesh, LATER, "The shard is full; try another one.";
        /// The edge belongs to another shard.
        Redirected = 11, "redirected", 307, Mesh, Retry::Now, "Another shard owns this edge.";
        /// The edge moved to another shard, and the last stream here has ended.
        Moved = 12, "moved", 307, Mesh, Retry::Now, "The edge moved to another shard.";
        /// No Hello in time.
        HelloTimeout = 13, "hello-timeout", 408, Client, LATER, "The first message did not come in time.";
    }
}

codes! {
    /// Why a stream ended by reset; the application error code of QUIC's RESET_STREAM and STOP_SENDING.
    ResetCode {
        /// The socket at the far end was reset.
        PeerReset = 1, "peer-reset", 502, Target, SOON, "The connection at the far end was reset.";
        /// A link on the way broke.
        LinkLost = 2, "link-lost", 503, Mesh, SOON, "A link on the way broke.";
        /// The stream's user was revoked or lost the right.
        Revoked = 3, "revoked", 403, Policy, Retry::Never, "The right to this stream was revoked.";
        /// A process on the way ended and its deadline had passed.
        Shutdown = 4, "shutdown", 503, Mesh, Retry::Now, "A process on the way shut down.";
        /// The reader did not read while the tunnel was short of memory.
        Stalled = 5, "stalled", 503, Client, SOON, "The reader did not read for too long while the tunnel was short of memory.";
        /// The opener went away before the stream was open.
        Cancelled = 6, "cancelled", 499, Client, Retry::Never, "The opener went away.";
        /// Bytes that do not belong there.
        ProtocolError = 7, "protocol-error", 400, Client, Retry::Never, "The stream broke the protocol.";
        /// The stream was refused; the `OpenRefused` frame says why.
        Refused = 8, "refused", 403, Client, Retry::Never, "The stream was refused.";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_slugs_are_unique_and_come_back() {
        for (i, code) in RefuseCode::ALL.iter().enumerate() {
            assert_eq!(RefuseCode::from_number(code.number()), Some(*code));
            assert!(RefuseCode::ALL[i + 1..].iter().all(|c| c.slug() != code.slug()));
        }
        for code in CloseCode::ALL {
            assert_eq!(CloseCode::from_number(code.number()), Some(*code));
        }
        for code in ResetCode::ALL {
            assert_eq!(ResetCode::from_number(code.number()), Some(*code));
        }
        assert_eq!(RefuseCode::from_number(0), None);
        assert_eq!(RefuseCode::from_number(9999), None);
    }

    #[test]
    fn the_document_has_every_code() {
        let document = include_str!("../../docs/protocol.md");
        let row = |number: u32, slug: &str, status: u16, sentence: &str| {
            let row = format!("| {number} | `{slug}` | {status} | {sentence} |");
            assert!(document.contains(&row), "docs/protocol.md lacks the row\n{row}");
        };
        for c in RefuseCode::ALL {
            row(c.number(), c.slug(), c.http_status(), c.sentence());
        }
        for c in CloseCode::ALL {
            row(c.number(), c.slug(), c.http_status(), c.sentence());
        }
        for c in ResetCode::ALL {
            row(c.number(), c.slug(), c.http_status(), c.sentence());
        }
    }
}
