//! Who a visitor of the proxy door is: by its client certificate, or by an access token.

use std::sync::Arc;

use hyper::{HeaderMap, StatusCode, header::PROXY_AUTHORIZATION};
use proto::{code::RefuseCode, identity::Role, principal::Principal, stream::Refusal};
use runtime::{cert::CertFacts, clock};

use super::authorization::Shown;
use crate::{doors::http::answer::Answer, state::MeshState};

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
            Self::Tls(None) | Self::Plain => by_token(shown(headers)?, state),
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

/// Who shows this.
pub(super) fn by_token(shown: Option<Shown>, state: &MeshState) -> Result<Caller, Answer> {
    let (user, token) = match shown {
        None => return Err(unauthenticated(&format!("the proxy door wants to know who asks: {HOW}"))),
        Some(Shown::Basic { user, token }) => (Some(user), token),
        Some(Shown::Bearer { token }) => (None, token),
    };
    let holder = state.holder(&token, clock::unix_now());
    let unknown = || unauthenticated("this access token is not known, has expired, or is another user's");
    let holder = holder.ok_or_else(unknown)?;
    match (&holder.principal, user) {
        (Principal::User { name, .. }, Some(user)) if name.as_str() != user => Err(unknown()),
        _ => Ok(Caller { principal: holder.principal, credential: holder.key }),
    }
}

/// What a request shows, if it shows something.
fn shown(headers: &HeaderMap) -> Result<Option<Shown>, Answer> {
    let malformed = || unauthenticated(&format!("Proxy-Authorization cannot be understood: {HOW}"));
    let mut values = headers.get_all(PROXY_AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return if headers.contains_key(PROXY_AUTHORIZATION) { Err(malformed()) } else { Ok(None) };
    };
    Shown::read(value.as_bytes()).ok_or_else(malformed).map(Some)
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
}
