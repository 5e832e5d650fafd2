//! What a failure to reach a shard is, and what follows from it: the one table that whoever dials goes by. The carriers
//! ask it whether another carrier may come through, the course whether the next address may help, and people what to do.

use proto::code::CloseCode;
use runtime::link::EndCause;

/// Classes of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Nothing came back: a firewall drops it, or nobody is there.
    Blocked,
    /// Somebody said no who is no shard, or does not speak as one: a closed port, a firewall, a box in between.
    Rejected,
    /// This machine has no way out.
    NoRoute,
    /// The HTTP proxy does not let it through.
    ProxyRefused,
    /// The name cannot be resolved.
    NameUnknown,
    /// Whoever answers has a certificate of another CA, or is no shard.
    WrongCa,
    /// A certificate is not valid at this time, by one of the two clocks.
    Clock,
    /// The shard does not know this machine's CA.
    Distrusted,
    /// This machine's certificate has ended.
    Expired,
    /// The edge is revoked, or may not be here as what it says it is.
    Revoked,
    /// Another machine is connected with the same identity.
    Duplicate,
    /// The two sides have no version in common.
    Version,
    /// The shard has no room now.
    Busy,
    /// The shard serves, and sends the edge elsewhere, or leaves.
    Elsewhere,
    /// One of the two broke the protocol.
    Broken,
    /// Ended here.
    Local,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::Blocked,
        Self::Rejected,
        Self::NoRoute,
        Self::ProxyRefused,
        Self::NameUnknown,
        Self::WrongCa,
        Self::Clock,
        Self::Distrusted,
        Self::Expired,
        Self::Revoked,
        Self::Duplicate,
        Self::Version,
        Self::Busy,
        Self::Elsewhere,
        Self::Broken,
        Self::Local,
    ];

    /// The class of an end.
    #[must_use]
    pub const fn of(cause: EndCause) -> Self {
        use CloseCode as C;
        match cause {
            EndCause::TimedOut | EndCause::PeerRestarted => Self::Blocked,
            EndCause::NobodyListens | EndCause::Transport => Self::Rejected,
            EndCause::NoRoute => Self::NoRoute,
            EndCause::ProxyRefused => Self::ProxyRefused,
            EndCause::NameUnknown => Self::NameUnknown,
            EndCause::WrongCa | EndCause::WrongPeer => Self::WrongCa,
            EndCause::PeerExpired | EndCause::Clock => Self::Clock,
            EndCause::Distrusted => Self::Distrusted,
            EndCause::Expired | EndCause::Closed(C::Expired) => Self::Expired,
            EndCause::NoCommonVersion => Self::Version,
            EndCause::Local => Self::Local,
            EndCause::Closed(C::Revoked | C::NameMismatch | C::WrongRole) => Self::Revoked,
            EndCause::Closed(C::DuplicateIdentity) => Self::Duplicate,
            EndCause::Closed(C::Overloaded) => Self::Busy,
            EndCause::Closed(C::Done | C::Shutdown | C::Drained | C::Replaced | C::Redirected | C::Moved) => {
                Self::Elsewhere
            }
            EndCause::Closed(C::ProtocolError | C::HelloTimeout) => Self::Broken,
        }
    }

    /// The word for programs.
    #[must_use]
    pub const fn slug(self) -> &'static str {
        match self {
            Self::Blocked => "blocked",
            Self::Rejected => "rejected",
            Self::NoRoute => "no-route",
            Self::ProxyRefused => "proxy-refused",
            Self::NameUnknown => "name-unknown",
            Self::WrongCa => "wrong-ca",
            Self::Clock => "clock",
            Self::Distrusted => "distrusted",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::Duplicate => "duplicate-identity",
            Self::Version => "version",
            Self::Busy => "busy",
            Self::Elsewhere => "elsewhere",
            Self::Broken => "broken",
            Self::Local => "local",
        }
    }

    /// Whether another carrier may come through where this one did not. What the shard itself has answered it would say
    /// again; what only the network says, it may not say of the other one.
    #[must_use]
    pub const fn may_pass_otherwise(self) -> bool {
        match self {
            Self::Blocked | Self::Rejected | Self::NoRoute | Self::ProxyRefused | Self::NameUnknown | Self::Version => {
                true
            }
            Self::WrongCa
            | Self::Clock
            | Self::Distrusted
            | Self::Expired
            | Self::Revoked
            | Self::Duplicate
            | Self::Busy
            | Self::Elsewhere
            | Self::Broken
            | Self::Local => false,
        }
    }

    /// Whether no shard of this mesh has answered at that address: the edge has no way there, or no use for it.
    #[must_use]
    pub const fn is_unreached(self) -> bool {
        match self {
            Self::Blocked
            | Self::Rejected
            | Self::NoRoute
            | Self::ProxyRefused
            | Self::NameUnknown
            | Self::WrongCa
            | Self::Clock
            | Self::Version => true,
            Self::Distrusted
            | Self::Expired
            | Self::Revoked
            | Self::Duplicate
            | Self::Busy
            | Self::Elsewhere
            | Self::Broken
            | Self::Local => false,
        }
    }

    /// Whether every shard would say the same.
    #[must_use]
    pub const fn is_about_this_edge(self) -> bool {
        matches!(self, Self::Revoked | Self::Duplicate)
    }

    /// Whether only people can change it, so that the pause is long. One shard's clock or CA may be wrong: the other
    /// shards are asked before it.
    #[must_use]
    pub const fn needs_people(self) -> bool {
        self.is_about_this_edge() || matches!(self, Self::Expired | Self::Distrusted)
    }

    /// Whether it is about who somebody is: that has a log line, a metric and a phase of its own.
    #[must_use]
    pub const fn is_identity(self) -> bool {
        self.needs_people() || matches!(self, Self::WrongCa | Self::Clock)
    }

    /// What to do about it, in a sentence for people on the machine.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Blocked => {
                "Let this machine out to the shard's port, by UDP and by TCP, or set [proxy] url; 'mesh-edge netcheck' \
                 shows what passes."
            }
            Self::Rejected => {
                "Look whether the address and the port are a shard's, and what firewall or middlebox answers in its place."
            }
            Self::NoRoute => "Give this machine a network: an address, a route, and a firewall that lets it send.",
            Self::ProxyRefused => "Look at [proxy] in the configuration, at its credentials, and at the proxy's rules.",
            Self::NameUnknown => {
                "Look at this machine's DNS (/etc/resolv.conf), or write addresses into `shards` of the configuration."
            }
            Self::WrongCa => {
                "Look at the address: it may be another mesh's. If it is right, something in between opens TLS: exempt \
                 the shard's port from inspection."
            }
            Self::Clock => "Set this machine's clock and let it follow a time server (timedatectl, chrony).",
            Self::Distrusted => {
                "Enrol this machine in this mesh: mesh-edge join --replace with a line from 'meshctl token create --edge'."
            }
            Self::Expired => {
                "Enrol this machine anew: mesh-edge join --replace with a line from 'meshctl token create --edge \
                 --replace --name NAME'."
            }
            Self::Revoked => {
                "An administrator has taken this machine's access away. To give it back: mesh-edge join --replace with \
                 a line from 'meshctl token create --edge --replace --name NAME'."
            }
            Self::Duplicate => "Enrol one of the two machines under a name of its own: mesh-edge join --replace.",
            Self::Version => "Update the older one of mesh-edge and mesh-cloud.",
            Self::Busy => "It is tried again by itself; if this stays, add a shard.",
            Self::Elsewhere => "It goes on by itself.",
            Self::Broken => "Look at the logs of the shard and of mesh-edge, and update the older one.",
            Self::Local => "Nothing: this side ended it.",
        }
    }
}

#[cfg(test)]
mod tests {
    use EndCause as E;

    use super::*;

    /// Every class: what belongs to it, and what follows: another carrier, counts as unreached, the long pause.
    #[test]
    fn every_class_decides_what_happens_next() {
        let closed = EndCause::Closed;
        use CloseCode as C;
        let table: [(Class, &[EndCause], [bool; 3]); 16] = [
            (Class::Blocked, &[E::TimedOut, E::PeerRestarted], [true, true, false]),
            (Class::Rejected, &[E::NobodyListens, E::Transport], [true, true, false]),
            (Class::NoRoute, &[E::NoRoute], [true, true, false]),
            (Class::ProxyRefused, &[E::ProxyRefused], [true, true, false]),
            (Class::NameUnknown, &[E::NameUnknown], [true, true, false]),
            (Class::WrongCa, &[E::WrongCa, E::WrongPeer], [false, true, false]),
            (Class::Clock, &[E::PeerExpired, E::Clock], [false, true, false]),
            (Class::Distrusted, &[E::Distrusted], [false, false, true]),
            (Class::Expired, &[E::Expired, closed(C::Expired)], [false, false, true]),
            (
                Class::Revoked,
                &[closed(C::Revoked), closed(C::NameMismatch), closed(C::WrongRole)],
                [false, false, true],
            ),
            (Class::Duplicate, &[closed(C::DuplicateIdentity)], [false, false, true]),
            (Class::Version, &[E::NoCommonVersion], [true, true, false]),
            (Class::Busy, &[closed(C::Overloaded)], [false, false, false]),
            (
                Class::Elsewhere,
                &[
                    closed(C::Drained),
                    closed(C::Shutdown),
                    closed(C::Moved),
                    closed(C::Redirected),
                    closed(C::Replaced),
                ],
                [false, false, false],
            ),
            (Class::Broken, &[closed(C::ProtocolError), closed(C::HelloTimeout)], [false, false, false]),
            (Class::Local, &[E::Local], [false, false, false]),
        ];
        assert_eq!(table.map(|(class, ..)| class), Class::ALL);
        for (class, causes, next) in table {
            for cause in causes {
                assert_eq!(Class::of(*cause), class, "{cause}");
            }
            let decided = [class.may_pass_otherwise(), class.is_unreached(), class.needs_people()];
            assert_eq!(decided, next, "{class:?}");
            assert!(class.remedy().ends_with('.'), "{class:?}");
        }
    }

    #[test]
    fn what_is_said_by_a_shard_is_never_taken_for_the_network() {
        for class in Class::ALL.into_iter().filter(|class| class.needs_people()) {
            assert!(!class.may_pass_otherwise() && !class.is_unreached() && class.is_identity(), "{class:?}");
        }
    }
}
