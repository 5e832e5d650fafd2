//! `meshctl ssh-cert` and `meshctl ssh-config`: what stock OpenSSH needs to jump through a shard.

use std::{
    fmt::Write,
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use proto::{
    ssh::{Authorities, Certificate, MAX_LINE, UserCertificateRequest},
    target::HostPort,
};
use runtime::clock::unix_now;
use serde_json::json;

use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    session::Session,
    text,
};

/// The port of a shard's SSH door, if nothing else is said.
const PORT: u16 = 2222;
/// Keys in `~/.ssh` that are taken if none is named, the best first.
const KEYS: [&str; 5] = ["id_ed25519.pub", "id_ed25519_sk.pub", "id_ecdsa.pub", "id_ecdsa_sk.pub", "id_rsa.pub"];

/// Gets an SSH certificate for a key of yours.
///
/// With it, OpenSSH gets in at the SSH doors of the shards: ssh -J SHARD:2222 USER@EDGE. It is short-lived, and is written
/// beside the key, where ssh finds it by itself.
#[derive(Debug, Args)]
#[command(after_help = "Only the public key is sent.

Examples:
  meshctl ssh-cert                                  for the key in ~/.ssh
  meshctl ssh-cert --key ~/.ssh/work.pub --ttl 1h
  ssh-keygen -L -f ~/.ssh/id_ed25519-cert.pub       shows what it says")]
pub(crate) struct SshCertArgs {
    /// The public key [default: the best of ~/.ssh/id_*.pub].
    #[arg(long, short, value_name = "FILE")]
    key: Option<PathBuf>,
    /// For how long: 90s, 30m, 12h; control has a limit, and takes it if nothing is said.
    #[arg(long, value_parser = text::parse_span, value_name = "SPAN")]
    ttl: Option<Duration>,
}

/// Prints what OpenSSH should know of this mesh: a part for ~/.ssh/config, or a line for ~/.ssh/known_hosts.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  meshctl ssh-config --known-hosts >> ~/.ssh/known_hosts
  meshctl ssh-config --jump ssh.example.org:2222 --edges 'shop-*' >> ~/.ssh/config
  ssh root@shop-1")]
pub(crate) struct SshConfigArgs {
    /// The SSH door to go through; can be repeated [default: port 2222 of each shard].
    #[arg(long, value_name = "HOST[:PORT]")]
    jump: Vec<String>,
    /// Which names of hosts are edges, as a pattern of ssh.
    #[arg(long, value_name = "PATTERN", default_value = "*.edge")]
    edges: String,
    /// Prints the line for known_hosts instead: shards then prove themselves by their certificates.
    #[arg(long)]
    known_hosts: bool,
}

/// Gets a certificate and writes it.
///
/// # Errors
/// If there is no key, control says no, or the file cannot be written.
pub(crate) async fn certificate(context: &Context, args: SshCertArgs) -> Result<(), Failure> {
    let path = match args.key {
        Some(path) => path,
        None => usual_key()?,
    };
    let session = context.session().await?;
    let (written, certificate) = sign(&session, &path, args.ttl).await?;
    match context.form {
        Form::Json => out::json(&json!({
            "key": path,
            "certificate": written,
            "not_before": certificate.not_before,
            "not_after": certificate.not_after,
            "user": session.facts().identity.name,
        })),
        Form::Table => {
            out::line(&format!(
                "{} names {} and ends {}.",
                written.display(),
                session.facts().identity.name,
                text::until(certificate.not_after, unix_now())
            ))?;
            out::note("Use it with: ssh -J SHARD:2222 USER@EDGE ('meshctl ssh-config' makes that shorter)");
            Ok(())
        }
    }
}

async fn sign(session: &Session, path: &Path, ttl: Option<Duration>) -> Result<(PathBuf, Certificate), Failure> {
    let ttl_secs = ttl.map(|ttl| u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX));
    let request = UserCertificateRequest { key: public_key(path)?, ttl_secs };
    let certificate: Certificate = session.api().post("/v1/ssh/user-certificates", &request).await?;
    let written = beside(path);
    write(&written, &certificate.certificate)
        .map_err(|e| Failure::Failed(format!("cannot write {}: {e}", written.display())))?;
    Ok((written, certificate))
}

/// The public key that is meant by a file: its own line, or that of the `.pub` beside a private key.
///
/// # Errors
/// If it cannot be read, or is no public key.
pub(crate) fn public_key(path: &Path) -> Result<String, Failure> {
    let named = path.extension().is_some_and(|e| e == "pub");
    let public = if named { path.to_owned() } else { with_suffix(path, ".pub") };
    let failed = |e: &dyn std::fmt::Display| Failure::Failed(format!("cannot read {}: {e}", public.display()));
    let mut line = String::new();
    let most = MAX_LINE as u64 + 1;
    File::open(&public).and_then(|file| file.take(most).read_to_string(&mut line)).map_err(|e| failed(&e))?;
    if line.contains("PRIVATE KEY") {
        return Err(Failure::Usage(format!(
            "{} is a private key, which is not sent anywhere; name the public one",
            public.display()
        )));
    }
    Ok(line.trim().to_owned())
}

/// The best key of `~/.ssh`.
///
/// # Errors
/// If there is none.
pub(crate) fn usual_key() -> Result<PathBuf, Failure> {
    let home = std::env::home_dir().unwrap_or_default();
    let found = KEYS.iter().map(|name| home.join(".ssh").join(name)).find(|path| path.exists());
    found.ok_or_else(|| {
        Failure::Failed(format!(
            "there is no key in {}: make one with 'ssh-keygen -t ed25519', or name one with --key",
            home.join(".ssh").display()
        ))
    })
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Where OpenSSH looks for the certificate of a key.
fn beside(path: &Path) -> PathBuf {
    let private = if path.extension().is_some_and(|e| e == "pub") { path.with_extension("") } else { path.to_owned() };
    with_suffix(&private, "-cert.pub")
}

fn write(path: &Path, line: &str) -> io::Result<()> {
    let draft = with_suffix(path, ".new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o644).open(&draft)?;
    io::Write::write_all(&mut file, format!("{}\n", line.trim()).as_bytes())?;
    std::fs::rename(&draft, path)
}

/// Prints what OpenSSH should know.
///
/// # Errors
/// If control cannot be asked, or has no authority.
pub(crate) async fn config(context: &Context, args: SshConfigArgs) -> Result<(), Failure> {
    let session = context.session().await?;
    let doors = doors(&session, &args.jump).await?;
    let mesh = session.facts().identity.domain.to_string();
    if args.known_hosts {
        let authorities: Authorities = session.api().get("/v1/ssh/authorities").await?;
        if authorities.host.is_empty() {
            return Err(Failure::Failed(
                "control signs no SSH host keys (docs/operations.md, 'SSH'); compare fingerprints when ssh asks".into(),
            ));
        }
        let lines = known_hosts(&doors, &authorities.host, &mesh);
        return match context.form {
            Form::Json => out::json(&json!({ "known_hosts": lines.lines().collect::<Vec<_>>() })),
            Form::Table => out::text(&lines),
        };
    }
    let config = ssh_config(&doors, &args.edges, &mesh);
    match context.form {
        Form::Json => out::json(&json!({ "ssh_config": config })),
        Form::Table => out::text(&config),
    }
}

async fn doors(session: &Session, named: &[String]) -> Result<Vec<HostPort>, Failure> {
    if named.is_empty() {
        let shards = session.shards().await?;
        let hosts = shards.iter().filter_map(|s| s.addresses.first()).filter_map(|a| a.parse::<HostPort>().ok());
        let mut doors: Vec<HostPort> = Vec::new();
        for door in hosts.map(|at| HostPort { port: PORT, ..at }) {
            if !doors.contains(&door) {
                doors.push(door);
            }
        }
        if doors.is_empty() {
            return Err(Failure::Failed("control knows no shard now; name an SSH door with --jump HOST:PORT".into()));
        }
        return Ok(doors);
    }
    let door = |text: &String| {
        let with_port = text.parse::<HostPort>().or_else(|_| HostPort::new(text.trim_matches(['[', ']']), PORT));
        with_port.map_err(|e| Failure::Usage(format!("--jump {text:?}: {e}")))
    };
    named.iter().map(door).collect()
}

/// A line for each authority: it may speak for these doors and for no other host.
fn known_hosts(doors: &[HostPort], authorities: &[String], mesh: &str) -> String {
    let pattern = |door: &HostPort| {
        if door.port == 22 { door.host.clone() } else { format!("[{}]:{}", door.host, door.port) }
    };
    let hosts: Vec<String> = doors.iter().map(pattern).collect();
    let mut lines = String::new();
    for authority in authorities {
        // Into a string, which takes everything.
        let _ = writeln!(lines, "@cert-authority {} {authority} {mesh}", hosts.join(","));
    }
    lines
}

fn ssh_config(doors: &[HostPort], edges: &str, mesh: &str) -> String {
    let mut text = format!("# Edges of {mesh}, through the SSH door of a shard. 'meshctl ssh-cert' lets you in.\n");
    let jumps: Vec<String> = (1..=doors.len()).map(|i| format!("{mesh}-jump-{i}")).collect();
    for (jump, door) in jumps.iter().zip(doors) {
        // Into a string, which takes everything.
        let _ = write!(text, "Host {jump}\n  HostName {}\n  Port {}\n", door.host, door.port);
    }
    let first = jumps.first().map_or("", String::as_str);
    // The name of an edge is not that of a host in the network.
    let _ = write!(text, "Host {edges}\n  ProxyJump {first}\n  HostKeyAlias causeway-%n\n  CheckHostIP no\n");
    if jumps.len() > 1 {
        let _ = writeln!(text, "  # Any of these leads there: {}", jumps.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_lies_where_ssh_looks_for_it() {
        assert_eq!(beside(Path::new("/a/id_ed25519.pub")), Path::new("/a/id_ed25519-cert.pub"));
        assert_eq!(beside(Path::new("/a/work")), Path::new("/a/work-cert.pub"));
        assert_eq!(beside(Path::new("/a/my.key")), Path::new("/a/my.key-cert.pub"));
    }

    #[test]
    fn a_private_key_stays_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("id.pub");
        std::fs::write(&path, "-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
        assert!(public_key(&path).unwrap_err().to_string().contains("not sent anywhere"));
        std::fs::write(&path, "ssh-ed25519 AAAA me\n").unwrap();
        assert_eq!(public_key(&dir.path().join("id")).unwrap(), "ssh-ed25519 AAAA me");
    }

    #[test]
    fn an_authority_speaks_for_the_doors_alone() {
        let doors = ["a.example.org:2222".parse().unwrap(), "b.example.org:22".parse().unwrap()];
        let lines = known_hosts(&doors, &["ssh-ed25519 AAAA".to_owned()], "mesh.test");
        assert_eq!(lines, "@cert-authority [a.example.org]:2222,b.example.org ssh-ed25519 AAAA mesh.test\n");
        let config = ssh_config(&doors, "shop-*", "mesh.test");
        assert!(config.contains("Host mesh.test-jump-1\n  HostName a.example.org\n  Port 2222\n"), "{config}");
        assert!(config.contains("Host shop-*\n  ProxyJump mesh.test-jump-1\n"), "{config}");
    }
}
