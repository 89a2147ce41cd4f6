//! The linear layer.

use super::{abs, assert_close, assert_gradient, nan, on_all, uniform, weighted};
use iddpm::ops::{fast, linear};

#[test]
fn fast_linear_equals_the_plain_one() {
    for (i, [n, c, oc]) in [[1, 1, 1], [3, 5, 7], [13, 33, 65], [16, 128, 192], [1, 9, 8200]].into_iter().enumerate() {
        let seed = 300 + 10 * i as u64;
        let what = format!("seed {seed}, n {n}, c {c}, oc {oc}");
        let (x, w, b) = (uniform(n * c, seed), uniform(oc * c, seed + 1), uniform(oc, seed + 2));
        let (dy, add) = (uniform(n * oc, seed + 3), uniform(n * c, seed + 4));
        let new = || [nan(n * oc), nan(n * c), w.clone(), b.clone()];
        let plain = |x: &[f32], w: &[f32], b: &[f32], dy: &[f32], add: &[f32]| {
            let [mut y, mut dx, mut dw, mut db] = new().map(|v| if x[0] < 0.0 { v } else { abs(&v) });
            linear::forward_cpu(&mut y, x, w, b, n, c, oc);
            linear::backward_data_cpu(&mut dx, dy, w, Some(add), n, c, oc);
            linear::backward_weight_cpu(&mut dw, &mut db, dy, x, true, n, c, oc);
            [y, dx, dw, db]
        };
        let x: Vec<f32> = std::iter::once(-1.0).chain(x[1..].iter().copied()).collect();
        let want = plain(&x, &w, &b, &dy, &add);
        let size = plain(&abs(&x), &abs(&w), &abs(&b), &abs(&dy), &abs(&add));
        let fast = on_all(&what, |isa| {
            let [mut y, mut dx, mut dw, mut db] = new();
            let mut scratch = nan(fast::linear::forward_scratch(n, c, oc));
            fast::linear::forward(isa, &mut y, &x, &w, &b, n, c, oc, &mut scratch);
            let mut scratch = nan(fast::linear::backward_data_scratch(n, c, oc));
            fast::linear::backward_data(isa, &mut dx, &dy, &w, Some(&add), n, c, oc, &mut scratch);
            let mut scratch = nan(fast::linear::backward_weight_scratch(n, c, oc));
            fast::linear::backward_weight(isa, &mut dw, &mut db, &dy, &x, true, n, c, oc, &mut scratch);
            vec![y, dx, dw, db]
        });
        for (isa, outs) in fast {
            for (part, name) in ["y", "dx", "dw", "db"].into_iter().enumerate() {
                assert_close(&outs[part], &want[part], &size[part], n + c + oc, &format!("{name}, {isa:?}, {what}"));
            }
        }
    }
}

/// A row is the same to the bit alone, where it is computed in parts, and among others.
#[test]
fn rows_do_not_depend_on_their_number() {
    let ([n, c, oc], seed) = ([3, 17, 4096 + 37], 51);
    let (x, w, b) = (uniform(n * c, seed), uniform(oc * c, seed + 1), uniform(oc, seed + 2));
    let forward = |isa, x: &[f32]| {
        let n = x.len() / c;
        let (mut y, mut scratch) = (nan(n * oc), nan(fast::linear::forward_scratch(n, c, oc)));
        fast::linear::forward(isa, &mut y, x, &w, &b, n, c, oc, &mut scratch);
        vec![y]
    };
    for (isa, all) in on_all("three rows", |isa| forward(isa, &x)) {
        for (row, y) in x.chunks_exact(c).zip(all[0].chunks_exact(oc)) {
            assert!(forward(isa, row)[0] == y, "{isa:?}");
        }
    }
}

#[test]
fn plain_linear_gradients() {
    let ([n, c, oc], seed) = ([3, 4, 5], 41);
    let (x, w, b) = (uniform(n * c, seed), uniform(oc * c, seed + 1), uniform(oc, seed + 2));
    let dy = uniform(n * oc, seed + 3);
    let loss = |x: &[f32], w: &[f32], b: &[f32]| {
        let mut y = nan(n * oc);
        linear::forward_cpu(&mut y, x, w, b, n, c, oc);
        weighted(&y, &dy)
    };
    let (mut dx, mut dw, mut db) = (nan(n * c), nan(oc * c), nan(oc));
    linear::backward_data_cpu(&mut dx, &dy, &w, None, n, c, oc);
    linear::backward_weight_cpu(&mut dw, &mut db, &dy, &x, false, n, c, oc);
    assert_gradient(&dx, &x, |x| loss(x, &w, &b), "linear dx");
    assert_gradient(&dw, &w, |w| loss(&x, w, &b), "linear dw");
    assert_gradient(&db, &b, |b| loss(&x, &w, b), "linear db");
}
