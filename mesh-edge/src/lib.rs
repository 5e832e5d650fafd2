//! mesh-edge
