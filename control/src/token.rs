//! Tokens: what they look like and when they hold. Pure: the time and the random bytes are arguments.
//!
//! A token is `cw_<id>.<secret>`: eight characters to name it by, and thirty-two that make it one. Both are of
//! lower-case letters and digits without those that look alike, so that a token survives being read aloud. Control
//! keeps the SHA-256 of the whole text, and so a stolen database opens nothing.

use std::fmt;

use proto::{
    api::{ApiCode, TokenKind},
    id::{EdgeId, GroupName, SiteName},
    secret::Secret,
};
use sha2::{Digest, Sha256};

const PREFIX: &str = "cw_";
const ID_LEN: usize = 8;
/// 32 characters of 5 bits: 160 bits.
const SECRET_LEN: usize = 32;
/// Longest text that is looked at, in bytes.
const MAX_LEN: usize = 128;
/// 32 characters, so that 5 bits of a random byte choose one without bias.
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";

/// How many random bytes [`generate`] takes.
pub const RANDOM_LEN: usize = ID_LEN + SECRET_LEN;

/// Makes a token out of random bytes. Returns its id and its text.
#[must_use]
pub fn generate(random: &[u8; RANDOM_LEN]) -> (String, Secret) {
    let text: String = random.iter().map(|b| char::from(ALPHABET[usize::from(b & 31)])).collect();
    let (id, secret) = text.split_at(ID_LEN);
    (id.to_owned(), Secret::new(format!("{PREFIX}{id}.{secret}")))
}

/// The hash under which a token is kept, and by which shards check access tokens.
#[must_use]
pub fn sha256_hex(token: &Secret) -> String {
    Sha256::digest(token.reveal().as_bytes()).iter().fold(String::with_capacity(64), |mut hex, b| {
        use fmt::Write;
        let _ = write!(hex, "{b:02x}");
        hex
    })
}

/// The id inside a token's text; `None` if the text is no token.
#[must_use]
pub fn id_of(token: &Secret) -> Option<&str> {
    let text = token.reveal();
    if text.len() > MAX_LEN {
        return None;
    }
    let (id, secret) = text.strip_prefix(PREFIX)?.split_once('.')?;
    let known = |part: &str| part.bytes().all(|b| ALPHABET.contains(&b));
    (id.len() == ID_LEN && known(id) && secret.len() >= SECRET_LEN && known(secret)).then_some(id)
}

/// What is kept of a token.
#[derive(Clone, Debug)]
pub struct StoredToken {
    /// The part before the dot.
    pub id: String,
    /// Of the whole text, in hexadecimal.
    pub sha256: String,
    /// What for.
    pub kind: TokenKind,
    /// The only name that it is good for.
    pub name: Option<EdgeId>,
    /// Uses left; `None` for access tokens.
    pub uses_left: Option<u32>,
    /// Last second of its life.
    pub expires: i64,
    /// Groups of the user.
    pub groups: Vec<GroupName>,
    /// Site of the edges.
    pub site: Option<SiteName>,
    /// Whether it may take the name of an edge that is enrolled.
    pub replace: bool,
    /// Who made it.
    pub created_by: String,
    /// When.
    pub created: i64,
}

/// Why a token does not let one in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such token, or a wrong secret. The two are not told apart.
    #[error(
        "this token is not known: it was deleted, belongs to another mesh, or was not copied whole; ask for a new one from 'meshctl token create'"
    )]
    Unknown,
    /// Its time is over.
    #[error("this token has expired; ask for a new one from 'meshctl token create'")]
    Expired,
    /// All its uses are gone.
    #[error("this token has been used as often as it allows; ask for a new one from 'meshctl token create'")]
    Used,
    /// It is for another name.
    #[error("this token is for the name {fixed:?}, not for {asked:?}; leave the name out, or ask for another token")]
    OtherName {
        /// The name that it is for.
        fixed: String,
        /// The name that was asked for.
        asked: String,
    },
    /// It is for the proxy door.
    #[error(
        "this is an access token, for the proxy door of a shard; enrolling takes one from 'meshctl token create --edge'"
    )]
    OtherKind,
    /// Neither the token nor the request has a name.
    #[error("this token fixes no name, so the request must bring one; name the machine, for example by --name")]
    NoName,
}

impl Refusal {
    /// The code in the answer.
    #[must_use]
    pub const fn code(&self) -> ApiCode {
        match self {
            Self::Unknown => ApiCode::TokenUnknown,
            Self::Expired => ApiCode::TokenExpired,
            Self::Used => ApiCode::TokenUsed,
            Self::OtherName { .. } | Self::OtherKind => ApiCode::TokenMismatch,
            Self::NoName => ApiCode::BadRequest,
        }
    }
}

/// Decides whether a token lets somebody enrol, and under which name.
///
/// `found` is what is kept under the token's id. The secret is compared in constant time and first of all, so that
/// who does not hold the token learns nothing about it.
///
/// # Errors
/// If it does not.
pub fn admit<'a>(
    found: Option<&'a StoredToken>,
    token: &Secret,
    asked: Option<&'a EdgeId>,
    now: i64,
) -> Result<(&'a StoredToken, &'a EdgeId), Refusal> {
    // Hashes even when there is nothing to compare with, so that the time says nothing either.
    let hash = Secret::new(sha256_hex(token));
    let found = found.filter(|f| Secret::new(f.sha256.clone()) == hash).ok_or(Refusal::Unknown)?;
    if found.kind == TokenKind::Access {
        return Err(Refusal::OtherKind);
    }
    if found.expires < now {
        return Err(Refusal::Expired);
    }
    if found.uses_left.unwrap_or(0) == 0 {
        return Err(Refusal::Used);
    }
    let name = match (&found.name, asked) {
        (Some(fixed), Some(asked)) if fixed != asked => {
            return Err(Refusal::OtherName { fixed: fixed.to_string(), asked: asked.to_string() });
        }
        (Some(fixed), _) => fixed,
        (None, Some(asked)) => asked,
        (None, None) => return Err(Refusal::NoName),
    };
    Ok((found, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> (Secret, StoredToken) {
        let (id, token) = generate(&std::array::from_fn(|i| u8::try_from(i * 7 % 256).unwrap()));
        let stored = StoredToken {
            id,
            sha256: sha256_hex(&token),
            kind: TokenKind::Edge,
            name: None,
            uses_left: Some(1),
            expires: 100,
            groups: vec![],
            site: None,
            replace: false,
            created_by: "admin".into(),
            created: 0,
        };
        (token, stored)
    }

    fn name(text: &str) -> EdgeId {
        text.parse().unwrap()
    }

    #[test]
    fn a_token_has_the_form_that_join_lines_allow_and_names_itself() {
        let (token, stored) = made();
        assert_eq!(token.reveal().len(), 3 + 8 + 1 + 32);
        assert_eq!(id_of(&token), Some(stored.id.as_str()));
        assert!(token.reveal().bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)));
        assert_eq!(stored.sha256.len(), 64);
    }

    #[test]
    fn what_is_no_token_has_no_id() {
        let long = format!("cw_abcdefgh.{}", "a".repeat(200));
        for text in
            ["", "cw_", "cw_abcdefgh", "cw_abcdefgh.short", "xx_abcdefgh.abcdefghabcdefghabcdefghabcdefgh", &long]
        {
            assert_eq!(id_of(&Secret::new(text.into())), None, "{text}");
        }
    }

    #[test]
    fn the_first_thing_that_is_wrong_is_named() {
        let (token, stored) = made();
        let shop = name("shop-1");
        assert!(admit(Some(&stored), &token, Some(&shop), 100).is_ok());
        let refuse = |stored: &StoredToken, asked: Option<&EdgeId>, now| {
            admit(Some(stored), &token, asked, now).unwrap_err().code()
        };
        assert_eq!(admit(None, &token, Some(&shop), 0).unwrap_err(), Refusal::Unknown);
        let wrong = Secret::new(token.reveal().replace('a', "b"));
        assert_eq!(admit(Some(&stored), &wrong, Some(&shop), 0).unwrap_err(), Refusal::Unknown);
        assert_eq!(refuse(&stored, Some(&shop), 101), ApiCode::TokenExpired);
        assert_eq!(refuse(&StoredToken { uses_left: Some(0), ..stored.clone() }, Some(&shop), 0), ApiCode::TokenUsed);
        let fixed = StoredToken { name: Some(name("shop-2")), ..stored.clone() };
        assert_eq!(refuse(&fixed, Some(&shop), 0), ApiCode::TokenMismatch);
        assert_eq!(admit(Some(&fixed), &token, None, 0).unwrap().1.as_str(), "shop-2");
        let access = StoredToken { kind: TokenKind::Access, uses_left: None, ..stored.clone() };
        assert_eq!(refuse(&access, Some(&shop), 0), ApiCode::TokenMismatch);
        assert_eq!(refuse(&stored, None, 0), ApiCode::BadRequest);
    }
}
