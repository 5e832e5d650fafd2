//! Logs and spans.

use std::io;

use serde::Deserialize;
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{Layer, filter::Targets, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// The version of the software, for people.
#[must_use]
pub const fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// How to log.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug` or `trace`, and per module: `info,mesh_edge=debug`.
    pub level: String,
    /// `text` for people, `json` for programs.
    pub format: LogFormat,
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs, one object a line.
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// Libraries that talk.
const LIBRARIES: [&str; 8] = ["quinn", "quinn_proto", "quinn_udp", "rustls", "hyper", "hyper_util", "sqlx", "h2"];

/// The level could not be read.
#[derive(Debug, thiserror::Error)]
#[error("log level {level:?} cannot be read: {source}; write a level such as \"info\", or \"info,mesh_edge=debug\"")]
pub struct InvalidLevel {
    level: String,
    source: tracing_subscriber::filter::ParseError,
}

/// Starts logging to standard error. A second call, as in tests, changes nothing.
///
/// # Errors
/// If the level cannot be read.
pub fn init(config: &LogConfig) -> Result<(), InvalidLevel> {
    let wanted: Targets =
        config.level.parse().map_err(|source| InvalidLevel { level: config.level.clone(), source })?;
    // What the libraries say below a warning is for their authors; whoever wants it names the library.
    let filter = Targets::new()
        .with_targets(LIBRARIES.map(|library| (library, LevelFilter::WARN)))
        .with_targets(wanted.iter())
        .with_default(wanted.default_level().unwrap_or(LevelFilter::INFO));
    let registry = tracing_subscriber::registry();
    let result = match config.format {
        LogFormat::Text => registry.with(text_layer().with_filter(filter)).try_init(),
        LogFormat::Json => registry
            .with(fmt::layer().json().flatten_event(true).with_writer(io::stderr).with_filter(filter))
            .try_init(),
    };
    if result.is_err() {
        tracing::debug!("logging was started before");
    }
    Ok(())
}

fn text_layer<S>() -> impl Layer<S>
where
    S: Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    use std::io::IsTerminal;
    fmt::layer().with_ansi(io::stderr().is_terminal()).with_target(false).with_writer(io::stderr)
}
