//! Header fields on their way through: who is meant, what belongs to one hop only, and what a proxy adds.

use std::net::IpAddr;

use hyper::{
    HeaderMap, Request, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
        TRANSFER_ENCODING, UPGRADE, VIA,
    },
    http::uri::Authority,
};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Fields of one hop besides those that `Connection` names (RFC 9110, 7.6.1).
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("http2-settings"),
];

/// Fields that `Connection` cannot take away: without them the next one reads another message than was sent.
const END_TO_END: [HeaderName; 2] = [HOST, CONTENT_LENGTH];

/// The authority that a request is for.
///
/// # Errors
/// With a sentence, if it names none, more than one, or two that differ.
pub(crate) fn authority<B>(request: &Request<B>) -> Result<Authority, String> {
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = hosts.next().map(|host| parse(host.as_bytes())).transpose()?;
    if hosts.next().is_some() {
        return Err("the request has more than one Host header".into());
    }
    let named = request.uri().authority().map(|a| parse(a.as_str().as_bytes())).transpose()?;
    match (host, named) {
        (Some(host), Some(named)) if !same(&host, &named) => {
            Err(format!("the request is for {named} and its Host header says {host}"))
        }
        (None, Some(named)) if request.version() != Version::HTTP_11 => Ok(named),
        (Some(host), _) => Ok(host),
        (None, _) => Err("the request has no Host header".into()),
    }
}

fn parse(text: &[u8]) -> Result<Authority, String> {
    let shown = || String::from_utf8_lossy(text).chars().take(253).collect::<String>();
    let authority = Authority::try_from(text).map_err(|_| format!("{:?} is no host", shown()))?;
    if authority.host().is_empty() || authority.as_str().contains('@') {
        return Err(format!("{:?} is no host", shown()));
    }
    Ok(authority)
}

fn same(a: &Authority, b: &Authority) -> bool {
    a.host().eq_ignore_ascii_case(b.host()) && a.port_u16().unwrap_or(80) == b.port_u16().unwrap_or(80)
}

/// The protocol that the client wants to change to, if that can be passed on.
pub(crate) fn upgrade_wanted<B>(request: &Request<B>) -> Option<HeaderValue> {
    let headers = request.headers();
    let wanted = headers.get(UPGRADE).filter(|_| request.version() == Version::HTTP_11)?;
    // HTTP/2 is spoken from the first byte or not at all: RFC 9113, 3.1 has given up the upgrade to it.
    let passed_on = tokens(headers).any(|t| t.eq_ignore_ascii_case("upgrade"))
        && !wanted.as_bytes().to_ascii_lowercase().starts_with(b"h2c");
    passed_on.then(|| wanted.clone())
}

fn tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).map(str::trim).filter(|t| !t.is_empty())
}

/// Takes away what belongs to the hop that the message came over.
pub(crate) fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers).filter_map(|t| t.parse().ok()).collect();
    for name in named.iter().filter(|name| !END_TO_END.contains(name)).chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Makes the fields of a request fit for the next hop.
pub(crate) fn to_service(
    headers: &mut HeaderMap,
    version: Version,
    authority: &Authority,
    from: IpAddr,
    upgrade: Option<HeaderValue>,
) {
    let trailers = headers
        .get_all(TE)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .any(|t| t.trim().eq_ignore_ascii_case("trailers"));
    strip(headers);
    if let Some(protocol) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
    } else if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    let host = HeaderValue::from_str(authority.as_str());
    if let Ok(host) = host {
        headers.entry(FORWARDED_HOST).or_insert_with(|| host.clone());
        headers.insert(HOST, host);
    }
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
    append(headers, FORWARDED_FOR, &from.to_string(), ", ");
    let protocol = match version {
        Version::HTTP_2 => "2",
        Version::HTTP_10 => "1.0",
        _ => "1.1",
    };
    append(headers, VIA, &format!("{protocol} causeway"), ", ");
    join_cookies(headers);
}

/// HTTP/2 may cut a cookie field into several, of which HTTP/1 knows one (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() > 1
        && let Ok(whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        headers.insert(COOKIE, whole);
    }
}

fn append(headers: &mut HeaderMap, name: HeaderName, value: &str, between: &str) {
    let mut all: Vec<&[u8]> = headers.get_all(&name).iter().map(HeaderValue::as_bytes).collect();
    all.push(value.as_bytes());
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(between.as_bytes())) {
        headers.insert(name, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(target: &str, hosts: &[&str]) -> Request<()> {
        let mut request = Request::builder().uri(target);
        for host in hosts {
            request = request.header(HOST, *host);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn one_host_is_meant_or_none() {
        let of = |target: &str, hosts: &[&str]| authority(&request(target, hosts)).map(|a| a.to_string());
        assert_eq!(of("/", &["a.b:80"]).unwrap(), "a.b:80");
        assert_eq!(of("http://A.b/", &["a.B:80"]).unwrap(), "a.B:80");
        for (target, hosts) in [
            ("/", &[][..]),
            ("/", &["a", "a"]),
            ("/", &[""]),
            ("/", &["a b"]),
            ("/", &["a/b"]),
            ("/", &["user@a"]),
            ("http://a/", &["b"]),
            ("http://a/", &["a:81"]),
            ("http://a/", &[]),
        ] {
            assert!(of(target, hosts).is_err(), "{target} {hosts:?}");
        }
    }

    #[test]
    fn fields_of_one_hop_stay_there() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Mine, host"),
            ("x-mine", "1"),
            ("host", "a"),
            ("keep-alive", "timeout=5"),
            ("proxy-authorization", "Basic c2VjcmV0"),
            ("proxy-connection", "keep-alive"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("x-forwarded-for", "192.0.2.1"),
            ("via", "1.0 other"),
            ("cookie", "a=1"),
            ("trailer", "x-sum"),
        ] {
            headers.append(name, value.parse().unwrap());
        }
        headers.append(COOKIE, "b=2".parse().unwrap());
        let host = Authority::from_static("a");
        to_service(&mut headers, Version::HTTP_11, &host, [192, 0, 2, 9].into(), None);
        let left: Vec<String> = headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
        let mut left: Vec<&str> = left.iter().map(String::as_str).collect();
        left.sort_unstable();
        assert_eq!(
            left,
            [
                "connection: te",
                "cookie: a=1; b=2",
                "host: a",
                "te: trailers",
                "trailer: x-sum",
                "via: 1.0 other, 1.1 causeway",
                "x-forwarded-for: 192.0.2.1, 192.0.2.9",
                "x-forwarded-host: a",
                "x-forwarded-proto: http",
            ]
        );
    }
}
