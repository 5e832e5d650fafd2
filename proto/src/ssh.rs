//! SSH at the jump host: what control, shards and people's tools say of keys and certificates. Keys and certificates are
//! lines as OpenSSH writes them, `ssh-ed25519 AAAA…`; who reads them needs a library for that, and this crate none.
//!
//! | method and path | who | body | answer |
//! |---|---|---|---|
//! | `GET /v1/ssh/authorities` | any member | | [`Authorities`] |
//! | `POST /v1/ssh/user-certificates` | users, for themselves | [`UserCertificateRequest`] | [`Certificate`] |
//! | `POST /v1/ssh/host-certificates` | shards, for themselves | [`HostCertificateRequest`] | [`Certificate`] |
//! | `GET/POST /v1/users/{name}/keys` | the user, admins | [`KeyRequest`] | [`Key`]s, [`Key`] |
//! | `DELETE /v1/users/{name}/keys/{id}` | the user, admins | | `204` |
//!
//! A user is a member by a certificate of the mesh, from which groups are taken; SSH certificates carry them on in the
//! extension [`GROUPS_EXTENSION`].

use serde::{Deserialize, Serialize};

use crate::id::{EdgeId, GroupName};

/// The extension of a user certificate with the user's groups, separated by spaces.
pub const GROUPS_EXTENSION: &str = "groups@causeway";

/// How the names of registered keys among credentials begin.
pub const KEY_PREFIX: &str = "ssh-key:";

/// Longest line with a key or a certificate, in bytes: RSA of 16,384 bits in base64, and a comment.
pub const MAX_LINE: usize = 8 * 1024;

/// The keys that sign certificates. More than one while they are being replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authorities {
    /// Of user certificates, the one in use first. None if control has none.
    pub user: Vec<String>,
    /// Of host certificates.
    pub host: Vec<String>,
}

/// What shards need to know, as a section of the watch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// Who signs user certificates.
    pub authorities: Vec<String>,
    /// Keys of users that are good without a certificate.
    pub keys: Vec<Key>,
}

/// A user's key that was registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// To name it by: hexadecimal digits of the SHA-256 of the key, half of them.
    pub id: String,
    /// As OpenSSH prints it: `SHA256:…`.
    pub fingerprint: String,
    /// Whose it is.
    pub user: EdgeId,
    /// Groups that the user has by it.
    pub groups: Vec<GroupName>,
    /// Algorithm and base64, without a comment.
    pub key: String,
    /// What the user calls it.
    pub comment: String,
    /// When it was registered, in seconds since 1970.
    pub created: i64,
    /// By whom: `user/alice`.
    pub created_by: String,
}

/// Registers a key.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyRequest {
    /// The line, as in a file that ends in `.pub`.
    pub key: String,
    /// Groups that the user has by this key. Users themselves can take only those that they have; all of them, if none
    /// is named.
    #[serde(default)]
    pub groups: Vec<GroupName>,
}

/// Asks for a certificate for oneself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserCertificateRequest {
    /// The line, as in a file that ends in `.pub`.
    pub key: String,
    /// For how long, in seconds; control has a limit, and takes it if nothing is said.
    #[serde(default)]
    pub ttl_secs: Option<u32>,
}

/// A shard asks for a certificate of its host key.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostCertificateRequest {
    /// The public key.
    pub key: String,
    /// Names and addresses under which people reach it.
    pub names: Vec<String>,
}

/// A certificate that was signed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Certificate {
    /// The line, as in a file that ends in `-cert.pub`.
    pub certificate: String,
    /// First second of its life, since 1970.
    pub not_before: i64,
    /// Last second of its life.
    pub not_after: i64,
    /// The keys that sign host certificates, for `known_hosts`.
    pub hosts: Vec<String>,
}

/// The name of an SSH certificate among credentials and revocations: the serial numbers of X.509 have no colon.
#[must_use]
pub fn serial_name(serial: u64) -> String {
    format!("ssh:{serial:016x}")
}

/// The name of a registered key among credentials.
#[must_use]
pub fn key_name(id: &str) -> String {
    format!("{KEY_PREFIX}{id}")
}
