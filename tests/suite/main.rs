//! Every integration test, in one binary.

mod cli;
mod cuda_conv;
mod data;
mod device;
mod diffusion;
mod driver;
mod floors;
mod golden;
mod kernels;
mod network;
mod steps;
mod train;
