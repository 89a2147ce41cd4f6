//! unet (being written)
