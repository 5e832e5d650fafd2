//! For whom a stream is opened.

use std::fmt;

use crate::id::{EdgeId, GroupName, SiteName, UserId};

/// Whoever wants something of the mesh. Taken from a certificate, a token or the door itself, never from a message of
/// the one concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Principal {
    /// A person or a program.
    User {
        /// Its name.
        name: UserId,
        /// What it belongs to.
        groups: Vec<GroupName>,
    },
    /// Another edge.
    Edge {
        /// Its name.
        name: EdgeId,
        /// Its site.
        site: Option<SiteName>,
    },
    /// Anybody, through a door that asks for no identity: `http`, `https`, or a TCP door by its name.
    Door {
        /// The door.
        name: String,
    },
    /// kube-apiserver, through the egress door.
    Apiserver,
}

impl fmt::Display for Principal {
    /// As policy rules write it: `user/alice`, `edge/shop-17`, `door/http`, `apiserver`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User { name, .. } => write!(f, "user/{name}"),
            Self::Edge { name, .. } => write!(f, "edge/{name}"),
            Self::Door { name } => write!(f, "door/{name}"),
            Self::Apiserver => f.write_str("apiserver"),
        }
    }
}
