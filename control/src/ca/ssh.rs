//! The authority for SSH: one key that signs certificates of users, and one that signs certificates of shards' host keys.
//!
//! Both are Ed25519 and lie beside the key of the CA, as OpenSSH writes private keys. Whoever may make the CA makes them
//! too; where the CA was given, they must be given as well, and without them there are no SSH certificates.

use std::{fmt, fs, io, path::Path};

use proto::{
    id::{EdgeId, GroupName},
    ssh::{GROUPS_EXTENSION, MAX_LINE},
};
use ssh_key::{
    Algorithm, HashAlg, LineEnding, PrivateKey, PublicKey,
    certificate::{Builder, CertType},
    private::Ed25519Keypair,
    public::KeyData,
};

use super::{BACKDATED, CaError};

/// The key for users' certificates, beside the CA's key; mode 0600.
pub const USER_CA: &str = "ssh-user-ca";
/// The key for hosts' certificates.
pub const HOST_CA: &str = "ssh-host-ca";
/// Behind those names: public keys that count as well, one on each line, while a key is being replaced.
pub const OTHERS: &str = ".others";
/// Shortest RSA key that is taken, in bits.
const MIN_RSA: u32 = 2048;

/// A line is no public key that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// It is too long.
    #[error("the public key is longer than {MAX_LINE} bytes; a line as in id_ed25519.pub is what is wanted")]
    TooLong,
    /// It is not one line of OpenSSH's.
    #[error(
        "this is no public key of OpenSSH ({0}); a line as in id_ed25519.pub is what is wanted, beginning with \
         ssh-ed25519 or the like, and never the private key"
    )]
    Unreadable(String),
    /// It is of a kind that is not safe, or not known.
    #[error("keys of the kind {0} are not taken; make one with 'ssh-keygen -t ed25519'")]
    Kind(String),
    /// It is RSA, and short.
    #[error(
        "an RSA key of {0} bits is too short, at least {MIN_RSA} are needed; 'ssh-keygen -t ed25519' makes a good key"
    )]
    Short(u32),
}

/// A public key that somebody showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserKey {
    key: KeyData,
    /// What its owner calls it, as far as it can be printed.
    pub comment: String,
}

impl UserKey {
    /// Reads a line as in a file that ends in `.pub`.
    ///
    /// # Errors
    /// If it is none, or of a kind that is not taken.
    pub fn parse(line: &str) -> Result<Self, InvalidKey> {
        if line.len() > MAX_LINE {
            return Err(InvalidKey::TooLong);
        }
        let key = PublicKey::from_openssh(line.trim()).map_err(|e| InvalidKey::Unreadable(e.to_string()))?;
        let comment: String = key.comment().as_str_lossy().chars().filter(|c| !c.is_control()).take(128).collect();
        let key = key.key_data().clone();
        if let Some(bits) = key.rsa().map(|rsa| rsa.key_size()) {
            return if bits < MIN_RSA { Err(InvalidKey::Short(bits)) } else { Ok(Self { key, comment }) };
        }
        let good = matches!(
            key.algorithm(),
            Algorithm::Ed25519 | Algorithm::Ecdsa { .. } | Algorithm::SkEd25519 | Algorithm::SkEcdsaSha2NistP256
        );
        if !good {
            return Err(InvalidKey::Kind(key.algorithm().to_string()));
        }
        Ok(Self { key, comment })
    }

    /// Algorithm and base64, without a comment.
    ///
    /// # Errors
    /// Never, since it was read.
    pub fn line(&self) -> Result<String, InvalidKey> {
        line(&self.key).map_err(|e| InvalidKey::Unreadable(e.to_string()))
    }

    /// As OpenSSH prints it: `SHA256:…`.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        self.key.fingerprint(HashAlg::Sha256).to_string()
    }

    /// Hexadecimal digits of its SHA-256, half of them: 128 bits.
    #[must_use]
    pub fn id(&self) -> String {
        let digest = self.key.fingerprint(HashAlg::Sha256);
        digest.as_bytes().iter().take(16).map(|b| format!("{b:02x}")).collect()
    }
}

fn line(key: &KeyData) -> Result<String, ssh_key::Error> {
    Ok(PublicKey::new(key.clone(), "").to_openssh()?.trim_end().to_owned())
}

/// A certificate that was signed.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The line, as in a file that ends in `-cert.pub`.
    pub line: String,
    /// Its serial number, never 0.
    pub serial: u64,
    /// First second of its life.
    pub not_before: i64,
    /// Last second of its life.
    pub not_after: i64,
}

/// From when to when a certificate holds, in seconds since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// Now.
    pub now: i64,
    /// For so long.
    pub ttl: i64,
}

/// The authority.
pub struct SshCa {
    user: PrivateKey,
    host: PrivateKey,
    users: Vec<String>,
    hosts: Vec<String>,
}

impl fmt::Debug for SshCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SshCa({:?}, {:?})", self.users, self.hosts)
    }
}

impl SshCa {
    /// Takes the keys of this folder. If there are none, makes them if it may; `None` if it may not.
    ///
    /// # Errors
    /// If a file cannot be read or written, or holds something else.
    pub fn open(folder: &Path, make: bool) -> Result<Option<Self>, CaError> {
        let (user, host) = (folder.join(USER_CA), folder.join(HOST_CA));
        if make {
            make_at(&user)?;
            make_at(&host)?;
        } else if !user.exists() && !host.exists() {
            return Ok(None);
        }
        let (user_key, host_key) = (read(&user)?, read(&host)?);
        if user_key.public_key() == host_key.public_key() {
            let why = "both SSH authorities are one key; a host could then pass for a user".into();
            return Err(CaError::Unusable(why));
        }
        let users = public(&user, &user_key)?;
        let hosts = public(&host, &host_key)?;
        Ok(Some(Self { user: user_key, host: host_key, users, hosts }))
    }

    /// The public keys that sign certificates of users, as lines.
    #[must_use]
    pub fn users(&self) -> &[String] {
        &self.users
    }

    /// The public keys that sign certificates of hosts, as lines.
    #[must_use]
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// Signs a key of a user.
    ///
    /// # Errors
    /// If it cannot be signed.
    pub fn sign_user(&self, key: &UserKey, name: &EdgeId, groups: &[GroupName], life: Life) -> Result<Signed, CaError> {
        let groups: Vec<_> = groups.iter().map(GroupName::as_str).collect();
        let extensions = [(GROUPS_EXTENSION, groups.join(" ")), ("permit-port-forwarding", String::new())];
        let principals = [name.to_string()];
        let of = Holder { kind: CertType::User, id: format!("user/{name}"), principals: &principals };
        sign(&self.user, key, &of, &extensions, life)
    }

    /// Signs the host key of a shard, for these names.
    ///
    /// # Errors
    /// If it cannot be signed.
    pub fn sign_host(&self, key: &UserKey, name: &EdgeId, names: &[String], life: Life) -> Result<Signed, CaError> {
        let of = Holder { kind: CertType::Host, id: format!("shard/{name}"), principals: names };
        sign(&self.host, key, &of, &[], life)
    }
}

struct Holder<'a> {
    kind: CertType,
    id: String,
    principals: &'a [String],
}

fn sign(
    with: &PrivateKey,
    key: &UserKey,
    of: &Holder<'_>,
    extensions: &[(&str, String)],
    life: Life,
) -> Result<Signed, CaError> {
    let unusable = |e: ssh_key::Error| CaError::Unusable(format!("an SSH certificate cannot be signed: {e}"));
    let back = i64::try_from(BACKDATED.as_secs()).unwrap_or(0).min(life.ttl / 4);
    let (from, to) = (life.now.saturating_sub(back), life.now.saturating_add(life.ttl));
    let seconds = |unix: i64| u64::try_from(unix).unwrap_or(0);
    let nonce: [u8; 32] = rand::random();
    let serial = rand::random::<u64>().max(1);
    let mut builder = Builder::new(nonce, key.key.clone(), seconds(from), seconds(to)).map_err(unusable)?;
    builder.serial(serial).map_err(unusable)?;
    builder.cert_type(of.kind).map_err(unusable)?;
    builder.key_id(of.id.as_str()).map_err(unusable)?;
    for principal in of.principals {
        builder.valid_principal(principal.as_str()).map_err(unusable)?;
    }
    for (name, value) in extensions {
        builder.extension(*name, value.as_str()).map_err(unusable)?;
    }
    builder.comment(of.id.as_str()).map_err(unusable)?;
    let certificate = builder.sign(with).map_err(unusable)?;
    Ok(Signed { line: certificate.to_openssh().map_err(unusable)?, serial, not_before: from, not_after: to - 1 })
}

fn make_at(path: &Path) -> Result<(), CaError> {
    if path.exists() {
        return Ok(());
    }
    let key = PrivateKey::from(Ed25519Keypair::from_seed(&rand::random()));
    let unusable = |e: ssh_key::Error| CaError::Unusable(format!("an SSH key cannot be made: {e}"));
    let text = key.to_openssh(LineEnding::LF).map_err(unusable)?;
    runtime::identity::write_atomically(path, text.as_bytes()).map_err(|e| file("write", path, &e))?;
    tracing::info!(path = %path.display(), "made a key that signs SSH certificates; back it up with the CA's");
    Ok(())
}

fn read(path: &Path) -> Result<PrivateKey, CaError> {
    let text = fs::read_to_string(path).map_err(|e| file("read", path, &e))?;
    let wrong = |why: String| file("use", path, &io::Error::other(why));
    let key = PrivateKey::from_openssh(&text).map_err(|e| wrong(format!("it is no private key of OpenSSH: {e}")))?;
    if key.is_encrypted() || key.algorithm() != Algorithm::Ed25519 {
        let how = "it must be Ed25519 and without a passphrase: ssh-keygen -t ed25519 -N '' -f FILE";
        return Err(wrong(how.into()));
    }
    Ok(key)
}

/// The key's own line, and those of the file beside it.
fn public(path: &Path, key: &PrivateKey) -> Result<Vec<String>, CaError> {
    let mut others = path.as_os_str().to_owned();
    others.push(OTHERS);
    let others = Path::new(&others);
    let wrong = |why: String| file("use", others, &io::Error::other(why));
    let mut lines = vec![line(key.public_key().key_data()).map_err(|e| wrong(e.to_string()))?];
    let text = match fs::read_to_string(others) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(lines),
        Err(e) => return Err(file("read", others, &e)),
    };
    for text in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        lines.push(UserKey::parse(text).and_then(|key| key.line()).map_err(|e| wrong(e.to_string()))?);
    }
    Ok(lines)
}

fn file(what: &'static str, path: &Path, why: &io::Error) -> CaError {
    CaError::File { what, path: path.display().to_string(), why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use ssh_key::Certificate;

    use super::*;

    const NOW: i64 = 1_800_000_000;
    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti alice@laptop";

    #[test]
    fn lines_that_are_keys_and_lines_that_are_not() {
        let key = UserKey::parse(&format!("  {KEY}\n")).unwrap();
        assert_eq!((key.comment.as_str(), key.line().unwrap().split(' ').count()), ("alice@laptop", 2));
        assert!(key.fingerprint().starts_with("SHA256:") && key.id().len() == 32);
        assert_eq!(UserKey::parse(&key.line().unwrap()).unwrap().id(), key.id());
        let why = |line: &str| UserKey::parse(line).unwrap_err().to_string();
        assert!(why("").contains("no public key") && why("ssh-ed25519 AAAA").contains("no public key"));
        assert!(why("-----BEGIN OPENSSH PRIVATE KEY-----").contains("never the private key"));
        assert!(why(&"x".repeat(MAX_LINE + 1)).contains("longer than"));
        // Two keys in one line would be one for us and another one for somebody else.
        assert!(UserKey::parse(&format!("{KEY}\n{KEY}")).is_err() || !key.line().unwrap().contains('\n'));
    }

    #[test]
    fn the_first_start_makes_both_keys_and_the_second_finds_them() {
        let dir = tempfile::tempdir().unwrap();
        assert!(SshCa::open(dir.path(), false).unwrap().is_none());
        let first = SshCa::open(dir.path(), true).unwrap().unwrap();
        assert_eq!(fs::metadata(dir.path().join(USER_CA)).unwrap().permissions().mode() & 0o777, 0o600);
        let second = SshCa::open(dir.path(), false).unwrap().unwrap();
        assert_eq!((first.users(), first.hosts()), (second.users(), second.hosts()));
        fs::write(dir.path().join("ssh-user-ca.others"), format!("# the last one\n{KEY}\n")).unwrap();
        let third = SshCa::open(dir.path(), false).unwrap().unwrap();
        assert_eq!((third.users().len(), third.users()[0].as_str()), (2, first.users()[0].as_str()));
        fs::copy(dir.path().join(USER_CA), dir.path().join(HOST_CA)).unwrap();
        assert!(SshCa::open(dir.path(), false).unwrap_err().to_string().contains("one key"));
        fs::remove_file(dir.path().join(HOST_CA)).unwrap();
        assert!(SshCa::open(dir.path(), false).unwrap_err().to_string().contains("ssh-host-ca"));
    }

    #[test]
    fn certificates_say_who_and_for_how_long() {
        let dir = tempfile::tempdir().unwrap();
        let ca = SshCa::open(dir.path(), true).unwrap().unwrap();
        let key = UserKey::parse(KEY).unwrap();
        let life = Life { now: NOW, ttl: 3600 };
        let groups = ["admin".parse().unwrap(), "ops".parse().unwrap()];
        let signed = ca.sign_user(&key, &"alice".parse().unwrap(), &groups, life).unwrap();
        let read = Certificate::from_openssh(&signed.line).unwrap();
        assert_eq!((read.cert_type(), read.serial(), read.key_id()), (CertType::User, signed.serial, "user/alice"));
        assert_eq!(read.valid_principals(), ["alice"]);
        assert_eq!(read.extensions().get(GROUPS_EXTENSION).map(String::as_str), Some("admin ops"));
        assert_eq!((signed.not_before, signed.not_after), (NOW - 600, NOW + 3599));
        let user = PublicKey::from_openssh(&ca.users()[0]).unwrap().fingerprint(HashAlg::Sha256);
        let host = PublicKey::from_openssh(&ca.hosts()[0]).unwrap().fingerprint(HashAlg::Sha256);
        let now = NOW.unsigned_abs();
        assert!(read.validate_at(now, [&user]).is_ok() && read.validate_at(now, [&host]).is_err());
        assert!(read.validate_at(now + 3600, [&user]).is_err(), "its end is its end");
        let names = ["shard-1".to_owned(), "192.0.2.1".to_owned()];
        let signed = ca.sign_host(&key, &"s1".parse().unwrap(), &names, life).unwrap();
        let read = Certificate::from_openssh(&signed.line).unwrap();
        assert_eq!((read.cert_type(), read.valid_principals()), (CertType::Host, &names[..]));
        assert!(read.validate_at(now, [&host]).is_ok());
    }
}
