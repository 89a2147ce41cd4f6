//! The choice of instruction set at run time.
//!
//! A kernel is written once, generic over [`Vector`], as the `run` of a [`Kernel`]; [`Isa::run`] calls it inside a
//! function compiled for the chosen instruction set. Everything a `run` calls is `#[inline(always)]`, so that it is
//! compiled for that set too.

use super::simd::{F32x4, Vector};
#[cfg(target_arch = "x86_64")]
use super::simd::{F32x8, F32x16};

/// A computation written once for every vector width; `run` must be `#[inline(always)]`.
pub(super) trait Kernel {
    /// The computation.
    fn run<V: Vector>(self);
}

/// Instruction sets the fast operations are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Whatever the target has.
    Portable,
    /// 8 lanes, fused multiply-add.
    Avx2,
    /// 16 lanes, 32 registers.
    Avx512,
}

impl Isa {
    /// The best set this CPU has.
    pub fn detect() -> Self {
        [Isa::Avx512, Isa::Avx2].into_iter().find(|isa| isa.available()).unwrap_or(Isa::Portable)
    }

    /// Whether this CPU has the set.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => false,
        }
    }

    /// Values per vector.
    pub(super) fn lanes(self) -> usize {
        match self {
            Isa::Portable => 4,
            Isa::Avx2 => 8,
            Isa::Avx512 => 16,
        }
    }

    /// Runs `kernel` with the vectors of this set.
    pub(super) fn run<K: Kernel>(self, kernel: K) {
        debug_assert!(self.available(), "{self:?} is not available on this CPU");
        match self {
            Isa::Portable => kernel.run::<F32x4>(),
            // SAFETY: `available` has found the features these functions are compiled for.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { run_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { run_avx512(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => unreachable!("only on x86-64"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<K: Kernel>(kernel: K) {
    kernel.run::<F32x8>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")]
unsafe fn run_avx512<K: Kernel>(kernel: K) {
    kernel.run::<F32x16>();
}
