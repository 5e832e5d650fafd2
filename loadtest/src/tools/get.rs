//! A page over HTTP or HTTPS, for machines without curl.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context;
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use runtime::identity::certificates;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
};
use tokio_rustls::TlsConnector;

use crate::say;

/// What to get.
#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// http:// or https://
    url: Uri,
    /// Where to connect to instead of the URL's host
    #[arg(long, value_name = "HOST:PORT")]
    connect: Option<String>,
    /// The CA that the server must have, PEM
    #[arg(long, value_name = "FILE")]
    cacert: Option<PathBuf>,
}

/// Gets it and prints the body; a status that is no success is an error.
pub(crate) async fn run(args: GetArgs) -> anyhow::Result<()> {
    let host = args.url.host().context("the URL names no host")?.to_owned();
    let tls = args.url.scheme_str() == Some("https");
    let port = args.url.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let address = args.connect.unwrap_or_else(|| format!("{host}:{port}"));
    let socket = TcpStream::connect(&address).await.with_context(|| format!("cannot connect to {address}"))?;
    if tls {
        let mut roots = rustls::RootCertStore::empty();
        let file = args.cacert.context("name the CA with --cacert")?;
        for certificate in certificates(&std::fs::read_to_string(&file)?)? {
            roots.add(certificate)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(host)?;
        let socket = TlsConnector::from(Arc::new(config)).connect(name, socket).await.context("TLS")?;
        exchange(socket, &args.url).await
    } else {
        exchange(socket, &args.url).await
    }
}

async fn exchange(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, url: &Uri) -> anyhow::Result<()> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(connection);
    let path = url.path_and_query().map_or("/", |p| p.as_str());
    let host = url.authority().context("the URL names no host")?.as_str();
    let request = Request::get(path).header("host", host).body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    say(String::from_utf8_lossy(&body).trim_end())?;
    anyhow::ensure!(status.is_success(), "the answer is {status}");
    Ok(())
}
