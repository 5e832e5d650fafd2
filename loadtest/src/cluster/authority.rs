//! The CA of a simulated mesh. Signatures and serial numbers are all equally long, so that two runs send datagrams of
//! the same sizes.

use anyhow::Context;
use rcgen::{KeyPair, SerialNumber};
use runtime::{
    identity::{Credentials, NodeKey},
    tls::{TrustBundle, testing::TestCa},
};

/// Issues identities.
#[derive(Debug)]
pub struct Authority {
    ca: TestCa,
    serial: u64,
}

impl Authority {
    /// A new CA.
    #[must_use]
    pub fn new() -> Self {
        // The first byte stays the same and small, so that the number takes eight bytes in DER.
        Self { ca: TestCa::with_algorithm(&rcgen::PKCS_ED25519), serial: 0x4000_0000_0000_0000 }
    }

    /// Its root.
    #[must_use]
    pub fn bundle(&self) -> TrustBundle {
        self.ca.bundle()
    }

    /// Issues for `role/name`.
    pub fn issue(&mut self, who: &str) -> Credentials {
        self.serial += 1;
        let serial = SerialNumber::from(self.serial.to_be_bytes().to_vec());
        self.ca.issue_with(who, |params| params.serial_number = Some(serial))
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

/// The same credentials once more, as a process that starts again reads them from its disk.
///
/// # Errors
/// Never, for credentials that were good before.
pub fn again(credentials: &Credentials) -> anyhow::Result<Credentials> {
    let key = KeyPair::try_from(&credentials.private_key()).context("the key cannot be read back")?;
    Ok(Credentials::new(NodeKey::from_key_pair(key), credentials.chain().to_vec())?)
}
