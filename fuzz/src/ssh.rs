//! Keys and certificates of SSH clients.

use control::ca::ssh::UserKey;
use ssh_key::Certificate;

// What a shard reads in a certificate is a private part of its SSH door. It is taken as a file, so that nothing of it has
// to be made public and nothing else of a shard is built here.
#[path = "../../mesh-cloud/src/doors/ssh/who.rs"]
mod who;

use self::who::Facts;

/// When the certificates of the corpus hold.
const NOW: i64 = 1_800_000_000;

/// A line with a public key, as users hand it in.
pub fn ssh_key(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(key) = UserKey::parse(text) else { return };
    let line = key.line().expect("what was read can be written");
    assert!(!line.contains('\n') && line.split(' ').count() == 2, "{line:?} is not one line without a comment");
    let again = UserKey::parse(&line).expect("what was written can be read");
    assert_eq!((again.line(), again.id(), again.fingerprint()), (Ok(line), key.id(), key.fingerprint()));
    assert!(!key.comment.chars().any(char::is_control), "a comment that does things to terminals");
}

/// A certificate, as SSH clients show it: the bytes, or the line.
pub fn ssh_certificate(data: &[u8]) {
    let text = std::str::from_utf8(data).ok();
    let line = text.and_then(|text| Certificate::from_openssh(text.trim()).ok());
    let Some(certificate) = line.or_else(|| Certificate::from_bytes(data).ok()) else { return };
    let Ok(facts) = Facts::of(&certificate, NOW) else { return };
    assert_eq!(certificate.valid_principals(), [facts.user.to_string()]);
    assert!(certificate.critical_options().is_empty() && facts.not_after >= NOW);
    assert_eq!(facts.authority.split(' ').count(), 2);
}
