//! Texts: names, targets, identities, join lines, host names, configuration.

use std::{fmt::Debug, str::FromStr};

use proto::{
    id::{EdgeId, GroupName, ServiceName, ShardId, SiteName, TrustDomain, UserId},
    identity::Identity,
    join::JoinLine,
    target::{HostPort, Target},
};
use runtime::config::{self, ConfigError};
use serde::Deserialize;

/// What was accepted prints and parses again alike; returns the value and the print.
fn comes_back<T>(text: &str) -> Option<(T, String)>
where
    T: FromStr<Err: Debug + PartialEq> + ToString + Debug + PartialEq,
{
    let value: T = text.parse().ok()?;
    let printed = value.to_string();
    let again = printed.parse::<T>();
    assert_eq!(again.as_ref(), Ok(&value), "{text:?} printed as {printed:?}");
    Some((value, printed))
}

/// Names of every kind.
pub fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    fn name<T: FromStr<Err: Debug + PartialEq> + ToString + Debug + PartialEq>(text: &str, max: usize) -> bool {
        let Some((_, printed)) = comes_back::<T>(text) else { return false };
        assert_eq!(printed, text, "a name is kept as it is");
        assert!((1..=max).contains(&text.len()), "a name of {} bytes", text.len());
        assert!(
            text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.'),
            "a name with other characters: {text:?}"
        );
        true
    }
    let dotted = [
        name::<EdgeId>(text, 253),
        name::<ShardId>(text, 253),
        name::<UserId>(text, 253),
        name::<TrustDomain>(text, 253),
    ];
    let labels = [name::<ServiceName>(text, 63), name::<SiteName>(text, 63), name::<GroupName>(text, 63)];
    assert!(dotted.iter().all(|&ok| ok == dotted[0]) && labels.iter().all(|&ok| ok == labels[0]));
    assert_eq!(labels[0], dotted[0] && !text.contains('.'), "a label is a name without dots: {text:?}");
}

/// Targets as people write them.
pub fn target(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    comes_back::<Target>(text);
}

/// `host:port`.
pub fn host_port(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some((place, _)) = comes_back::<HostPort>(text) {
        assert!(place.port != 0 && !place.host.is_empty() && place.host.len() <= 253, "{place:?}");
        assert_eq!(HostPort::new(&place.host, place.port).as_ref(), Ok(&place), "its parts are refused");
    }
}

/// SPIFFE IDs.
pub fn identity(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some((_, printed)) = comes_back::<Identity>(text) {
        assert_eq!(printed, text, "one identity has one spelling");
    }
}

/// Join lines. An error never shows what may be a token.
pub fn join_line(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(line) = text.parse::<JoinLine>() else { return };
    let revealed = line.reveal();
    assert_eq!(revealed.parse().as_ref(), Ok(&line), "{text:?} printed as {revealed:?}");
    // A word as short as this may stand in the rest of the line by chance.
    if line.token.reveal().len() > 64 {
        assert!(!format!("{line:?}").contains(line.token.reveal()), "the token shows");
    }
}

/// Host names that a client asks a door for, by `Host` or by SNI.
pub fn hostname(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(door) = "http".parse() else { return };
    for domain in ["mesh.test", "test"] {
        let Ok(target) = proto::hostname::target_of(text, domain, &door) else { continue };
        let Target::Service { edge: Some(edge), name } = &target else { panic!("{text:?} led to {target}") };
        let canonical = format!("{name}.{edge}.{domain}");
        let again = proto::hostname::target_of(&canonical, domain, &door);
        assert_eq!(again.as_ref(), Ok(&target), "{text:?} is {canonical:?}");
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Sample {
    listen: std::net::SocketAddr,
    names: Vec<String>,
    free: toml::Table,
}

impl Default for Sample {
    fn default() -> Self {
        Self { listen: ([0, 0, 0, 0], 0).into(), names: Vec::new(), free: toml::Table::new() }
    }
}

/// A configuration file, and behind a line `---` what `--set` was given, one to a line.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (file, sets) = text.split_once("\n---\n").unwrap_or((text, ""));
    let sets: Vec<String> = sets.lines().map(str::to_owned).collect();
    match config::parse::<Sample>("mesh.toml", file, &sets) {
        Ok(sample) => {
            let _ = (sample.listen, sample.names, sample.free);
        }
        Err(ConfigError::Parse { line, column, message, .. }) => {
            let lines = file.matches('\n').count() + 1;
            assert!((1..=lines).contains(&line) && column >= 1, "an error at {line}:{column} of {lines} lines");
            assert!(!message.is_empty(), "an error that says nothing");
        }
        Err(ConfigError::Set(set)) => assert!(sets.iter().any(|s| s.starts_with(&set)), "{set:?} was never given"),
        Err(ConfigError::Read { .. }) => panic!("nothing was to be read"),
    }
    // As text and not as values: a NaN is not equal to itself.
    if let Ok(table) = config::parse::<toml::Table>("mesh.toml", file, &sets) {
        let printed = table.to_string();
        let again = config::parse::<toml::Table>("printed.toml", &printed, &[]).map(|t| t.to_string());
        assert_eq!(again.as_deref().ok(), Some(printed.as_str()), "{again:?}");
    }
}
