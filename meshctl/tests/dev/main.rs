//! The built `meshctl` against a whole mesh, which `meshctl dev` runs as a process of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops where something is wrong")]

mod access;
mod diagnosis;
mod kube;
mod lifecycle;
mod mesh;
mod shards;
mod streams;
