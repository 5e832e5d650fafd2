//! The egress door, tried as kube-apiserver goes through it: a CONNECT for each node, by the same address.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::Args;
use proto::target::HostPort;
use runtime::{identity::certificates, tls::provider};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;

use super::check::Check;
use crate::{failure::Failure, text};

/// The door answers within 10 s by itself.
const ANSWER: Duration = Duration::from_secs(12);
/// Longest head of an answer in bytes.
const MAX_HEAD: u64 = 16 * 1024;

/// Which door.
#[derive(Debug, Args)]
pub(super) struct DoorArgs {
    /// The egress door: the path of its socket, or HOST:PORT.
    #[arg(long, value_name = "DOOR")]
    door: Option<String>,
    /// The CA of the door's certificate; that of the mesh, as a rule.
    #[arg(long, value_name = "FILE", requires = "door")]
    door_ca: Option<PathBuf>,
    /// The certificate that kube-apiserver shows there.
    #[arg(long, value_name = "FILE", requires = "door_key")]
    door_cert: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "FILE", requires = "door_cert")]
    door_key: Option<PathBuf>,
    /// The name in the door's certificate (tlsServerName) [default: the host of --door].
    #[arg(long, value_name = "NAME", requires = "door")]
    door_name: Option<String>,
}

/// A door that can be tried.
#[derive(Clone, Debug)]
pub(super) enum Door {
    /// A unix socket.
    Socket(PathBuf),
    /// TLS.
    Tcp {
        /// Where.
        at: HostPort,
        /// As whom, and whom to trust.
        tls: Arc<ClientConfig>,
        /// Who must answer.
        name: ServerName<'static>,
    },
}

impl DoorArgs {
    /// Reads what is needed for it.
    ///
    /// # Errors
    /// If a file cannot be used, or something is missing.
    pub(super) fn open(&self) -> Result<Option<Door>, Failure> {
        let Some(door) = &self.door else { return Ok(None) };
        if door.contains('/') {
            return Ok(Some(Door::Socket(door.into())));
        }
        let at: HostPort = door.parse().map_err(|e| Failure::Usage(format!("--door {door}: {e}")))?;
        let (Some(ca), Some(cert), Some(key)) = (&self.door_ca, &self.door_cert, &self.door_key) else {
            return Err(Failure::Usage(
                "a door over TCP takes --door-ca, --door-cert and --door-key: it lets nobody in without the certificate \
                 of kube-apiserver"
                    .into(),
            ));
        };
        let name = self.door_name.clone().unwrap_or_else(|| at.host.clone());
        let name = ServerName::try_from(name).map_err(|e| Failure::Usage(format!("--door-name: {e}")))?;
        Ok(Some(Door::Tcp { at, tls: Arc::new(tls(ca, cert, key)?), name }))
    }
}

fn tls(ca: &Path, cert: &Path, key: &Path) -> Result<ClientConfig, Failure> {
    let unusable = |path: &Path, e: &dyn std::fmt::Display| Failure::Failed(format!("{}: {e}", path.display()));
    let read = |path: &Path| std::fs::read_to_string(path).map_err(|e| unusable(path, &e));
    let mut roots = RootCertStore::empty();
    for root in certificates(&read(ca)?).map_err(|e| unusable(ca, &e))? {
        roots.add(root).map_err(|e| unusable(ca, &e))?;
    }
    let chain = certificates(&read(cert)?).map_err(|e| unusable(cert, &e))?;
    let secret = PrivateKeyDer::from_pem_slice(read(key)?.as_bytes()).map_err(|e| unusable(key, &e))?;
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| Failure::Failed(e.to_string()))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, secret)
        .map_err(|e| unusable(key, &e))
}

impl Door {
    /// Asks for the way to a kubelet. Returns how long the answer took.
    ///
    /// # Errors
    /// With what kubectl would show.
    pub(super) async fn dial(&self, to: &HostPort) -> Result<Duration, String> {
        let begun = Instant::now();
        let asked = async {
            match self {
                Self::Socket(path) => {
                    let socket = UnixStream::connect(path).await.map_err(|e| format!("{}: {e}", path.display()))?;
                    connect(socket, to).await
                }
                Self::Tcp { at, tls, name } => {
                    let place = (at.host.as_str(), at.port);
                    let socket = TcpStream::connect(place).await.map_err(|e| format!("{at}: {e}"))?;
                    let tls = TlsConnector::from(Arc::clone(tls)).connect(name.clone(), socket).await;
                    connect(tls.map_err(|e| format!("{at}: {e}"))?, to).await
                }
            }
        };
        timeout(ANSWER, asked)
            .await
            .map_err(|_| format!("the door did not answer within {}", text::span(ANSWER)))??;
        Ok(begun.elapsed())
    }
}

async fn connect(mut socket: impl AsyncRead + AsyncWrite + Unpin, to: &HostPort) -> Result<(), String> {
    let lost = |e: std::io::Error| format!("the door hung up: {e}");
    socket.write_all(format!("CONNECT {to} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").as_bytes()).await.map_err(lost)?;
    let mut head = Vec::new();
    let mut limited = socket.take(MAX_HEAD);
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        if limited.read_buf(&mut head).await.map_err(lost)? == 0 {
            return Err("the door hung up without an answer; does another program listen there?".into());
        }
    }
    let text = String::from_utf8_lossy(&head);
    let line = text.lines().next().unwrap_or_default();
    match line.split_once(' ').filter(|(version, _)| version.starts_with("HTTP/1.")) {
        Some((_, status)) if status.starts_with("200 ") => Ok(()),
        Some((_, status)) => Err(status.to_owned()),
        None => Err("what listens there does not speak HTTP".into()),
    }
}

/// What a refusal of the door means, and what to do.
pub(super) fn explain(node: &str, to: &HostPort, why: &str) -> Check {
    let slug = why.split(' ').nth(1).unwrap_or_default();
    let remedy = match slug {
        "no-book" => {
            "control has given the shards no address book: [kubernetes] enabled = true, and /readyz of control says how it \
             goes"
        }
        "unknown-host" => {
            "control does not know the node by that address yet: /readyz of control tells how old its address book is"
        }
        "no-edge" => "control does not take the node for an edge: its own log says whether the annotation is wrong",
        "ambiguous" => "start kube-apiserver with --kubelet-preferred-address-types=Hostname",
        "policy-denied" => "meshctl policy allow --from apiserver --to 'edge/*' --ports '*'",
        "client-denied" => "list a name of this certificate in doors.egress.tcp.clients of the shard",
        "edge-denied" => "the edge's configuration shuts kubelet out: kubelet = true, and allow for further addresses",
        "edge-offline" | "link-lost" => "the edge has lost its tunnel: its log says why",
        "target-refused" => "kubelet does not listen on that port of the machine: look at kubelet there",
        "target-timeout" | "target-unreachable" => {
            "the edge does not reach kubelet: look at kubelet and firewalls there"
        }
        _ => "the shard's access records have the same stream with all that is known of it",
    };
    Check::fail("door", node, format!("CONNECT {to}: {why}"), remedy)
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    async fn answered(answer: &'static [u8]) -> Result<Duration, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("egress.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let shard = async {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 64];
            let read = socket.read(&mut head).await.unwrap();
            assert_eq!(&head[..read], b"CONNECT node-1:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
            socket.write_all(answer).await.unwrap();
        };
        let to = "node-1:10250".parse().unwrap();
        let door = Door::Socket(path);
        tokio::join!(door.dial(&to), shard).0
    }

    #[tokio::test]
    async fn the_doors_own_words_are_told_with_a_remedy() {
        assert!(answered(b"HTTP/1.1 200 Connection Established\r\n\r\n").await.is_ok());
        let refused =
            answered(b"HTTP/1.1 502 ambiguous node address 10.0.0.5: a, b\r\nX: y\r\n\r\nbody").await.unwrap_err();
        assert_eq!(refused, "502 ambiguous node address 10.0.0.5: a, b");
        let check = explain("node-1", &"10.0.0.5:10250".parse().unwrap(), &refused);
        assert!(check.remedy.unwrap().contains("Hostname"));
        assert!(answered(b"").await.unwrap_err().contains("hung up"));
        assert!(answered(b"SSH-2.0-x\r\n\r\n").await.unwrap_err().contains("does not speak HTTP"));
        let nobody = Door::Socket("/nonexistent/egress.sock".into()).dial(&"a:1".parse().unwrap()).await;
        assert!(nobody.unwrap_err().contains("/nonexistent/egress.sock"));
    }

    #[test]
    fn a_door_over_tcp_takes_certificates() {
        let none = DoorArgs { door: None, door_ca: None, door_cert: None, door_key: None, door_name: None };
        assert!(none.open().unwrap().is_none());
        let bare = DoorArgs { door: Some("10.96.0.131:8131".into()), ..none };
        assert!(matches!(bare.open(), Err(Failure::Usage(why)) if why.contains("--door-ca")));
    }
}
