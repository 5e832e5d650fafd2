//! Replays what libFuzzer has found interesting, in every test run and on a stable compiler.

use std::{fs, path::Path};

/// Bounds of the corpus, so that it stays a thing to commit: files of a target, and bytes of all.
const MAX_FILES: usize = 64;
const MAX_BYTES: usize = 400 * 1024;

#[test]
fn every_corpus_file_passes_through_its_parser() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut bytes = 0;
    for (name, parser) in fuzz::TARGETS {
        let folder = root.join("corpus").join(name);
        let files = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "{name} has no corpus");
        assert!(files.len() <= MAX_FILES, "{name} has {} files; minimise it with cargo fuzz cmin", files.len());
        for file in files {
            let data = fs::read(&file).unwrap();
            bytes += data.len();
            // Printed only if the test fails, and then the last line names the culprit.
            eprintln!("{}", file.display());
            parser(&data);
        }
    }
    assert!(bytes <= MAX_BYTES, "the corpus has {bytes} bytes");
}

#[test]
fn every_parser_meets_the_ends_of_its_input() {
    for (name, parser) in fuzz::TARGETS {
        eprintln!("{name}");
        parser(&[]);
        parser(&[0]);
        parser(&[0xff; 300]);
        parser(" \u{0} \u{feff} ü ".repeat(20).as_bytes());
        parser(&[b'.'; 70_000]);
    }
}

#[test]
fn every_parser_has_a_program_and_every_program_a_parser() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets");
    let mut programs: Vec<_> = fs::read_dir(root)
        .unwrap()
        .map(|file| file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    programs.sort();
    let parsers: Vec<_> = fuzz::TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(programs, parsers);
}
