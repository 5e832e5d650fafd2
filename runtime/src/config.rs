//! Configuration: one TOML file per process, every key optional, unknown keys refused with file, line and column.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;

/// The configuration could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No such file, or no right to read it.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type; names line and column.
    #[error("{path}:{line}:{column}: {message}")]
    Parse {
        /// The file.
        path: String,
        /// From 1.
        line: usize,
        /// From 1, in characters.
        column: usize,
        /// What is wrong, with what would be right.
        message: String,
    },
    /// A `--set` that is not `key=value`.
    #[error("--set {0:?} is not of the form key=value, such as --set log.level=debug")]
    Set(String),
}

/// Most parts of a dotted key of `--set`; each is a level of the stack.
const MAX_DEPTH: usize = 16;

/// Reads a configuration: the file if there is one, then each `key=value` of `sets` over it, where the key is dotted
/// and the value is TOML, or a bare word taken as a string.
///
/// # Errors
/// If the file cannot be read, or the whole is not a valid `T`.
pub fn load<T: DeserializeOwned>(path: Option<&Path>, sets: &[String]) -> Result<T, ConfigError> {
    let text = match path {
        Some(path) => fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?,
        None => String::new(),
    };
    let name = path.map_or_else(|| "(no file)".to_owned(), |p| p.display().to_string());
    parse(&name, &text, sets)
}

/// Reads a configuration as [`load`] does, from a text that is called `name` in errors.
///
/// # Errors
/// If the whole is not a valid `T`.
pub fn parse<T: DeserializeOwned>(name: &str, text: &str, sets: &[String]) -> Result<T, ConfigError> {
    if sets.is_empty() {
        return toml::from_str(text).map_err(|e| located(name, text, &e));
    }
    // The file by itself first, so that its errors carry its own lines.
    toml::from_str::<T>(text).map_err(|e| located(name, text, &e))?;
    let mut table: toml::Table = toml::from_str(text).map_err(|e| located(name, text, &e))?;
    for set in sets {
        let wrong = || ConfigError::Set(set.chars().take(80).collect());
        let (key, value) = set.split_once('=').ok_or_else(wrong)?;
        if key.matches('.').count() >= MAX_DEPTH {
            return Err(wrong());
        }
        apply(&mut table, key, parse_value(value)).ok_or_else(wrong)?;
    }
    T::deserialize(table).map_err(|e| ConfigError::Parse {
        path: "--set".into(),
        line: 1,
        column: 1,
        message: e.message().to_owned(),
    })
}

fn parse_value(text: &str) -> toml::Value {
    toml::from_str::<toml::Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(text.to_owned()))
}

fn apply(table: &mut toml::Table, key: &str, value: toml::Value) -> Option<()> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
            Some(())
        }
        Some((head, rest)) => {
            let inner = table.entry(head).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            apply(inner.as_table_mut()?, rest, value)
        }
    }
}

fn located(path: &str, text: &str, error: &toml::de::Error) -> ConfigError {
    let start = error.span().map_or(0, |s| s.start).min(text.len());
    let before = &text[..text.floor_char_boundary(start)];
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    ConfigError::Parse { path: path.to_owned(), line, column, message: error.message().to_owned() }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Sample {
        name: String,
        inner: Inner,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Inner {
        port: u16,
    }

    #[allow(clippy::unwrap_in_result, reason = "the result is what is tested, not how the file was made")]
    fn load_text(text: &str, sets: &[&str]) -> Result<Sample, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let sets: Vec<_> = sets.iter().map(ToString::to_string).collect();
        load(Some(file.path()), &sets)
            .map_err(|e| e.to_string().replace(&file.path().display().to_string(), "mesh.toml"))
    }

    #[test]
    fn a_wrong_key_is_named_with_line_and_column() {
        let error = load_text("name = \"a\"\n[inner]\n  prot = 1\n", &[]).unwrap_err();
        assert_eq!(error, "mesh.toml:3:3: unknown field `prot`, expected `port`");
        let error = load_text("[inner]\nport = \"x\"\n", &[]).unwrap_err();
        assert_eq!(error, "mesh.toml:2:8: invalid type: string \"x\", expected u16");
        let error = load_text("name = \n", &[]).unwrap_err();
        assert!(error.starts_with("mesh.toml:1:"), "{error}");
    }

    #[test]
    fn sets_go_over_the_file() {
        let sample = load_text("name = \"a\"\n[inner]\nport = 1\n", &["inner.port=2", "name=b c"]).unwrap();
        assert_eq!(sample, Sample { name: "b c".into(), inner: Inner { port: 2 } });
        let error = load_text("", &["inner.prot=2"]).unwrap_err();
        assert!(error.contains("unknown field `prot`"), "{error}");
        assert!(load_text("", &["x"]).unwrap_err().contains("key=value"));
    }

    #[test]
    fn a_key_of_very_many_parts_is_refused() {
        let deep = format!("{}a=1", "a.".repeat(100_000));
        assert!(load_text("", &[&deep]).unwrap_err().starts_with("--set \"a.a."));
    }

    #[test]
    fn no_file_means_defaults_and_a_missing_one_is_named() {
        assert_eq!(load::<Sample>(None, &[]).unwrap(), Sample::default());
        let error = load::<Sample>(Some(Path::new("/nonexistent/x.toml")), &[]).unwrap_err().to_string();
        assert!(error.starts_with("cannot read the configuration /nonexistent/x.toml"), "{error}");
    }
}
