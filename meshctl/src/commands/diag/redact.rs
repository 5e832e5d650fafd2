//! What of a configuration and of a log may leave the machine. Pure, but for reading a key to look out for it.

use std::path::Path;

use runtime::link::tcp::proxy::Proxy;
use serde_json::{Map, Value};

/// Keys whose values are known to be harmless; the value of any other key is left out. A key that is new in the
/// configuration is so left out until somebody has thought about it.
const HARMLESS: &[&str] = &[
    "access",
    "address",
    "addresses",
    "admin",
    "advertise",
    "allow",
    "audience",
    "congestion",
    "context",
    "data_dir",
    "dial_timeout",
    "door_connections",
    "domain",
    "drain",
    "drain_secs",
    "edge",
    "edge_annotation",
    "egress",
    "enabled",
    "except",
    "format",
    "head_start",
    "http",
    "https",
    "keep_days",
    "keep_records",
    "kind",
    "kubelet",
    "kubernetes",
    "labels",
    "leaf_ttl_secs",
    "level",
    "linger_secs",
    "links",
    "links_per_user",
    "listen",
    "metrics_listen",
    "moves_per_sec",
    "name",
    "names",
    "one_of",
    "pod_networks",
    "port",
    "proxy_plain",
    "proxy_protocol",
    "public",
    "queue",
    "shard",
    "shard_accounts",
    "shards",
    "sshd",
    "streams",
    "streams_per_link",
    "streams_per_peer",
    "streams_per_user",
    "target",
    "tcp",
    "trust_domain",
    "weight",
    "within_secs",
];
/// What stands in place of a value.
const LEFT_OUT: &str = "(left out)";

/// A configuration with the values of harmless keys, and the names of all.
pub(super) fn config(table: &toml::Table) -> Value {
    let entries = table.iter().map(|(key, value)| (key.clone(), entry(key, value)));
    Value::Object(entries.collect::<Map<_, _>>())
}

fn entry(key: &str, value: &toml::Value) -> Value {
    match value {
        toml::Value::Table(inner) => config(inner),
        toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
            Value::Array(items.iter().map(|item| entry(key, item)).collect())
        }
        // Where the proxy is matters most of all, and the rest of its URL is a password.
        toml::Value::String(url) if key == "url" => {
            url.parse::<Proxy>().map_or_else(|_| LEFT_OUT.into(), |proxy| proxy.to_string().into())
        }
        _ if !HARMLESS.contains(&key) => LEFT_OUT.into(),
        toml::Value::Array(items) => Value::Array(items.iter().map(|item| entry(key, item)).collect()),
        toml::Value::String(text) => line(text).into(),
        toml::Value::Integer(number) => (*number).into(),
        toml::Value::Float(number) => (*number).into(),
        toml::Value::Boolean(flag) => (*flag).into(),
        toml::Value::Datetime(time) => time.to_string().into(),
    }
}

/// A log without what looks like a secret. There should be none; but a log may have lines of other programs.
pub(super) fn log(text: &str) -> String {
    let mut inside_key = false;
    let keep = |text: &str| {
        if text.contains("-----BEGIN") && text.contains("KEY") {
            inside_key = true;
        }
        let hidden = inside_key;
        if text.contains("-----END") {
            inside_key = false;
        }
        if hidden { LEFT_OUT.to_owned() } else { line(text) }
    };
    text.lines().map(keep).map(|line| line + "\n").collect()
}

/// Words before a secret, in lower case.
const BEFORE: &[&str] =
    &["password=", "password:", "token=", "token:", "authorization:", "secret=", "basic ", "bearer "];

/// One line without join lines, credentials in URLs, and what stands behind words such as `token=`.
fn line(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for word in text.split_inclusive(char::is_whitespace) {
        let (bare, space) = word.split_at(word.trim_end().len());
        match bare.split_once("://") {
            Some((front, _)) if front.ends_with("causeway") => clean += LEFT_OUT,
            Some((front, rest)) => {
                // Up to the path there may be credentials.
                let end = rest.find(['/', '?', '"', '\'', ')', ',']).unwrap_or(rest.len());
                let (authority, path) = rest.split_at(end);
                let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
                clean += &format!("{front}://{host}{}", behind(path));
            }
            None => clean += &behind(bare),
        }
        clean += space;
    }
    let lower = clean.to_ascii_lowercase();
    let first = BEFORE.iter().filter_map(|word| lower.find(word).map(|at| at + word.len())).min();
    match first {
        // What follows may go on over several words.
        Some(at) if clean.is_char_boundary(at) => format!("{}{LEFT_OUT}", &clean[..at]),
        Some(_) => LEFT_OUT.to_owned(),
        None => clean,
    }
}

/// A path or a word without a password among its parameters.
fn behind(text: &str) -> String {
    match text.to_ascii_lowercase().find("password=") {
        Some(at) if text.is_char_boundary(at) => format!("{}password={LEFT_OUT}", &text[..at]),
        Some(_) => LEFT_OUT.to_owned(),
        None => text.to_owned(),
    }
}

/// The lines of the private key in a folder, to be looked out for.
pub(super) fn key_of(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("identity.pem")).unwrap_or_default();
    let begins = text.lines().skip_while(|line| !(line.starts_with("-----BEGIN") && line.contains("PRIVATE")));
    begins.skip(1).take_while(|line| !line.starts_with("-----")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_to_be_harmless_is_told() {
        let table: toml::Table = r#"
            data_dir = "/var/lib/x"
            database = "postgres://mesh:swordfish@db/mesh"
            surprise = "swordfish"
            [proxy]
            url = "http://me:swordfish@proxy.lan:3128/"
            credentials_file = "/etc/swordfish"
            [[services]]
            name = "web"
            address = "127.0.0.1:80"
            secret = "swordfish"
            [log]
            level = "info"
        "#
        .parse()
        .unwrap();
        let told = config(&table);
        assert!(!told.to_string().contains("swordfish"), "{told}");
        assert_eq!(told["proxy"]["url"], "http://proxy.lan:3128");
        assert_eq!(told["services"][0]["address"], "127.0.0.1:80");
        assert_eq!((&told["surprise"], &told["log"]["level"]), (&LEFT_OUT.into(), &"info".into()));
    }

    #[test]
    fn a_log_is_cleaned_and_the_rest_stays() {
        let dirty = "\
started edge=shop-1
join causeway://swordfish@c:7443?ca=sha256:00 now
proxy http://me:swordfish@p:3128/x failed
database \"postgres:///mesh?password=swordfish\"
Proxy-Authorization: Basic swordfish==
-----BEGIN PRIVATE KEY-----
swordfish
-----END PRIVATE KEY-----
TOKEN=swordfish and more swordfish
stopped
";
        let clean = log(dirty);
        assert!(!clean.contains("swordfish"), "{clean}");
        assert!(clean.starts_with("started edge=shop-1\n") && clean.ends_with("stopped\n"), "{clean}");
        assert!(clean.contains("proxy http://p:3128/x failed"), "{clean}");
    }
}
