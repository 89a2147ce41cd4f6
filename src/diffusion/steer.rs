//! What may be done to the network's word before a step: classifier-free guidance, a dynamic threshold.
//!
//! ```text
//! guidance             out = without + w (with - without)                    the half of the mean; the variance is that with the label
//! dynamic threshold    x_0 -> clamp(x_0, -s, s)/s,   s = max(1, quantile p of |x_0| over the image)
//! ```
//!
//! (Ho & Salimans 2022, with w as diffusers counts it: 1 is no guidance; Saharia et al. 2022, section 2.3.) Eps, x_0 and v are
//! combined alike: each is a linear function of x_0 at given x_t.

/// The guided output of one image: `with` and `without` are the network's outputs with the label and with the null class.
///
/// guided, with, without: (pixels, C or 2C), rounded to f32 as an output is.
pub fn guide(guided: &mut [f32], with: &[f32], without: &[f32], channels: usize, stride: usize, weight: f64) {
    assert!(guided.len() == with.len() && with.len() == without.len(), "guidance: lengths differ");
    for (i, ((guided, &with), &without)) in guided.iter_mut().zip(with).zip(without).enumerate() {
        let difference = f64::from(with) - f64::from(without);
        *guided = if i % stride < channels { (f64::from(without) + weight * difference) as f32 } else { with };
    }
}

/// Place of quantile `p` among `n` sorted values: rank and fraction of the way to the next one, `p (n - 1)`.
pub fn quantile_place(p: f64, n: usize) -> (usize, f32) {
    let place = p * (n - 1) as f64;
    let rank = (place as usize).min(n - 1);
    (rank, if rank + 1 < n { (place - rank as f64) as f32 } else { 0.0 })
}

/// The dynamic threshold of one image: quantile `p` of |x_0|, between two values by their line, at least 1. Sorts `x_0`, by the bits of
/// its magnitudes: a NaN counts as larger than any number, and a threshold that is NaN becomes 1.
pub fn dynamic_threshold(x_0: &mut [f32], p: f64) -> f32 {
    assert!(!x_0.is_empty(), "dynamic threshold of no element");
    x_0.iter_mut().for_each(|x| *x = x.abs());
    let (rank, fraction) = quantile_place(p, x_0.len());
    let (_, low, above) = x_0.select_nth_unstable_by_key(rank, |x| x.to_bits());
    let low = *low;
    let high = if fraction > 0.0 { above.iter().copied().min_by_key(|x| x.to_bits()).unwrap_or(low) } else { low };
    fraction.mul_add(high - low, low).max(1.0)
}

/// What is done to a prediction of x_0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// Nothing.
    Free,
    /// Clipped to [-1, 1].
    Clip,
    /// Clipped to [-s, s] and divided by s.
    Threshold(f64),
}

impl Bound {
    /// The map, as the steps of [`super::reverse`] take it.
    pub fn map(self) -> impl Fn(f64) -> f64 + Copy {
        move |x| match self {
            Bound::Free => x,
            Bound::Clip => x.clamp(-1.0, 1.0),
            Bound::Threshold(s) => x.clamp(-s, s) / s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Quantiles of 0, 1, .. 10, as NumPy's default gives them.
    #[test]
    fn thresholds_are_quantiles_of_magnitudes() {
        let shuffled: Vec<f32> = (0..11).map(|i| ((i * 7 % 11) as f32) * if i % 2 == 0 { -1.0 } else { 1.0 }).collect();
        for (p, want) in [(0.5, 5.0), (0.25, 2.5), (0.995, 9.95), (1.0, 10.0), (0.0, 1.0), (0.05, 1.0), (0.12, 1.2)] {
            let got = dynamic_threshold(&mut shuffled.clone(), p);
            assert!((got - want).abs() <= 1e-6 * want, "{p}: {got} {want}");
        }
        assert_eq!(dynamic_threshold(&mut [-7.0], 0.3), 7.0);
        assert_eq!(dynamic_threshold(&mut [f32::NAN, 2.0, f32::NAN], 0.9), 1.0);
        assert_eq!(dynamic_threshold(&mut [f32::NAN, 2.0, -3.0], 0.5), 3.0);
    }

    #[test]
    fn guidance_is_a_line_through_both_outputs() {
        let (with, without) = ([1.0f32, 2.0, 10.0, 20.0], [3.0f32, -2.0, 11.0, 22.0]);
        let at = |weight| {
            let mut guided = [f32::NAN; 4];
            guide(&mut guided, &with, &without, 2, 4, weight);
            guided
        };
        assert_eq!(at(1.0), with);
        assert_eq!(at(0.0), [3.0, -2.0, 10.0, 20.0]);
        assert_eq!(at(3.0), [-3.0, 10.0, 10.0, 20.0]);
    }

    #[test]
    fn bounds() {
        let at = |bound: Bound| [-4.0, 0.5, 3.0].map(bound.map());
        assert_eq!(at(Bound::Free), [-4.0, 0.5, 3.0]);
        assert_eq!(at(Bound::Clip), [-1.0, 0.5, 1.0]);
        assert_eq!(at(Bound::Threshold(2.0)), [-1.0, 0.25, 1.0]);
    }
}
