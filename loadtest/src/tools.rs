//! The commands of `mesh-loadtest`, one file each.

pub(crate) mod check;
pub(crate) mod edges;
pub(crate) mod figures;
pub(crate) mod get;
pub(crate) mod hostile;
pub(crate) mod load;
pub(crate) mod ports;
pub(crate) mod probes;
pub(crate) mod serve;
pub(crate) mod tricks;
