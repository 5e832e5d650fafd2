//! `meshctl user`.

use clap::{Args, Subcommand};
use proto::id::EdgeId;
use serde_json::{Value, json};

use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
};

/// Revokes users.
#[derive(Debug, Args)]
pub(crate) struct UserArgs {
    #[command(subcommand)]
    command: UserCommand,
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Takes a user's access away: ends their links, and lets them log in with a new token only.
    Revoke {
        /// The user.
        name: EdgeId,
        /// Does not ask.
        #[arg(short, long)]
        yes: bool,
    },
}

/// Does what is asked for.
///
/// # Errors
/// If control cannot be reached or says no.
pub(crate) async fn run(context: &Context, args: UserArgs) -> Result<(), Failure> {
    let UserCommand::Revoke { name, yes } = args.command;
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
