//! What comes before or with an identity: certificates, PEM, and the first flight of TLS.

use std::io::{Cursor, Read};

use control::ca::csr::Csr;
use runtime::{
    cert::{self, CertFacts},
    identity,
    tls::TrustBundle,
};
use rustls::server::Acceptor;
use rustls_pki_types::CertificateDer;

/// Longest ClientHello that a door buffers, in bytes; rustls' own bound is near it.
const MAX_HELLO: usize = 80 * 1024;

/// Certificates in DER, as any peer may show them.
pub fn certificate(data: &[u8]) {
    let hash = cert::ca_hash(data);
    let _ = cert::is_for_key(data, &[4; 65]);
    let _ = cert::names(data);
    let _ = TrustBundle::from_der(vec![CertificateDer::from(data.to_vec())]);
    let Ok(facts) = CertFacts::from_der(data) else { return };
    assert!(hash.is_ok(), "a leaf that can be read has a key");
    assert_eq!(facts.identity.to_string().parse().as_ref(), Ok(&facts.identity));
    assert!(!facts.serial.is_empty() && facts.serial.bytes().all(|b| b.is_ascii_hexdigit()), "{}", facts.serial);
    assert!(facts.serial == "0" || !facts.serial.starts_with('0'), "{}", facts.serial);
    let (first, last) = (facts.not_before.min(facts.not_after), facts.not_before.max(facts.not_after));
    assert!((first..=last).contains(&facts.renew_at()), "renewed outside its life: {facts:?}");
}

/// Certificates in PEM, as files and control's answers hold them.
pub fn pem(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(certificates) = identity::certificates(text) else { return };
    assert!(!certificates.is_empty(), "no certificate, and no error");
    let printed: String = certificates.iter().map(|c| identity::to_pem("CERTIFICATE", c)).collect();
    assert_eq!(identity::certificates(&printed).as_ref(), Ok(&certificates), "{printed}");
    let _ = TrustBundle::from_pem(text);
}

/// A request for a certificate, as control reads it from whoever has found its port: DER, or PEM if it is text.
pub fn csr(data: &[u8]) {
    let read = match std::str::from_utf8(data) {
        Ok(pem) => Csr::from_pem(pem),
        Err(_) => Csr::from_der(data),
    };
    if let Ok(csr) = read {
        assert!(csr.hosts().len() <= 32, "more names than are allowed");
    }
}

/// The first flight of a TLS client at the door that goes by SNI. The first byte sets the size of the pieces in which it
/// arrives.
pub fn client_hello(data: &[u8]) {
    let [piece, flight @ ..] = data else { return };
    let whole = server_name(flight, flight.len().max(1));
    let pieces = server_name(flight, usize::from(*piece) + 1);
    assert_eq!(whole, pieces, "the name depends on how the bytes were cut");
    let Ok(door) = "https".parse() else { return };
    if let Some(name) = whole {
        let _ = proto::hostname::target_of(&name, "mesh.test", &door);
    }
}

/// The name in the ClientHello; `None` if it has none, is none, or is not whole.
fn server_name(flight: &[u8], piece: usize) -> Option<String> {
    let mut acceptor = Acceptor::default();
    let mut taken = 0;
    for chunk in flight.chunks(piece) {
        let mut chunk = Cursor::new(chunk).take(u64::MAX);
        while chunk.get_ref().position() < chunk.get_ref().get_ref().len() as u64 {
            taken += acceptor.read_tls(&mut chunk).ok()?;
            assert!(taken <= MAX_HELLO, "{taken} bytes and still no ClientHello");
            if let Some(accepted) = acceptor.accept().ok()? {
                return accepted.client_hello().server_name().map(str::to_owned);
            }
        }
    }
    None
}
