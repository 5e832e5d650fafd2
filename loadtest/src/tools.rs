//! The commands of `mesh-loadtest`, one file each.

pub(crate) mod balance;
pub(crate) mod check;
pub(crate) mod dials;
pub(crate) mod edges;
pub(crate) mod figures;
pub(crate) mod get;
pub(crate) mod hop;
pub(crate) mod hostile;
pub(crate) mod keys;
pub(crate) mod kill;
pub(crate) mod link;
pub(crate) mod load;
pub(crate) mod outage;
pub(crate) mod ports;
pub(crate) mod probes;
pub(crate) mod rolling;
pub(crate) mod scale_out;
pub(crate) mod serve;
pub(crate) mod storm;
pub(crate) mod tricks;
