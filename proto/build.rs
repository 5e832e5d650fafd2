//! Compiles the wire (`proto/*.proto`) with protox, so that no system `protoc` is needed.

use std::{env, error::Error, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = ["control_stream.proto", "data_stream.proto", "egress.proto", "peer_stream.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    prost_build::Config::new().bytes(["."]).btree_map(["."]).out_dir(out).compile_fds(descriptors)?;
    Ok(())
}
