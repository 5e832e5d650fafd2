//! The certificate authority: makes itself on the first start, reads requests, issues leaves.
//!
//! Of a request only the public key is used, and a shard's host names; everything else in a certificate is what control
//! knows about its holder. Nothing here keeps a record: that is the store's part.

pub mod csr;
pub mod files;
pub mod roots;
pub mod ssh;

use std::{fmt, net::IpAddr, time::Duration};

use proto::{
    id::{GroupName, SiteName, TrustDomain},
    identity::{Identity, Role},
    join::CaHash,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use runtime::cert::{self, CertError};
use rustls_pki_types::CertificateDer;

/// How far back a certificate's life begins, so that machines whose clock is behind can use it at once. No more than a
/// quarter of its life to come, or a short one would be due for renewal when it is issued.
pub const BACKDATED: Duration = Duration::from_secs(600);
/// Life of a CA that control makes: ten years.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);

/// The authority could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file of the CA cannot be used.
    #[error("cannot {what} {path}: {why}")]
    File {
        /// The attempt.
        what: &'static str,
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
    /// Certificate and key of the CA do not work together, or the certificate is not that of a CA.
    #[error("the CA cannot be used: {0}")]
    Unusable(String),
    /// The CA's own life is over.
    #[error("the CA's certificate has ended; put a new CA in place (docs/operations.md, 'Rotating the CA')")]
    Ended,
    /// A key could not be made or did not sign.
    #[error("cryptography failed: {0}")]
    Crypto(#[from] rcgen::Error),
    /// A certificate could not be read.
    #[error(transparent)]
    Cert(#[from] CertError),
}

/// A DNS name or an address in a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostName {
    /// In lower case, without a final dot.
    Dns(String),
    /// An address.
    Ip(IpAddr),
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Ip(ip) => write!(f, "{ip}"),
        }
    }
}

impl HostName {
    /// Reads an address or a DNS name; wildcards are none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(ip) = text.parse() {
            return Some(Self::Ip(ip));
        }
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let valid = rustls_pki_types::DnsName::try_from(name.as_str()).is_ok();
        valid.then_some(Self::Dns(name))
    }

    /// Whether everybody may have it, because it means the own machine.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        match self {
            Self::Dns(name) => name == "localhost" || name.ends_with(".localhost"),
            Self::Ip(ip) => ip.is_loopback(),
        }
    }

    fn to_san(&self) -> Result<SanType, CaError> {
        Ok(match self {
            Self::Dns(name) => SanType::DnsName(name.as_str().try_into()?),
            Self::Ip(ip) => SanType::IpAddress(*ip),
        })
    }
}

/// For whom a leaf is.
#[derive(Clone, Debug)]
pub struct Holder {
    /// Who.
    pub identity: Identity,
    /// Groups of a user.
    pub groups: Vec<GroupName>,
    /// Site of an edge.
    pub site: Option<SiteName>,
    /// Host names of a shard or of control.
    pub hosts: Vec<HostName>,
}

/// A certificate that was issued.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// Hexadecimal, lower case, without leading zeros.
    pub serial: String,
    /// Whose it is.
    pub role: Role,
    /// Last second of its life.
    pub not_after: i64,
}

/// The authority.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    hash: CaHash,
    not_after: i64,
    domain: TrustDomain,
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ca({}, {})", self.domain, self.hash)
    }
}

impl Ca {
    /// Makes a new authority. Returns its certificate and its key, both PEM.
    ///
    /// # Errors
    /// If the system has no randomness to give.
    pub fn make(domain: &TrustDomain, now: i64) -> Result<(String, String), CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        // The serial number in the name keeps two CAs of one mesh apart, for people and for path building.
        let serial = random_serial();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let tail = serial.iter().take(4).map(|b| format!("{b:02x}")).collect::<String>();
        params.distinguished_name.push(DnType::CommonName, format!("{domain} CA {tail}"));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        life(&mut params, now, now.saturating_add_unsigned(CA_LIFE.as_secs()));
        Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
    }

    /// Takes an authority from PEM texts, and proves with a leaf that certificate and key work together.
    ///
    /// # Errors
    /// If they do not, or if the certificate has ended.
    pub fn from_pem(domain: &TrustDomain, certificate: &str, key: &str, now: i64) -> Result<Self, CaError> {
        let unusable = |why: &dyn fmt::Display| CaError::Unusable(why.to_string());
        let certificate = runtime::identity::certificates(certificate)?.swap_remove(0);
        let key = KeyPair::from_pem(key).map_err(|e| unusable(&format!("its key cannot be read: {e}")))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).map_err(|e| unusable(&e))?;
        if !parsed.is_ca() {
            return Err(unusable(&"its certificate is not that of a CA (basicConstraints CA:TRUE is missing)"));
        }
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(unusable(&"its key does not belong to its certificate"));
        }
        let not_after = parsed.validity().not_after.timestamp();
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        let hash = cert::ca_hash(&certificate)?;
        let ca = Self { issuer, certificate, hash, not_after, domain: domain.clone() };
        ca.prove(now)?;
        Ok(ca)
    }

    /// A given CA may have a name or extensions that leaves then do not fit to; better found at the start than by
    /// every edge.
    fn prove(&self, now: i64) -> Result<(), CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let name = "proof".parse().map_err(|e| CaError::Unusable(format!("{e}")))?;
        let identity = Identity::new(self.domain.clone(), Role::Control, name);
        let holder = Holder { identity, groups: vec![], site: None, hosts: vec![] };
        let spki = SubjectPublicKeyInfo::from_der(&key.subject_public_key_info())?;
        let leaf = self.issue(&holder, &spki, Duration::from_secs(60), now)?;
        roots::verify(std::slice::from_ref(&self.certificate), &leaf.der, now)
            .map_err(|e| CaError::Unusable(format!("certificates that it signs do not verify: {e}")))
    }

    /// Issues a certificate.
    ///
    /// # Errors
    /// If the CA itself has ended, or a name cannot stand in a certificate.
    pub fn issue(&self, holder: &Holder, key: &SubjectPublicKeyInfo, ttl: Duration, now: i64) -> Result<Leaf, CaError> {
        let not_after = now.saturating_add_unsigned(ttl.as_secs()).min(self.not_after);
        if not_after <= now {
            return Err(CaError::Ended);
        }
        let serial = random_serial();
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(holder);
        params.subject_alt_names = vec![SanType::URI(holder.identity.to_string().as_str().try_into()?)];
        for host in &holder.hosts {
            params.subject_alt_names.push(host.to_san()?);
        }
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        life(&mut params, now, not_after);
        let der = params.signed_by(key, &self.issuer)?.der().clone();
        Ok(Leaf { der, serial: cert::serial_hex(&serial), role: holder.identity.role, not_after })
    }

    /// Its certificate.
    #[must_use]
    pub const fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The hash of its public key, as join lines carry it.
    #[must_use]
    pub const fn hash(&self) -> CaHash {
        self.hash
    }

    /// Last second of its life.
    #[must_use]
    pub const fn not_after(&self) -> i64 {
        self.not_after
    }

    /// The mesh whose members it names.
    #[must_use]
    pub const fn domain(&self) -> &TrustDomain {
        &self.domain
    }
}

fn subject(holder: &Holder) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, holder.identity.name.as_str());
    if let Some(site) = &holder.site {
        name.push(DnType::OrganizationName, site.as_str());
    }
    if !holder.groups.is_empty() {
        // rcgen's names hold one value per kind; runtime::cert takes the groups apart again.
        let groups: Vec<_> = holder.groups.iter().map(GroupName::as_str).collect();
        name.push(DnType::OrganizationalUnitName, groups.join(" "));
    }
    name
}

fn life(params: &mut CertificateParams, now: i64, not_after: i64) {
    let at = |unix: i64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(unix.try_into().unwrap_or(0));
    let back = BACKDATED.as_secs().min(not_after.saturating_sub(now).unsigned_abs() / 4);
    params.not_before = at(now.saturating_sub_unsigned(back));
    params.not_after = at(not_after);
}

/// 128 random bits; a first byte of zero would make two texts of one number.
fn random_serial() -> [u8; 16] {
    let mut serial: [u8; 16] = rand::random();
    if serial[0] == 0 {
        serial[0] = 1;
    }
    serial
}

#[cfg(test)]
mod tests {
    use runtime::{cert::CertFacts, identity::NodeKey};

    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn ca() -> Ca {
        let domain = "mesh.test".parse().unwrap();
        let (certificate, key) = Ca::make(&domain, NOW).unwrap();
        Ca::from_pem(&domain, &certificate, &key, NOW).unwrap()
    }

    fn holder(uri: &str) -> Holder {
        Holder { identity: uri.parse().unwrap(), groups: vec![], site: None, hosts: vec![] }
    }

    fn key(names: &[String]) -> csr::Csr {
        csr::Csr::from_der(&NodeKey::generate().unwrap().csr(names).unwrap()).unwrap()
    }

    #[test]
    fn a_leaf_says_who_its_holder_is_and_for_how_long() {
        let ca = ca();
        let mut who = holder("spiffe://mesh.test/user/alice");
        who.groups = vec!["admin".parse().unwrap(), "ops".parse().unwrap()];
        who.site = Some("berlin".parse().unwrap());
        let leaf = ca.issue(&who, key(&[]).key(), Duration::from_secs(3600), NOW).unwrap();
        let facts = CertFacts::from_der(&leaf.der).unwrap();
        assert_eq!(facts.identity, who.identity);
        assert_eq!(facts.groups, who.groups);
        assert_eq!(facts.site, who.site);
        assert_eq!((facts.not_before, facts.not_after), (NOW - 600, NOW + 3600));
        assert_eq!(facts.serial, leaf.serial);
        let (_, x509) = x509_parser::parse_x509_certificate(&leaf.der).unwrap();
        assert!(!x509.is_ca());
        let usage = x509.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && usage.server_auth && !usage.any);
        assert!(x509.raw_serial().len() >= 16);
        let short = ca.issue(&who, key(&[]).key(), Duration::from_secs(60), NOW).unwrap();
        let facts = CertFacts::from_der(&short.der).unwrap();
        assert!(facts.renew_at() > NOW + 30, "a short life is not due for renewal at its beginning");
        roots::verify(&[ca.certificate().clone()], &leaf.der, NOW).unwrap();
    }

    #[test]
    fn a_leaf_never_outlives_its_ca() {
        let ca = ca();
        let late = ca.not_after() - 10;
        let who = holder("spiffe://mesh.test/edge/shop-1");
        assert_eq!(ca.issue(&who, key(&[]).key(), Duration::from_secs(3600), late).unwrap().not_after, ca.not_after());
        let ended = ca.issue(&who, key(&[]).key(), Duration::from_secs(3600), ca.not_after());
        assert!(matches!(ended, Err(CaError::Ended)));
    }

    #[test]
    fn a_ca_that_cannot_sign_is_refused_with_the_reason() {
        let domain: TrustDomain = "mesh.test".parse().unwrap();
        let (certificate, key) = Ca::make(&domain, NOW).unwrap();
        let (_, other) = Ca::make(&domain, NOW).unwrap();
        let why = |c: &str, k: &str, now| Ca::from_pem(&domain, c, k, now).unwrap_err().to_string();
        assert!(why(&certificate, &other, NOW).contains("does not belong"));
        assert!(why(&certificate, "nonsense", NOW).contains("key cannot be read"));
        assert!(why(&certificate, &key, NOW + 400_000_000).contains("has ended"));
        let leaf = ca().issue(&holder("spiffe://mesh.test/edge/a"), self::key(&[]).key(), BACKDATED, NOW).unwrap();
        let leaf = runtime::identity::to_pem("CERTIFICATE", &leaf.der);
        assert!(why(&leaf, &key, NOW).contains("not that of a CA"));
    }

    #[test]
    fn host_names_and_what_is_none() {
        assert_eq!(HostName::parse("A.Example.org."), Some(HostName::Dns("a.example.org".into())));
        assert!(matches!(HostName::parse("fd00::1"), Some(HostName::Ip(_))));
        for bad in ["", "*.example.org", "a b", "a..b", "ü.example.org"] {
            assert_eq!(HostName::parse(bad), None, "{bad}");
        }
        assert!(HostName::parse("127.0.0.1").unwrap().is_loopback());
    }
}
