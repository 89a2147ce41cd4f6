//! `--device` and `--precision`: where to compute, and in which numbers. Neither is a property of a model: a run may be
//! resumed, and a model used, on any device.

use crate::config::Precision;
use crate::device::{Device, driver};
use crate::error::{Error, Result};
use crate::graph::Target;
use clap::Args;
use std::fmt::{Display, Formatter};
use std::str::FromStr;
use std::sync::Once;

/// Flags of every subcommand that computes.
#[derive(Args, Clone, Debug)]
pub struct DeviceFlags {
    /// Where to compute: cpu, cuda (the first GPU), cuda:1 (the second), or emulated (the CUDA kernels on the processor, slow)
    /// [default: cpu]
    #[arg(long, global = true, value_name = "DEVICE")]
    device: Option<DeviceKind>,
    /// Numbers of the network on CUDA; the processor computes in f32 [default: bf16]
    #[arg(long, global = true, value_enum)]
    precision: Option<Precision>,
}

/// Devices that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The processor, in f32.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
    /// The CUDA kernels on the processor.
    Emulated,
}

impl FromStr for DeviceKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(DeviceKind::Cpu),
            None if text == "cuda" => Ok(DeviceKind::Cuda(0)),
            None if text == "emulated" => Ok(DeviceKind::Emulated),
            Some(("cuda", n)) if n.parse::<u16>().is_ok() => Ok(DeviceKind::Cuda(n.parse().unwrap_or(0))),
            _ => Err("there are cpu, cuda, cuda:N (N = 0, 1, ...) and emulated".into()),
        }
    }
}

impl Display for DeviceKind {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceKind::Cpu => f.write_str("cpu"),
            DeviceKind::Cuda(0) => f.write_str("cuda"),
            DeviceKind::Cuda(n) => write!(f, "cuda:{n}"),
            DeviceKind::Emulated => f.write_str("emulated"),
        }
    }
}

impl DeviceFlags {
    /// The device asked for.
    pub fn kind(&self) -> DeviceKind {
        self.device.unwrap_or(DeviceKind::Cpu)
    }

    /// The flags as they were given, for a process that is to compute on the same device.
    pub fn given(&self) -> Vec<String> {
        let precision = self.precision.map(|p| format!("--precision={}", p.name()));
        [format!("--device={}", self.kind())].into_iter().chain(precision).collect()
    }

    /// What plans are recorded for on it; it need not be there.
    ///
    /// # Errors
    /// [`Error::Config`] for a precision that it has not.
    pub fn target(&self) -> Result<Target> {
        match (self.kind(), self.precision) {
            (DeviceKind::Cpu, Some(Precision::Bf16)) => {
                let what = "--precision bf16: the processor computes in f32; give --device cuda as well";
                Err(Error::Config(what.into()))
            }
            (DeviceKind::Cpu, _) => Ok(Target::Cpu),
            (_, precision) => Ok(Target::Cuda(precision.unwrap_or_default())),
        }
    }

    /// Opens it; the processor with `threads` threads.
    ///
    /// # Errors
    /// [`Error::Device`] for a device that is not there, with what to install or build; [`Error::Config`] for a precision that
    /// it has not.
    pub fn open(&self, threads: Option<usize>) -> Result<Device> {
        self.target()?;
        let device = match self.kind() {
            DeviceKind::Cpu => Device::cpu(threads.unwrap_or(0))?,
            DeviceKind::Cuda(n) => Device::cuda(n)?,
            DeviceKind::Emulated => Device::emulated()?,
        };
        static TOLD: Once = Once::new();
        if self.device.is_none() && driver::usable_gpus() > 0 {
            TOLD.call_once(|| eprintln!("note: this machine has an NVIDIA GPU; --device cuda computes on it"));
        }
        Ok(device.with_precision(self.precision.unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named() {
        for (text, kind) in [("cpu", DeviceKind::Cpu), ("cuda", DeviceKind::Cuda(0)), ("cuda:3", DeviceKind::Cuda(3))] {
            assert_eq!(text.parse(), Ok(kind));
            assert_eq!(kind.to_string(), text);
        }
        assert_eq!("cuda:0".parse(), Ok(DeviceKind::Cuda(0)));
        for text in ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", ""] {
            assert!(text.parse::<DeviceKind>().unwrap_err().contains("cuda:N"), "{text}");
        }
    }
}
