//! Every integration test, in one binary.

mod cli;
mod data;
mod diffusion;
mod driver;
mod golden;
mod kernels;
mod network;
mod train;
