//! The archive: files in memory, then a gzipped tar with a manifest.

use std::{
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use flate2::{Compression, write::GzEncoder};
use proto::id::EdgeId;
use runtime::{clock::unix_now, telemetry};
use serde::Serialize;

use crate::failure::Failure;

/// Longest file in it, in bytes; what is longer is cut at its end.
const MAX_FILE: usize = 16 * 1024 * 1024;
/// A line of a key that is shorter than this stands in many texts that are none.
const SHORTEST: usize = 16;

/// What is in an archive.
#[derive(Debug, Serialize)]
pub(super) struct Manifest {
    /// Version of meshctl.
    pub(super) meshctl: &'static str,
    /// When it was made, in seconds since 1970.
    pub(super) made: i64,
    /// The edge that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) edge: Option<EdgeId>,
    /// Each file.
    pub(super) files: Vec<Entry>,
    /// What could not be had, and why.
    pub(super) missing: Vec<Missing>,
}

/// A file of it.
#[derive(Debug, Serialize)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) what: &'static str,
    pub(super) bytes: usize,
}

/// What could not be had.
#[derive(Debug, Serialize)]
pub(super) struct Missing {
    pub(super) name: String,
    pub(super) what: &'static str,
    pub(super) why: String,
}

/// An archive in the making.
#[derive(Debug, Default)]
pub(super) struct Archive {
    files: Vec<(Entry, Vec<u8>)>,
    missing: Vec<Missing>,
    /// Texts that must stand nowhere in it.
    never: Vec<String>,
}

impl Archive {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Takes texts that must stand nowhere in the archive.
    pub(super) fn never(&mut self, secrets: &[String]) {
        self.never.extend(secrets.iter().filter(|secret| secret.len() >= SHORTEST).cloned());
    }

    /// Puts a text in.
    pub(super) fn text(&mut self, name: &str, what: &'static str, text: &str) {
        let mut text = text.to_owned();
        text.truncate(text.floor_char_boundary(MAX_FILE));
        // Two files of the same name in different folders.
        let taken = |name: &str| self.files.iter().any(|(entry, _)| entry.name == name);
        let mut own = name.to_owned();
        let mut number = 2;
        while taken(&own) {
            own = format!("{name}.{number}");
            number += 1;
        }
        self.files.push((Entry { name: own, what, bytes: text.len() }, text.into_bytes()));
    }

    /// Puts a document in.
    pub(super) fn json(&mut self, name: &str, what: &'static str, value: &impl Serialize) {
        match serde_json::to_string_pretty(value) {
            Ok(text) => self.text(name, what, &(text + "\n")),
            Err(error) => self.missing(name, what, &error.to_string()),
        }
    }

    /// Notes what could not be had.
    pub(super) fn missing(&mut self, name: &str, what: &'static str, why: &str) {
        self.missing.push(Missing { name: name.to_owned(), what, why: why.trim().chars().take(500).collect() });
    }

    /// Writes it, readable for its owner alone.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn write(mut self, path: &Path, edge: Option<&EdgeId>) -> Result<Manifest, Failure> {
        self.look_out();
        let (entries, contents): (Vec<_>, Vec<_>) = self.files.into_iter().unzip();
        let manifest = Manifest {
            meshctl: telemetry::version(),
            made: unix_now(),
            edge: edge.cloned(),
            files: entries,
            missing: self.missing,
        };
        let failed = |e: io::Error| Failure::Failed(format!("cannot write {}: {e}", path.display()));
        let mut options = std::fs::OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(path).map_err(failed)?;
        let mut tar = tar::Builder::new(GzEncoder::new(file, Compression::default()));
        let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Failure::Failed(e.to_string()))?;
        let first = std::iter::once(("manifest.json", &text));
        let names = manifest.files.iter().map(|entry| entry.name.as_str());
        for (name, bytes) in first.chain(names.zip(&contents)) {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o600);
            header.set_mtime(manifest.made.unsigned_abs());
            tar.append_data(&mut header, format!("causeway-diag/{name}"), bytes.as_slice()).map_err(failed)?;
        }
        tar.into_inner().and_then(GzEncoder::finish).and_then(|mut file| file.flush()).map_err(failed)?;
        Ok(manifest)
    }

    /// The last look: a file that holds a key is not passed on, however it came to.
    fn look_out(&mut self) {
        let never = std::mem::take(&mut self.never);
        let holds = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            never.iter().any(|secret| text.contains(secret.as_str()))
        };
        let (good, bad): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.files).into_iter().partition(|(_, bytes)| !holds(bytes));
        self.files = good;
        for (entry, _) in bad {
            self.missing(&entry.name, entry.what, "left out: it held a part of a private key");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn an_archive_says_what_it_has_and_never_holds_a_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tar.gz");
        let mut archive = Archive::new();
        archive.never(&["MIGHAgEAMBMGByqGSM49".into(), "short".into()]);
        archive.text("logs/a", "a log", "nothing short of a log");
        archive.text("logs/a", "a log", "another one");
        archive.text("logs/b", "a log", "it says MIGHAgEAMBMGByqGSM49 in the middle");
        archive.missing("control/", "what control knows", "nobody is logged in");
        archive.write(&path, None).unwrap();
        let mut tar = tar::Archive::new(GzDecoder::new(std::fs::File::open(&path).unwrap()));
        let mut all = std::collections::BTreeMap::new();
        for entry in tar.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            all.insert(entry.path().unwrap().display().to_string(), text);
        }
        let names: Vec<_> = all.keys().map(String::as_str).collect();
        assert_eq!(names, ["causeway-diag/logs/a", "causeway-diag/logs/a.2", "causeway-diag/manifest.json"]);
        let manifest: serde_json::Value = serde_json::from_str(&all["causeway-diag/manifest.json"]).unwrap();
        assert_eq!(manifest["missing"][1]["name"], "logs/b");
        assert!(!all.values().any(|text| text.contains("MIGH")));
    }
}
