//! Latents: the x_T that a walk starts from, and the way between two of them.
//!
//! ```text
//! slerp(a, b, f) = (sin((1 - f) w) a + sin(f w) b)/sin w,   cos w = <a, b>/(|a| |b|)
//! ```
//!
//! Between two draws of normal noise the mean of both has too small a norm, so that its pictures are dull; the arc keeps the norm.

use crate::rng;

/// x_T of the picture with this seed.
pub fn draw(x: &mut [f32], seed: u64) {
    rng::fill_normal(x, seed, 0, 0, rng::op::X_T);
}

/// The latent at part `f` (0 to 1) of the arc from `a` to `b`; a straight line where they point the same way or opposite ways.
pub fn slerp(a: &[f32], b: &[f32], f: f64) -> Vec<f32> {
    assert_eq!(a.len(), b.len(), "latents of two sizes");
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let angle = (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).clamp(-1.0, 1.0).acos();
    let [part_a, part_b] =
        if angle.sin() > 1e-4 { [(1.0 - f) * angle, f * angle].map(|x| x.sin() / angle.sin()) } else { [1.0 - f, f] };
    a.iter().zip(b).map(|(&a, &b)| (part_a * f64::from(a) + part_b * f64::from(b)) as f32).collect()
}

/// `columns` latents from `a` to `b`, both among them, evenly spaced on the arc.
pub fn path(a: &[f32], b: &[f32], columns: usize) -> Vec<f32> {
    assert!(columns >= 2, "a path of {columns} latents");
    (0..columns).flat_map(|i| slerp(a, b, i as f64 / (columns - 1) as f64)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arcs_keep_angle_and_norm() {
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        // A quarter of a circle in thirds, and the ends themselves.
        let path = path(&[2.0, 0.0], &[0.0, 2.0], 4);
        let third = (std::f64::consts::PI / 6.0).sin_cos();
        let want = [2.0, 0.0, 2.0 * third.1, 2.0 * third.0, 2.0 * third.0, 2.0 * third.1, 0.0, 2.0];
        path.iter().zip(want).for_each(|(&got, want)| assert!((f64::from(got) - want).abs() < 1e-6, "{path:?}"));
        let [mut a, mut b] = [[0.0f32; 500]; 2];
        draw(&mut a, 3);
        draw(&mut b, 4);
        assert_eq!((slerp(&a, &b, 0.0), slerp(&a, &b, 1.0)), (a.to_vec(), b.to_vec()));
        // The two norms differ by the chance of 500 draws; the mean of both would have 0.7 of them.
        let ratio = norm(&slerp(&a, &b, 0.5)) / (norm(&a) * norm(&b)).sqrt();
        assert!((ratio - 1.0).abs() < 0.01, "{ratio}");
        assert_eq!(slerp(&a, &a, 0.3), a);
        assert!(
            slerp(&[1.0, 0.0], &[-1.0, 0.0], 0.25) == [0.5, 0.0] && slerp(&[0.0; 2], &[1.0, 0.0], 0.5)[0].is_finite()
        );
    }
}
