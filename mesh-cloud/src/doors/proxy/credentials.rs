//! Who a visitor of the proxy door is: by its client certificate, or by an access token.

use std::sync::Arc;

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use hyper::{HeaderMap, StatusCode, header::PROXY_AUTHORIZATION};
use proto::{code::RefuseCode, identity::Role, principal::Principal, secret::Secret, stream::Refusal};
use runtime::{cert::CertFacts, clock};

use crate::{doors::http::answer::Answer, state::MeshState};

/// Base64 of any padding: clients differ.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

const HOW: &str = "show a user's client certificate, or send an access token from 'meshctl token create --access' as \
                   Proxy-Authorization: Basic USER:TOKEN (curl: --proxy-user USER:TOKEN) or Bearer TOKEN";

/// What is known of a visitor before its first request.
#[derive(Clone, Debug)]
pub(super) enum Peer {
    /// Over TLS, with what its certificate says if it showed one.
    Tls(Option<Arc<CertFacts>>),
    /// Without TLS, where that is allowed.
    Plain,
    /// Without TLS, over a network that others may listen to.
    PlainFromAfar,
}

/// Who asks.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    /// As whom.
    pub(super) principal: Principal,
    /// By which credential.
    pub(super) credential: String,
}

/// What stands in `Proxy-Authorization`.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    Nothing,
    Basic { user: String, token: Secret },
    Bearer { token: Secret },
}

fn unauthenticated(why: &str) -> Answer {
    Answer::from(Refusal::because(RefuseCode::Unauthenticated, why))
}

impl Peer {
    /// Who makes a request with these header fields.
    pub(super) fn caller(&self, headers: &HeaderMap, state: &MeshState) -> Result<Caller, Answer> {
        match self {
            Self::Tls(Some(facts)) => by_certificate(facts),
            // Nobody is asked to send a token where it could be read on the way.
            Self::PlainFromAfar => {
                let why = format!(
                    "without TLS, tokens are taken from this machine only: use https:// for the proxy (or set doors.proxy_plain on the shard); then {HOW}"
                );
                Err(unauthenticated(&why).with_status(StatusCode::FORBIDDEN))
            }
            Self::Tls(None) | Self::Plain => by_token(Shown::in_headers(headers)?, state),
        }
    }
}

fn by_certificate(facts: &CertFacts) -> Result<Caller, Answer> {
    let Some(name) = facts.identity.user().filter(|_| facts.identity.role == Role::User) else {
        let why = format!("{} is no user, and only users may use the proxy door", facts.identity);
        return Err(Answer::from(Refusal::because(RefuseCode::PolicyDenied, why)));
    };
    // A connection may outlive the certificate of its handshake.
    if facts.not_after < clock::unix_now() {
        return Err(unauthenticated("the client certificate has expired; log in again with 'meshctl login'"));
    }
    let principal = Principal::User { name, groups: facts.groups.clone() };
    Ok(Caller { principal, credential: facts.serial.clone() })
}

fn by_token(shown: Shown, state: &MeshState) -> Result<Caller, Answer> {
    let (user, token) = match shown {
        Shown::Nothing => return Err(unauthenticated(&format!("the proxy door wants to know who asks: {HOW}"))),
        Shown::Basic { user, token } => (Some(user), token),
        Shown::Bearer { token } => (None, token),
    };
    let holder = state.holder(&token, clock::unix_now());
    let unknown = || unauthenticated("this access token is not known, has expired, or is another user's");
    let holder = holder.ok_or_else(unknown)?;
    match (&holder.principal, user) {
        (Principal::User { name, .. }, Some(user)) if name.as_str() != user => Err(unknown()),
        _ => Ok(Caller { principal: holder.principal, credential: holder.key }),
    }
}

impl Shown {
    fn in_headers(headers: &HeaderMap) -> Result<Self, Answer> {
        let malformed = || unauthenticated(&format!("Proxy-Authorization cannot be understood: {HOW}"));
        let mut values = headers.get_all(PROXY_AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return if headers.contains_key(PROXY_AUTHORIZATION) { Err(malformed()) } else { Ok(Self::Nothing) };
        };
        Self::read(value.as_bytes()).ok_or_else(malformed)
    }

    /// Reads `Basic` (RFC 7617) and `Bearer` (RFC 6750); `None` if it is neither.
    fn read(value: &[u8]) -> Option<Self> {
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
    fn nobody_is_asked_for_a_token_where_others_may_listen() {
        let state = MeshState::default();
        let mut headers = HeaderMap::new();
        let status = |peer: &Peer, headers: &HeaderMap| peer.caller(headers, &state).unwrap_err().response().status();
        assert_eq!(status(&Peer::Plain, &headers), StatusCode::PROXY_AUTHENTICATION_REQUIRED);
        assert_eq!(status(&Peer::PlainFromAfar, &headers), StatusCode::FORBIDDEN);
        headers.insert(PROXY_AUTHORIZATION, "Bearer a.b".parse().unwrap());
        assert_eq!(status(&Peer::PlainFromAfar, &headers), StatusCode::FORBIDDEN);
    }

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
