//! The in-process cluster.
