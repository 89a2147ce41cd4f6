//! Every integration test, in one binary.

mod cli;
mod data;
mod device;
mod diffusion;
mod floors;
mod fuzz;
mod golden;
mod import;
mod kernels;
mod network;
mod steps;
mod train;
