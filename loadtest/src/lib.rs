//! Tests of the mesh as a whole: a simulation of it in memory, and load for a real one.
//!
//! [`bottleneck`] is one direction of a path, [`simnet`] a network in memory, [`cluster`] a mesh on it, [`probe`] a stream whose every byte is known. The
//! commands of `mesh-loadtest` put real load on a real mesh.

pub mod bottleneck;
pub mod cluster;
pub mod probe;
pub mod simnet;
