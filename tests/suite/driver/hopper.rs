//! Bulk copies, clusters and products of a warpgroup against plain loops.

use half::bf16;
use iddpm::args;
use iddpm::device::driver::{Driver, Element, Launch, Ptr, Swizzle, TensorMapMode, TensorMapSpec};

use super::{download, drivers, integers, upload};

fn bf16s(values: &[i32]) -> Vec<bf16> {
    values.iter().map(|&v| bf16::from_f32(v as f32)).collect()
}

fn matrix(address: Ptr, rows: u64, columns: u64, tile: [u32; 2], swizzle: Swizzle) -> TensorMapSpec {
    TensorMapSpec {
        element: Element::Bf16,
        address,
        dims: vec![columns, rows],
        strides_bytes: vec![columns * 2],
        element_strides: vec![1, 1],
        swizzle,
        mode: TensorMapMode::Tile { sizes: tile.to_vec() },
    }
}

/// Where element `i` of a tile with rows of `row_bytes` lies under a swizzle of `width` bytes (0: none).
fn swizzled(i: usize, row_bytes: usize, width: usize) -> usize {
    let address = i / (row_bytes / 2) * row_bytes + i % (row_bytes / 2) * 2;
    let mask = if width == 0 { 0 } else { width / 16 - 1 };
    (address ^ ((address >> 7 & mask) << 4)) / 2
}

#[test]
fn tiles_are_cut_zero_filled_and_swizzled() {
    let (rows, columns) = (40usize, 72usize);
    let x = bf16s(&integers(rows * columns, 128));
    for (on, d) in drivers() {
        let input = upload(&d, &x);
        let cases = [(Swizzle::None, 64, 0), (Swizzle::B32, 16, 32), (Swizzle::B64, 32, 64), (Swizzle::B128, 64, 128)];
        for (swizzle, width, bytes) in cases {
            let map = d.tensor_map(&matrix(input.ptr(), 40, 72, [width, 16], swizzle)).unwrap();
            let n = 16 * width as usize;
            for (c0, c1) in [(0, 0), (8, 3), (-8, -5), (40, 30), (72, 0)] {
                let out = d.alloc(2 * n).unwrap();
                let launch = Launch::new([1, 1, 1], [128, 1, 1]).shared(2 * n);
                d.launch("test_tma_tile", launch, args![out.ptr(), &map, c0, c1, n as i32]).unwrap();
                let got = download::<bf16>(&d, &out, n);
                for i in 0..n {
                    let (r, c) = (c1 + (i / width as usize) as i32, c0 + (i % width as usize) as i32);
                    let inside = (0..rows as i32).contains(&r) && (0..columns as i32).contains(&c);
                    let truth = if inside { x[r as usize * columns + c as usize] } else { bf16::ZERO };
                    let at = swizzled(i, 2 * width as usize, bytes);
                    assert_eq!(got[at], truth, "{swizzle:?} ({c0}, {c1}) element {i} on {on}");
                }
            }
        }
    }
}

/// A 3 x 3 filter with padding 1: pixel p of the copy is output pixel `first + p` moved by the tap, zero outside the image.
#[test]
fn im2col_walks_the_pixels_of_a_convolution() {
    let (images, h, w, c) = (2usize, 5usize, 6usize, 64usize);
    let x = bf16s(&integers(images * h * w * c, 128));
    for (on, d) in drivers() {
        let input = upload(&d, &x);
        let (pixels, row) = (32usize, 2 * c as u64);
        let spec = TensorMapSpec {
            element: Element::Bf16,
            address: input.ptr(),
            dims: vec![c as u64, w as u64, h as u64, images as u64],
            strides_bytes: vec![row, row * w as u64, row * (w * h) as u64],
            element_strides: vec![1; 4],
            swizzle: Swizzle::B128,
            mode: TensorMapMode::Im2col { lower: [-1, -1], upper: [-1, -1], channels: 64, pixels: pixels as u32 },
        };
        let map = d.tensor_map(&spec).unwrap();
        let n = pixels * c;
        for (first, tap_h, tap_w) in [(0usize, 0usize, 0usize), (0, 1, 1), (17, 2, 0), (40, 2, 2)] {
            let (image, y, col) = (first / (h * w), first / w % h, first % w);
            let out = d.alloc(2 * n).unwrap();
            let at = args![
                out.ptr(),
                &map,
                0,
                col as i32 - 1,
                y as i32 - 1,
                image as i32,
                tap_w as i32,
                tap_h as i32,
                n as i32
            ];
            d.launch("test_tma_im2col", Launch::new([1, 1, 1], [128, 1, 1]).shared(2 * n), at).unwrap();
            let got = download::<bf16>(&d, &out, n);
            for i in 0..n {
                let pixel = first + i / c;
                let (image, y, col) = (pixel / (h * w), pixel / w % h + tap_h, pixel % w + tap_w);
                let inside = image < images && (1..=h).contains(&y) && (1..=w).contains(&col);
                let truth = if inside { x[((image * h + y - 1) * w + col - 1) * c + i % c] } else { bf16::ZERO };
                assert_eq!(
                    got[swizzled(i, 128, 128)],
                    truth,
                    "pixel {pixel}, tap ({tap_h}, {tap_w}), element {i} on {on}"
                );
            }
        }
    }
}

#[test]
fn bulk_stores_write_only_inside_the_tensor() {
    let (rows, columns) = (20usize, 96usize);
    for (on, d) in drivers() {
        let out = d.alloc_zeroed(2 * rows * columns).unwrap();
        let map = d.tensor_map(&matrix(out.ptr(), 20, 96, [64, 8], Swizzle::None)).unwrap();
        d.launch("test_tma_store", Launch::new([1, 1, 1], [128, 1, 1]).shared(1024), args![&map, 48, 15]).unwrap();
        let got = download::<bf16>(&d, &out, rows * columns);
        for (i, got) in got.iter().enumerate() {
            let (r, c) = (i / columns, i % columns);
            let truth = if r >= 15 && c >= 48 { (((r - 15) * 64 + c - 48) % 256) as f32 } else { 0.0 };
            assert_eq!(got.to_f32(), truth, "element ({r}, {c}) on {on}");
        }
    }
}

#[test]
fn clusters_share_loads_and_memory() {
    let x = bf16s(&integers(24 * 64, 128));
    for (on, d) in drivers() {
        let input = upload(&d, &x);
        let map = d.tensor_map(&matrix(input.ptr(), 24, 64, [64, 8], Swizzle::None)).unwrap();
        let out = d.alloc(4 * 6 * 512).unwrap();
        let launch = Launch::new([6, 1, 1], [128, 1, 1]).shared(4096).cluster(2);
        d.launch("test_cluster", launch, args![out.ptr(), &map]).unwrap();
        let got = download::<f32>(&d, &out, 6 * 512);
        for i in 0..6 * 512 {
            let block = i / 512;
            let truth = x[block / 2 * 512 + i % 512].to_f32() + (1 - block % 2) as f32;
            assert_eq!(got[i], truth, "block {block}, element {} on {on}", i % 512);
        }
    }
}

fn product(a: &[i32], b: &[i32], n: usize) -> Vec<f32> {
    (0..64 * n).map(|i| (0..64).map(|k| (a[i / n * 64 + k] * b[i % n * 64 + k]) as f32).sum()).collect()
}

fn run_product(d: &Driver, name: &str, a: &[i32], b: &[i32], n: usize) -> Vec<f32> {
    let (x, y) = (upload(d, &bf16s(a)), upload(d, &bf16s(b)));
    let ma = d.tensor_map(&matrix(x.ptr(), 64, 64, [64, 64], Swizzle::B128)).unwrap();
    let mb = d.tensor_map(&matrix(y.ptr(), n as u64, 64, [64, n as u32], Swizzle::B128)).unwrap();
    let c = d.alloc(4 * 64 * n).unwrap();
    let launch = Launch::new([1, 1, 1], [128, 1, 1]).shared(128 * (64 + n) + 1024);
    d.launch(name, launch, args![c.ptr(), x.ptr(), &ma, &mb]).unwrap();
    download(d, &c, 64 * n)
}

#[test]
fn wgmma_multiplies_matrices_from_shared_memory_and_registers() {
    for (on, d) in drivers() {
        for n in [8usize, 64, 256] {
            let (a, b) = (integers(64 * 64, 8), integers(n * 64 + 5, 8)[5..].to_vec());
            let truth = product(&a, &b, n);
            assert_eq!(run_product(&d, &format!("test_wgmma_{n}"), &a, &b, n), truth, "n = {n} on {on}");
            assert_eq!(
                run_product(&d, &format!("test_wgmma_registers_{n}"), &a, &b, n),
                truth,
                "registers, n = {n} on {on}"
            );
        }
    }
}

#[test]
fn wgmma_takes_operands_with_rows_contiguous() {
    let (a, b) = (integers(64 * 64, 8), integers(64 * 64 + 3, 8)[3..].to_vec());
    let truth = product(&a, &b, 64);
    let transposed = |v: &[i32]| (0..64 * 64).map(|i| v[i % 64 * 64 + i / 64]).collect::<Vec<_>>();
    for (on, d) in drivers() {
        let (x, y) = (upload(&d, &bf16s(&transposed(&a))), upload(&d, &bf16s(&transposed(&b))));
        let map = |p| d.tensor_map(&matrix(p, 64, 64, [64, 64], Swizzle::B128)).unwrap();
        let (ma, mb, c) = (map(x.ptr()), map(y.ptr()), d.alloc(4 * 64 * 64).unwrap());
        d.launch("test_wgmma_mn", Launch::new([1, 1, 1], [128, 1, 1]).shared(17 << 10), args![c.ptr(), &ma, &mb])
            .unwrap();
        assert_eq!(download::<f32>(&d, &c, 64 * 64), truth, "on {on}");
    }
}

#[test]
fn tensor_maps_that_break_a_rule_are_refused() {
    let d = Driver::emulated().unwrap();
    let buffer = d.alloc(1 << 16).unwrap();
    let fine = matrix(buffer.ptr(), 64, 64, [64, 8], Swizzle::B128);
    let refused = |spec: TensorMapSpec, part: &str| {
        let text = d.tensor_map(&spec).err().expect("refused").to_string();
        assert!(text.contains(part), "{text}");
    };
    assert!(d.tensor_map(&fine).is_ok());
    refused(TensorMapSpec { address: buffer.ptr().offset(2), ..fine.clone() }, "multiple of 16");
    refused(TensorMapSpec { strides_bytes: vec![100], ..fine.clone() }, "stride of 100");
    refused(TensorMapSpec { swizzle: Swizzle::B64, ..fine.clone() }, "128 bytes in the fastest dimension");
    refused(
        TensorMapSpec { mode: TensorMapMode::Tile { sizes: vec![64, 300] }, ..fine.clone() },
        "each side can be 1 to 256",
    );
    refused(TensorMapSpec { dims: vec![64], ..fine }, "1 dimensions with 1 strides");
}
