//! Linear layer: `y[n,o] = b[o] + Σ_c x[n,c] · w[o,c]`.   x: (n, c), w: (oc, c), b: (oc), y: (n, oc).

/// `y = x wᵀ + b`.
pub fn forward_cpu(y: &mut [f32], x: &[f32], w: &[f32], b: &[f32], n: usize, c: usize, oc: usize) {
    assert!(y.len() == n * oc && x.len() == n * c && w.len() == oc * c && b.len() == oc, "linear forward: lengths");
    for (i, y) in y.iter_mut().enumerate() {
        let (x, w) = (&x[i / oc * c..][..c], &w[i % oc * c..][..c]);
        let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        *y = (sum + f64::from(b[i % oc])) as f32;
    }
}

/// Gradient of the input: `dx = dy w + add`.   dx, add: (n, c), dy: (n, oc).
pub fn backward_data_cpu(dx: &mut [f32], dy: &[f32], w: &[f32], add: Option<&[f32]>, n: usize, c: usize, oc: usize) {
    assert!(dx.len() == n * c && dy.len() == n * oc && w.len() == oc * c, "linear backward: lengths");
    for (i, dx) in dx.iter_mut().enumerate() {
        let dy = &dy[i / c * oc..][..oc];
        let sum: f64 = dy.iter().enumerate().map(|(o, dy)| f64::from(*dy) * f64::from(w[o * c + i % c])).sum();
        *dx = (sum + f64::from(add.map_or(0.0, |add| add[i]))) as f32;
    }
}

/// Gradients of the parameters: `dw = dyᵀ x`, `db[o] = Σ_n dy[n,o]`; added to the old values with `accumulate`.
#[allow(clippy::too_many_arguments)]
pub fn backward_weight_cpu(
    dw: &mut [f32],
    db: &mut [f32],
    dy: &[f32],
    x: &[f32],
    accumulate: bool,
    n: usize,
    c: usize,
    oc: usize,
) {
    assert!(dw.len() == oc * c && db.len() == oc && dy.len() == n * oc && x.len() == n * c, "linear backward: lengths");
    let kept = |old: f32| if accumulate { f64::from(old) } else { 0.0 };
    for (i, dw) in dw.iter_mut().enumerate() {
        let (o, c_in) = (i / c, i % c);
        let sum: f64 = (0..n).map(|n| f64::from(dy[n * oc + o]) * f64::from(x[n * c + c_in])).sum();
        *dw = (kept(*dw) + sum) as f32;
    }
    for (o, db) in db.iter_mut().enumerate() {
        *db = (kept(*db) + (0..n).map(|n| f64::from(dy[n * oc + o])).sum::<f64>()) as f32;
    }
}
