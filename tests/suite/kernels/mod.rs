//! The numeric operations: plain references against closed forms and central differences, fast twins against the plain
//! ones on every instruction set of this CPU, with 1 and 2 threads to the same bits.
//!
//! A fast sum of `terms` products may differ from the exact one by `terms · eps · Σ|products|` (every partial sum is
//! rounded once, whatever the order); `Σ|products|` is computed by the plain reference on absolute values.

mod attention;
mod conv2d;
mod group_norm;
mod linear;

use iddpm::ops::fast::Isa;
use iddpm::rng::philox;

/// Uniform values in [-1, 1).
fn uniform(len: usize, seed: u64) -> Vec<f32> {
    let word = |i: usize| philox([(i / 4) as u32, 0, 0, 0], seed)[i % 4];
    (0..len).map(|i| f64::from(word(i)).mul_add(1.0 / 2_147_483_648.0, -1.0) as f32).collect()
}

fn abs(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| x.abs()).collect()
}

fn nan(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}

fn isas() -> Vec<Isa> {
    [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.available()).collect()
}

/// Runs `f` on pools of 1 and 2 threads for every instruction set; the outputs of the two pools must have the same bits.
fn on_all(what: &str, f: impl Fn(Isa) -> Vec<Vec<f32>> + Sync) -> Vec<(Isa, Vec<Vec<f32>>)> {
    let with = |threads: usize, isa: Isa| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool").install(|| f(isa))
    };
    let bits = |outs: &[Vec<f32>]| outs.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
    isas()
        .into_iter()
        .map(|isa| {
            let (one, two) = (with(1, isa), with(2, isa));
            assert!(bits(&one) == bits(&two), "{what}, {isa:?}: 1 and 2 threads differ");
            (isa, one)
        })
        .collect()
}

/// `|got - want| <= terms · eps · size` everywhere.
fn assert_close(got: &[f32], want: &[f32], size: &[f32], terms: usize, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, ((got, want), size)) in got.iter().zip(want).zip(size).enumerate() {
        let bound = terms as f32 * f32::EPSILON * size.abs() + f32::MIN_POSITIVE;
        assert!((got - want).abs() <= bound, "{what}: element {i} is {got}, plain {want}, bound {bound:e}");
    }
}

/// Central differences of `loss` in f64: compares `grad` with (loss(x + h) - loss(x - h))/2h for a few elements of x.
fn assert_gradient(grad: &[f32], x: &[f32], loss: impl Fn(&[f32]) -> f64, what: &str) {
    assert_eq!(grad.len(), x.len(), "{what}: lengths");
    let largest = grad.iter().fold(1e-3f32, |m, g| m.max(g.abs()));
    for i in (0..x.len()).step_by(1 + x.len() / 13) {
        let (mut up, mut down) = (x.to_vec(), x.to_vec());
        up[i] += 0.0078125;
        down[i] -= 0.0078125;
        let want = (loss(&up) - loss(&down)) / f64::from(up[i] - down[i]);
        // Outputs are rounded to f32 (about 1e-7 of their size over 2h = 1/64) and the third derivative weighs h²/6.
        let bound = 2e-3 * f64::from(largest);
        assert!((f64::from(grad[i]) - want).abs() <= bound, "{what}: element {i} is {}, difference {want}", grad[i]);
    }
}

fn weighted(y: &[f32], dy: &[f32]) -> f64 {
    y.iter().zip(dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
}

/// Every size of an element is the largest of its tensor: for results whose terms cancel a little.
fn largest(x: &[f32]) -> Vec<f32> {
    vec![x.iter().fold(0.0, |m: f32, x| m.max(x.abs())); x.len()]
}
