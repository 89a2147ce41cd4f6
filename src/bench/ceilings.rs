//! What the machine can do at most, measured in the same run as everything that is compared with it.
//!
//! The arithmetic ceiling is the rate of independent fused multiply-adds held in registers, on every thread; the memory
//! ceiling is the rate of copying between buffers that no cache holds, read and written bytes both counted. Each is the
//! fastest block: a ceiling is what was reached once.

use super::gpu_rates::Rates;
use super::timing::{Clock, Effort, Timing, measure};
use crate::device::Device;
use crate::device::cpu::Cpu;
use crate::device::driver::Driver;
use crate::error::Result;
use rayon::prelude::*;
use serde::Serialize;
use std::hint::black_box;

/// The ceilings of a device; all NaN for an emulated GPU, whose times say nothing.
#[derive(Clone, Debug, Serialize)]
pub struct Ceilings {
    /// Widest multiply-add the device has: "avx512", "avx2", "portable", "wgmma, bf16", "mma.sync, bf16".
    pub instructions: &'static str,
    /// Fused multiply-adds, GFLOP/s (each is two).
    pub gflops: f64,
    /// Copy, GB/s read and written.
    pub gb_s: f64,
    /// Times of the multiply-adds; on a GPU seconds per FLOP.
    pub arithmetic: Timing,
    /// Times of the copy; on a GPU seconds per byte.
    pub copy: Timing,
}

impl Ceilings {
    fn unknown() -> Self {
        let never = Timing::one(f64::NAN);
        Ceilings { instructions: "emulated", gflops: f64::NAN, gb_s: f64::NAN, arithmetic: never, copy: never }
    }

    /// Whether the device has any.
    pub fn known(&self) -> bool {
        !self.gflops.is_nan()
    }

    /// Least seconds that `flops` and `bytes` take on this machine, whichever is longer.
    pub fn floor(&self, flops: f64, bytes: f64) -> f64 {
        (flops / (self.gflops * 1e9)).max(bytes / (self.gb_s * 1e9))
    }

    /// Measures both: on the threads of a processor, or by kernels of a GPU.
    ///
    /// # Errors
    /// Those of the timing and the driver.
    pub fn measure(device: &Device, effort: &Effort) -> Result<Self> {
        match device {
            Device::Cpu(cpu) => Self::of_processor(cpu, effort),
            Device::Cuda(gpu) if gpu.driver().is_emulated() => Ok(Self::unknown()),
            Device::Cuda(gpu) => Self::of_gpu(gpu.driver()),
        }
    }

    fn of_gpu(driver: &Driver) -> Result<Self> {
        let info = driver.info()?;
        let rates = Rates { driver, info: &info };
        let wgmma = info.compute_capability.0 == 9;
        let flops = if wgmma { rates.wgmma()? } else { rates.mma()? };
        let bytes = rates.copy()?;
        let instructions = if wgmma { "wgmma, bf16" } else { "mma.sync, bf16" };
        let (arithmetic, copy) = (Timing::one(1.0 / flops), Timing::one(1.0 / bytes));
        Ok(Ceilings { instructions, gflops: flops / 1e9, gb_s: bytes / 1e9, arithmetic, copy })
    }

    fn of_processor(cpu: &Cpu, effort: &Effort) -> Result<Self> {
        let (instructions, lanes, kernel) = multiply_add();
        let flops = (cpu.threads() * ROUNDS * CHAINS * lanes * 2) as f64;
        let arithmetic = measure(&Clock::Wall, effort, || {
            cpu.install(|| rayon::broadcast(|_| black_box(kernel(black_box(0.999)))));
            Ok(())
        })?;
        let from = vec![1.0f32; COPIED];
        let mut to = vec![0.0f32; COPIED];
        let copy = measure(&Clock::Wall, effort, || {
            let part = COPIED.div_ceil(cpu.threads());
            cpu.install(|| to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(a, b)| a.copy_from_slice(b)));
            black_box(&mut to);
            Ok(())
        })?;
        let gflops = flops / arithmetic.min / 1e9;
        let gb_s = (2 * COPIED * size_of::<f32>()) as f64 / copy.min / 1e9;
        Ok(Ceilings { instructions, gflops, gb_s, arithmetic, copy })
    }
}

/// Elements of each copied buffer: 256 MB, several times the largest cache in use.
const COPIED: usize = 64 << 20;

/// Multiply-adds in flight: two units with a latency of four cycles need eight.
const CHAINS: usize = 12;

/// Length of each chain in one call.
const ROUNDS: usize = 1 << 20;

/// The widest multiply-add of this processor: its name, numbers per instruction, and the loop.
fn multiply_add() -> (&'static str, usize, fn(f32) -> f32) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions.
            return ("avx512", 16, |a| unsafe { x86::avx512(a) });
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the instructions.
            return ("avx2", 8, |a| unsafe { x86::avx2(a) });
        }
    }
    ("portable", PORTABLE, portable)
}

/// Numbers per step of the portable chain.
const PORTABLE: usize = 4;

/// Starting value of chain `i`: all differ, else the compiler would compute one for all.
fn start(i: usize) -> f32 {
    i as f32 * 0.01
}

/// Chains of `x = x·a + b` without instructions of one processor: a multiply and an add where there is no fused one.
fn portable(a: f32) -> f32 {
    let mut chains: [[f32; PORTABLE]; CHAINS] =
        std::array::from_fn(|i| std::array::from_fn(|k| start(i * PORTABLE + k)));
    for _ in 0..ROUNDS {
        for x in chains.as_flattened_mut() {
            *x = if cfg!(target_arch = "aarch64") { x.mul_add(a, 0.25) } else { *x * a + 0.25 };
        }
    }
    chains.as_flattened().iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHAINS, ROUNDS, start};
    use std::arch::x86_64::*;

    macro_rules! chains {
        ($name:ident, $feature:literal, $vector:ty, $set:ident, $fma:ident) => {
            /// Chains of `x = x·a + b`.
            #[target_feature(enable = $feature)]
            pub fn $name(a: f32) -> f32 {
                let (a, b) = ($set(a), $set(0.25));
                let mut chains: [$vector; CHAINS] = std::array::from_fn(|i| $set(start(i)));
                for _ in 0..ROUNDS {
                    for x in &mut chains {
                        *x = $fma(*x, a, b);
                    }
                }
                // SAFETY: a vector is as many plain floats as fit its bytes.
                let numbers: [[f32; size_of::<$vector>() / 4]; CHAINS] = unsafe { std::mem::transmute(chains) };
                numbers.as_flattened().iter().sum()
            }
        };
    }
    chains!(avx512, "avx512f", __m512, _mm512_set1_ps, _mm512_fmadd_ps);
    chains!(avx2, "avx2,fma", __m256, _mm256_set1_ps, _mm256_fmadd_ps);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_take_the_longer_of_arithmetic_and_memory() {
        let t = Timing::one(1.0);
        let c = Ceilings { instructions: "portable", gflops: 10.0, gb_s: 2.0, arithmetic: t, copy: t };
        assert_eq!(c.floor(1e10, 1e9), 1.0);
        assert_eq!(c.floor(1e9, 4e9), 2.0);
        assert!(Ceilings::unknown().floor(1e9, 4e9).is_nan() && !Ceilings::unknown().known() && c.known());
    }

    #[test]
    fn every_chain_converges_to_the_same_fixed_point() {
        // x = 0.5x + 0.25 has the fixed point 0.5; the sum counts every lane of every chain once.
        let (_, lanes, kernel) = multiply_add();
        assert!((kernel(0.5) - 0.5 * (CHAINS * lanes) as f32).abs() < 1e-3);
        assert!((portable(0.5) - 0.5 * (CHAINS * PORTABLE) as f32).abs() < 1e-3);
    }
}
