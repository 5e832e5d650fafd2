//! A CA for tests and simulations. Control has the real one.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType, SignatureAlgorithm,
};

use super::TrustBundle;
use crate::identity::{Credentials, NodeKey};

/// A certificate authority of the trust domain `mesh.test`.
#[derive(Debug)]
pub struct TestCa {
    issuer: CertifiedIssuer<'static, KeyPair>,
    algorithm: &'static SignatureAlgorithm,
}

#[allow(clippy::missing_panics_doc, clippy::expect_used, reason = "tests want to stop where something is wrong")]
impl TestCa {
    /// An ECDSA P-256 authority, as control makes it.
    #[must_use]
    pub fn new() -> Self {
        Self::with_algorithm(&rcgen::PKCS_ECDSA_P256_SHA256)
    }

    /// An authority whose signatures are all equally long, as a simulation wants it: `rcgen::PKCS_ED25519`.
    #[must_use]
    pub fn with_algorithm(algorithm: &'static SignatureAlgorithm) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, "mesh.test CA");
        let key = KeyPair::generate_for(algorithm).expect("a key can be made");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a root can be made");
        Self { issuer, algorithm }
    }

    /// Its certificate.
    #[must_use]
    pub fn bundle(&self) -> TrustBundle {
        TrustBundle::from_der(vec![self.issuer.der().clone()]).expect("a root is a certificate")
    }

    /// Issues for `role/name`, valid from 1975 to 4096.
    #[must_use]
    pub fn issue(&self, who: &str) -> Credentials {
        self.issue_with(who, |_| ())
    }

    /// Issues with changed parameters.
    #[must_use]
    pub fn issue_with(&self, who: &str, change: impl FnOnce(&mut CertificateParams)) -> Credentials {
        let mut params = CertificateParams::default();
        let uri = format!("spiffe://mesh.test/{who}");
        params.subject_alt_names = vec![SanType::URI(uri.try_into().expect("ASCII"))];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate_for(self.algorithm).expect("a key can be made");
        let leaf = params.signed_by(&key, &self.issuer).expect("a leaf can be issued");
        Credentials::new(NodeKey::from_key_pair(key), vec![leaf.der().clone()]).expect("it fits its key")
    }

    /// Issues for `role/name` to the key of a request (PKCS#10, DER), as control does at a renewal. Returns DER.
    #[must_use]
    pub fn sign(&self, who: &str, csr: &[u8]) -> Vec<u8> {
        let mut request = CertificateSigningRequestParams::from_der(&csr.to_vec().into()).expect("a request");
        let uri = format!("spiffe://mesh.test/{who}");
        request.params.subject_alt_names = vec![SanType::URI(uri.try_into().expect("ASCII"))];
        request.params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        request.signed_by(&self.issuer).expect("a leaf can be issued").der().to_vec()
    }
}

impl Default for TestCa {
    fn default() -> Self {
        Self::new()
    }
}
