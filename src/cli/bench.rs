//! `iddpm bench`: measurements, each in [`crate::bench`].

use super::Global;
use crate::error::Result;
use clap::Subcommand;

/// What to measure.
#[derive(Subcommand, Clone, Debug)]
pub enum BenchCommand {}

/// Measures.
///
/// # Errors
/// Those of the measurement.
pub fn main(c: &BenchCommand, _g: &Global) -> Result<()> {
    match *c {}
}
