//! Attention in both orders of its channels.

use super::{assert_close, assert_gradient, largest, nan, on_all, uniform, weighted};
use iddpm::ops::attention::{self, AttentionShape, QkvOrder};
use iddpm::ops::fast::{self, Isa};

/// out and lse, then dqkv.
fn attention_outputs(isa: Option<Isa>, qkv: &[f32], dout: &[f32], s: &AttentionShape) -> Vec<Vec<f32>> {
    let (mut out, mut lse, mut dqkv) = (nan(dout.len()), nan(s.n * s.heads * s.s), nan(qkv.len()));
    if let Some(isa) = isa {
        fast::attention::forward(isa, &mut out, &mut lse, qkv, s, &mut nan(fast::attention::forward_scratch(s)));
        let mut scratch = nan(fast::attention::backward_scratch(s));
        fast::attention::backward(isa, &mut dqkv, dout, qkv, &out, &lse, s, &mut scratch);
    } else {
        attention::forward_cpu(&mut out, &mut lse, qkv, s);
        attention::backward_cpu(&mut dqkv, dout, qkv, &out, &lse, s);
    }
    vec![out, lse, dqkv]
}

fn attention_shape([n, s, heads, d]: [usize; 4], order: QkvOrder) -> AttentionShape {
    AttentionShape { n, s, heads, d, order }
}

#[test]
fn fast_attention_equals_the_plain_one() {
    let sizes = [[1, 1, 1, 1], [2, 5, 3, 7], [1, 17, 2, 33], [2, 64, 4, 16], [1, 49, 1, 8], [3, 100, 2, 32]];
    for (i, size) in sizes.into_iter().enumerate() {
        for (order, gain) in [(QkvOrder::Legacy, 1.0), (QkvOrder::New, 1.0), (QkvOrder::Legacy, 4.0)] {
            let (s, seed) = (attention_shape(size, order), 500 + i as u64);
            let what = format!("seed {seed}, gain {gain}, {s:?}");
            let qkv: Vec<f32> = uniform(s.n * s.s * 3 * s.c(), seed).iter().map(|x| x * gain).collect();
            let dout = uniform(s.n * s.s * s.c(), seed + 100);
            let plain = attention_outputs(None, &qkv, &dout, &s);
            // A score of at most gain²√d is off by d + 4 roundings, which is then the relative error of p; the
            // backward uses it with an lse and a delta that are off as much, and everything sums s tokens.
            let score = ((s.d + 4) as f32 * gain * gain * (s.d as f32).sqrt()) as usize + 4;
            for (isa, outs) in on_all(&what, |isa| attention_outputs(Some(isa), &qkv, &dout, &s)) {
                let name = |part: &str| format!("{part}, {isa:?}, {what}");
                assert_close(&outs[0], &plain[0], &largest(&plain[0]), s.s + 2 * score, &name("out"));
                assert_close(&outs[1], &plain[1], &vec![1.0; plain[1].len()], s.s + 2 * score, &name("lse"));
                assert_close(&outs[2], &plain[2], &largest(&plain[2]), 2 * s.s + 8 * score, &name("dqkv"));
            }
        }
    }
}

#[test]
fn plain_attention_closed_forms() {
    // Equal keys: the output is the mean of v and lse = score + log s. The orders agree on permuted channels.
    let s = attention_shape([1, 4, 1, 2], QkvOrder::Legacy);
    let qkv: Vec<f32> = (0..4).flat_map(|i| [1.0, 1.0, 0.5, 0.5, i as f32, 1.0]).collect();
    let outs = attention_outputs(None, &qkv, &[1.0; 8], &s);
    assert_close(&outs[0], &[1.5, 1.0, 1.5, 1.0, 1.5, 1.0, 1.5, 1.0], &[2.0; 8], 2, "mean of v");
    let lse = (1.0 / 2f64.sqrt() + 4f64.ln()) as f32;
    assert_close(&outs[1], &[lse; 4], &[lse; 4], 1, "lse");
    let [legacy, new] = [QkvOrder::Legacy, QkvOrder::New].map(|order| attention_shape([1, 5, 3, 2], order));
    let qkv = uniform(5 * 18, 3);
    let mut moved = nan(qkv.len());
    for (i, x) in qkv.iter().enumerate() {
        let (token, head, part, e) = (i / 18, i % 18 / 6, i % 6 / 2, i % 2);
        moved[token * 18 + part * 6 + head * 2 + e] = *x;
    }
    let dout = uniform(5 * 6, 4);
    let (a, b) = (attention_outputs(None, &qkv, &dout, &legacy), attention_outputs(None, &moved, &dout, &new));
    assert_eq!((&a[0], &a[1]), (&b[0], &b[1]));
}

#[test]
fn plain_attention_gradients() {
    for order in [QkvOrder::Legacy, QkvOrder::New] {
        let (s, seed) = (attention_shape([2, 5, 2, 3], order), 77);
        let (qkv, dout) = (uniform(s.n * s.s * 3 * s.c(), seed), uniform(s.n * s.s * s.c(), seed + 1));
        let dqkv = &attention_outputs(None, &qkv, &dout, &s)[2];
        let loss = |qkv: &[f32]| weighted(&attention_outputs(None, qkv, &dout, &s)[0], &dout);
        assert_gradient(dqkv, &qkv, loss, &format!("dqkv, seed {seed}, {order:?}"));
    }
}
