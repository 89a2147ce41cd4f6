//! timestep (being written)
