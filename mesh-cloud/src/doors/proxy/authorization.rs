//! What stands in `Proxy-Authorization`. Pure, and fuzzed as a file of its own (`fuzz/src/door.rs`).

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use proto::secret::Secret;

/// Base64 of any padding: clients differ.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A credential as it was shown.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// A user and a token (RFC 7617).
    Basic {
        /// The user's name, as given.
        user: String,
        /// In place of a password.
        token: Secret,
    },
    /// A token (RFC 6750).
    Bearer {
        /// The token.
        token: Secret,
    },
}

impl Shown {
    /// Reads `Basic` and `Bearer`; `None` if it is neither.
    pub(super) fn read(value: &[u8]) -> Option<Self> {
        let (scheme, rest) = std::str::from_utf8(value).ok()?.trim().split_once(' ')?;
        let rest = rest.trim();
        if scheme.eq_ignore_ascii_case("bearer") {
            return (!rest.is_empty()).then(|| Self::Bearer { token: Secret::new(rest.to_owned()) });
        }
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        let both = String::from_utf8(BASE64.decode(rest).ok()?).ok()?;
        let (user, token) = both.split_once(':')?;
        Some(Self::Basic { user: user.to_owned(), token: Secret::new(token.to_owned()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_read_or_not_and_never_more() {
        let token = |text: &str| Secret::new(text.to_owned());
        let basic = |user: &str, text: &str| Some(Shown::Basic { user: user.into(), token: token(text) });
        assert_eq!(Shown::read(b"Basic YWxpY2U6YS5iOmM="), basic("alice", "a.b:c"));
        assert_eq!(Shown::read(b"basic  YWxpY2U6YS5iOmM"), basic("alice", "a.b:c"));
        assert_eq!(Shown::read(b"Bearer a.b"), Some(Shown::Bearer { token: token("a.b") }));
        for text in
            ["", "x", "Basic", "Basic ", "Basic !", "Basic YQ==", "Basic gICAOg==", "Bearer ", "Digest a=b", "\u{80}"]
        {
            assert_eq!(Shown::read(text.as_bytes()), None, "{text}");
        }
        assert_eq!(Shown::read(b"Basic \xff\xfe"), None);
    }
}
