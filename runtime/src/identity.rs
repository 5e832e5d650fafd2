//! Who this process is: its key, its certificate, and the folder where both live.
//!
//! The key is made here and never leaves the machine. It lies in one file with the certificate, so that a renewal
//! replaces both in one rename and a power cut never leaves a key without its certificate.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use proto::message::{RENEW_CONTEXT, Renew, Renewal};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SigningKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};

use crate::{
    cert::{CertError, CertFacts},
    tls::TrustBundle,
};

/// An identity could not be made, read or kept.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file could not be read or written.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// The attempt.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file holds something else than it should.
    #[error("{path} holds no usable identity ({why}); remove it and enrol again with a new join line")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The key could not be made or used.
    #[error("the private key cannot be used: {0}")]
    Key(#[from] rcgen::Error),
    /// The certificate is not one of a mesh.
    #[error(transparent)]
    Cert(#[from] CertError),
    /// The certificate is for another key.
    #[error("the certificate that was issued is not for the key of this machine")]
    OtherKey,
}

/// A private key of a node: ECDSA P-256.
#[derive(Debug)]
pub struct NodeKey(KeyPair);

impl NodeKey {
    /// Makes a new key.
    ///
    /// # Errors
    /// If the system has no randomness to give.
    pub fn generate() -> Result<Self, IdentityError> {
        Ok(Self(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?))
    }

    /// Takes a key that was made elsewhere, as simulations do.
    #[must_use]
    pub const fn from_key_pair(key: KeyPair) -> Self {
        Self(key)
    }

    /// Reads a PKCS#8 key.
    ///
    /// # Errors
    /// If it is none.
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        Ok(Self(KeyPair::from_pem(pem)?))
    }

    /// A request for a certificate (PKCS#10, DER). `names` are DNS names and addresses, which only shards need.
    ///
    /// # Errors
    /// If a name cannot stand in a certificate.
    pub fn csr(&self, names: &[String]) -> Result<Bytes, IdentityError> {
        let request = CertificateParams::new(names)?.serialize_request(&self.0)?;
        Ok(Bytes::copy_from_slice(request.der()))
    }

    /// The same in PEM.
    ///
    /// # Errors
    /// If a name cannot stand in a certificate.
    pub fn csr_pem(&self, names: &[String]) -> Result<String, IdentityError> {
        Ok(CertificateParams::new(names)?.serialize_request(&self.0)?.pem()?)
    }

    /// The key in PKCS#8 PEM. It is a secret.
    #[must_use]
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    fn private_der(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.0.serialize_der()).into()
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IdentityError> {
        Ok(self.0.sign(message)?)
    }
}

/// A key and the certificate that belongs to it.
#[derive(Debug)]
pub struct Credentials {
    key: NodeKey,
    chain: Vec<CertificateDer<'static>>,
    facts: CertFacts,
}

impl Credentials {
    /// Puts both together.
    ///
    /// # Errors
    /// If the chain is empty or not of a mesh, or if the leaf is for another key.
    pub fn new(key: NodeKey, chain: Vec<CertificateDer<'static>>) -> Result<Self, IdentityError> {
        let leaf = chain.first().ok_or_else(|| CertError::Malformed("an empty chain".into()))?;
        let facts = CertFacts::from_der(leaf)?;
        if !crate::cert::is_for_key(leaf, key.0.public_key_raw())? {
            return Err(IdentityError::OtherKey);
        }
        Ok(Self { key, chain, facts })
    }

    /// From PEM texts.
    ///
    /// # Errors
    /// As [`Credentials::new`], or if the texts are not PEM.
    pub fn from_pem(key: &str, chain: &str) -> Result<Self, IdentityError> {
        Self::new(NodeKey::from_pem(key)?, certificates(chain)?)
    }

    /// What the leaf says.
    #[must_use]
    pub const fn facts(&self) -> &CertFacts {
        &self.facts
    }

    /// The chain, leaf first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The key in the form that rustls takes.
    #[must_use]
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        self.key.private_der()
    }

    /// Asks for the next certificate, for a key that is made here and returned.
    ///
    /// # Errors
    /// If the key cannot be made or used.
    pub fn renewal(&self, names: &[String]) -> Result<(NodeKey, Renew), IdentityError> {
        let next = NodeKey::generate()?;
        let csr = next.csr(names)?;
        let signature = self.key.sign(&[RENEW_CONTEXT, &csr].concat())?.into();
        let certificate = Bytes::copy_from_slice(&self.chain[0]);
        Ok((next, Renew { csr, certificate, signature }))
    }

    fn to_pem(&self) -> String {
        let mut pem = self.key.to_pem();
        for cert in &self.chain {
            pem.push_str(&to_pem("CERTIFICATE", cert));
        }
        pem
    }
}

/// Takes over what a shard passed on from control.
///
/// # Errors
/// As [`Credentials::new`], or if a root is no certificate.
pub fn renewed(key: NodeKey, renewal: &Renewal) -> Result<(Credentials, TrustBundle), IdentityError> {
    let der = |list: &[Bytes]| list.iter().map(|c| CertificateDer::from(c.to_vec())).collect::<Vec<_>>();
    Ok((Credentials::new(key, der(&renewal.chain))?, TrustBundle::from_der(der(&renewal.roots))?))
}

/// All certificates of a PEM text.
///
/// # Errors
/// If it has a damaged one, or none.
pub fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, CertError> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| CertError::Malformed(e.to_string()))?;
    if all.is_empty() { Err(CertError::Malformed("no certificate in the PEM text".into())) } else { Ok(all) }
}

/// DER as PEM.
#[must_use]
pub fn to_pem(label: &str, der: &[u8]) -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let body = BASE64_STANDARD.encode(der);
    let lines: Vec<_> = body.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// The folder of an identity: `identity.pem` (key and chain, mode 0600), `bundle.pem` (the roots), and small notes such
/// as where control is.
#[derive(Clone, Debug)]
pub struct IdentityDir(PathBuf);

impl IdentityDir {
    /// Opens the folder, and makes it with mode 0700 if it is not there.
    ///
    /// # Errors
    /// If it can be neither found nor made.
    pub fn open(path: &Path) -> Result<Self, IdentityError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| IdentityError::File {
            what: "make",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self(path.to_owned()))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What was kept; `None` before the first enrolment.
    ///
    /// # Errors
    /// If files are there and cannot be used.
    pub fn load(&self) -> Result<Option<(Credentials, TrustBundle)>, IdentityError> {
        let Some(identity) = self.read("identity.pem")? else { return Ok(None) };
        let bundle = self.read("bundle.pem")?.unwrap_or_default();
        let damaged = |file: &str, why: &dyn std::fmt::Display| IdentityError::Damaged {
            path: self.0.join(file),
            why: why.to_string(),
        };
        let credentials = Credentials::from_pem(&identity, &identity).map_err(|e| damaged("identity.pem", &e))?;
        let bundle = TrustBundle::from_pem(&bundle).map_err(|e| damaged("bundle.pem", &e))?;
        Ok(Some((credentials, bundle)))
    }

    /// Keeps an identity.
    ///
    /// # Errors
    /// If a file cannot be written; then the old one is untouched.
    pub fn store(&self, credentials: &Credentials, bundle: &TrustBundle) -> Result<(), IdentityError> {
        self.write("bundle.pem", &bundle.to_pem())?;
        self.write("identity.pem", &credentials.to_pem())
    }

    /// Reads a note; `None` if there is none.
    ///
    /// # Errors
    /// If it is there and cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<String>, IdentityError> {
        let path = self.0.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(IdentityError::File { what: "read", path, source }),
        }
    }

    /// Writes a note.
    ///
    /// # Errors
    /// If it cannot be written; then the old one is untouched.
    pub fn write(&self, name: &str, text: &str) -> Result<(), IdentityError> {
        let path = self.0.join(name);
        write_atomically(&path, text.as_bytes()).map_err(|source| IdentityError::File { what: "write", path, source })
    }
}

/// Replaces a file in one step, with mode 0600: whoever reads it, even after a power cut, sees the old or the new text.
///
/// # Errors
/// If the folder or the disk does not allow it.
pub fn write_atomically(path: &Path, text: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let draft = PathBuf::from(draft);
    match fs::remove_file(&draft) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::tls::testing::TestCa;

    #[test]
    fn an_identity_is_kept_for_its_owner_alone_and_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let dir = IdentityDir::open(&folder.path().join("edge")).unwrap();
        assert!(dir.load().unwrap().is_none());
        let ca = TestCa::new();
        dir.store(&ca.issue("edge/shop-1"), &ca.bundle()).unwrap();
        let (credentials, _) = dir.load().unwrap().unwrap();
        assert_eq!(credentials.facts().identity.to_string(), "spiffe://mesh.test/edge/shop-1");
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode("identity.pem"), 0o600);
        assert_eq!(mode("."), 0o700);
    }

    #[test]
    fn a_damaged_identity_is_named_with_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let dir = IdentityDir::open(folder.path()).unwrap();
        dir.write("identity.pem", "-----BEGIN nonsense").unwrap();
        let error = dir.load().unwrap_err().to_string();
        assert!(error.contains("identity.pem holds no usable identity"), "{error}");
        assert!(error.contains("enrol again"), "{error}");
    }

    #[test]
    fn a_certificate_for_another_key_is_refused() {
        let issued = TestCa::new().issue("edge/shop-1");
        let other = NodeKey::generate().unwrap();
        assert!(matches!(Credentials::new(other, issued.chain), Err(IdentityError::OtherKey)));
    }
}
