//! Names of the things of the mesh. Each is checked once, where it enters, and is valid from then on.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// A name was not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// Nothing, or nothing between two dots.
    #[error("{what} name {given:?} has an empty part")]
    Empty {
        /// What kind of name was expected.
        what: &'static str,
        /// What was given.
        given: String,
    },
    /// Longer than the bound.
    #[error("{what} name is {len} bytes long; at most {max} are allowed")]
    TooLong {
        /// What kind of name was expected.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The bound in bytes.
        max: usize,
    },
    /// A character that is not allowed where it stands.
    #[error("{what} name {given:?} may only have a-z, 0-9, '-' inside{dots}; {bad:?} does not fit")]
    Character {
        /// What kind of name was expected.
        what: &'static str,
        /// What was given.
        given: String,
        /// The character.
        bad: char,
        /// Text on whether dots are allowed.
        dots: &'static str,
    },
}

/// Longest RFC 1123 subdomain in bytes, which is also Kubernetes' bound for a node name.
const MAX_SUBDOMAIN: usize = 253;
/// Longest DNS label in bytes (RFC 1035, 2.3.4).
const MAX_LABEL: usize = 63;

fn check(what: &'static str, given: &str, max: usize, dotted: bool) -> Result<(), InvalidName> {
    if given.len() > max {
        return Err(InvalidName::TooLong { what, len: given.len(), max });
    }
    let dots = if dotted { ", and dots between labels" } else { "" };
    let labels = given.split('.').map(Some).chain((given.is_empty()).then_some(None));
    for label in labels {
        let Some(label) = label.filter(|l| !l.is_empty()) else {
            return Err(InvalidName::Empty { what, given: given.to_owned() });
        };
        if label.len() > MAX_LABEL {
            return Err(InvalidName::TooLong { what, len: label.len(), max: MAX_LABEL });
        }
        let edge_of_label = |i: usize| i == 0 || i == label.len() - 1;
        let bad = label
            .char_indices()
            .find(|&(i, c)| !(c.is_ascii_lowercase() || c.is_ascii_digit() || (c == '-' && !edge_of_label(i))));
        if let Some((_, bad)) = bad {
            return Err(InvalidName::Character { what, given: given.to_owned(), bad, dots });
        }
    }
    if !dotted && given.contains('.') {
        return Err(InvalidName::Character { what, given: given.to_owned(), bad: '.', dots });
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:expr, $dotted:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(given: &str) -> Result<Self, InvalidName> {
                check($what, given, $max, $dotted)?;
                Ok(Self(given.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(given: String) -> Result<Self, InvalidName> {
                given.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

name!(
    /// An enrolled machine outside the cloud: an RFC 1123 subdomain of at most 253 bytes, so that a Kubernetes node
    /// name is one.
    EdgeId, "edge", MAX_SUBDOMAIN, true
);
name!(
    /// A shard: one `mesh-cloud` process.
    ShardId, "shard", MAX_SUBDOMAIN, true
);
name!(
    /// A person or a program that uses the mesh.
    UserId, "user", MAX_SUBDOMAIN, true
);
name!(
    /// A service that one or more edges answer for: one DNS label.
    ServiceName, "service", MAX_LABEL, false
);
name!(
    /// A group of edges that can reach each other.
    SiteName, "site", MAX_LABEL, false
);
name!(
    /// A group of users.
    GroupName, "group", MAX_LABEL, false
);
name!(
    /// The SPIFFE trust domain of a mesh, such as `mesh.example.org`.
    TrustDomain, "trust domain", MAX_SUBDOMAIN, true
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_and_names_that_are_not() {
        for good in ["a", "shop-17", "node1.plant.example.org", "0", &"a".repeat(63)] {
            assert!(good.parse::<EdgeId>().is_ok(), "{good}");
        }
        for bad in ["", ".", "a.", ".a", "a..b", "-a", "a-", "A", "a_b", "a b", "ü", "a/b", &"a".repeat(64)] {
            assert!(bad.parse::<EdgeId>().is_err(), "{bad}");
        }
        assert!("a.b".parse::<ServiceName>().is_err());
        assert!(["abcdefg"; 40].join(".").parse::<EdgeId>().is_err());
    }

    #[test]
    fn an_error_says_what_is_wrong() {
        let error = "Shop_17".parse::<EdgeId>().unwrap_err().to_string();
        assert_eq!(
            error,
            "edge name \"Shop_17\" may only have a-z, 0-9, '-' inside, and dots between labels; 'S' does not fit"
        );
    }
}
