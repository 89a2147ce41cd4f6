//! cli (being written)

pub mod data;
