//! driver
#![allow(dead_code)]
/// m
pub(crate) struct Module { file: &'static str, kernels: &'static [&'static str], image: &'static [u8] }
/// r
#[derive(Debug)]
pub struct Resources { /// k
 pub kernel: &'static str, /// k
 pub arch: &'static str, /// k
 pub registers: u32, /// k
 pub spilled_bytes: u32 }
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
