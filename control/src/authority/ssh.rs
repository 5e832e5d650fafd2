//! Who may come in by SSH: certificates for users and for the host keys of shards, and keys that are good without one.

use std::time::Duration;

use proto::{
    api::{ADMIN_GROUP, ApiCode, ApiError},
    id::{EdgeId, GroupName},
    identity::Role,
    ssh::{self, Authorities, Certificate, HostCertificateRequest, Key, KeyRequest, UserCertificateRequest},
};
use runtime::{cert::CertFacts, clock::unix_now};

use super::{Authority, MAX_GROUPS, bad, ca_error, renew_error, store_error};
use crate::{
    ca::{
        HostName,
        ssh::{Life, SshCa, UserKey},
    },
    store::ssh::{Added, MAX_KEYS},
};

/// Shortest life of a user's certificate that can be asked for.
const LEAST: Duration = Duration::from_secs(60);
/// Most names of a shard in a certificate.
const MAX_NAMES: usize = 64;

impl Authority {
    /// The keys that sign SSH certificates; none if control has none.
    #[must_use]
    pub fn ssh_authorities(&self) -> Authorities {
        let ca = self.0.ssh.ca.as_ref();
        ca.map(|ca| Authorities { user: ca.users().to_vec(), host: ca.hosts().to_vec() }).unwrap_or_default()
    }

    fn ssh_ca(&self) -> Result<&SshCa, ApiError> {
        self.0.ssh.ca.as_ref().ok_or_else(|| {
            ApiError::new(
                ApiCode::NotFound,
                "control has no keys to sign SSH certificates with: its CA was given to it, so ssh-user-ca and \
                 ssh-host-ca must lie beside the CA's key as well (docs/operations.md, 'SSH'); registered keys work \
                 without",
            )
        })
    }

    /// Signs a user's key, for the user.
    ///
    /// # Errors
    /// If the key is none, the caller is revoked, or the database cannot be written.
    pub async fn sign_ssh_user(
        &self,
        facts: &CertFacts,
        request: &UserCertificateRequest,
    ) -> Result<Certificate, ApiError> {
        let ca = self.ssh_ca()?;
        let key = UserKey::parse(&request.key).map_err(bad)?;
        let most = self.0.ssh.user_ttl.as_secs();
        let ttl = request.ttl_secs.map_or(most, |asked| u64::from(asked).min(most)).max(LEAST.as_secs());
        let now = unix_now();
        let life = Life { now, ttl: i64::try_from(ttl).unwrap_or(i64::MAX) };
        let renewal = self.0.store.begin_renewal(facts).await.map_err(|e| renew_error(&e))?;
        let signed = ca.sign_user(&key, &facts.identity.name, &facts.groups, life).map_err(|e| ca_error(&e))?;
        let serial = ssh::serial_name(signed.serial);
        renewal.finish_for_ssh(&serial, signed.not_after, now).await.map_err(|e| renew_error(&e))?;
        self.0.metrics.issued.with_label_values(&["ssh-user"]).inc();
        tracing::info!(target: "audit", who = %facts.identity, serial, key = key.fingerprint(), not_after = signed.not_after, "SSH certificate signed");
        let (not_before, not_after) = (signed.not_before, signed.not_after);
        Ok(Certificate { certificate: signed.line, not_before, not_after, hosts: ca.hosts().to_vec() })
    }

    /// Signs the host key of a shard, for the names that it gives unless one is control's.
    ///
    /// # Errors
    /// If the key or a name is none, or the caller is revoked.
    pub fn sign_ssh_host(&self, facts: &CertFacts, request: &HostCertificateRequest) -> Result<Certificate, ApiError> {
        let ca = self.ssh_ca()?;
        let key = UserKey::parse(&request.key).map_err(bad)?;
        if request.names.len() > MAX_NAMES {
            return Err(bad(format!("{} names are too many for one shard; at most {MAX_NAMES}", request.names.len())));
        }
        let mut names = vec![facts.identity.name.to_string()];
        for given in &request.names {
            let name =
                HostName::parse(given).ok_or_else(|| bad(format!("{given:?} is neither a DNS name nor an address")))?;
            if self.0.reserved.contains(&name) && !name.is_loopback() {
                return Err(bad(format!("{name} is a name of control itself; take it out of the shard's names")));
            }
            let name = name.to_string();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let now = unix_now();
        let ttl = i64::try_from(self.0.ttl.of(Role::Shard).as_secs()).unwrap_or(i64::MAX);
        let signed = ca.sign_host(&key, &facts.identity.name, &names, Life { now, ttl }).map_err(|e| ca_error(&e))?;
        self.0.metrics.issued.with_label_values(&["ssh-host"]).inc();
        tracing::info!(target: "audit", who = %facts.identity, key = key.fingerprint(), ?names, "SSH host certificate signed");
        let (not_before, not_after) = (signed.not_before, signed.not_after);
        Ok(Certificate { certificate: signed.line, not_before, not_after, hosts: ca.hosts().to_vec() })
    }

    /// Registers a key for a user.
    ///
    /// # Errors
    /// If the key is none, if the caller may not, or if the database cannot be written.
    pub async fn add_ssh_key(&self, facts: &CertFacts, user: &EdgeId, request: &KeyRequest) -> Result<Key, ApiError> {
        let own = may(facts, user)?;
        let read = UserKey::parse(&request.key).map_err(bad)?;
        let groups = groups(facts, own, &request.groups)?;
        let key = Key {
            id: read.id(),
            fingerprint: read.fingerprint(),
            user: user.clone(),
            groups,
            key: read.line().map_err(bad)?,
            comment: read.comment.clone(),
            created: unix_now(),
            created_by: format!("user/{}", facts.identity.name),
        };
        match self.0.store.add_ssh_key(&key).await.map_err(|e| store_error(&e))? {
            Added::At(revision) => {
                tracing::info!(target: "audit", who = key.created_by, %user, key = key.fingerprint, "SSH key added");
                self.0.hub.in_force(revision).await;
                Ok(key)
            }
            // Who else has it is nobody's business who is no administrator.
            Added::OfAnother(_) => Err(bad(format!(
                "the key {} is registered for another user already; a key says who somebody is, so make a new one",
                key.fingerprint
            ))),
            Added::TooMany => Err(bad(format!(
                "user {user} has {MAX_KEYS} keys, which is the most; remove one with 'meshctl user key rm'"
            ))),
        }
    }

    /// The keys of a user.
    ///
    /// # Errors
    /// If the caller may not see them, or the database cannot be read.
    pub async fn ssh_keys(&self, facts: &CertFacts, user: &EdgeId) -> Result<Vec<Key>, ApiError> {
        may(facts, user)?;
        self.0.store.ssh_keys_of(user).await.map_err(|e| store_error(&e))
    }

    /// Removes a key of a user; sessions by it end.
    ///
    /// # Errors
    /// If there is none, the caller may not, or the database cannot be written.
    pub async fn remove_ssh_key(&self, facts: &CertFacts, user: &EdgeId, id: &str) -> Result<(), ApiError> {
        may(facts, user)?;
        let revision = self.0.store.delete_ssh_key(user, id).await.map_err(|e| store_error(&e))?;
        let revision = revision.ok_or_else(|| {
            let why = format!("user {user} has no key {id:?}; 'meshctl user key ls {user}' shows them");
            ApiError::new(ApiCode::NotFound, why)
        })?;
        tracing::info!(target: "audit", who = %facts.identity, %user, key = id, "SSH key removed");
        self.0.hub.in_force(revision).await;
        Ok(())
    }
}

fn is_admin(facts: &CertFacts) -> bool {
    facts.groups.iter().any(|g| g.as_str() == ADMIN_GROUP)
}

/// Whether the caller is the user, or an administrator; others may not.
fn may(facts: &CertFacts, user: &EdgeId) -> Result<bool, ApiError> {
    let own = facts.identity.role == Role::User && facts.identity.name == *user;
    if own || is_admin(facts) {
        return Ok(own);
    }
    let why = format!("the keys of user {user} are for {user} and for users of the group '{ADMIN_GROUP}'");
    Err(ApiError::new(ApiCode::Forbidden, why))
}

/// The groups of a new key.
fn groups(facts: &CertFacts, own: bool, asked: &[GroupName]) -> Result<Vec<GroupName>, ApiError> {
    if asked.len() > MAX_GROUPS {
        return Err(bad(format!("{} groups are too many; at most {MAX_GROUPS} are allowed", asked.len())));
    }
    if own && asked.is_empty() {
        return Ok(facts.groups.clone());
    }
    if is_admin(facts) {
        return Ok(asked.to_vec());
    }
    match asked.iter().find(|group| !facts.groups.contains(group)) {
        None => Ok(asked.to_vec()),
        Some(group) => {
            let why = format!("you are not in the group {group}, so no key of yours can be; ask an administrator");
            Err(ApiError::new(ApiCode::Forbidden, why))
        }
    }
}
