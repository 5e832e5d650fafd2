//! Requests for certificates (PKCS#10, RFC 2986), from whoever can reach control.

use rcgen::SubjectPublicKeyInfo;
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject};
use x509_parser::{
    certification_request::X509CertificationRequest,
    prelude::{FromDer, GeneralName, ParsedExtension},
};

use super::HostName;

/// Longest request that is looked at, in bytes.
const MAX_LEN: usize = 16 * 1024;
/// Most host names in one request.
const MAX_HOSTS: usize = 32;
/// Kinds of keys that are certified: P-256, P-384 and Ed25519, by the length of their encoding and their algorithm.
const ALGORITHMS: [&rcgen::SignatureAlgorithm; 3] =
    [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];

/// A request that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Not PKCS#10.
    #[error("the certificate request cannot be read: {0}")]
    Malformed(String),
    /// Longer than the bound.
    #[error("the certificate request is {0} bytes long; at most {MAX_LEN} are allowed")]
    TooLong(usize),
    /// Not signed by the key that it is for.
    #[error("the certificate request is not signed by its own key")]
    Signature,
    /// A kind of key that the mesh does not use.
    #[error("the key of the certificate request is of a kind that is not used here; use ECDSA P-256, P-384 or Ed25519")]
    Key,
    /// A name that cannot be certified.
    #[error("{0:?} in the certificate request is no DNS name or address; wildcards are not certified")]
    Host(String),
    /// More names than the bound.
    #[error("the certificate request has more than {MAX_HOSTS} names")]
    TooManyHosts,
}

/// What is used of a request: the public key, and host names for whom may have some.
#[derive(Clone, Debug)]
pub struct Csr {
    key: SubjectPublicKeyInfo,
    hosts: Vec<HostName>,
}

impl Csr {
    /// Reads a request in PEM.
    ///
    /// # Errors
    /// If it is none, or not signed by its own key.
    pub fn from_pem(pem: &str) -> Result<Self, CsrError> {
        if pem.len() > MAX_LEN {
            return Err(CsrError::TooLong(pem.len()));
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|e| CsrError::Malformed(e.to_string()))?;
        Self::from_der(&der)
    }

    /// Reads a request in DER.
    ///
    /// # Errors
    /// If it is none, or not signed by its own key.
    pub fn from_der(der: &[u8]) -> Result<Self, CsrError> {
        if der.len() > MAX_LEN {
            return Err(CsrError::TooLong(der.len()));
        }
        let csr = match X509CertificationRequest::from_der(der) {
            Ok(([], csr)) => csr,
            Ok(_) => return Err(CsrError::Malformed("bytes behind its end".into())),
            Err(e) => return Err(CsrError::Malformed(e.to_string())),
        };
        csr.verify_signature().map_err(|_| CsrError::Signature)?;
        let key = SubjectPublicKeyInfo::from_der(csr.certification_request_info.subject_pki.raw)
            .map_err(|_| CsrError::Key)?;
        if !ALGORITHMS.contains(&rcgen::PublicKeyData::algorithm(&key)) {
            return Err(CsrError::Key);
        }
        let mut hosts = Vec::new();
        for extension in csr.requested_extensions().into_iter().flatten() {
            #[allow(clippy::wildcard_enum_match_arm, reason = "a request may ask for much; only names are listened to")]
            let names = match extension {
                ParsedExtension::SubjectAlternativeName(san) => &san.general_names,
                _ => continue,
            };
            for name in names {
                hosts.extend(host(name)?);
            }
            if hosts.len() > MAX_HOSTS {
                return Err(CsrError::TooManyHosts);
            }
        }
        Ok(Self { key, hosts })
    }

    /// The public key.
    #[must_use]
    pub const fn key(&self) -> &SubjectPublicKeyInfo {
        &self.key
    }

    /// Takes the host names out.
    #[must_use]
    pub fn into_hosts(self) -> Vec<HostName> {
        self.hosts
    }

    /// The host names that are asked for.
    #[must_use]
    pub fn hosts(&self) -> &[HostName] {
        &self.hosts
    }
}

#[allow(clippy::wildcard_enum_match_arm, reason = "names of other kinds are not for the requester to choose")]
fn host(name: &GeneralName<'_>) -> Result<Option<HostName>, CsrError> {
    match name {
        GeneralName::DNSName(dns) => match HostName::parse(dns) {
            Some(host) => Ok(Some(host)),
            None => Err(CsrError::Host(dns.chars().take(80).collect())),
        },
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(|b| HostName::Ip(b.into()));
            let ip = v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(|b| HostName::Ip(b.into())));
            ip.map(Some).map_err(|_| CsrError::Host(format!("an address of {} bytes", bytes.len())))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};
    use runtime::identity::NodeKey;

    use super::*;

    #[test]
    fn a_request_gives_its_key_and_its_names_and_nothing_else() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["a.example.org".into(), "10.0.0.1".into()]).unwrap();
        params.subject_alt_names.push(SanType::URI("spiffe://mesh.test/user/admin".try_into().unwrap()));
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let csr = Csr::from_pem(&params.serialize_request(&key).unwrap().pem().unwrap()).unwrap();
        let hosts: Vec<_> = csr.hosts().iter().map(ToString::to_string).collect();
        assert_eq!(hosts, ["a.example.org", "10.0.0.1"]);
    }

    #[test]
    fn a_request_that_another_key_signed_is_refused() {
        let mut der = NodeKey::generate().unwrap().csr(&[]).unwrap().to_vec();
        let last = der.len() - 1;
        der[last] ^= 1;
        assert!(matches!(Csr::from_der(&der), Err(CsrError::Signature | CsrError::Malformed(_))));
    }

    #[test]
    fn no_bytes_are_too_strange() {
        let good = NodeKey::generate().unwrap().csr(&["a.b".into()]).unwrap();
        for end in 0..good.len() {
            assert!(Csr::from_der(&good[..end]).is_err());
        }
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] = bad[at].wrapping_add(1);
            let _ = Csr::from_der(&bad);
        }
        assert!(matches!(Csr::from_der(&vec![0; MAX_LEN + 1]), Err(CsrError::TooLong(_))));
        assert!(matches!(Csr::from_pem("hello"), Err(CsrError::Malformed(_))));
        let wild = NodeKey::generate().unwrap().csr(&["*.example.org".into()]).unwrap();
        assert!(matches!(Csr::from_der(&wild), Err(CsrError::Host(_))));
    }
}
