//! Reading the field's checkpoints.

pub mod optimizer;
pub mod pickle;
pub mod reference;
pub mod tensor_file;
pub mod zip;
