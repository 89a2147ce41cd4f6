//! device (being written)

pub mod driver;
