//! Times of the CPU operations at the shapes of small networks: `cargo bench --bench cpu_ops [-- filter]`.
//!
//! Throughput is in arithmetic operations per second (Gelem/s reads as GFLOP/s), multiplications and additions counted
//! apart and upsampled convolutions by the products they make (4/9); group norm is in bytes of its tensors. The group
//! `ceiling` measures multiply-adds from registers on the same threads: the other rows are to be read as parts of it.
//! Threads are rayon's (`RAYON_NUM_THREADS`).

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use iddpm::ops::attention::{AttentionShape, QkvOrder};
use iddpm::ops::conv2d::ConvShape;
use iddpm::ops::fast::{self, Isa};
use iddpm::ops::group_norm::GroupNormShape;
use iddpm::ops::view::{Cat, Rows};
use iddpm::rng::philox;
use std::hint::black_box;
use std::time::Duration;

/// Images per batch.
const N: usize = 16;

fn uniform(len: usize, seed: u64) -> Vec<f32> {
    (0..len).map(|i| philox([i as u32, 0, 0, 0], seed)[0] as f32 / 2_147_483_648.0 - 1.0).collect()
}

fn zeros(len: usize) -> Vec<f32> {
    vec![0.0; len]
}

/// Multiply-adds per call of [`multiply_adds`], in vectors of 16.
const CHAINS: usize = 10;
const ROUNDS: usize = 1 << 16;

/// Independent chains of multiply-adds in registers, with 16, 8 or 4 lanes per instruction.
fn multiply_adds(isa: Isa) -> f32 {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn avx512() -> f32 {
        use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_reduce_add_ps, _mm512_set1_ps};
        let (mut chains, x) = ([_mm512_set1_ps(1.0); CHAINS], _mm512_set1_ps(black_box(0.999)));
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = _mm512_fmadd_ps(*chain, x, x);
            }
        }
        chains.into_iter().map(|chain| _mm512_reduce_add_ps(chain)).sum()
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn avx2() -> f32 {
        use std::arch::x86_64::{_mm256_cvtss_f32, _mm256_fmadd_ps, _mm256_set1_ps};
        let (mut chains, x) = ([_mm256_set1_ps(1.0); CHAINS], _mm256_set1_ps(black_box(0.999)));
        for _ in 0..2 * ROUNDS {
            for chain in &mut chains {
                *chain = _mm256_fmadd_ps(*chain, x, x);
            }
        }
        chains.into_iter().map(|chain| _mm256_cvtss_f32(chain)).sum()
    }
    match isa {
        // SAFETY: the instruction set was detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512() },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2() },
        _ => {
            let (mut chains, x) = ([1.0f32; 4 * CHAINS], black_box(0.999f32));
            for _ in 0..4 * ROUNDS {
                chains.iter_mut().for_each(|chain| *chain = *chain * x + x);
            }
            chains.iter().sum()
        }
    }
}

fn ceiling(c: &mut Criterion) {
    let (isa, mut group) = (Isa::detect(), c.benchmark_group("ceiling"));
    let flops = 2 * 16 * CHAINS * ROUNDS * rayon::current_num_threads();
    group.throughput(Throughput::Elements(flops as u64));
    group.bench_function(format!("{isa:?}"), |b| b.iter(|| rayon::broadcast(|_| black_box(multiply_adds(isa)))));
}

fn conv(hw: usize, ca: usize, cb: usize, oc: usize, k: usize) -> ConvShape {
    ConvShape { n: N, h: hw, w: hw, ca, cb, oc, k, stride: 1, upsample: false, pad: k / 2 }
}

fn conv_shapes() -> Vec<ConvShape> {
    vec![
        conv(32, 32, 0, 32, 3),
        conv(32, 64, 32, 32, 3),
        conv(16, 32, 0, 32, 3),
        conv(16, 64, 32, 32, 3),
        conv(16, 64, 0, 64, 3),
        conv(16, 64, 64, 64, 3),
        conv(8, 64, 0, 64, 3),
        conv(8, 64, 64, 64, 3),
        conv(4, 64, 0, 64, 3),
        conv(16, 96, 0, 96, 3),
        conv(8, 128, 0, 128, 3),
        ConvShape { stride: 2, ..conv(32, 32, 0, 32, 3) },
        ConvShape { upsample: true, ..conv(16, 64, 0, 64, 3) },
        conv(16, 64, 0, 192, 1),
        conv(32, 64, 32, 32, 1),
        conv(32, 3, 0, 32, 3),
        conv(32, 32, 0, 6, 3),
        conv(1, 128, 0, 128, 1),
    ]
}

fn conv2d(c: &mut Criterion) {
    let isa = Isa::detect();
    for s in conv_shapes() {
        let products = s.out_pixels() * s.weights() * if s.upsample { 4 } else { 9 } / 9;
        let (a, b, w) = (uniform(s.in_pixels() * s.ca, 1), uniform(s.in_pixels() * s.cb, 2), uniform(s.weights(), 3));
        let (bias, dy) = (uniform(s.oc, 4), uniform(s.out_pixels() * s.oc, 5));
        let x = Cat { a: &a, ca: s.ca, b: &b, cb: s.cb };
        let mut group = c.benchmark_group("conv2d");
        group.throughput(Throughput::Elements(2 * products as u64));
        let kind = if s.upsample { "up" } else { ["", "", "half"][s.stride] };
        let id = |pass| {
            BenchmarkId::new(pass, format!("{}x{} {}+{}->{} k{} {kind}", s.h, s.w, s.ca, s.cb, s.oc, s.k).trim_end())
        };
        let (mut y, mut scratch) = (zeros(dy.len()), zeros(fast::conv2d::forward_scratch(&s)));
        group.bench_function(id("forward"), |bencher| {
            bencher.iter(|| fast::conv2d::forward(isa, &mut y, x, &w, Some(&bias), None, None, &s, &mut scratch));
        });
        let (mut dxa, mut dxb) = (zeros(a.len()), zeros(b.len()));
        let mut scratch = zeros(fast::conv2d::backward_data_scratch(&s));
        group.bench_function(id("backward_data"), |bencher| {
            bencher.iter(|| {
                fast::conv2d::backward_data(isa, &mut dxa, &mut dxb, &dy, &w, None, None, &s, &mut scratch);
            });
        });
        let (mut dw, mut db) = (zeros(w.len()), zeros(s.oc));
        let mut scratch = zeros(fast::conv2d::backward_weight_scratch(&s));
        group.bench_function(id("backward_weight"), |bencher| {
            bencher.iter(|| {
                let db = Some(&mut db[..]);
                fast::conv2d::backward_weight(isa, &mut dw, db, None, &dy, x, false, &s, &mut scratch);
            });
        });
    }
}

fn group_norm(c: &mut Criterion) {
    let isa = Isa::detect();
    for (hw, ca, cb) in [(32, 32, 0), (32, 64, 32), (16, 64, 0), (8, 64, 64), (4, 64, 0)] {
        let (s, channels) = (hw * hw, ca + cb);
        let s = GroupNormShape { n: N, s, ca, cb, groups: 32, eps: 1e-5, silu: true, dropout: None };
        let (a, b, dy) = (uniform(N * s.s * ca, 1), uniform(N * s.s * cb, 2), uniform(N * s.s * channels, 3));
        let (gamma, beta, rows) = (uniform(channels, 4), uniform(channels, 5), uniform(2 * N * channels, 6));
        let x = Cat { a: &a, ca, b: &b, cb };
        let rows = Some(Rows { data: &rows, stride: 2 * channels, col: 0 });
        let (mut y, mut mean, mut rstd) = (zeros(dy.len()), zeros(32 * N), zeros(32 * N));
        let mut scratch = zeros(fast::group_norm::backward_scratch(&s));
        let mut group = c.benchmark_group("group_norm_silu");
        let id = |pass| BenchmarkId::new(pass, format!("{hw}x{hw} {ca}+{cb}"));
        group.throughput(Throughput::Bytes(8 * dy.len() as u64));
        group.bench_function(id("forward"), |bencher| {
            bencher.iter(|| {
                let (mean, rstd, scratch) = (&mut mean, &mut rstd, &mut scratch);
                fast::group_norm::forward(isa, &mut y, mean, rstd, x, &gamma, &beta, rows, &s, scratch);
            });
        });
        let (mut dxa, mut dxb) = (zeros(a.len()), zeros(b.len()));
        let (mut dgamma, mut dbeta) = (zeros(channels), zeros(channels));
        group.throughput(Throughput::Bytes(12 * dy.len() as u64));
        group.bench_function(id("backward"), |bencher| {
            bencher.iter(|| {
                fast::group_norm::backward(
                    isa,
                    &mut dxa,
                    &mut dxb,
                    &mut dgamma,
                    &mut dbeta,
                    None,
                    &dy,
                    x,
                    &mean,
                    &rstd,
                    &gamma,
                    &beta,
                    rows,
                    None,
                    None,
                    false,
                    &s,
                    &mut scratch,
                );
            });
        });
    }
}

fn attention(c: &mut Criterion) {
    let isa = Isa::detect();
    for (tokens, d) in [(256, 16), (64, 16), (16, 32), (256, 64)] {
        let s = AttentionShape { n: N, s: tokens, heads: 4, d, order: QkvOrder::Legacy };
        let (qkv, dout) = (uniform(N * tokens * 12 * d, 1), uniform(N * tokens * 4 * d, 2));
        let (mut out, mut lse, mut dqkv) = (zeros(dout.len()), zeros(4 * N * tokens), zeros(qkv.len()));
        let flops = (16 * N * tokens * tokens * d) as u64;
        let mut group = c.benchmark_group("attention");
        let id = |pass| BenchmarkId::new(pass, format!("s{tokens} heads4 d{d}"));
        group.throughput(Throughput::Elements(flops));
        let mut scratch = zeros(fast::attention::forward_scratch(&s));
        group.bench_function(id("forward"), |bencher| {
            bencher.iter(|| fast::attention::forward(isa, &mut out, &mut lse, &qkv, &s, &mut scratch));
        });
        let mut scratch = zeros(fast::attention::backward_scratch(&s));
        group.throughput(Throughput::Elements(flops * 5 / 2));
        group.bench_function(id("backward"), |bencher| {
            bencher.iter(|| fast::attention::backward(isa, &mut dqkv, &dout, &qkv, &out, &lse, &s, &mut scratch));
        });
    }
}

criterion_group! {
    name = cpu_ops;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600));
    targets = ceiling, conv2d, group_norm, attention
}
criterion_main!(cpu_ops);
