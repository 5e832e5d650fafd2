//! `meshctl token`: who may join.

use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};
use proto::{
    api::{TokenCreated, TokenKind, TokenRequest, TokenView},
    id::{EdgeId, GroupName, SiteName},
};
use runtime::clock::unix_now;
use serde_json::json;

use super::Context;
use crate::{
    failure::Failure,
    out::{self, Form},
    table::{Cell, Table},
    text,
};

/// Makes, lists and removes tokens, with which machines and people join.
#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    Create(CreateArgs),
    /// Lists the tokens that have not ended.
    Ls,
    /// Removes a token; who joined with it stays.
    Rm {
        /// As 'meshctl token ls' shows it.
        #[arg(value_parser = token_id)]
        id: String,
    },
}

/// Makes a token and prints its join line, this once.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("kind").required(true),
    after_help = "The join line goes to standard output, everything else to standard error.

Examples:
  meshctl token create --edge --name shop-1
  meshctl token create --edge --uses 50 --ttl 7d --site berlin     fifty machines, each with a name of its own
  meshctl token create --edge --name shop-1 | ssh shop-1 mesh-edge join
  meshctl token create --user alice --group ops
  meshctl token create --access prometheus --ttl 90d               for programs, at the proxy door"
)]
pub(crate) struct CreateArgs {
    /// For an edge.
    #[arg(long, group = "kind")]
    edge: bool,
    /// For a shard.
    #[arg(long, group = "kind")]
    shard: bool,
    /// For a person or a program that uses meshctl.
    #[arg(long, group = "kind", value_name = "NAME")]
    user: Option<EdgeId>,
    /// For a program that uses the proxy door under this name, without a certificate.
    #[arg(long, group = "kind", value_name = "NAME")]
    access: Option<EdgeId>,
    /// The only name that the edge or shard may take.
    #[arg(long, conflicts_with_all = ["user", "access"])]
    name: Option<EdgeId>,
    /// How many may join with it.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "access")]
    uses: u32,
    /// How long it is good: 90s, 30m, 12h, 7d.
    #[arg(long, default_value = "1h", value_parser = text::parse_span, value_name = "SPAN")]
    ttl: Duration,
    /// A group of the user; can be repeated. Members of 'admin' may change everything.
    #[arg(long = "group", value_name = "GROUP", conflicts_with_all = ["edge", "shard"])]
    groups: Vec<GroupName>,
    /// The site of the edges.
    #[arg(long, conflicts_with_all = ["user", "access", "shard"])]
    site: Option<SiteName>,
    /// Lets an edge join that has joined before; its old certificates are then revoked.
    #[arg(long, conflicts_with_all = ["user", "access", "shard"])]
    replace: bool,
}

fn token_id(text: &str) -> Result<String, String> {
    let fits = !text.is_empty()
        && text.len() <= 100
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if fits { Ok(text.to_owned()) } else { Err("no token id; 'meshctl token ls' lists them".into()) }
}

/// Does what is asked for.
///
/// # Errors
/// If control cannot be reached or says no.
pub(crate) async fn run(context: &Context, args: TokenArgs) -> Result<(), Failure> {
    let session = context.session().await?;
    match args.command {
        TokenCommand::Create(args) => {
            let request = args.request();
            let created: TokenCreated = session.api().post("/v1/tokens", &request).await?;
            show_created(context.form, &request, &created)
        }
        TokenCommand::Ls => {
            let tokens: Vec<TokenView> = session.api().get("/v1/tokens").await?;
            match context.form {
                Form::Json => out::json(&tokens),
                Form::Table => out::table(&table(&tokens, unix_now())),
            }
        }
        TokenCommand::Rm { id } => {
            session.api().delete::<serde_json::Value>(&format!("/v1/tokens/{id}")).await?;
            match context.form {
                Form::Json => out::json(&json!({ "removed": id })),
                Form::Table => out::line(&format!("Token {id} is removed.")),
            }
        }
    }
}

impl CreateArgs {
    fn request(&self) -> TokenRequest {
        let (kind, name) = match (&self.user, &self.access) {
            (Some(user), _) => (TokenKind::User, Some(user)),
            (None, Some(access)) => (TokenKind::Access, Some(access)),
            (None, None) if self.edge => (TokenKind::Edge, self.name.as_ref()),
            (None, None) => (TokenKind::Shard, self.name.as_ref()),
        };
        TokenRequest {
            kind,
            name: name.cloned(),
            uses: self.uses,
            ttl_secs: u32::try_from(self.ttl.as_secs()).unwrap_or(u32::MAX),
            groups: self.groups.clone(),
            site: self.site.clone(),
            replace: self.replace,
        }
    }
}

fn show_created(form: Form, request: &TokenRequest, created: &TokenCreated) -> Result<(), Failure> {
    let secret = created.join.as_ref().unwrap_or(&created.token);
    if form == Form::Json {
        return out::json(created);
    }
    out::note(&instructions(request, created));
    out::line(secret.reveal())
}

fn instructions(request: &TokenRequest, created: &TokenCreated) -> String {
    let name = request.name.as_ref().map(EdgeId::as_str).unwrap_or_default();
    let good = text::span(Duration::from_secs(request.ttl_secs.into()));
    let uses = text::counted(request.uses.into(), "use");
    let id = &created.view.id;
    let what = |who: &str, command: &str| {
        format!("On the machine of {who}, run\n\n  {command}\n\nand give it this line on standard input.")
    };
    let how = match request.kind {
        TokenKind::Edge if name.is_empty() => what("the edge", "mesh-edge join"),
        TokenKind::Shard if name.is_empty() => what("the shard", "mesh-cloud join"),
        TokenKind::Edge => what(&format!("edge {name}"), "mesh-edge join"),
        TokenKind::Shard => what(&format!("shard {name}"), "mesh-cloud join"),
        TokenKind::User => what(&format!("user {name}"), "meshctl login"),
        TokenKind::Access => {
            return format!(
                "This is the password of {name} at the proxy door of a shard, as in\n\n  \
                 curl -x https://SHARD:7480 --proxy-cacert bundle.pem --proxy-user {name} http://EDGE:PORT/\n\n\
                 where curl asks for it, and bundle.pem lies where 'meshctl whoami' says the home is. On the shard's \
                 own machine, http:// will do.\n\
                 It is shown only this once, and good for {good}. To take it back: meshctl token rm {id}\n"
            );
        }
    };
    format!(
        "{how} It is shown only this once, and good for {uses} within {good}.\nTo take it back: meshctl token rm {id}\n"
    )
}

fn table(tokens: &[TokenView], now: i64) -> Table {
    let mut table = Table::new(&["ID", "FOR", "NAME", "GROUPS", "SITE", "USES LEFT", "ENDS", "BY", "AGE"]);
    for token in tokens {
        let groups: Vec<_> = token.groups.iter().map(GroupName::as_str).collect();
        table.row(vec![
            token.id.as_str().into(),
            token.kind.as_str().into(),
            Cell::or_dash(token.name.as_ref()),
            Cell::or_dash((!groups.is_empty()).then(|| groups.join(","))),
            Cell::or_dash(token.site.as_ref()),
            Cell::or_dash(token.uses_left),
            text::until(token.expires, now).into(),
            token.created_by.as_str().into(),
            text::age(token.created, now).into(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: CreateArgs,
    }

    fn parse(line: &str) -> Result<TokenRequest, clap::Error> {
        Line::try_parse_from(std::iter::once("x").chain(line.split(' '))).map(|line| line.args.request())
    }

    #[test]
    fn a_request_says_what_the_flags_say() {
        let edges = parse("--edge --uses 50 --ttl 7d --site berlin").unwrap();
        assert_eq!((edges.kind, edges.uses, edges.ttl_secs), (TokenKind::Edge, 50, 7 * 86_400));
        assert_eq!((edges.name, edges.site.unwrap().as_str()), (None, "berlin"));
        let user = parse("--user alice --group ops --group admin").unwrap();
        assert_eq!((user.kind, user.name.unwrap().as_str(), user.groups.len()), (TokenKind::User, "alice", 2));
        assert_eq!(parse("--access prometheus").unwrap().kind, TokenKind::Access);
    }

    #[test]
    fn flags_that_make_no_sense_together_are_refused() {
        for bad in [
            "--name x",
            "--edge --shard",
            "--edge --user alice",
            "--edge --group ops",
            "--user alice --site berlin",
            "--user alice --name bob",
            "--shard --replace",
            "--edge --uses 0",
            "--edge --ttl 5",
            "--user Alice",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_words_around_a_token_do_not_hold_it() {
        let request = parse("--edge --name shop-1").unwrap();
        let view = TokenView {
            id: "k3x9".into(),
            kind: TokenKind::Edge,
            name: request.name.clone(),
            uses_left: Some(1),
            expires: 4600,
            groups: vec![],
            site: None,
            created_by: "user/root".into(),
            created: 1000,
        };
        let created = TokenCreated { view, token: proto::secret::Secret::new("swordfish".into()), join: None };
        let words = instructions(&request, &created);
        assert!(words.contains("mesh-edge join") && words.contains("1 use within 60m") && !words.contains("swordfish"));
        assert!(
            table(&[created.view], 1060).render(false).contains("k3x9  edge  shop-1  -       -     1          in 59m")
        );
    }
}
