//! An edge against a small shard of its own, over real sockets on loopback. Nothing here waits for a time to pass: every
//! wait is for something that happens, with a deadline that only a failure meets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops where something is wrong")]

mod apiserver;
mod carriers;
mod diagnosis;
mod doors;
mod fake;
mod flows;
mod identity;
mod life;
mod loss;
mod relay;
mod streams;
