//! TLS 1.3 as every connection of the mesh uses it: both sides show a certificate of the mesh's CA, and who they are
//! is the SPIFFE ID in it. Host names play no part, except for browsers and tools that talk to an API or a door.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::RwLock;
use proto::{id::EdgeId, identity::Role, join::CaHash};
use rustls::{
    CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::{
    cert::{self, CertError, CertFacts},
    identity::{self, Credentials, IdentityError},
};

/// The cryptography of the mesh: aws-lc-rs with X25519MLKEM768 preferred, and AES-128 with SHA-256, for which processors
/// have instructions where they have none for SHA-384.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// The roots that are trusted now. Clones share them, so that a rotation reaches every listener and dialer at once.
#[derive(Clone)]
pub struct TrustBundle(Arc<RwLock<Roots>>);

struct Roots {
    certificates: Vec<CertificateDer<'static>>,
    anchors: Arc<Vec<TrustAnchor<'static>>>,
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustBundle({} roots)", self.0.read().certificates.len())
    }
}

impl TrustBundle {
    /// From CA certificates.
    ///
    /// # Errors
    /// If one is no certificate, or if there is none.
    pub fn from_der(certificates: Vec<CertificateDer<'static>>) -> Result<Self, CertError> {
        Ok(Self(Arc::new(RwLock::new(Roots::new(certificates)?))))
    }

    /// From a PEM text of one or more CA certificates.
    ///
    /// # Errors
    /// As [`TrustBundle::from_der`], or if it is not PEM.
    pub fn from_pem(pem: &str) -> Result<Self, CertError> {
        Self::from_der(identity::certificates(pem)?)
    }

    /// As PEM.
    #[must_use]
    pub fn to_pem(&self) -> String {
        self.0.read().certificates.iter().map(|c| identity::to_pem("CERTIFICATE", c)).collect()
    }

    /// The CA certificates.
    #[must_use]
    pub fn certificates(&self) -> Vec<CertificateDer<'static>> {
        self.0.read().certificates.clone()
    }

    /// Trusts what another bundle trusts, from the next handshake on. Returns whether that is a change.
    pub fn replace(&self, other: &Self) -> bool {
        if Arc::ptr_eq(&self.0, &other.0) {
            return false;
        }
        let (certificates, anchors) = {
            let other = other.0.read();
            (other.certificates.clone(), Arc::clone(&other.anchors))
        };
        let mut mine = self.0.write();
        let changed = mine.certificates != certificates;
        *mine = Roots { certificates, anchors };
        changed
    }

    /// Checks that these roots vouch for a certificate which this process is about to show. A clock that stands before
    /// the certificate's first second does not matter.
    ///
    /// # Errors
    /// If the chain leads to none of the roots, or has ended.
    pub fn vouches_for(&self, credentials: &Credentials) -> Result<(), Error> {
        let [leaf, intermediates @ ..] = credentials.chain() else { return Err(Error::NoCertificatesPresented) };
        let now = Duration::from_secs(crate::clock::unix_now().try_into().unwrap_or(0));
        MeshVerifier::of_clients(self.clone(), true)
            .knowing_that(credentials.facts().not_before)
            .verify(leaf, intermediates, UnixTime::since_unix_epoch(now), KeyUsage::client_auth())
            .map(drop)
    }

    fn anchors(&self) -> Arc<Vec<TrustAnchor<'static>>> {
        Arc::clone(&self.0.read().anchors)
    }
}

impl Roots {
    fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, CertError> {
        if certificates.is_empty() {
            return Err(CertError::Malformed("a trust bundle without a certificate".into()));
        }
        let anchors = certificates
            .iter()
            .map(|c| webpki::anchor_from_trusted_cert(c).map(|a| a.to_owned()))
            .collect::<Result<_, _>>()
            .map_err(|e| CertError::Malformed(e.to_string()))?;
        Ok(Self { certificates, anchors: Arc::new(anchors) })
    }
}

/// The identity that is shown in handshakes, replaceable while connections live.
#[derive(Clone)]
pub struct LiveIdentity(Arc<RwLock<Shown>>);

#[derive(Clone)]
struct Shown {
    key: Arc<CertifiedKey>,
    facts: Arc<CertFacts>,
}

impl fmt::Debug for LiveIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LiveIdentity({})", self.facts().identity)
    }
}

impl LiveIdentity {
    /// Shows these credentials from now on.
    ///
    /// # Errors
    /// If the key is of a kind that TLS cannot use.
    pub fn new(credentials: &Credentials) -> Result<Self, Error> {
        Ok(Self(Arc::new(RwLock::new(Shown::new(credentials)?))))
    }

    /// Shows other credentials from the next handshake on.
    ///
    /// # Errors
    /// If the key is of a kind that TLS cannot use; then nothing changes.
    pub fn replace(&self, credentials: &Credentials) -> Result<(), Error> {
        let shown = Shown::new(credentials)?;
        *self.0.write() = shown;
        Ok(())
    }

    /// What the shown certificate says.
    #[must_use]
    pub fn facts(&self) -> Arc<CertFacts> {
        Arc::clone(&self.0.read().facts)
    }

    fn key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().key)
    }
}

impl Shown {
    fn new(credentials: &Credentials) -> Result<Self, Error> {
        let key = aws_lc_rs::sign::any_supported_type(&credentials.private_key())?;
        Ok(Self {
            key: Arc::new(CertifiedKey::new(credentials.chain().to_vec(), key)),
            facts: Arc::new(credentials.facts().clone()),
        })
    }
}

impl rustls::server::ResolvesServerCert for LiveIdentity {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.key())
    }
}

impl rustls::client::ResolvesClientCert for LiveIdentity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.key())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Verifies the other side by the mesh's CA and by its SPIFFE ID.
#[derive(Debug)]
pub struct MeshVerifier {
    bundle: TrustBundle,
    server_role: Role,
    server_name: Option<EdgeId>,
    not_before: Duration,
    any_time: bool,
    client_certificate_needed: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl MeshVerifier {
    /// Verifies servers that must have the role.
    #[must_use]
    pub fn of_servers(bundle: TrustBundle, role: Role) -> Self {
        Self {
            bundle,
            server_role: role,
            server_name: None,
            not_before: Duration::ZERO,
            any_time: false,
            client_certificate_needed: true,
            algorithms: provider().signature_verification_algorithms,
        }
    }

    /// Verifies clients of any role; what a role may do is decided after the handshake, where it can be explained.
    #[must_use]
    pub fn of_clients(bundle: TrustBundle, certificate_needed: bool) -> Self {
        Self { client_certificate_needed: certificate_needed, ..Self::of_servers(bundle, Role::Shard) }
    }

    /// Takes it that this moment has passed, whatever the clock says: machines without a battery for their clock start
    /// in 1970, and the beginning of their own certificate is a time that they know to be over.
    #[must_use]
    pub fn knowing_that(mut self, unix_seconds: i64) -> Self {
        self.not_before = Duration::from_secs(unix_seconds.try_into().unwrap_or(0));
        self
    }

    /// Takes every time for the beginning of the certificate that is shown: for somebody who wants to know the time, and
    /// nothing else.
    #[must_use]
    pub fn at_any_time(self) -> Self {
        Self { any_time: true, ..self }
    }

    fn time(&self, now: UnixTime) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()).max(self.not_before))
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<CertFacts, Error> {
        let end_entity = EndEntityCert::try_from(leaf).map_err(|e| pki_error(&e))?;
        let mut time = self.time(now);
        if self.any_time {
            let begins = CertFacts::from_der(leaf).map_err(|e| other(e.to_string()))?.not_before;
            time = UnixTime::since_unix_epoch(Duration::from_secs(begins.try_into().unwrap_or(0)));
        }
        end_entity
            .verify_for_usage(self.algorithms.all, &self.bundle.anchors(), intermediates, time, usage, None, None)
            .map_err(|e| pki_error(&e))?;
        CertFacts::from_der(leaf).map_err(|e| other(e.to_string()))
    }
}

fn other(why: String) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(std::io::Error::other(why)))))
}

fn pki_error(error: &webpki::Error) -> Error {
    use webpki::Error as E;
    #[allow(clippy::wildcard_enum_match_arm, reason = "webpki's list grows, and what is left is told as it is")]
    let certificate = match error {
        E::CertExpired { .. } => CertificateError::Expired,
        E::CertNotValidYet { .. } => CertificateError::NotValidYet,
        // A CA with the same name and another key is another CA.
        E::UnknownIssuer | E::InvalidSignatureForPublicKey => CertificateError::UnknownIssuer,
        E::BadDer => CertificateError::BadEncoding,
        other => return self::other(other.to_string()),
    };
    Error::InvalidCertificate(certificate)
}

/// The part that every verifier of rustls has: signatures of TLS 1.3 by the algorithms in `self`, and none of TLS 1.2.
macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::PeerIncompatible(rustls::PeerIncompatible::Tls13RequiredForQuic))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, cert, dss, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for MeshVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let facts = self.verify(leaf, intermediates, now, KeyUsage::server_auth())?;
        let (role, name) = (facts.identity.role, &facts.identity.name);
        if role != self.server_role || self.server_name.as_ref().is_some_and(|n| n != name) {
            return Err(other(format!("expected a {}, met {}", self.server_role, facts.identity)));
        }
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

impl ClientCertVerifier for MeshVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        self.client_certificate_needed
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(leaf, intermediates, now, KeyUsage::client_auth()).map(|_| ClientCertVerified::assertion())
    }

    tls13_signatures!();
}

/// Verifies control by the hash of its CA alone, for the first contact of a machine that has only a join line.
#[derive(Debug)]
pub struct PinnedVerifier {
    ca: CaHash,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinnedVerifier {
    /// Trusts the CA with this hash, which the server must send with its chain.
    #[must_use]
    pub fn new(ca: CaHash) -> Self {
        Self { ca, algorithms: provider().signature_verification_algorithms }
    }
}

/// What a wrong CA hash reads like; [`crate::api`] looks for it.
pub(crate) const WRONG_CA: &str = "the server's CA is not the one in the join line";

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pinned = intermediates.iter().find(|c| cert::ca_hash(c).is_ok_and(|h| h == self.ca));
        let ca = pinned.ok_or_else(|| other(WRONG_CA.to_owned()))?;
        let bundle = TrustBundle::from_der(vec![ca.clone().into_owned()]).map_err(|e| other(e.to_string()))?;
        // A machine that joins may not know the time yet; the CA's own key is what is trusted here.
        let facts = CertFacts::from_der(leaf).map_err(|e| other(e.to_string()))?;
        MeshVerifier::of_servers(bundle, Role::Control).knowing_that(facts.not_before).verify_server_cert(
            leaf,
            intermediates,
            name,
            ocsp,
            now,
        )
    }

    tls13_signatures!();
}

/// A server of the mesh: shows the identity, verifies clients, speaks the ALPN protocols, TLS 1.3 only.
///
/// # Errors
/// Never with this provider; rustls states it as possible.
pub fn server_config(identity: &LiveIdentity, clients: MeshVerifier, alpn: &[&[u8]]) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(clients))
        .with_cert_resolver(Arc::new(identity.clone()));
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(config)
}

/// A client of the mesh: shows the identity if it has one, verifies the server, TLS 1.3 only. Sessions are resumed by
/// connections of the same configuration.
///
/// # Errors
/// Never with this provider; rustls states it as possible.
pub fn client_config(
    identity: Option<&LiveIdentity>,
    servers: Arc<dyn ServerCertVerifier>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, Error> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(servers);
    let mut config = match identity {
        Some(identity) => builder.with_client_cert_resolver(Arc::new(identity.clone())),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(config)
}

/// The facts of the peer's certificate; `None` if it showed none.
///
/// # Errors
/// If its certificate is not of a mesh.
pub fn peer_facts(chain: Option<&[CertificateDer<'_>]>) -> Result<Option<CertFacts>, IdentityError> {
    chain.and_then(<[_]>::first).map(|leaf| CertFacts::from_der(leaf)).transpose().map_err(Into::into)
}

/// A CA for tests: issues what is asked for, valid for a day.
#[doc(hidden)]
pub mod testing;
