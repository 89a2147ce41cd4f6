//! Intrinsics, cp.async, ldmatrix, mma.sync and named barriers against plain loops, and Philox against `rng`.

use half::bf16;
use iddpm::args;
use iddpm::device::driver::Launch;
use iddpm::rng;

use super::{download, drivers, integers, upload};

#[test]
fn philox_uniforms_and_normals_have_the_bits_of_the_cpu() {
    let quads = 300usize;
    for (on, d) in drivers() {
        for (seed, image, step, op) in [(0u64, 0u32, 0u32, 1u32), (0x0123_4567_89ab_cdef, 7, 999, 0x2000_0005)] {
            let buffer = || d.alloc(16 * quads).unwrap();
            let (words, uniforms, normals) = (buffer(), buffer(), buffer());
            let args = args![words.ptr(), uniforms.ptr(), normals.ptr(), seed, image, step, op, quads as i32];
            d.launch("test_rng", Launch::over(quads, 64), args).unwrap();
            let (w, u) = (download::<u32>(&d, &words, 4 * quads), download::<u32>(&d, &uniforms, 4 * quads));
            let n = download::<u32>(&d, &normals, 4 * quads);
            for q in 0..quads {
                let truth = rng::philox([q as u32, image, step, op], seed);
                assert_eq!(w[4 * q..4 * q + 4], truth, "words of quad {q} on {on}");
                assert_eq!(
                    u[4 * q..4 * q + 4],
                    truth.map(|b| rng::uniform(b).to_bits()),
                    "uniforms of quad {q} on {on}"
                );
                assert_eq!(n[4 * q..4 * q + 4], rng::normals(truth).map(f32::to_bits), "normals of quad {q} on {on}");
            }
        }
    }
}

#[test]
fn warp_intrinsics_exchange_between_the_right_lanes() {
    let x = integers(32, 50);
    for (on, d) in drivers() {
        let (input, out) = (upload(&d, &x), d.alloc(4 * 9 * 32).unwrap());
        d.launch("test_warp", Launch::new([1, 1, 1], [32, 1, 1]), args![out.ptr(), input.ptr()]).unwrap();
        let got = download::<i32>(&d, &out, 9 * 32);
        let ballot = (0..32).fold(0u32, |b, l| b | u32::from(x[l] > 0) << l) as i32;
        for l in 0..32 {
            let truth = [
                x[if l >= 3 { l - 3 } else { l }],
                x[if l + 5 < 32 { l + 5 } else { l }],
                x[l ^ 9],
                x[l / 8 * 8 + 2],
                ballot,
                i32::from(x.contains(&7)),
                i32::from(x.iter().all(|&v| v > -100)),
                x.iter().sum(),
                *x.iter().max().unwrap(),
            ];
            let lane: Vec<i32> = (0..9).map(|r| got[r * 32 + l]).collect();
            assert_eq!(lane, truth, "lane {l} on {on}");
        }
    }
}

#[test]
fn barriers_votes_and_atomics_sum_each_block() {
    for (on, d) in drivers() {
        for (n, block) in [(1usize, 32u32), (1000, 64), (4096, 256)] {
            let x = integers(n, 50);
            let blocks = n.div_ceil(block as usize);
            let (input, sums, counts) = (upload(&d, &x), d.alloc(4 * blocks).unwrap(), d.alloc_zeroed(32).unwrap());
            d.launch("test_block", Launch::over(n, block), args![sums.ptr(), counts.ptr(), input.ptr(), n as i32])
                .unwrap();
            let truth: Vec<i32> = x
                .chunks(block as usize)
                .map(|c| c.iter().sum::<i32>() + 1_000_000 * c.iter().filter(|&&v| v > 0).count() as i32)
                .collect();
            assert_eq!(download::<i32>(&d, &sums, blocks), truth, "n = {n} on {on}");
            let mut count = [0u32; 8];
            x.iter().for_each(|v| count[(v & 7) as usize] += 1);
            assert_eq!(download::<u32>(&d, &counts, 8), count, "n = {n} on {on}");
        }
    }
}

#[test]
fn cp_async_fills_the_ring_and_zeros_the_rest() {
    let x: Vec<u32> = (1..=1024).collect();
    for (on, d) in drivers() {
        for valid in [0usize, 1, 33, 255, 256] {
            let (input, out) = (upload(&d, &x), d.alloc(4096).unwrap());
            d.launch("test_cp_async", Launch::new([1, 1, 1], [32, 1, 1]), args![out.ptr(), input.ptr(), valid as i32])
                .unwrap();
            let got = download::<u32>(&d, &out, 1024);
            for word in 0..256 {
                let from = word / 32 * 32 + 31 - word % 32;
                for i in 0..4 {
                    let truth = if from < valid { x[4 * from + i] } else { 0 };
                    assert_eq!(got[4 * word + i], truth, "word {word}, valid {valid} on {on}");
                }
            }
        }
        let (in4, in8) = (upload(&d, &x[..32]), upload(&d, &x[..64]));
        let (out4, out8) = (d.alloc(128).unwrap(), d.alloc(256).unwrap());
        let args = args![out4.ptr(), out8.ptr(), in4.ptr(), in8.ptr()];
        d.launch("test_cp_async_small", Launch::new([1, 1, 1], [32, 1, 1]), args).unwrap();
        let (got4, got8) = (download::<u32>(&d, &out4, 32), download::<u32>(&d, &out8, 64));
        for l in 0..32usize {
            assert_eq!(got4[l], x[l ^ 1], "lane {l} on {on}");
            let from = l ^ 1;
            let truth = if from < 16 { [x[2 * from], x[2 * from + 1]] } else { [0, 0] };
            assert_eq!(got8[2 * l..2 * l + 2], truth, "lane {l} on {on}");
        }
    }
}

#[test]
fn ldmatrix_gives_each_lane_its_elements() {
    let x: Vec<u16> = (0..256).collect(); // four matrices of 8 x 8; element (m, row, column) = 64 m + 8 row + column
    for (on, d) in drivers() {
        let (input, out) = (upload(&d, &x), d.alloc(4 * 384).unwrap());
        d.launch("test_ldmatrix", Launch::new([1, 1, 1], [32, 1, 1]), args![out.ptr(), input.ptr()]).unwrap();
        let got = download::<u32>(&d, &out, 384);
        let pair = |a: usize, b: usize| x[a] as u32 | (x[b] as u32) << 16;
        for l in 0..32 {
            let (g, t) = (l / 4, l % 4 * 2);
            for m in 0..4 {
                let plain = pair(64 * m + 8 * g + t, 64 * m + 8 * g + t + 1);
                let transposed = pair(64 * m + 8 * t + g, 64 * m + 8 * (t + 1) + g);
                assert_eq!(got[l * 4 + m], plain, "lane {l}, matrix {m} on {on}");
                assert_eq!(got[128 + l * 4 + m], transposed, "lane {l}, matrix {m} transposed on {on}");
                if m < 2 {
                    assert_eq!(got[256 + l * 4 + m], plain, "lane {l}, matrix {m} of two on {on}");
                    assert_eq!(got[256 + l * 4 + 2 + m], transposed, "lane {l}, matrix {m} of two transposed on {on}");
                }
            }
        }
    }
}

/// Small integers: every product and sum is exact, so the tensor core's rounding does not matter.
#[test]
fn mma_multiplies_matrices() {
    let (m, n, k) = (32usize, 24usize, 64usize);
    let (a, b) = (integers(m * k, 8), integers(n * k + 1, 8)[1..].to_vec());
    let truth: Vec<f32> =
        (0..m * n).map(|i| (0..k).map(|j| (a[i / n * k + j] * b[i % n * k + j]) as f32).sum()).collect();
    let as_f32 = |v: &[i32]| v.iter().map(|&x| x as f32).collect::<Vec<_>>();
    let as_bf16 = |v: &[i32]| v.iter().map(|&x| bf16::from_f32(x as f32)).collect::<Vec<_>>();
    for (on, d) in drivers() {
        let launch = Launch::new([n as u32 / 8, m as u32 / 16, 1], [32, 1, 1]);
        let c = d.alloc(4 * m * n).unwrap();
        let (x, y) = (upload(&d, &as_bf16(&a)), upload(&d, &as_bf16(&b)));
        d.launch("test_mma_bf16", launch, args![c.ptr(), x.ptr(), y.ptr(), n as i32, k as i32]).unwrap();
        assert_eq!(download::<f32>(&d, &c, m * n), truth, "bf16 on {on}");
        let (x, y) = (upload(&d, &as_f32(&a)), upload(&d, &as_f32(&b)));
        d.fill(c.ptr(), 0xff, 4 * m * n).unwrap();
        d.launch("test_mma_tf32", launch, args![c.ptr(), x.ptr(), y.ptr(), n as i32, k as i32]).unwrap();
        assert_eq!(download::<f32>(&d, &c, m * n), truth, "tf32 on {on}");
    }
}

#[test]
fn named_barriers_hand_over_between_warps() {
    let x = integers(512, 1000);
    for (on, d) in drivers() {
        let (input, out) = (upload(&d, &x), d.alloc(2048).unwrap());
        d.launch("test_named_barriers", Launch::new([1, 1, 1], [128, 1, 1]), args![out.ptr(), input.ptr()]).unwrap();
        let got = download::<i32>(&d, &out, 512);
        for i in 0..512 {
            assert_eq!(got[i], 2 * x[i / 64 * 64 + 63 - i % 64], "element {i} on {on}");
        }
    }
}
