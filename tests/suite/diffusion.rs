//! diffusion (being written)
