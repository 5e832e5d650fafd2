//! What a user's certificate says, once its signature has been checked. Pure, and fuzzed as a file of its own
//! (`fuzz/src/ssh.rs`).

use proto::{
    id::{GroupName, UserId},
    ssh::GROUPS_EXTENSION,
};
use ssh_key::{Certificate, PublicKey, certificate::CertType, public::KeyData};

/// Most groups that are read.
const MAX_GROUPS: usize = 64;

/// What is wrong with a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unfit {
    /// It is for hosts.
    #[error("it is the certificate of a host")]
    Host,
    /// It asks for something that is not known here.
    #[error("it has the critical option {0:?}, which is not known here")]
    Critical(String),
    /// It names nobody, or more than one.
    #[error("it names {0} principals, and a user's certificate names the user and nobody else")]
    Principals(usize),
    /// Its principal or a group is no name.
    #[error("{0}")]
    Name(String),
    /// It has ended, or has not begun.
    #[error("it holds from {from} to {to}, and now is {now}")]
    Time {
        /// First second.
        from: u64,
        /// First second after its end.
        to: u64,
        /// Now.
        now: u64,
    },
    /// Its key cannot be written down.
    #[error("its authority cannot be read")]
    Authority,
}

/// What a user's certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// Who.
    pub(super) user: UserId,
    /// Of which groups.
    pub(super) groups: Vec<GroupName>,
    /// Its number.
    pub(super) serial: u64,
    /// Last second of its life, since 1970.
    pub(super) not_after: i64,
    /// Who signed it, as a line without a comment.
    pub(super) authority: String,
}

impl Facts {
    /// Reads a certificate. Whether its authority is trusted is another question.
    pub(super) fn of(certificate: &Certificate, now: i64) -> Result<Self, Unfit> {
        if certificate.cert_type() != CertType::User {
            return Err(Unfit::Host);
        }
        if let Some(option) = certificate.critical_options().keys().next() {
            return Err(Unfit::Critical(option.clone()));
        }
        let [principal] = certificate.valid_principals() else {
            return Err(Unfit::Principals(certificate.valid_principals().len()));
        };
        let user = principal.parse().map_err(|e| Unfit::Name(format!("{e}")))?;
        let groups = certificate.extensions().get(GROUPS_EXTENSION).map_or("", String::as_str);
        let groups: Result<Vec<GroupName>, _> =
            groups.split_ascii_whitespace().take(MAX_GROUPS).map(str::parse).collect();
        let groups = groups.map_err(|e| Unfit::Name(e.to_string()))?;
        let (from, to) = (certificate.valid_after(), certificate.valid_before());
        let now = u64::try_from(now).unwrap_or(0);
        if now < from || now >= to {
            return Err(Unfit::Time { from, to, now });
        }
        let not_after = i64::try_from(to - 1).unwrap_or(i64::MAX);
        let authority = line(certificate.signature_key()).ok_or(Unfit::Authority)?;
        Ok(Self { user, groups, serial: certificate.serial(), not_after, authority })
    }
}

/// A key as a line without a comment.
pub(super) fn line(key: &KeyData) -> Option<String> {
    let line = PublicKey::new(key.clone(), "").to_openssh().ok()?;
    Some(line.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use ssh_key::{PrivateKey, certificate::Builder, private::Ed25519Keypair};

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn certificate(change: impl FnOnce(&mut Builder)) -> Certificate {
        let key = |seed| PrivateKey::from(Ed25519Keypair::from_seed(&[seed; 32]));
        let mut builder = Builder::new([0; 16], key(1).public_key().key_data().clone(), NOW - 60, NOW + 60).unwrap();
        builder.serial(7).unwrap();
        change(&mut builder);
        builder.sign(&key(2)).unwrap()
    }

    fn of(change: impl FnOnce(&mut Builder)) -> Result<Facts, Unfit> {
        Facts::of(&certificate(change), NOW.cast_signed())
    }

    #[test]
    fn a_certificate_names_one_user_and_its_groups() {
        let facts = of(|b| {
            b.valid_principal("alice").unwrap().extension(GROUPS_EXTENSION, "admin ops").unwrap();
        });
        let facts = facts.unwrap();
        assert_eq!((facts.user.as_str(), facts.serial, facts.not_after), ("alice", 7, NOW.cast_signed() + 59));
        assert_eq!(facts.groups.iter().map(GroupName::as_str).collect::<Vec<_>>(), ["admin", "ops"]);
        assert!(facts.authority.starts_with("ssh-ed25519 ") && facts.authority.split(' ').count() == 2);
    }

    #[test]
    fn what_is_not_one_user_now_is_nobody() {
        let alice = |b: &mut Builder| _ = b.valid_principal("alice").unwrap();
        assert_eq!(
            of(|b| {
                alice(b);
                b.cert_type(CertType::Host).unwrap();
            }),
            Err(Unfit::Host)
        );
        assert_eq!(
            of(|b| {
                alice(b);
                b.valid_principal("bob").unwrap();
            }),
            Err(Unfit::Principals(2))
        );
        assert_eq!(of(|b| _ = b.all_principals_valid().unwrap()), Err(Unfit::Principals(0)));
        assert!(matches!(of(|b| _ = b.valid_principal("Alice").unwrap()), Err(Unfit::Name(_))));
        let option = |b: &mut Builder| _ = b.critical_option("force-command", "x").unwrap();
        assert_eq!(
            of(|b| {
                alice(b);
                option(b);
            }),
            Err(Unfit::Critical("force-command".into()))
        );
        let old = certificate(alice);
        for now in [NOW - 61, NOW + 60, u64::MAX / 4] {
            assert!(matches!(Facts::of(&old, now.cast_signed()), Err(Unfit::Time { .. })), "{now}");
        }
    }
}
