//! The statistics of the parts of its result that a convolution leaves behind for the next norm.

use super::{BF16, Data, F32, FEW, Gpu, MANY, conv, driver, odd_shapes, real_shapes};
use iddpm::device::driver::{Driver, Ptr};
use iddpm::ops::conv2d::ConvShape;
use iddpm::ops::conv2d::launch::{self, Types};
use iddpm::ops::group_norm::Parts;

/// y and, if wanted, the statistics; both are NaN before.
fn forward(d: &Driver, s: ConvShape, t: Types, full: usize, mean: f32, wanted: bool) -> (Vec<f32>, Vec<f32>) {
    let mut data = Data::new(s, 21);
    data.bias.iter_mut().for_each(|b| *b += mean);
    let mut gpu = Gpu { d, half: t.half, buffers: Vec::new() };
    let (x, w) = ([gpu.act(&data.x[0]), gpu.act(&data.x[1])], gpu.act(&data.w));
    let len = s.n * Parts::of_conv(&s).parts() * 2 * s.oc;
    let (y, sums) = (gpu.nan(data.dy.len()), gpu.f32(&vec![f32::NAN; len]));
    let scratch = d.alloc(launch::weights_workspace(&s, t).max(1)).unwrap();
    let bias = gpu.f32(&data.bias);
    let f = launch::Forward { y, x, w, bias, sums: if wanted { sums } else { Ptr::NULL }, ..Default::default() };
    launch::forward(d, &s, t, full, &f, scratch.ptr()).unwrap();
    (gpu.read(y, data.dy.len(), t.half), gpu.read(sums, len, false))
}

/// The statistics are those of what was written, to the rounding of a mean and of sums of at most 32 terms.
fn check(d: &Driver, s: ConvShape, t: Types, full: usize, mean: f32) {
    let (y, sums) = forward(d, s, t, full, mean, true);
    let mut want = vec![0.0; sums.len()];
    s.sums_cpu(&mut want, &y);
    let largest = y.iter().fold(0f32, |m, y| m.max(y.abs()));
    for (i, (got, want)) in sums.iter().zip(&want).enumerate() {
        // The mean is rounded once and its sum is one of differences; the deviations from it are off by its rounding.
        let mean = (i / s.oc).is_multiple_of(2);
        let bound =
            if mean { 4.0 * f32::EPSILON * largest } else { 1e-5 * want + (8.0 * f32::EPSILON * largest).powi(2) };
        assert!((got - want).abs() <= bound, "{s:?} {t:?}: sum {i} is {got}, plain {want}, bound {bound:e}");
    }
    let (plain, untouched) = forward(d, s, t, full, mean, false);
    assert!(plain == y, "{s:?}: y differs with the sums");
    assert!(untouched.iter().all(|x| x.is_nan()), "{s:?}: sums nobody asked for");
}

#[test]
fn sums_are_those_of_what_is_written() {
    let d = driver();
    let mut shapes: Vec<(ConvShape, usize)> = odd_shapes().into_iter().map(|s| (s, MANY)).collect();
    shapes.extend(real_shapes().into_iter().map(|s| (s, FEW)));
    // Every tile: 128x128, 128x64, 64x64, 128x32; images smaller than a part, than a tile, across tiles, and of 33 x 33.
    shapes.extend([
        (conv(3, [8, 8], [16, 0, 128], 3, 1, false), FEW),
        (conv(11, [4, 4], [8, 0, 192], 1, 1, false), FEW),
        (conv(5, [7, 9], [8, 8, 136], 1, 1, false), FEW),
        (conv(3, [8, 8], [64, 64, 128], 1, 1, false), 6),
        (conv(130, [1, 1], [8, 0, 64], 1, 1, false), MANY),
        (conv(1, [33, 33], [8, 0, 32], 1, 1, false), FEW),
        (conv(3, [6, 6], [16, 0, 128], 3, 1, true), FEW),
    ]);
    for (s, full) in shapes {
        check(&d, s, F32, full, 0.0);
        check(&d, s, BF16, full, 0.0);
        check(&d, s, BF16, full, 100.0);
    }
    check(&d, conv(2, [16, 16], [8, 0, 64], 1, 1, false), F32, FEW, 100.0);
}
