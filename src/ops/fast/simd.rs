//! Vectors of f32 for three instruction sets behind one trait.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A vector of f32. Values exist only inside [`Kernel::run`], where the instructions behind them are available.
pub(super) trait Vector: Copy {
    /// Values per vector.
    const LANES: usize;
    /// Rows of the widest register tile of two vectors per row.
    const ROWS: usize;

    /// Every lane `x`.
    fn splat(x: f32) -> Self;
    /// # Safety
    /// `p` points to `LANES` values.
    unsafe fn load(p: *const f32) -> Self;
    /// # Safety
    /// `p` points to `LANES` values.
    unsafe fn store(self, p: *mut f32);
    /// The first `n <= LANES` lanes from memory, the others 0.
    /// # Safety
    /// `p` points to `n` values.
    unsafe fn load_first(p: *const f32, n: usize) -> Self;
    /// The first `n <= LANES` lanes to memory.
    /// # Safety
    /// `p` points to `n` values.
    unsafe fn store_first(self, p: *mut f32, n: usize);
    /// self + o
    fn add(self, o: Self) -> Self;
    /// self - o
    fn sub(self, o: Self) -> Self;
    /// self · o
    fn mul(self, o: Self) -> Self;
    /// self / o
    fn div(self, o: Self) -> Self;
    /// self · b + c, rounded once where the instruction set can.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// self if self > o, else o: a NaN in `o` comes through.
    fn max(self, o: Self) -> Self;
    /// self if self < o, else o: a NaN in `o` comes through.
    fn min(self, o: Self) -> Self;
    /// 2^n where self = n + 1.5·2²³, n an integer in [-126, 127].
    fn exp2_of_shifted(self) -> Self;

    /// Sum of the lanes, in a fixed order.
    #[inline(always)]
    fn sum(self) -> f32 {
        let lanes = self.to_array();
        let mut sums = [lanes[0], lanes[1], lanes[2], lanes[3]];
        let mut i = 4;
        while i < Self::LANES {
            sums[i % 4] += lanes[i];
            i += 1;
        }
        (sums[0] + sums[1]) + (sums[2] + sums[3])
    }

    /// The largest lane.
    #[inline(always)]
    fn largest(self) -> f32 {
        let lanes = self.to_array();
        let mut largest = lanes[0];
        let mut i = 1;
        while i < Self::LANES {
            largest = if lanes[i] > largest { lanes[i] } else { largest };
            i += 1;
        }
        largest
    }

    /// The lanes, followed by zeros.
    #[inline(always)]
    fn to_array(self) -> [f32; 16] {
        let mut lanes = [0.0; 16];
        // SAFETY: no vector has more than 16 lanes.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes
    }

    /// e^self to 2 ulp for self in [-87.3, 88.3]; the values at those ends beyond them.
    #[inline(always)]
    fn exp(self) -> Self {
        let c = Self::splat;
        let x = c(88.3).min(c(-87.3).max(self));
        let shifted = x.mul_add(c(std::f32::consts::LOG2_E), c(12_582_912.0));
        let n = shifted.sub(c(12_582_912.0));
        // ln 2 in two pieces, the first short enough for n times it to be exact.
        let r = n.mul_add(c(-0.693_359_4), x);
        let r = n.mul_add(c(2.121_944_4e-4), r);
        // e^r - 1 - r = r²·(polynomial), |r| <= ln(2)/2 (Cephes expf).
        let p = c(1.987_569_1e-4).mul_add(r, c(1.398_2e-3));
        let p = p.mul_add(r, c(8.333_452e-3));
        let p = p.mul_add(r, c(4.166_579_6e-2));
        let p = p.mul_add(r, c(1.666_666_5e-1));
        let p = p.mul_add(r, c(0.5));
        let p = p.mul_add(r.mul(r), r).add(c(1.0));
        p.mul(shifted.exp2_of_shifted())
    }

    /// 1/(1 + e^-self)
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let one = Self::splat(1.0);
        one.div(one.add(Self::splat(0.0).sub(self).exp()))
    }
}

/// Four lanes as an array, which compilers turn into whatever vectors the target has.
#[derive(Clone, Copy)]
pub(super) struct F32x4([f32; 4]);

macro_rules! lanewise {
    ($self:expr, $o:expr, $op:expr) => {{
        let (a, b) = ($self.0, $o.0);
        F32x4([$op(a[0], b[0]), $op(a[1], b[1]), $op(a[2], b[2]), $op(a[3], b[3])])
    }};
}

impl Vector for F32x4 {
    const LANES: usize = 4;
    const ROWS: usize = 4;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        F32x4([x; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's promise.
        F32x4(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        if n == 4 {
            // SAFETY: the caller's promise.
            return unsafe { Self::load(p) };
        }
        let mut lanes = [0.0; 4];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: the caller's promise, i < n.
            *lane = unsafe { *p.add(i) };
        }
        F32x4(lanes)
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        if n == 4 {
            // SAFETY: the caller's promise.
            return unsafe { self.store(p) };
        }
        for (i, lane) in self.0.into_iter().enumerate().take(n) {
            // SAFETY: the caller's promise, i < n.
            unsafe { *p.add(i) = lane };
        }
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        lanewise!(self, o, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        lanewise!(self, o, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        lanewise!(self, o, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        lanewise!(self, o, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        self.mul(b).add(c)
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        lanewise!(self, o, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        lanewise!(self, o, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn exp2_of_shifted(self) -> Self {
        let pow = |x: f32| f32::from_bits((x.to_bits() << 23).wrapping_add(0x3F80_0000));
        F32x4([pow(self.0[0]), pow(self.0[1]), pow(self.0[2]), pow(self.0[3])])
    }
}

/// Implements [`Vector`] for a newtype of an x86 vector; `$op` names the intrinsics in the order of the trait.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_vector {
    ($name:ident($raw:ty), $lanes:literal, $rows:literal, $splat:ident, $load:ident, $store:ident,
     $add:ident, $sub:ident, $mul:ident, $div:ident, $fma:ident, $max:ident, $min:ident,
     |$p:ident, $n:ident| $load_first:expr, |$v:ident, $q:ident, $m:ident| $store_first:expr, |$s:ident| $exp2:expr) => {
        /// See [`Vector`].
        #[derive(Clone, Copy)]
        pub(super) struct $name($raw);

        // SAFETY of every block: the instructions exist because values of this type are made only inside
        // `Kernel::run`, which `Isa::run` enters through a function compiled for them; pointers are the caller's promise.
        impl Vector for $name {
            const LANES: usize = $lanes;
            const ROWS: usize = $rows;

            #[inline(always)]
            fn splat(x: f32) -> Self {
                $name(unsafe { $splat(x) })
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> Self {
                $name(unsafe { $load(p) })
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut f32) {
                unsafe { $store(p, self.0) }
            }
            #[inline(always)]
            unsafe fn load_first($p: *const f32, $n: usize) -> Self {
                $name(unsafe { $load_first })
            }
            #[inline(always)]
            unsafe fn store_first(self, $q: *mut f32, $m: usize) {
                let $v = self.0;
                unsafe { $store_first }
            }
            #[inline(always)]
            fn add(self, o: Self) -> Self {
                $name(unsafe { $add(self.0, o.0) })
            }
            #[inline(always)]
            fn sub(self, o: Self) -> Self {
                $name(unsafe { $sub(self.0, o.0) })
            }
            #[inline(always)]
            fn mul(self, o: Self) -> Self {
                $name(unsafe { $mul(self.0, o.0) })
            }
            #[inline(always)]
            fn div(self, o: Self) -> Self {
                $name(unsafe { $div(self.0, o.0) })
            }
            #[inline(always)]
            fn mul_add(self, b: Self, c: Self) -> Self {
                $name(unsafe { $fma(self.0, b.0, c.0) })
            }
            #[inline(always)]
            fn max(self, o: Self) -> Self {
                $name(unsafe { $max(self.0, o.0) })
            }
            #[inline(always)]
            fn min(self, o: Self) -> Self {
                $name(unsafe { $min(self.0, o.0) })
            }
            #[inline(always)]
            fn exp2_of_shifted(self) -> Self {
                let $s = self.0;
                $name(unsafe { $exp2 })
            }
        }
    };
}

/// Lanes 0..n of an AVX2 mask are the 8 entries from 8 - n.
#[cfg(target_arch = "x86_64")]
static AVX2_MASK: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[cfg(target_arch = "x86_64")]
x86_vector!(
    F32x8(__m256),
    8,
    6,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_div_ps,
    _mm256_fmadd_ps,
    _mm256_max_ps,
    _mm256_min_ps,
    |p, n| _mm256_maskload_ps(p, _mm256_loadu_si256(AVX2_MASK.as_ptr().add(8 - n).cast())),
    |v, p, n| _mm256_maskstore_ps(p, _mm256_loadu_si256(AVX2_MASK.as_ptr().add(8 - n).cast()), v),
    |v| _mm256_castsi256_ps(_mm256_add_epi32(
        _mm256_slli_epi32::<23>(_mm256_castps_si256(v)),
        _mm256_set1_epi32(0x3F80_0000)
    ))
);

#[cfg(target_arch = "x86_64")]
x86_vector!(
    F32x16(__m512),
    16,
    12,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_div_ps,
    _mm512_fmadd_ps,
    _mm512_max_ps,
    _mm512_min_ps,
    |p, n| _mm512_maskz_loadu_ps(((1u32 << n) - 1) as __mmask16, p),
    |v, p, n| _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as __mmask16, v),
    |v| _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_slli_epi32::<23>(_mm512_castps_si512(v)),
        _mm512_set1_epi32(0x3F80_0000)
    ))
);

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, Kernel};
    use super::*;

    /// Checks `exp` of one instruction set over its range, to 2 ulp of the f64 value.
    struct Exp;

    impl Kernel for Exp {
        #[inline(always)]
        fn run<V: Vector>(self) {
            let mut x = -87.3f32;
            while x < 88.3 {
                let got = f64::from(V::splat(x).exp().to_array()[0]);
                let want = f64::from(x).exp();
                assert!((got - want).abs() <= 2.0 * f64::from(f32::EPSILON) * want, "exp({x}): {got} is not {want}");
                x += 0.000_37 + x.abs() * 1e-5;
            }
            assert!(V::splat(f32::NAN).exp().to_array()[0].is_nan(), "exp of NaN");
            assert_eq!(V::splat(0.0).exp().to_array()[0], 1.0);
        }
    }

    #[test]
    fn exp_is_within_two_ulp() {
        [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.available()).for_each(|isa| isa.run(Exp));
    }
}
