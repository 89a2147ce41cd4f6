//! nll (being written)
