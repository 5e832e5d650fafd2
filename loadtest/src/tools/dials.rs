//! Many dials through the egress door, as kube-apiserver sends them.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use clap::Args;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{say, tools::figures::Times};

/// How long an answer is waited for: longer than kube-apiserver should ever have to.
const ANSWER: Duration = Duration::from_secs(30);
/// How much of an answer is read.
const HEAD: u64 = 4096;

/// What to dial.
#[derive(Debug, Args)]
pub(crate) struct DialsArgs {
    /// The door
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// What to CONNECT to
    #[arg(long, value_name = "HOST:PORT")]
    target: String,
    /// How many
    #[arg(long, default_value_t = 1000)]
    count: usize,
    /// How many at once
    #[arg(long, default_value_t = 500)]
    at_once: usize,
}

/// Sends them, and prints how many had which status, and how long it took until they had it.
pub(crate) async fn run(args: DialsArgs) -> anyhow::Result<()> {
    let (socket, head) = (Arc::new(args.socket), format!("CONNECT {0} HTTP/1.1\r\nHost: {0}\r\n\r\n", args.target));
    let head: Arc<str> = head.into();
    let (mut statuses, mut times) = (BTreeMap::<String, usize>::new(), Times::default());
    let (mut dials, mut begun) = (JoinSet::new(), 0);
    loop {
        while begun < args.count && dials.len() < args.at_once {
            dials.spawn(dial(Arc::clone(&socket), Arc::clone(&head)));
            begun += 1;
        }
        let Some(answer) = dials.join_next().await else { break };
        let (status, time) = answer?;
        *statuses.entry(status).or_default() += 1;
        times.add(time);
    }
    let statuses: Vec<_> = statuses.into_iter().map(|(status, count)| format!("{status}={count}")).collect();
    say(format_args!("{} {times}", statuses.join(" ")))?;
    Ok(())
}

/// The status of the answer, or the kind of error; and how long that took.
async fn dial(socket: Arc<PathBuf>, head: Arc<str>) -> (String, Duration) {
    let begun = Instant::now();
    let ask = async {
        let mut socket = UnixStream::connect(&*socket).await?;
        socket.write_all(head.as_bytes()).await?;
        let mut answer = Vec::new();
        socket.take(HEAD).read_to_end(&mut answer).await?;
        let answer = String::from_utf8_lossy(&answer);
        std::io::Result::Ok(answer.split(' ').nth(1).unwrap_or("nothing").to_owned())
    };
    let status = match timeout(ANSWER, ask).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => error.kind().to_string().replace(' ', "-"),
        Err(_) => "late".to_owned(),
    };
    (status, begun.elapsed())
}
