//! Attention and its gradient by plain loops in f64, with the sum of the absolute terms of each result, and optionally with the
//! roundings that a plain bf16 implementation makes.

use super::Data;
use half::bf16;
use iddpm::ops::attention::AttentionShape;

/// Results, and beside each the sum of the absolute values of its terms.
pub struct Reference {
    pub out: Vec<f64>,
    pub out_size: Vec<f64>,
    pub lse: Vec<f64>,
    pub lse_size: Vec<f64>,
    pub dqkv: Vec<f64>,
    pub dqkv_size: Vec<f64>,
    /// The largest Σ|q||k|/√d.
    pub largest_score: f64,
}

impl Reference {
    /// Positions of the elements of "out", or of the "dq", "dk" or "dv" in dqkv.
    pub fn part(&self, s: &AttentionShape, name: &str) -> Vec<usize> {
        let Some(part) = ["dq", "dk", "dv"].iter().position(|&n| n == name) else {
            return (0..self.out.len()).collect();
        };
        let owns = |column: usize| (0..s.heads).any(|h| (s.columns(h)[part]..).take(s.d).any(|own| own == column));
        (0..self.dqkv.len()).filter(|i| owns(i % (3 * s.c()))).collect()
    }
}

/// `rounds`: p, ds and results go through bf16 on the way.
pub fn reference(data: &Data, rounds: bool) -> Reference {
    let s = &data.s;
    let round = |x: f64| if rounds { f64::from(bf16::from_f32(x as f32).to_f32()) } else { x };
    let (c, d, scale) = (s.c(), s.d, s.scale());
    let (zeros, rows) = (vec![0f64; data.dout.len()], vec![0f64; s.n * s.heads * s.s]);
    let sums = vec![0f64; data.qkv.len()];
    let mut r = Reference {
        out: zeros.clone(),
        out_size: zeros,
        lse: rows.clone(),
        lse_size: rows,
        dqkv: sums.clone(),
        dqkv_size: sums,
        largest_score: 0.0,
    };
    let products = |a: &[f32], b: &[f32]| -> (f64, f64) {
        let terms = || a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        (terms().sum(), terms().map(f64::abs).sum())
    };
    for (n, head) in (0..s.n).flat_map(|n| (0..s.heads).map(move |head| (n, head))) {
        let [q, k, v] = s.columns(head);
        let at = |i: usize, column: usize| (n * s.s + i) * 3 * c + column;
        let token = |i: usize, column: usize| &data.qkv[at(i, column)..][..d];
        for i in 0..s.s {
            let row = (n * s.s + i) * c + head * d;
            let scores: Vec<(f64, f64)> = (0..s.s).map(|j| products(token(i, q), token(j, k))).collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |m, x| m.max(scale * x.0));
            let weights: Vec<f64> = scores.iter().map(|x| (scale * x.0 - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let lse = max + sum.ln();
            r.largest_score = scores.iter().fold(r.largest_score, |m, x| m.max(scale * x.1));
            let at_lse = (n * s.heads + head) * s.s + i;
            (r.lse[at_lse], r.lse_size[at_lse]) = (lse, 1.0 + lse.abs());
            for e in 0..d {
                let terms = |f: &dyn Fn(f64) -> f64| -> f64 {
                    (0..s.s).map(|j| round(weights[j]) * f(f64::from(token(j, v)[e])) / sum).sum()
                };
                (r.out[row + e], r.out_size[row + e]) = (round(terms(&|x| x)), terms(&f64::abs));
            }
            let dout = &data.dout[row..][..d];
            let (mut delta, mut delta_size) = (0f64, 0f64);
            for (dout, out) in dout.iter().zip(&r.out[row..][..d]) {
                delta += f64::from(*dout) * out;
                delta_size += (f64::from(*dout) * out).abs();
            }
            for (j, score) in scores.iter().enumerate() {
                let p = (scale * score.0 - lse).exp();
                let (dp, dp_size) = products(dout, token(j, v));
                let (ds, ds_size) = (round(p * (dp - delta)), p * (dp_size + delta_size));
                let mut add = |to: usize, weight: f64, size: f64, x: f32| {
                    r.dqkv[to] += weight * f64::from(x);
                    r.dqkv_size[to] += size * f64::from(x).abs();
                };
                for (e, dout) in dout.iter().enumerate() {
                    add(at(i, q) + e, scale * ds, scale * ds_size, token(j, k)[e]);
                    add(at(j, k) + e, scale * ds, scale * ds_size, token(i, q)[e]);
                    add(at(j, v) + e, round(p), p, *dout);
                }
            }
        }
    }
    r.dqkv.iter_mut().for_each(|x| *x = round(*x));
    r
}
