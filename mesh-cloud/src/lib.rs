//! mesh-cloud
