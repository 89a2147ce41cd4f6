//! golden (being written)
