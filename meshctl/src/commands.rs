//! The commands, one file each.

use std::path::PathBuf;

use clap::Subcommand;

use crate::{failure::Failure, out::Form, session::Session};

pub(crate) mod audit;
pub(crate) mod completions;
pub(crate) mod dev;
pub(crate) mod diag;
pub(crate) mod edge;
pub(crate) mod forward;
pub(crate) mod kube;
pub(crate) mod login;
pub(crate) mod netcheck;
pub(crate) mod ping;
pub(crate) mod policy;
pub(crate) mod proxy;
pub(crate) mod ring;
pub(crate) mod shard;
pub(crate) mod ssh;
pub(crate) mod ssh_cert;
pub(crate) mod token;
pub(crate) mod user;
pub(crate) mod why;

/// What every command knows.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// Where the login is kept.
    pub(crate) home: PathBuf,
    /// The form of results.
    pub(crate) form: Form,
}

impl Context {
    /// The login, renewed if it was time.
    ///
    /// # Errors
    /// If nobody is logged in.
    pub(crate) async fn session(&self) -> Result<Session, Failure> {
        Session::open(&self.home).await
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Login(login::LoginArgs),
    Logout(login::LogoutArgs),
    Whoami(login::WhoamiArgs),
    Token(token::TokenArgs),
    Edge(edge::EdgeArgs),
    Shard(shard::ShardArgs),
    Ring(ring::RingArgs),
    User(user::UserArgs),
    Policy(policy::PolicyArgs),
    Audit(audit::AuditArgs),
    Ssh(ssh::SshArgs),
    SshCert(ssh_cert::SshCertArgs),
    SshConfig(ssh_cert::SshConfigArgs),
    Kube(kube::KubeArgs),
    Proxy(proxy::ProxyArgs),
    Forward(forward::ForwardArgs),
    Ping(ping::PingArgs),
    Why(why::WhyArgs),
    Netcheck(netcheck::NetcheckArgs),
    Diag(diag::DiagArgs),
    Completions(completions::CompletionsArgs),
    Dev(dev::DevArgs),
}

impl Command {
    /// Does it.
    ///
    /// # Errors
    /// If it does not work out.
    pub(crate) async fn run(self, context: &Context) -> Result<(), Failure> {
        match self {
            Self::Login(args) => login::login(context, args).await,
            Self::Logout(args) => login::logout(context, &args),
            Self::Whoami(args) => login::whoami(context, &args).await,
            Self::Token(args) => token::run(context, args).await,
            Self::Edge(args) => edge::run(context, args).await,
            Self::Shard(args) => shard::run(context, args).await,
            Self::Ring(args) => ring::run(context, args).await,
            Self::User(args) => user::run(context, args).await,
            Self::Policy(args) => policy::run(context, args).await,
            Self::Audit(args) => audit::run(context, args).await,
            Self::Ssh(args) => ssh::run(context, args).await,
            Self::SshCert(args) => ssh_cert::certificate(context, args).await,
            Self::SshConfig(args) => ssh_cert::config(context, args).await,
            Self::Kube(args) => kube::run(context, args).await,
            Self::Proxy(args) => proxy::run(context, &args).await,
            Self::Forward(args) => forward::run(context, args).await,
            Self::Ping(args) => ping::run(context, &args).await,
            Self::Why(args) => why::run(context, &args).await,
            Self::Netcheck(args) => netcheck::run(context, args).await,
            Self::Diag(args) => diag::run(context, args).await,
            Self::Completions(args) => completions::run(&args),
            Self::Dev(args) => dev::run(context, &args).await,
        }
    }
}
