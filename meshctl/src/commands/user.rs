//! `meshctl user`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use proto::{
    id::{EdgeId, GroupName},
    ssh::{Key, KeyRequest},
};
use runtime::clock::unix_now;
use serde_json::{Value, json};

use super::{
    Context,
    ssh_cert::{public_key, usual_key},
};
use crate::{
    failure::Failure,
    out::{self, Form},
    session::Session,
    table::{Cell, Table},
    text,
};

/// Revokes users, and keeps their SSH keys.
#[derive(Debug, Args)]
pub(crate) struct UserArgs {
    #[command(subcommand)]
    command: UserCommand,
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Takes a user's access away: ends their links, removes their SSH keys, and lets them log in with a new token only.
    Revoke {
        /// The user.
        name: EdgeId,
        /// Does not ask.
        #[arg(short, long)]
        yes: bool,
    },
    Key(KeyArgs),
}

/// Keeps SSH keys that are good at the SSH doors without a certificate.
#[derive(Debug, Args)]
#[command(
    after_help = "Users keep their own keys, and administrators those of all. For oneself, a certificate is better, \
since it ends by itself: meshctl ssh-cert.

Examples:
  meshctl user key add                                      your own, from ~/.ssh
  meshctl user key add robot --key robot.pub --group ops    an administrator, for a program
  meshctl user key ls robot
  meshctl user key rm 0f3a… --user robot"
)]
pub(crate) struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Registers a public key.
    Add {
        /// The user [default: yourself].
        name: Option<EdgeId>,
        /// The public key [default: the best of ~/.ssh/id_*.pub].
        #[arg(long, short, value_name = "FILE")]
        key: Option<PathBuf>,
        /// A group that the user has by it; can be repeated [default: all of yours, for yourself].
        #[arg(long = "group", value_name = "GROUP")]
        groups: Vec<GroupName>,
    },
    /// Lists the keys of a user.
    Ls {
        /// The user [default: yourself].
        name: Option<EdgeId>,
    },
    /// Removes a key; sessions by it end.
    Rm {
        /// As 'meshctl user key ls' shows it; its beginning will do.
        id: String,
        /// The user [default: yourself].
        #[arg(long)]
        user: Option<EdgeId>,
    },
}

/// Does what is asked for.
///
/// # Errors
/// If control cannot be reached or says no.
pub(crate) async fn run(context: &Context, args: UserArgs) -> Result<(), Failure> {
    let (name, yes) = match args.command {
        UserCommand::Revoke { name, yes } => (name, yes),
        UserCommand::Key(args) => return keys(context, args.command).await,
    };
    if !yes {
        out::confirm(&format!("Revoke user {name}? Their links end, and they need a new token to log in."), "--yes")?;
    }
    let session = context.session().await?;
    session.api().post::<Value>(&format!("/v1/users/{name}/revoke"), &()).await?;
    match context.form {
        Form::Json => out::json(&json!({ "revoked": name })),
        Form::Table => {
            out::line(&format!("User {name} is revoked. To let them back in: meshctl token create --user {name}"))
        }
    }
}

async fn keys(context: &Context, command: KeyCommand) -> Result<(), Failure> {
    match command {
        KeyCommand::Add { name, key, groups } => {
            let path = key.map_or_else(usual_key, Ok)?;
            let request = KeyRequest { key: public_key(&path)?, groups };
            let session = context.session().await?;
            let name = name.unwrap_or_else(|| myself(&session));
            let key: Key = session.api().post(&format!("/v1/users/{name}/keys"), &request).await?;
            match context.form {
                Form::Json => out::json(&key),
                Form::Table => out::line(&format!("{} is a key of {name} now: {}", path.display(), key.fingerprint)),
            }
        }
        KeyCommand::Ls { name } => {
            let session = context.session().await?;
            let name = name.unwrap_or_else(|| myself(&session));
            list(context, &of(&session, &name).await?)
        }
        KeyCommand::Rm { id, user } => {
            let session = context.session().await?;
            let name = user.unwrap_or_else(|| myself(&session));
            let key = chosen(of(&session, &name).await?, &id, &name)?;
            session.api().delete::<Option<()>>(&format!("/v1/users/{name}/keys/{}", key.id)).await?;
            match context.form {
                Form::Json => out::json(&json!({ "removed": key.id, "user": name })),
                Form::Table => out::line(&format!("{} is no key of {name} any more.", key.fingerprint)),
            }
        }
    }
}

fn myself(session: &Session) -> EdgeId {
    session.facts().identity.name.clone()
}

async fn of(session: &Session, name: &EdgeId) -> Result<Vec<Key>, Failure> {
    Ok(session.api().get(&format!("/v1/users/{name}/keys")).await?)
}

fn chosen(keys: Vec<Key>, id: &str, name: &EdgeId) -> Result<Key, Failure> {
    let mut fits = keys.into_iter().filter(|key| !id.is_empty() && (key.id.starts_with(id) || key.fingerprint == id));
    match (fits.next(), fits.next()) {
        (Some(key), None) => Ok(key),
        (None, _) => {
            Err(Failure::Failed(format!("user {name} has no key {id:?}; 'meshctl user key ls {name}' shows them")))
        }
        (Some(_), Some(_)) => Err(Failure::Usage(format!("more than one key of {name} begins with {id:?}"))),
    }
}

fn list(context: &Context, keys: &[Key]) -> Result<(), Failure> {
    match context.form {
        Form::Json => out::json(&keys),
        Form::Table => {
            let mut table = Table::new(&["ID", "FINGERPRINT", "GROUPS", "COMMENT", "ADDED", "BY"]);
            for key in keys {
                let groups: Vec<_> = key.groups.iter().map(GroupName::as_str).collect();
                let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
                table.row(vec![
                    key.id.chars().take(12).collect::<String>().into(),
                    key.fingerprint.as_str().into(),
                    Cell::or_dash(some(&groups.join(","))),
                    Cell::or_dash(some(&key.comment)),
                    format!("{} ago", text::age(key.created, unix_now())).into(),
                    key.created_by.as_str().into(),
                ]);
            }
            out::table(&table)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str) -> Key {
        Key {
            id: id.into(),
            fingerprint: format!("SHA256:{id}"),
            user: "alice".parse().unwrap(),
            groups: vec![],
            key: String::new(),
            comment: String::new(),
            created: 0,
            created_by: String::new(),
        }
    }

    #[test]
    fn a_key_is_chosen_by_its_beginning_if_that_says_enough() {
        let choose =
            |id: &str| chosen(vec![key("0a1"), key("0a2"), key("b")], id, &"alice".parse().unwrap()).map(|k| k.id);
        assert_eq!(choose("0a2").unwrap(), "0a2");
        assert_eq!(choose("SHA256:b").unwrap(), "b");
        assert!(choose("0a").unwrap_err().to_string().contains("more than one"));
        assert!(choose("c").is_err() && choose("").is_err());
    }
}
