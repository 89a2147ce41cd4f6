//! Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal 2021) as one engine.
#![deny(missing_docs)]

pub mod config;
pub mod error;
pub mod rng;

pub mod animation;
pub mod checkpoint;
pub mod data;
pub mod diffusion;
pub mod grid;
pub mod import;
pub mod npz;
pub mod plot;
pub mod schedule;
pub mod tensorboard;
pub mod timestep;

pub mod autograd;
pub mod device;
pub mod graph;
pub mod memory;
pub mod ops;
pub mod unet;

pub mod bench;
pub mod nll;
pub mod sampler;
pub mod train;

pub mod cli;
