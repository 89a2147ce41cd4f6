use super::*;

/// Known answers of Random123's `kat_vectors` for philox4x32 with 10 rounds.
#[test]
fn philox_known_answers() {
    assert_eq!(philox([0; 4], 0), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    assert_eq!(philox([u32::MAX; 4], u64::MAX), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    let counter = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
    assert_eq!(philox(counter, 0x299f31d0_a4093822), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
}

/// Distance from the truth in units in the last place of the f32 nearest to it.
fn ulps(got: f32, truth: f64) -> f64 {
    let near = truth.abs() as f32;
    let unit = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
    (f64::from(got) - truth).abs() / unit
}

fn words(n: usize) -> impl Iterator<Item = u32> {
    let edges = [0, 1, 2, 3, 1 << 29, 1 << 30, 1 << 31, 3 << 30, u32::MAX - 1, u32::MAX];
    edges.into_iter().chain((0..n as u32).map(|i| philox([i, 1, 2, 3], 7)[0]))
}

#[test]
fn uniform_stays_in_its_range() {
    assert_eq!(uniform(0), 2f32.powi(-33));
    assert_eq!(uniform(u32::MAX), 1.0);
    assert!(words(100_000).all(|w| uniform(w) > 0.0 && uniform(w) <= 1.0));
}

/// The polynomials are good to 1e-8; what remains is the rounding of the last two or three operations.
#[test]
fn logarithm_sine_and_cosine_are_good_to_two_ulps() {
    for w in words(400_000) {
        let u = uniform(w);
        let log = ulps(ln(u), f64::from(u).ln());
        assert!(log <= 1.5, "ln {u}: {log} ulps");
        let turns = f64::from(u);
        let nearest = (4.0 * turns).round_ties_even() as i64;
        let (s, c) = (std::f64::consts::TAU * (turns - nearest as f64 / 4.0)).sin_cos();
        let truth = [(s, c), (c, -s), (-s, -c), (-c, s)][nearest as usize % 4];
        let got = sincos_turns(u);
        let err = ulps(got.0, truth.0).max(ulps(got.1, truth.1));
        assert!(err <= 1.5, "sincos of {u} turns: {err} ulps");
    }
}

#[test]
fn normals_are_good_to_three_ulps() {
    let mut worst = 0f64;
    for i in 0..300_000 {
        let w = philox([i, 0, 0, 0], 11);
        let (u1, u2) = (f64::from(uniform(w[0])), f64::from(uniform(w[1])));
        let radius = (-2.0 * u1.ln()).sqrt();
        let [a, b] = normal_pair(w[0], w[1]);
        // Near a zero of the sine the f64 argument itself is rounded; there the absolute error is what counts.
        for (got, truth) in
            [(a, radius * (std::f64::consts::TAU * u2).cos()), (b, radius * (std::f64::consts::TAU * u2).sin())]
        {
            if truth.abs() > 1e-6 {
                worst = worst.max(ulps(got, truth));
            } else {
                assert!((f64::from(got) - truth).abs() < 1e-12);
            }
        }
    }
    assert!(worst <= 3.0, "{worst} ulps");
}

#[test]
fn normals_have_the_moments_of_a_normal() {
    let mut x = vec![0f32; 1 << 20];
    fill_normal(&mut x, 5, 0, 0, op::Q_SAMPLE);
    let n = x.len() as f64;
    let moment = |k: i32| x.iter().map(|&x| f64::from(x).powi(k)).sum::<f64>() / n;
    // Five standard errors: variances of x, x², x³, x⁴ are 1, 2, 15, 96.
    for (k, truth, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0f64)] {
        assert!((moment(k) - truth).abs() < 5.0 * (variance / n).sqrt(), "moment {k}: {}", moment(k));
    }
}

/// Every path, every length, and the element-by-element definition: the same bits.
#[test]
fn bits_do_not_depend_on_the_path() {
    let (seed, tail) = (0x0123_4567_89ab_cdef, [3, 1000, op::P_SAMPLE]);
    let kinds =
        [Kind::Normal, Kind::Uniform, Kind::Dropout { threshold: keep_threshold(0.3), scale: 1.0 / (1.0 - 0.3) }];
    for kind in kinds {
        for n in [0, 1, 3, 4, 5, 31, 32, 33, 1000, 3072] {
            let (mut fast, mut plain) = (vec![f32::NAN; n], vec![f32::NAN; n]);
            fill(&mut fast, seed, tail, kind);
            fill_portable(&mut plain, seed, tail, kind);
            for i in 0..n {
                let w = philox([i as u32 / 4, tail[0], tail[1], tail[2]], seed);
                let truth = match kind {
                    Kind::Normal => normals(w)[i % 4],
                    Kind::Uniform => uniform(w[i % 4]),
                    Kind::Dropout { scale, .. } => f32::from(keep(w[i % 4], 0.3)) * scale,
                };
                assert_eq!(fast[i].to_bits(), truth.to_bits(), "element {i} of {n}");
                assert_eq!(plain[i].to_bits(), truth.to_bits(), "element {i} of {n}");
            }
        }
    }
}

/// Bits of a few normals, so that an accidental change of the order of operations is noticed.
#[test]
fn normals_keep_their_bits() {
    let mut x = [0f32; 8];
    fill_normal(&mut x, 42, 1, 2, op::Q_SAMPLE);
    let kept = [0xbf43_4890, 0x3f81_b03a, 0x3fca_8dbd, 0x3fdf_22fe, 0xbf89_a473, 0xbd4b_eec4, 0xbfa2_f5b8, 0xbe13_baf8];
    assert_eq!(x.map(f32::to_bits), kept, "{x:?}");
}

#[test]
fn dropout_keeps_the_share_it_should() {
    assert_eq!(keep_threshold(0.0), 0);
    assert_eq!(keep_threshold(0.5), 1 << 31);
    assert!(keep(0, 0.0) && !keep((1 << 31) - 1, 0.5) && keep(1 << 31, 0.5));
    let n = 1 << 20;
    let mut mask = vec![0f32; n];
    fill_dropout(&mut mask, 0.1, 9, 0, 0, op::DROPOUT);
    let kept = mask.iter().filter(|&&m| m != 0.0).count() as f64 / n as f64;
    assert!((kept - 0.9).abs() < 5.0 * (0.09 / n as f64).sqrt(), "{kept}");
    assert!(mask.iter().all(|&m| m == 0.0 || m == 1.0 / (1.0 - 0.1)));
}

#[test]
fn below_covers_its_range() {
    assert_eq!((below(0, 7), below(u32::MAX, 7), below(1 << 31, 2)), (0, 6, 1));
    assert!(words(10_000).all(|w| below(w, 10) < 10));
}

#[test]
fn permutations_hold_every_index_once_and_differ_by_epoch() {
    for n in [0, 1, 2, 5, 1000] {
        let mut p = permutation(n, 3, 0);
        assert_eq!(p, permutation(n, 3, 0));
        p.sort_unstable();
        assert_eq!(p, (0..n as u32).collect::<Vec<_>>());
    }
    assert_ne!(permutation(100, 3, 0), permutation(100, 3, 1));
    assert_ne!(permutation(100, 3, 0), permutation(100, 4, 0));
}

/// Each of the 24 orders of 4 things in 1/24 of the epochs, to five standard errors.
#[test]
fn permutations_are_uniform() {
    let mut counts = std::collections::BTreeMap::new();
    let epochs = 24_000;
    for epoch in 0..epochs {
        *counts.entry(permutation(4, 1, epoch)).or_insert(0u32) += 1;
    }
    assert_eq!(counts.len(), 24);
    let (mean, deviation) = (1000.0, 31.0);
    assert!(counts.values().all(|&c| (f64::from(c) - mean).abs() < 5.0 * deviation), "{counts:?}");
}
