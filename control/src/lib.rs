//! `mesh-control`: certificate authority, enrolment, policy and the list of shards.

pub mod ca;
pub mod store;
pub mod token;
