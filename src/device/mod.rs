//! device (being written)
