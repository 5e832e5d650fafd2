//! Where the CA lies: in files that were given, or in the data folder, where the first start makes it.

use std::{fs, io, path::Path};

use proto::id::TrustDomain;

use super::{Ca, CaError};

/// The CA's certificate in the data folder.
pub const CERTIFICATE: &str = "ca.pem";
/// The CA's key in the data folder, mode 0600.
pub const KEY: &str = "ca.key";

/// Opens the CA at these two files. Returns it, and whether it was made just now, which happens only if `make` allows it
/// and there is no certificate yet.
///
/// # Errors
/// If a file cannot be read or written, or certificate and key cannot be used together.
pub fn open(certificate: &Path, key: &Path, make: bool, domain: &TrustDomain, now: i64) -> Result<(Ca, bool), CaError> {
    let made = make && !certificate.exists();
    if made {
        let (cert_pem, key_pem) = Ca::make(domain, now)?;
        // The key goes first: a certificate without a key would be a CA that can never sign, while a key without a
        // certificate has never been seen by anybody and is simply made anew.
        write(key, &key_pem)?;
        write(certificate, &cert_pem)?;
    }
    let ca = Ca::from_pem(domain, &read(certificate)?, &read(key)?, now)?;
    Ok((ca, made))
}

fn read(path: &Path) -> Result<String, CaError> {
    fs::read_to_string(path).map_err(|e| error("read", path, &e))
}

fn write(path: &Path, text: &str) -> Result<(), CaError> {
    runtime::identity::write_atomically(path, text.as_bytes()).map_err(|e| error("write", path, &e))
}

fn error(what: &'static str, path: &Path, why: &io::Error) -> CaError {
    CaError::File { what, path: path.display().to_string(), why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_first_start_makes_a_ca_and_the_second_finds_it() {
        let dir = tempfile::tempdir().unwrap();
        let (certificate, key) = (dir.path().join(CERTIFICATE), dir.path().join(KEY));
        let domain = "mesh.test".parse().unwrap();
        let now = runtime::clock::unix_now();
        // A start that was cut short between the two files.
        fs::write(&key, "half").unwrap();
        let (first, made) = open(&certificate, &key, true, &domain, now).unwrap();
        assert!(made);
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        let (second, made) = open(&certificate, &key, true, &domain, now).unwrap();
        assert!(!made);
        assert_eq!(first.hash(), second.hash());
        fs::remove_file(&key).unwrap();
        assert!(open(&certificate, &key, true, &domain, now).unwrap_err().to_string().contains("ca.key"));
        fs::remove_file(&certificate).unwrap();
        assert!(open(&certificate, &key, false, &domain, now).unwrap_err().to_string().contains("ca.pem"));
    }
}
