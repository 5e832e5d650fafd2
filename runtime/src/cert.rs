//! What a certificate says: the facts that the mesh goes by.

use std::net::IpAddr;

use proto::{
    id::{GroupName, SiteName},
    identity::{Identity, InvalidIdentity},
    join::CaHash,
};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The facts of a leaf certificate. It is not verified here: that is TLS' part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertFacts {
    /// Who, by the one SPIFFE URI.
    pub identity: Identity,
    /// Hexadecimal serial number, lower case, without leading zeros.
    pub serial: String,
    /// First second of its life.
    pub not_before: i64,
    /// Last second of its life.
    pub not_after: i64,
    /// Groups of a user: the subject's organisational units.
    pub groups: Vec<GroupName>,
    /// Site of an edge: the subject's organisation.
    pub site: Option<SiteName>,
}

/// A certificate is not one of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertError {
    /// Not X.509.
    #[error("not an X.509 certificate: {0}")]
    Malformed(String),
    /// No SPIFFE ID, or more than one.
    #[error("the certificate has {0} SPIFFE IDs; a certificate of the mesh has exactly one")]
    SpiffeIds(usize),
    /// A SPIFFE ID that names nobody.
    #[error("the certificate's SPIFFE ID is wrong: {0}")]
    Identity(#[from] InvalidIdentity),
    /// A group or a site with an impossible name.
    #[error("the certificate's subject is wrong: {0}")]
    Subject(String),
}

impl CertFacts {
    /// Reads the facts of a leaf in DER.
    ///
    /// # Errors
    /// If it is not a certificate of a mesh.
    pub fn from_der(der: &[u8]) -> Result<Self, CertError> {
        let cert = parse(der)?;
        let san = cert.subject_alternative_name().map_err(|e| CertError::Malformed(e.to_string()))?;
        let names = san.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
        let mut uris = names.iter().filter_map(|name| {
            let GeneralName::URI(uri) = name else { return None };
            uri.starts_with("spiffe:").then_some(*uri)
        });
        let (first, others) = (uris.next(), uris.count());
        let identity = match first {
            Some(uri) if others == 0 => uri.parse()?,
            Some(_) => return Err(CertError::SpiffeIds(others + 1)),
            None => return Err(CertError::SpiffeIds(0)),
        };
        let subject = |e: &dyn std::fmt::Display| CertError::Subject(e.to_string());
        let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            attribute.as_str().map(str::to_owned).map_err(|e| subject(&e))
        };
        // rcgen's names hold one value per kind, so control writes all groups into one unit, with spaces between.
        let units = cert.subject().iter_organizational_unit().map(text).collect::<Result<Vec<_>, _>>()?;
        let groups = units
            .iter()
            .flat_map(|unit| unit.split(' '))
            .map(|group| group.parse().map_err(|e| subject(&e)))
            .collect::<Result<_, _>>()?;
        let site = match cert.subject().iter_organization().next() {
            Some(o) => Some(text(o)?.parse().map_err(|e| subject(&e))?),
            None => None,
        };
        Ok(Self {
            identity,
            serial: serial_hex(cert.raw_serial()),
            not_before: cert.validity().not_before.timestamp(),
            not_after: cert.validity().not_after.timestamp(),
            groups,
            site,
        })
    }

    /// When to ask for the next certificate: at 2/3 of its life.
    #[must_use]
    pub const fn renew_at(&self) -> i64 {
        self.not_before + (self.not_after - self.not_before) / 3 * 2
    }
}

/// The hash of a CA certificate's public key, as join lines carry it.
///
/// # Errors
/// If it is not a certificate.
pub fn ca_hash(der: &[u8]) -> Result<CaHash, CertError> {
    Ok(CaHash(Sha256::digest(parse(der)?.public_key().raw).into()))
}

/// The names in a certificate of whatever CA: common names of its subject, and DNS, URI, mail and IP names.
///
/// # Errors
/// If it is not a certificate.
pub fn names(der: &[u8]) -> Result<Vec<String>, CertError> {
    let cert = parse(der)?;
    let common = cert.subject().iter_common_name().filter_map(|name| name.as_str().ok()).map(str::to_owned);
    let mut names: Vec<String> = common.collect();
    let san = cert.subject_alternative_name().map_err(|e| CertError::Malformed(e.to_string()))?;
    for name in san.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default() {
        match name {
            GeneralName::DNSName(text) | GeneralName::URI(text) | GeneralName::RFC822Name(text) => {
                names.push((*text).to_owned());
            }
            GeneralName::IPAddress(bytes) => match (<[u8; 4]>::try_from(*bytes), <[u8; 16]>::try_from(*bytes)) {
                (Ok(v4), _) => names.push(IpAddr::from(v4).to_string()),
                (_, Ok(v6)) => names.push(IpAddr::from(v6).to_string()),
                (Err(_), Err(_)) => {}
            },
            GeneralName::OtherName(..)
            | GeneralName::X400Address(_)
            | GeneralName::DirectoryName(_)
            | GeneralName::EDIPartyName(_)
            | GeneralName::RegisteredID(_)
            | GeneralName::Invalid(..) => {}
        }
    }
    Ok(names)
}

/// A serial number as text.
#[must_use]
pub fn serial_hex(raw: &[u8]) -> String {
    let hex: String = raw.iter().map(|b| format!("{b:02x}")).collect();
    let trimmed = hex.trim_start_matches('0');
    if trimmed.is_empty() { "0".to_owned() } else { trimmed.to_owned() }
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, CertError> {
    match X509Certificate::from_der(der) {
        Ok(([], cert)) => Ok(cert),
        Ok(_) => Err(CertError::Malformed("bytes behind its end".into())),
        Err(e) => Err(CertError::Malformed(e.to_string())),
    }
}

/// Whether a certificate is for the public key (the raw bits of its SubjectPublicKeyInfo).
///
/// # Errors
/// If it is not a certificate.
pub fn is_for_key(der: &[u8], public_key: &[u8]) -> Result<bool, CertError> {
    Ok(&*parse(der)?.public_key().subject_public_key.data == public_key)
}
