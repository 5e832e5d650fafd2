//! Little services: web pages over HTTP and HTTPS, and [`tricks`].

use std::{convert::Infallible, net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::Context;
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use runtime::shutdown::{self, Tasks};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use super::tricks::{self, Notes};
use crate::say;

/// What to serve.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Who answers, for the pages
    #[arg(long, default_value = "nobody")]
    name: String,
    /// Web pages: / says who answers, /bytes/N is N bytes, /echo is what was posted, and an upgrade echoes
    #[arg(long, value_name = "ADDRESS:PORT")]
    http: Option<SocketAddr>,
    /// The same over TLS, with a certificate of a CA that is made for this once
    #[arg(long, value_name = "ADDRESS:PORT", requires = "ca_out", requires = "dns")]
    https: Option<SocketAddr>,
    /// Names in that certificate
    #[arg(long, value_name = "NAME")]
    dns: Vec<String>,
    /// Where to write that CA's certificate, PEM
    #[arg(long, value_name = "FILE")]
    ca_out: Option<PathBuf>,
    /// A TCP service that does as its first line says: echo, late, first, sink, ask, source, reset, hush
    #[arg(long, value_name = "ADDRESS:PORT")]
    tricks: Option<SocketAddr>,
    /// A plain echo
    #[arg(long, value_name = "ADDRESS:PORT")]
    echo: Option<SocketAddr>,
}

/// Serves until a signal comes.
pub(crate) async fn run(args: ServeArgs) -> anyhow::Result<()> {
    let tasks = Tasks::new();
    let name: Arc<str> = args.name.into();
    if let Some(address) = args.http {
        let (name, inner) = (Arc::clone(&name), tasks.clone());
        accept(&tasks, address, move |socket| pages(socket, Arc::clone(&name), inner.clone())).await?;
    }
    if let (Some(address), Some(ca)) = (args.https, args.ca_out) {
        let (acceptor, inner) = (acceptor(args.dns, &ca)?, tasks.clone());
        accept(&tasks, address, move |socket| {
            let (acceptor, name, inner) = (acceptor.clone(), Arc::clone(&name), inner.clone());
            async move {
                if let Ok(tls) = acceptor.accept(socket).await {
                    pages(tls, name, inner).await;
                }
            }
        })
        .await?;
    }
    if let Some(address) = args.tricks {
        let notes = Notes::default();
        accept(&tasks, address, move |socket| {
            let notes = Arc::clone(&notes);
            // How a connection ends is what it is for.
            async move { drop(tricks::serve(socket, notes).await) }
        })
        .await?;
    }
    if let Some(address) = args.echo {
        accept(&tasks, address, |mut socket| async move {
            let (mut read, mut write) = socket.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        })
        .await?;
    }
    say("ready")?;
    shutdown::signal().await?;
    Ok(())
}

async fn accept<F>(
    tasks: &Tasks,
    address: SocketAddr,
    serve: impl Fn(TcpStream) -> F + Send + 'static,
) -> anyhow::Result<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let inner = tasks.clone();
    tasks.spawn(async move {
        loop {
            match listener.accept().await {
                Ok((socket, _)) => drop(inner.spawn(serve(socket))),
                // Out of descriptors as a rule; those who are inside go first.
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
            }
        }
    });
    Ok(())
}

fn acceptor(names: Vec<String>, ca_out: &std::path::Path) -> anyhow::Result<TlsAcceptor> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::new(vec![])?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "a CA for this once");
    let root = ca.self_signed(&ca_key)?;
    std::fs::write(ca_out, root.pem()).with_context(|| format!("cannot write {}", ca_out.display()))?;
    let key = KeyPair::generate()?;
    let leaf = CertificateParams::new(names)?.signed_by(&key, &Issuer::new(ca, ca_key))?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn pages(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, name: Arc<str>, tasks: Tasks) {
    let service = service_fn(move |request| std::future::ready(Ok::<_, Infallible>(page(request, &name, &tasks))));
    // Clients that go away are no fault of a service.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades()
        .await;
}

type Body = BoxBody<Bytes, hyper::Error>;

fn page(mut request: Request<Incoming>, name: &str, tasks: &Tasks) -> Response<Body> {
    if let Some(protocol) = request.headers().get(header::UPGRADE).cloned() {
        let upgrading = hyper::upgrade::on(&mut request);
        tasks.spawn(echo_upgraded(upgrading));
        let mut response = Response::new(text(String::new()));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(header::UPGRADE, protocol);
        response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
        return response;
    }
    let path = request.uri().path().to_owned();
    if path == "/echo" {
        return Response::new(request.into_body().boxed());
    }
    let bytes = path.strip_prefix("/bytes/").map(str::parse::<usize>);
    match (path.as_str(), bytes) {
        ("/", _) => Response::new(text(format!("hello from {name}\n"))),
        (_, Some(Ok(count))) => Response::new(text("x".repeat(count.min(1 << 30)))),
        (_, Some(Err(_)) | None) => {
            let mut response = Response::new(text(format!("{name} has no {path}\n")));
            *response.status_mut() = StatusCode::NOT_FOUND;
            response
        }
    }
}

async fn echo_upgraded(upgrading: hyper::upgrade::OnUpgrade) {
    if let Ok(upgraded) = upgrading.await {
        let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
        let _ = tokio::io::copy(&mut read, &mut write).await;
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut write).await;
    }
}

fn text(text: String) -> Body {
    Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed()
}
