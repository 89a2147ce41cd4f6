//! train (being written)
