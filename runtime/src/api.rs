//! A client of control's JSON API.

use std::{io, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use proto::{
    api::{ApiError, EnrolRequest, Enrolled, WatchEvent},
    identity::Role,
    join::JoinLine,
    target::HostPort,
};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::TcpStream, time::Instant};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    clock,
    tls::{self, LiveIdentity, MeshVerifier, PinnedVerifier, TrustBundle},
};

/// How long a whole call may take.
const CALL: Duration = Duration::from_secs(15);
/// Longest answer in bytes.
const MAX_ANSWER: usize = 64 * 1024 * 1024;
/// Silence after which a watch counts as dead; a sign of life comes every two seconds.
const WATCH_SILENCE: Duration = Duration::from_secs(8);
/// Longest line of a watch in bytes.
const MAX_LINE: usize = 64 * 1024 * 1024;

/// A call did not work.
#[derive(Debug, thiserror::Error)]
pub enum ApiClientError {
    /// No connection.
    #[error("control at {address} cannot be reached: {why}")]
    Unreachable {
        /// Where it should be.
        address: String,
        /// What happened.
        why: String,
    },
    /// The CA is another one than the join line says.
    #[error(
        "control at {address} has another CA than the join line says: the line is from another mesh, or something in between opens the connection; get a new line with 'meshctl token create'"
    )]
    WrongCa {
        /// Where it was met.
        address: String,
    },
    /// The other side, or this one, was not trusted.
    #[error("no trust between this machine and control at {address}: {why}")]
    Tls {
        /// Where it was met.
        address: String,
        /// What happened.
        why: String,
    },
    /// Control said no.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// Something else answers there.
    #[error("control at {address} gave an answer that makes no sense ({why}); is it control?")]
    Nonsense {
        /// Where it was met.
        address: String,
        /// What is wrong with it.
        why: String,
    },
}

impl ApiClientError {
    /// Whether the same call may work later without anybody changing anything.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused(e) => e.code.is_transient(),
            Self::WrongCa { .. } | Self::Tls { .. } | Self::Nonsense { .. } => false,
        }
    }
}

/// A client: one address, one identity. A new connection per call, since calls are seconds or hours apart.
#[derive(Clone, Debug)]
pub struct ApiClient {
    address: HostPort,
    tls: Arc<ClientConfig>,
}

/// What time it is elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct TimeThere {
    /// This machine's clock when the answer came, in milliseconds since 1970.
    pub here_ms: u64,
    /// The other clock, in whole seconds since 1970.
    pub there: i64,
    /// How long the answer took.
    pub took: Duration,
}

impl TimeThere {
    /// How much this machine's clock is ahead, in milliseconds, to about a second.
    #[must_use]
    pub fn ahead_ms(&self) -> i64 {
        let here = i64::try_from(self.here_ms).unwrap_or(i64::MAX);
        let on_the_way = i64::try_from(self.took.as_millis() / 2).unwrap_or_default();
        // On average, half of the second that is told has passed.
        here.saturating_sub(self.there.saturating_mul(1000)).saturating_sub(500).saturating_sub(on_the_way)
    }
}

/// Asks control for its time, whatever this machine's clock says: the chain is checked as of the beginning of control's
/// certificate.
///
/// # Errors
/// If control cannot be reached, is not trusted, or does not say.
pub async fn time_at(address: &HostPort, bundle: &TrustBundle) -> Result<TimeThere, ApiClientError> {
    let at = || address.to_string();
    let tls_error = |e: rustls::Error| ApiClientError::Tls { address: at(), why: e.to_string() };
    let verifier = MeshVerifier::of_servers(bundle.clone(), Role::Control).at_any_time();
    let tls = tls::client_config(None, Arc::new(verifier), &[b"http/1.1"]).map_err(tls_error)?;
    let client = ApiClient { address: address.clone(), tls: Arc::new(tls) };
    let whole = async {
        let begun = Instant::now();
        let (response, _driver) = client.send(Method::HEAD, "/v1/openapi.json", None::<&()>).await?;
        let date = response.headers().get(hyper::header::DATE).and_then(|date| date.to_str().ok());
        let date = date.and_then(|date| httpdate::parse_http_date(date).ok());
        let there = date.and_then(|date| date.duration_since(std::time::UNIX_EPOCH).ok());
        let there = there.ok_or_else(|| client.nonsense("it does not say what time it is"))?;
        let there = i64::try_from(there.as_secs()).unwrap_or(i64::MAX);
        Ok(TimeThere { here_ms: clock::unix_millis(), there, took: begun.elapsed() })
    };
    let late = || client.unreachable(&format!("no answer within {} s", CALL.as_secs()));
    tokio::time::timeout(CALL, whole).await.unwrap_or_else(|_| Err(late()))
}

impl ApiClient {
    /// A client that shows an identity and trusts control by the bundle.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn new(address: HostPort, identity: &LiveIdentity, bundle: TrustBundle) -> Result<Self, rustls::Error> {
        let facts = identity.facts();
        let verifier = MeshVerifier::of_servers(bundle, Role::Control).knowing_that(facts.not_before);
        let tls = tls::client_config(Some(identity), Arc::new(verifier), &[b"http/1.1"])?;
        Ok(Self { address, tls: Arc::new(tls) })
    }

    /// Enrols: the first contact, where control is known by the hash of its CA alone.
    ///
    /// # Errors
    /// As every call.
    pub async fn enrol(join: &JoinLine, request: &EnrolRequest) -> Result<Enrolled, ApiClientError> {
        let tls = tls::client_config(None, Arc::new(PinnedVerifier::new(join.ca)), &[b"http/1.1"])
            .map_err(|e| ApiClientError::Tls { address: join.control.to_string(), why: e.to_string() })?;
        let client = Self { address: join.control.clone(), tls: Arc::new(tls) };
        client.call(Method::POST, "/v1/enrol", Some(request)).await
    }

    /// Where control is.
    #[must_use]
    pub const fn address(&self) -> &HostPort {
        &self.address
    }

    /// `GET`.
    ///
    /// # Errors
    /// As every call.
    pub async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, ApiClientError> {
        self.call(Method::GET, path, None::<&()>).await
    }

    /// `POST`. An answer without a body reads as `()`.
    ///
    /// # Errors
    /// As every call.
    pub async fn post<A: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<A, ApiClientError> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// `PUT`.
    ///
    /// # Errors
    /// As every call.
    pub async fn put<A: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<A, ApiClientError> {
        self.call(Method::PUT, path, Some(body)).await
    }

    /// `DELETE`.
    ///
    /// # Errors
    /// As every call.
    pub async fn delete<A: DeserializeOwned>(&self, path: &str) -> Result<A, ApiClientError> {
        self.call(Method::DELETE, path, None::<&()>).await
    }

    async fn call<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<A, ApiClientError> {
        let whole = async {
            let (response, _driver) = self.send(method, path, body).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map_err(|e| self.unreachable(&*e))?
                .to_bytes();
            if status.is_success() { self.read(&body) } else { Err(self.refusal(status, &body)) }
        };
        match tokio::time::timeout(CALL, whole).await {
            Ok(result) => result,
            Err(_) => Err(self.unreachable(&format!("no answer within {} s", CALL.as_secs()))),
        }
    }

    fn read<A: DeserializeOwned>(&self, body: &[u8]) -> Result<A, ApiClientError> {
        let body = if body.is_empty() { b"null" } else { body };
        serde_json::from_slice(body).map_err(|e| self.nonsense(&e))
    }

    fn refusal(&self, status: StatusCode, body: &[u8]) -> ApiClientError {
        match serde_json::from_slice::<ApiError>(body) {
            Ok(error) => error.into(),
            Err(_) => self.nonsense(&format!("HTTP {status}")),
        }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<(Response<Incoming>, Driver), ApiClientError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|e| self.nonsense(&e))?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, self.address.to_string())
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| self.nonsense(&e))?;
        let (mut sender, connection) = self.connect().await?;
        #[allow(clippy::disallowed_methods, reason = "ends with the handle, which the call holds")]
        let driver = AbortOnDropHandle::new(tokio::spawn(connection));
        let response = sender.send_request(request).await.map_err(|e| self.broken(&e))?;
        Ok((response, driver))
    }

    async fn connect(&self) -> Result<(http1::SendRequest<Full<Bytes>>, Connection), ApiClientError> {
        let socket = TcpStream::connect((self.address.host.as_str(), self.address.port))
            .await
            .map_err(|e| self.unreachable(&e))?;
        socket.set_nodelay(true).map_err(|e| self.unreachable(&e))?;
        let name = ServerName::try_from(self.address.host.clone()).map_err(|e| self.nonsense(&e))?;
        let stream =
            TlsConnector::from(Arc::clone(&self.tls)).connect(name, socket).await.map_err(|e| self.tls_error(&e))?;
        http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.unreachable(&e))
    }

    /// Follows the watch: [`Watch::next`] gives a whole snapshot first, then what changes.
    ///
    /// # Errors
    /// As every call.
    pub async fn watch(&self) -> Result<Watch, ApiClientError> {
        let sent = tokio::time::timeout(CALL, self.send(Method::GET, "/v1/watch", None::<&()>)).await;
        let (response, driver) = sent.map_err(|_| self.unreachable(&"no answer"))??;
        if !response.status().is_success() {
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map_err(|e| self.unreachable(&e))?
                .to_bytes();
            return Err(self.refusal(status, &body));
        }
        Ok(Watch { client: self.clone(), body: response.into_body(), buffer: BytesMut::new(), _driver: driver })
    }

    fn unreachable(&self, why: &(impl ToString + ?Sized)) -> ApiClientError {
        ApiClientError::Unreachable { address: self.address.to_string(), why: why.to_string() }
    }

    fn nonsense(&self, why: &(impl ToString + ?Sized)) -> ApiClientError {
        ApiClientError::Nonsense { address: self.address.to_string(), why: why.to_string() }
    }

    fn tls_error(&self, error: &io::Error) -> ApiClientError {
        let address = self.address.to_string();
        match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            Some(e) if e.to_string().contains(tls::WRONG_CA) => ApiClientError::WrongCa { address },
            Some(rustls::Error::InvalidMessage(_)) => {
                ApiClientError::Nonsense { address, why: "it does not speak TLS".into() }
            }
            Some(e) => ApiClientError::Tls { address, why: e.to_string() },
            None => self.unreachable(error),
        }
    }

    /// In TLS 1.3 a server refuses a client's certificate after the handshake, in answer to the first bytes.
    fn broken(&self, error: &hyper::Error) -> ApiClientError {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(e) = cause {
            let inner = e.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            if let Some(tls) = inner.and_then(|e| e.downcast_ref::<rustls::Error>()) {
                return ApiClientError::Tls { address: self.address.to_string(), why: tls.to_string() };
            }
            cause = e.source();
        }
        self.unreachable(error)
    }
}

type Connection = http1::Connection<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>, Full<Bytes>>;
type Driver = AbortOnDropHandle<Result<(), hyper::Error>>;

/// A watch that is being followed. It ends when it is dropped.
#[derive(Debug)]
pub struct Watch {
    client: ApiClient,
    body: Incoming,
    buffer: BytesMut,
    _driver: Driver,
}

impl Watch {
    /// The next event. Cancel-safe.
    ///
    /// # Errors
    /// If control went away, was silent for too long, or sent what is no event; then the watch is over.
    pub async fn next(&mut self) -> Result<WatchEvent, ApiClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let line = self.buffer.split_to(end + 1);
                return self.client.read(&line);
            }
            if self.buffer.len() > MAX_LINE {
                return Err(self.client.nonsense(&"a line without end"));
            }
            let frame = tokio::time::timeout(WATCH_SILENCE, self.body.frame())
                .await
                .map_err(|_| self.client.unreachable(&"it fell silent"))?
                .ok_or_else(|| self.client.unreachable(&"it closed the watch"))?
                .map_err(|e| self.client.broken(&e))?;
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }
}
