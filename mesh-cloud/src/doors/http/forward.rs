//! One request on its way to a service, and the response on its way back. Used by every door that speaks HTTP.

use std::net::IpAddr;

use hyper::{
    Request, Response, StatusCode, Uri, Version,
    body::Incoming,
    ext::on_informational,
    header::{CONNECTION, CONTENT_TYPE, EXPECT, HOST, UPGRADE},
    http::uri::{Authority, PathAndQuery, Scheme},
    upgrade::OnUpgrade,
};
use runtime::shutdown::Tasks;
use tokio_util::sync::CancellationToken;

use super::{
    answer::Answer,
    body::{self, Body},
    headers, upgrade,
    upstream::{Failure, Upstreams},
};
use crate::{
    flow::io::BrokenOff,
    route::{self, Router},
};

/// Forwards the requests of one visitor.
#[derive(Debug)]
pub(crate) struct Forwarder {
    upstreams: Upstreams,
    tasks: Tasks,
    from: IpAddr,
    broken_off: BrokenOff,
}

impl Forwarder {
    pub(crate) fn new(router: Router, tasks: Tasks, from: IpAddr, broken_off: BrokenOff) -> Self {
        Self { upstreams: Upstreams::new(router, tasks.clone()), tasks, from, broken_off }
    }

    /// Sends the request to the service behind `route` and returns what it answers, or why there is no answer. How long
    /// the service may take is for the client to decide: when it goes, the request goes.
    pub(crate) async fn forward(
        &self,
        mut request: Request<Incoming>,
        authority: &Authority,
        route: route::Request,
    ) -> Response<Body> {
        let wanted = headers::upgrade_wanted(&request);
        let client = wanted.is_some().then(|| hyper::upgrade::on(&mut request));
        let broken_off = (request.version() < Version::HTTP_2).then(|| self.broken_off.clone());
        let outgoing = match self.outgoing(request, authority, wanted) {
            Ok(outgoing) => outgoing,
            Err(why) => return Answer::bad_request(why).response(),
        };
        match self.upstreams.exchange(route, outgoing).await {
            Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => self.change(client, response),
            Ok(response) => {
                let (mut parts, incoming) = response.into_parts();
                headers::strip(&mut parts.headers);
                parts.version = Version::HTTP_11;
                Response::from_parts(parts, body::from_service(incoming, broken_off))
            }
            Err(Failure::Refused(refusal)) => Answer::from(refusal).response(),
            Err(Failure::Broken(error)) => Answer::broken(&error).response(),
        }
    }

    fn outgoing(
        &self,
        request: Request<Incoming>,
        authority: &Authority,
        wanted: Option<hyper::header::HeaderValue>,
    ) -> Result<Request<Body>, String> {
        let (mut parts, incoming) = request.into_parts();
        headers::to_service(&mut parts.headers, parts.version, authority, self.from, wanted);
        let version = if is_grpc(&parts) { Version::HTTP_2 } else { Version::HTTP_11 };
        let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let mut uri = Uri::builder().path_and_query(path);
        if version == Version::HTTP_2 {
            parts.headers.remove(HOST);
            parts.headers.remove(CONNECTION);
            uri = uri.scheme(Scheme::HTTP).authority(authority.clone());
        }
        let uri = uri.build().map_err(|e| format!("the request's target cannot be passed on: {e}"))?;
        let expects = parts.headers.get(EXPECT).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        let go = (expects && parts.version == Version::HTTP_11).then(CancellationToken::new);
        if go.is_none() {
            parts.headers.remove(EXPECT);
        }
        let mut outgoing = Request::new(body::from_client(incoming, go.clone()));
        (*outgoing.method_mut(), *outgoing.uri_mut(), *outgoing.version_mut()) = (parts.method, uri, version);
        *outgoing.headers_mut() = parts.headers;
        if let Some(go) = go {
            on_informational(&mut outgoing, move |response| {
                if response.status() == StatusCode::CONTINUE {
                    go.cancel();
                }
            });
        }
        Ok(outgoing)
    }

    /// Both sides change to another protocol.
    fn change(&self, client: Option<OnUpgrade>, mut response: Response<Incoming>) -> Response<Body> {
        let (Some(client), Some(protocol)) = (client, response.headers().get(UPGRADE).cloned()) else {
            let why = "the service changed to another protocol without being asked to";
            return Answer::bad_request(why).with_status(StatusCode::BAD_GATEWAY).response();
        };
        let service = hyper::upgrade::on(&mut response);
        self.tasks.spawn(upgrade::join(client, service));
        let (mut parts, _) = response.into_parts();
        headers::strip(&mut parts.headers);
        parts.headers.insert(CONNECTION, hyper::header::HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, protocol);
        parts.version = Version::HTTP_11;
        Response::from_parts(parts, body::empty())
    }
}

/// gRPC needs HTTP/2 at the service too; all else is understood in HTTP/1.1 by every service.
fn is_grpc(parts: &hyper::http::request::Parts) -> bool {
    let is = |value: &hyper::header::HeaderValue| value.as_bytes().starts_with(b"application/grpc");
    parts.version == Version::HTTP_2 && parts.headers.get(CONTENT_TYPE).is_some_and(is)
}
