//! The join line: all that a machine needs to enrol, in one line.
//!
//! `causeway://TOKEN@HOST:PORT?ca=sha256:HEX[&name=NAME]`, where the hash is that of the CA certificate's public key
//! (SubjectPublicKeyInfo, DER). It holds a secret, so it travels by standard input, a file or an environment variable,
//! never as a process argument.

use std::{fmt, str::FromStr};

use crate::{
    id::{EdgeId, InvalidName},
    secret::Secret,
    target::{HostPort, InvalidTarget},
};

/// SHA-256 of a CA's public key (SPKI, DER).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CaHash(pub [u8; 32]);

impl fmt::Display for CaHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for CaHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for CaHash {
    type Err = InvalidJoin;

    fn from_str(text: &str) -> Result<Self, InvalidJoin> {
        let hex = text.strip_prefix("sha256:").filter(|h| h.len() == 64 && h.is_ascii()).ok_or(InvalidJoin::CaHash)?;
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(hex.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| InvalidJoin::CaHash)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| InvalidJoin::CaHash)?;
        }
        Ok(Self(hash))
    }
}

/// What a join line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinLine {
    /// Where control listens.
    pub control: HostPort,
    /// Which CA it must have.
    pub ca: CaHash,
    /// The right to enrol.
    pub token: Secret,
    /// The name to enrol under, if the token fixes it.
    pub name: Option<EdgeId>,
}

/// A text was no join line. No variant carries the text: it may hold a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidJoin {
    /// The wrong form.
    #[error(
        "this is no join line; one looks like causeway://TOKEN@HOST:PORT?ca=sha256:HASH and comes from 'meshctl token create'"
    )]
    Form,
    /// The CA hash is missing or damaged.
    #[error(
        "the join line's CA hash is missing or damaged: it must be ca=sha256: and 64 hexadecimal digits; copy the whole line"
    )]
    CaHash,
    /// The address of control.
    #[error("the join line's address is wrong: {0}")]
    Address(#[from] InvalidTarget),
    /// The name.
    #[error("the join line's name is wrong: {0}")]
    Name(#[from] InvalidName),
}

impl FromStr for JoinLine {
    type Err = InvalidJoin;

    fn from_str(text: &str) -> Result<Self, InvalidJoin> {
        let rest = text.trim().strip_prefix("causeway://").ok_or(InvalidJoin::Form)?;
        let (token, rest) = rest.split_once('@').ok_or(InvalidJoin::Form)?;
        let (address, query) = rest.split_once('?').ok_or(InvalidJoin::CaHash)?;
        let token_fits = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !token_fits(token) {
            return Err(InvalidJoin::Form);
        }
        let (mut ca, mut name) = (None, None);
        for pair in query.trim_end_matches('/').split('&') {
            match pair.split_once('=') {
                Some(("ca", hash)) => ca = Some(hash.parse()?),
                Some(("name", n)) => name = Some(n.parse()?),
                Some(_) | None => return Err(InvalidJoin::Form),
            }
        }
        Ok(Self {
            control: address.parse()?,
            ca: ca.ok_or(InvalidJoin::CaHash)?,
            token: Secret::new(token.to_owned()),
            name,
        })
    }
}

impl JoinLine {
    /// The line, with its secret.
    #[must_use]
    pub fn reveal(&self) -> String {
        let name = self.name.as_ref().map(|n| format!("&name={n}")).unwrap_or_default();
        format!("causeway://{}@{}?ca={}{name}", self.token.reveal(), self.control, self.ca)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_line_comes_back() {
        let line = format!("causeway://cw1.abc_DEF-9@[fd00::1]:7443?ca=sha256:{}&name=shop-1", "0f".repeat(32));
        let join: JoinLine = line.parse().unwrap();
        assert_eq!(join.reveal(), line);
        assert_eq!(join.control.port, 7443);
        assert!(!format!("{join:?}").contains("abc_DEF"), "the token shows");
    }

    #[test]
    fn damage_is_named() {
        let hash = "0f".repeat(32);
        assert_eq!("".parse::<JoinLine>(), Err(InvalidJoin::Form));
        assert_eq!(format!("causeway://t@h:1?ca=sha256:{}", &hash[1..]).parse::<JoinLine>(), Err(InvalidJoin::CaHash));
        assert_eq!("causeway://t@h:1".parse::<JoinLine>(), Err(InvalidJoin::CaHash));
        assert!(matches!(
            format!("causeway://t@h:0?ca=sha256:{hash}").parse::<JoinLine>(),
            Err(InvalidJoin::Address(_))
        ));
        assert_eq!(format!("causeway://a b@h:1?ca=sha256:{hash}").parse::<JoinLine>(), Err(InvalidJoin::Form));
    }
}
