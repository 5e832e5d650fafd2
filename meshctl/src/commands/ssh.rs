//! `meshctl ssh`: OpenSSH through the mesh.

use std::{
    ffi::OsString,
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process,
};

use clap::Args;
use proto::{id::EdgeId, target::HostPort};

use super::Context;
use crate::{failure::Failure, session};

mod record;

/// Runs OpenSSH to an edge through the mesh.
///
/// Also to a host that the edge can reach. The sshd there checks the user as it always does.
#[derive(Debug, Args)]
#[command(
    override_usage = "meshctl ssh [-l USER] [--record FILE] [USER@]EDGE[/HOST] [SSH OPTIONS] [COMMAND]",
    after_help = "Everything behind EDGE goes to ssh. The exit status is ssh's.

Examples:
  meshctl ssh root@shop-1
  meshctl ssh shop-1 -l root -p 2222 uptime
  meshctl ssh pi@shop-1/10.0.0.5                   a host beside the edge
  meshctl ssh shop-1 -L 5432:localhost:5432 -N
  meshctl ssh --record today.cast root@shop-1      and what is shown goes to a file (asciicast)

For scp, rsync and git, in ~/.ssh/config:
  Host shop-*
    ProxyCommand meshctl proxy %h:%p"
)]
pub(crate) struct SshArgs {
    /// The user to log in as.
    #[arg(short = 'l', long, value_name = "USER")]
    pub(crate) login: Option<String>,

    /// Writes what is shown to a new file, as asciicast v2; not what is typed.
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Option<PathBuf>,

    /// The edge, and what goes to ssh.
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, value_name = "EDGE")]
    pub(crate) words: Vec<OsString>,
}

/// Where to: `[user@]edge[/host]`.
#[derive(Debug, PartialEq, Eq)]
struct Destination {
    user: Option<String>,
    edge: EdgeId,
    /// As seen from the edge, if it is not the edge itself.
    host: Option<String>,
}

impl std::str::FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (user, place) = text.rsplit_once('@').map_or((None, text), |(user, place)| (Some(user), place));
        let (edge, host) = place.split_once('/').map_or((place, None), |(edge, host)| (edge, Some(host)));
        let edge = edge.parse().map_err(|e| format!("{e}; write [USER@]EDGE before the options of ssh"))?;
        // The port is ssh's affair; any will do to check the host.
        let host =
            host.map(|h| HostPort::new(h.trim_matches(['[', ']']), 22)).transpose().map_err(|e| e.to_string())?;
        // ssh would take such a user for an option, or split at it.
        if user.is_some_and(|u| u.is_empty() || u.starts_with('-')) {
            return Err(format!("{text:?} has no user before the '@'"));
        }
        Ok(Self { user: user.map(str::to_owned), edge, host: host.map(|h| h.host) })
    }
}

impl Destination {
    /// The target of `meshctl proxy`, with ssh's placeholder for the port.
    fn target(&self) -> String {
        match &self.host {
            Some(v6) if v6.contains(':') => format!("{}/[{v6}]:%p", self.edge),
            Some(host) => format!("{}/{host}:%p", self.edge),
            None => format!("{}:%p", self.edge),
        }
    }

    /// The name in known_hosts. The mesh's edge and a host of that name in the network are not the same.
    fn alias(&self) -> String {
        match &self.host {
            Some(host) => format!("causeway-{}-{}", self.edge, host.replace(':', "-")),
            None => format!("causeway-{}", self.edge),
        }
    }
}

/// Becomes ssh, or runs it and records what it shows.
///
/// # Errors
/// If ssh cannot be started, or the recording not be written. Without a recording, this never returns otherwise.
pub(crate) async fn run(context: &Context, args: SshArgs) -> Result<(), Failure> {
    let mut words = args.words.into_iter();
    let first = words.next().unwrap_or_default();
    let to: Destination = first.to_string_lossy().parse().map_err(Failure::Usage)?;
    if !session::exists(&context.home) {
        return Err(session::not_logged_in(&context.home));
    }
    let program = std::env::current_exe().map_err(|e| Failure::Failed(format!("cannot find myself: {e}")))?;
    let user = match (to.user.clone(), args.login) {
        (Some(_), Some(_)) => return Err(Failure::Usage("the user is named twice: before '@' and with -l".into())),
        (named, login) => named.or(login),
    };
    let mut command = process::Command::new("ssh");
    command
        .args(["-o", &format!("ProxyCommand={}", proxy_command(&program, &context.home, &to)?)])
        .args(["-o", &format!("HostKeyAlias={}", to.alias())])
        // The address of an edge is that of some shard at some time.
        .args(["-o", "CheckHostIP=no"]);
    if let Some(user) = user {
        command.args(["-l", &user]);
    }
    command.arg(to.edge.as_str()).args(words);
    let Some(path) = args.record else { return Err(not_started(&command.exec())) };
    match record::run(command.into(), &path, &format!("meshctl ssh {}", first.to_string_lossy())).await? {
        0 => Ok(()),
        status => Err(Failure::Told(status)),
    }
}

fn not_started(error: &io::Error) -> Failure {
    Failure::Failed(if error.kind() == io::ErrorKind::NotFound {
        "OpenSSH's client 'ssh' is not installed here: install it (package openssh-client or openssh-clients), or use \
         'meshctl forward EDGE 22:2222' with another client"
            .into()
    } else {
        format!("cannot start ssh: {error}")
    })
}

/// What ssh shall run (it puts `exec` before it), quoted for the shell and for ssh's own placeholders.
fn proxy_command(program: &Path, home: &Path, to: &Destination) -> Result<String, Failure> {
    Ok(format!("{} --home {} proxy {}", quoted(program)?, quoted(home)?, to.target()))
}

fn quoted(path: &Path) -> Result<String, Failure> {
    let absolute = std::path::absolute(path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
    let text = absolute.to_str().filter(|t| !t.contains('\n')).ok_or_else(|| {
        Failure::Failed(format!("{} has a name that ssh cannot pass on; choose another folder", path.display()))
    })?;
    Ok(format!("'{}'", text.replace('\'', r"'\''").replace('%', "%%")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read() {
        let to = |text: &str| text.parse::<Destination>();
        assert_eq!(to("shop-1").unwrap().target(), "shop-1:%p");
        let pi = to("pi@shop-1/10.0.0.5").unwrap();
        assert_eq!(
            (pi.user.as_deref(), &*pi.target(), &*pi.alias()),
            (Some("pi"), "shop-1/10.0.0.5:%p", "causeway-shop-1-10.0.0.5")
        );
        assert_eq!(to("shop-1/[fd00::5]").unwrap().target(), "shop-1/[fd00::5]:%p");
        for bad in ["", "-X", "@shop-1", "-oX@shop-1", "Shop", "shop-1/a b", "shop-1/$(id)", "shop;id"] {
            assert!(to(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_ssh_gets_is_quoted_for_the_shell_and_for_ssh() {
        let to = "shop-1".parse().unwrap();
        let command = proxy_command(Path::new("/opt/it's 100%/meshctl"), Path::new("/home/a b"), &to).unwrap();
        assert_eq!(command, r"'/opt/it'\''s 100%%/meshctl' --home '/home/a b' proxy shop-1:%p");
    }
}
