//! Fast twins of the plain operations for the CPU device: vectors, threads, no allocation.
//!
//! Each takes the instruction set to use ([`Isa::detect`]) and a slice of scratch whose length its `*_scratch` function
//! tells. Results do not depend on the number of threads: work is cut by shape alone and sums have one order.

pub mod attention;
mod axis;
mod columns;
pub mod conv2d;
mod conv2d_weight;
mod dropout;
pub mod group_norm;
mod group_norm_backward;
mod isa;
pub mod linear;
mod parallel;
mod simd;
mod tile;

pub use isa::Isa;
