//! What a door answers by itself: a status, whose fault it is, when to try again, and a sentence.

use std::{error::Error, io};

use hyper::{
    Response, StatusCode,
    ext::ReasonPhrase,
    header::{CONTENT_TYPE, HeaderName, HeaderValue, PROXY_AUTHENTICATE, RETRY_AFTER},
};
use proto::{
    code::{Fault, RefuseCode, ResetCode, Retry},
    stream::Refusal,
};
use runtime::splice::Broken;

use super::body::{self, Body};

/// The kind of the error, by its slug.
pub(crate) const MESH_ERROR: HeaderName = HeaderName::from_static("x-mesh-error");
/// Who would have to act.
const MESH_FAULT: HeaderName = HeaderName::from_static("x-mesh-fault");

/// An error answer.
#[derive(Debug)]
pub(crate) struct Answer {
    status: StatusCode,
    slug: &'static str,
    fault: Fault,
    retry: Retry,
    sentence: String,
}

impl Answer {
    /// The client asked for something impossible.
    pub(crate) fn bad_request(sentence: impl Into<String>) -> Self {
        Self::from(Refusal::because(RefuseCode::BadRequest, sentence))
    }

    /// As another status than the code's own.
    pub(crate) const fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// The service broke off before it answered.
    pub(crate) fn broken(error: &hyper::Error) -> Self {
        let (code, fault) = match cause(error) {
            Some(broken) => (broken.code, broken.code.fault()),
            None if error.is_parse() => (ResetCode::ProtocolError, Fault::Target),
            None => (ResetCode::PeerReset, Fault::Target),
        };
        let status = match code {
            ResetCode::Revoked | ResetCode::Shutdown => status(code.http_status()),
            ResetCode::PeerReset
            | ResetCode::LinkLost
            | ResetCode::Stalled
            | ResetCode::Cancelled
            | ResetCode::ProtocolError
            | ResetCode::Refused => StatusCode::BAD_GATEWAY,
        };
        let sentence = if code == ResetCode::ProtocolError {
            "The service answered with something that is not HTTP.".to_owned()
        } else if fault == Fault::Target {
            format!("The service broke the connection before it answered ({error}).")
        } else {
            code.sentence().to_owned()
        };
        Self { status, slug: code.slug(), fault, retry: code.retry(), sentence }
    }

    /// As a response.
    pub(crate) fn response(self) -> Response<Body> {
        let mut response = Response::new(body::text(format!("{}\n", self.sentence)));
        *response.status_mut() = self.status;
        response.extensions_mut().insert(ReasonPhrase::from_static(self.slug.as_bytes()));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(MESH_ERROR, HeaderValue::from_static(self.slug));
        if let Ok(fault) = HeaderValue::try_from(self.fault.to_string()) {
            headers.insert(MESH_FAULT, fault);
        }
        let seconds = match self.retry {
            Retry::Now => Some(0),
            Retry::After(wait) => Some(wait.as_secs() + u64::from(wait.subsec_nanos() > 0)),
            Retry::Never => None,
        };
        if let Some(seconds) = seconds {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            headers.insert(PROXY_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"causeway\""));
        }
        response
    }
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        let code = refusal.code;
        Self {
            status: status(code.http_status()),
            slug: code.slug(),
            fault: code.fault(),
            retry: refusal.retry(),
            sentence: refusal.reason,
        }
    }
}

fn status(number: u16) -> StatusCode {
    StatusCode::from_u16(number).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// What the flow said when it broke, below hyper's own words.
fn cause(error: &hyper::Error) -> Option<&Broken> {
    let mut next = error.source();
    while let Some(source) = next {
        if let Some(io) = source.downcast_ref::<io::Error>() {
            return io.get_ref()?.downcast_ref();
        }
        next = source.source();
    }
    None
}
