//! Numeric operations: per op its doc, shape, plain reference and, where the CPU device needs speed, a fast twin.

pub mod attention;
pub mod conv2d;
pub mod fast;
pub mod group_norm;
pub mod linear;
pub mod view;
