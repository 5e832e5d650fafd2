//! The roots that the mesh trusts: the CA, and a second root while one CA takes over from another. And what it takes to
//! believe a certificate that somebody shows outside of a TLS handshake.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use proto::message::RENEW_CONTEXT;
use runtime::tls::{MeshVerifier, TrustBundle};
use rustls::{SignatureScheme, server::danger::ClientCertVerifier};
use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::EndEntityCert;

use super::CaError;

/// Where further roots come from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Each `*.pem` in it is read; it need not exist.
    pub folder: PathBuf,
    /// Named files, which must exist.
    pub files: Vec<PathBuf>,
}

impl Sources {
    /// Reads all roots: the CA's certificate, then the others in the order of their paths, each once.
    ///
    /// # Errors
    /// If a file cannot be read or holds something else than certificates. A half-copied file must not shrink the
    /// bundle, so the caller keeps the old one then.
    pub fn read(&self, ca: &CertificateDer<'static>) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let mut paths = self.files.clone();
        paths.extend(pem_files(&self.folder).map_err(|e| file_error("read the folder", &self.folder, &e))?);
        let mut roots = vec![ca.clone()];
        for path in paths {
            let pem = fs::read_to_string(&path).map_err(|e| file_error("read the root", &path, &e))?;
            let found = runtime::identity::certificates(&pem).map_err(|e| file_error("use the root", &path, &e))?;
            for root in found {
                if !roots.contains(&root) {
                    roots.push(root);
                }
            }
        }
        Ok(roots)
    }

    /// As [`Sources::read`], as a bundle.
    ///
    /// # Errors
    /// As [`Sources::read`].
    pub fn bundle(&self, ca: &CertificateDer<'static>) -> Result<TrustBundle, CaError> {
        Ok(TrustBundle::from_der(self.read(ca)?)?)
    }
}

fn pem_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(e),
    };
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.retain(|p| p.extension().is_some_and(|e| e == "pem"));
    paths.sort();
    Ok(paths)
}

fn file_error(what: &'static str, path: &Path, why: &dyn std::fmt::Display) -> CaError {
    CaError::File { what, path: path.display().to_string(), why: why.to_string() }
}

/// A proof of a renewal does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// The certificate is not one of this mesh, or has ended.
    #[error("the present certificate is not good: {0}")]
    Certificate(String),
    /// The signature is not by the certificate's key.
    #[error("the request is not signed by the key of the present certificate")]
    Signature,
}

/// Verifies a leaf against the roots at a time.
///
/// # Errors
/// If it is not signed by one of them, or not alive then.
pub fn verify(roots: &[CertificateDer<'static>], leaf: &CertificateDer<'_>, now: i64) -> Result<(), ProofError> {
    let bundle = TrustBundle::from_der(roots.to_vec()).map_err(|e| ProofError::Certificate(e.to_string()))?;
    verify_by(&bundle, leaf, now)
}

fn verify_by(bundle: &TrustBundle, leaf: &CertificateDer<'_>, now: i64) -> Result<(), ProofError> {
    let time = UnixTime::since_unix_epoch(Duration::from_secs(now.try_into().unwrap_or(0)));
    MeshVerifier::of_clients(bundle.clone(), true)
        .verify_client_cert(leaf, &[], time)
        .map(|_| ())
        .map_err(|e| ProofError::Certificate(e.to_string()))
}

/// Checks that whoever holds the key of `leaf` asked for `csr`. `at` is the time at which the leaf must be alive.
///
/// # Errors
/// If the leaf is not good then, or the signature over [`RENEW_CONTEXT`] and the request is not by its key.
pub fn check_proof(
    bundle: &TrustBundle,
    leaf: &CertificateDer<'_>,
    csr: &[u8],
    signature: &[u8],
    at: i64,
) -> Result<(), ProofError> {
    verify_by(bundle, leaf, at)?;
    let end_entity = EndEntityCert::try_from(leaf).map_err(|e| ProofError::Certificate(e.to_string()))?;
    let message = [RENEW_CONTEXT, csr].concat();
    let provider = runtime::tls::provider();
    // What a key of the CSR's kinds signs with; the certificate's own key decides which of them fits.
    let schemes =
        [SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ECDSA_NISTP384_SHA384, SignatureScheme::ED25519];
    let holds = provider
        .signature_verification_algorithms
        .mapping
        .iter()
        .filter(|(scheme, _)| schemes.contains(scheme))
        .flat_map(|(_, algorithms)| *algorithms)
        .any(|algorithm| end_entity.verify_signature(*algorithm, &message, signature).is_ok());
    if holds { Ok(()) } else { Err(ProofError::Signature) }
}

#[cfg(test)]
mod tests {
    use runtime::{clock::unix_now, tls::testing::TestCa};

    use super::*;

    #[test]
    fn a_proof_is_good_for_its_key_and_its_request_only() {
        let ca = TestCa::new();
        let present = ca.issue("edge/shop-1");
        let (_, proof) = present.renewal(&[]).unwrap();
        let leaf = CertificateDer::from(proof.certificate.to_vec());
        let now = unix_now();
        let check =
            |csr: &[u8], signature: &[u8], bundle: &TrustBundle| check_proof(bundle, &leaf, csr, signature, now);
        assert_eq!(check(&proof.csr, &proof.signature, &ca.bundle()), Ok(()));
        let (_, other) = present.renewal(&[]).unwrap();
        assert_eq!(check(&other.csr, &proof.signature, &ca.bundle()), Err(ProofError::Signature));
        let (_, stranger) = ca.issue("edge/shop-2").renewal(&[]).unwrap();
        assert_eq!(check(&stranger.csr, &stranger.signature, &ca.bundle()), Err(ProofError::Signature));
        assert_eq!(check(&proof.csr, &[], &ca.bundle()), Err(ProofError::Signature));
        let foreign = check(&proof.csr, &proof.signature, &TestCa::new().bundle());
        assert!(matches!(foreign, Err(ProofError::Certificate(_))));
    }

    #[test]
    fn roots_come_from_files_and_a_folder_each_once() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (TestCa::new().bundle(), TestCa::new().bundle());
        let ca = a.certificates().remove(0);
        let sources = Sources { folder: dir.path().join("roots.d"), files: vec![] };
        assert_eq!(sources.read(&ca).unwrap().len(), 1);
        fs::create_dir(&sources.folder).unwrap();
        fs::write(sources.folder.join("b.pem"), b.to_pem() + &a.to_pem()).unwrap();
        fs::write(sources.folder.join("notes.txt"), "not a root").unwrap();
        assert_eq!(sources.read(&ca).unwrap(), [ca.clone(), b.certificates().remove(0)]);
        fs::write(sources.folder.join("c.pem"), "damaged").unwrap();
        assert!(sources.read(&ca).unwrap_err().to_string().contains("c.pem"));
    }
}
