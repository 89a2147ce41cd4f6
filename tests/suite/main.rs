//! Every integration test, in one binary.

mod bench;
mod cli;
#[cfg(feature = "emulator")]
mod cuda_attention;
#[cfg(feature = "emulator")]
mod cuda_conv;
#[cfg(feature = "emulator")]
mod cuda_norm;
#[cfg(feature = "emulator")]
mod cuda_ops;
#[cfg(feature = "emulator")]
mod cuda_plans;
#[cfg(feature = "emulator")]
mod cuda_small;
#[cfg(feature = "emulator")]
mod cuda_step;
mod data;
mod device;
mod diffusers;
mod diffusion;
mod driver;
mod floors;
mod fuzz;
mod golden;
#[cfg(feature = "emulator")]
mod half;
mod import;
mod kernels;
mod network;
mod pictures;
mod reference_cli;
mod runs;
mod sampling;
mod steps;
mod super_res;
mod train;
