//! The admin pages of processes: whether they are ready, and what they count.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use anyhow::{Context, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// How long a page may take.
const PAGE: Duration = Duration::from_secs(5);

/// Gets a page; a status that is no success is an error with the page as its text.
pub(crate) async fn page(from: SocketAddr, path: &str) -> anyhow::Result<String> {
    let whole = async {
        let mut socket = TcpStream::connect(from).await?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: {from}\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await?;
        anyhow::Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = timeout(PAGE, whole).await.with_context(|| format!("{from}{path}: no answer"))??;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("{from}{path}: no HTTP"))?;
    ensure!(head.split(' ').nth(1).is_some_and(|status| status.starts_with('2')), "{from}{path}: {}", body.trim());
    Ok(body.to_owned())
}

/// What a process counts: by name, summed over labels.
#[derive(Debug, Default)]
pub(crate) struct Figures(HashMap<String, f64>);

impl Figures {
    /// Asks for all of them.
    pub(crate) async fn of(process: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self::parse(&page(process, "/metrics").await?))
    }

    fn parse(text: &str) -> Self {
        let mut all = HashMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some((name, value)) = line.rsplit_once(' ')
                && let Ok(value) = value.parse::<f64>()
            {
                *all.entry(name.split('{').next().unwrap_or_default().to_owned()).or_default() += value;
            }
        }
        Self(all)
    }

    /// One of them; `None` if the process does not count that.
    pub(crate) fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    /// One that is a count.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts are whole and not negative")]
    pub(crate) fn count(&self, name: &str) -> Option<u64> {
        self.get(name).map(|value| value as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_summed_over_their_labels() {
        let figures = Figures::parse("# HELP a\na 3\nb{x=\"1 2\"} 1\nb{x=\"2\"} 2.5\n");
        assert_eq!((figures.count("a"), figures.get("b"), figures.get("c")), (Some(3), Some(3.5), None));
    }
}
