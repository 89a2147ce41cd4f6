//! The benchmarks: every speed this project claims can be measured again with one command.
//!
//! A time is the median over blocks that ran while nobody else used the machine ([`timing`]), and stands beside the
//! ceilings measured in the same run ([`ceilings`]) and the least FLOPs and bytes that the plan's ops declare. What is
//! measured is the recorded plan itself, on real images and with weights that are all random: zero-initialised
//! layers would make some gradients zero.

pub mod ceilings;
pub mod configs;
pub mod gpu;
pub mod gpu_rates;
pub mod kernels;
pub mod load;
pub mod probes;
pub mod record;
pub mod run;
pub mod sample;
pub mod serve;
pub mod startup;
pub mod step;
pub mod timing;
#[cfg(feature = "emulator")]
pub mod traffic;
