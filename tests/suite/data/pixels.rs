//! Decoding and resizing held against Pillow's own results (tests/data, scripts/make-data-fixtures.py).

use iddpm::{
    data::{
        decode::{MAX_SIDE, Picture, check_size, decode},
        resize::{Filter, fit, resize},
    },
    npz::{self, Values},
};

use super::{fixture, noise};

fn picture(h: usize, w: usize, c: usize) -> Picture {
    Picture { h, w, c, pixels: noise(h, w, c, (h * 1000 + w) as u32) }
}

fn sizes(text: &str) -> Vec<usize> {
    text.split('x').map(|d| d.parse().unwrap()).collect()
}

#[test]
fn resizing_equals_pillow_bit_for_bit() {
    let cases = npz::read(&fixture("resized.npz")).unwrap();
    assert!(cases.len() >= 17, "only {} cases", cases.len());
    for (name, expected) in cases {
        let parts: Vec<_> = name.split('_').collect();
        let found = match parts[..] {
            [size, out] => {
                let [h, w, c] = sizes(size)[..] else { panic!("{name}") };
                fit(picture(h, w, c), out.parse().unwrap()).unwrap()
            }
            [filter, size, out] => {
                let ([h, w, c], [h2, w2]) = (&sizes(size)[..], &sizes(out)[..]) else { panic!("{name}") };
                let filter = if filter == "BOX" { Filter::Box } else { Filter::Bicubic };
                resize(&picture(*h, *w, *c), *h2, *w2, filter)
            }
            _ => panic!("{name}"),
        };
        assert_eq!(expected.shape, [found.h, found.w, found.c], "{name}");
        assert!(expected.values == Values::U8(found.pixels), "{name}");
    }
}

#[test]
fn pictures_of_the_right_size_pass_unchanged() {
    let p = picture(24, 24, 3);
    assert_eq!(fit(p.clone(), 24).unwrap(), p);
}

/// PNG, GIF and WebP exactly. JPEG within 4 levels of 255: two correct decoders differ in their inverse cosine transform,
/// chroma interpolation and colour arithmetic (largest difference seen on 3,000 CIFAR-10 images: 4).
#[test]
fn decoding_equals_pillow() {
    let expected = npz::read(&fixture("decoded.npz")).unwrap();
    assert!(expected.len() >= 27, "only {} images", expected.len());
    for (name, expected) in expected {
        let bytes = std::fs::read(fixture("images").join(&name)).unwrap();
        let found = decode(&bytes).unwrap_or_else(|e| panic!("{name}: {e}")).with_channels(3);
        assert_eq!(expected.shape, [found.h, found.w, 3], "{name}");
        let Values::U8(expected) = expected.values else { panic!("{name}") };
        let difference: Vec<u8> = found.pixels.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).collect();
        let largest = difference.iter().max().copied().unwrap();
        let allowed = if name.ends_with(".jpg") { 4 } else { 0 };
        assert!(largest <= allowed, "{name}: largest difference {largest}, {allowed} allowed");
    }
}

#[test]
fn grey_is_kept_and_recognised() {
    for (name, channels) in [
        ("grey.png", 1),
        ("grey1.png", 1),
        ("grey4.png", 1),
        ("grey16.png", 1),
        ("grey_alpha.png", 1),
        ("palette_grey.png", 1),
        ("grey.gif", 1),
        ("grey.jpg", 1),
        ("lossless_grey.webp", 1),
        ("lossless.webp", 3),
        ("rgb.png", 3),
        ("palette.png", 3),
        ("rgb.jpg", 3),
        ("animated.gif", 3),
    ] {
        let bytes = std::fs::read(fixture("images").join(name)).unwrap();
        assert_eq!(decode(&bytes).unwrap().c, channels, "{name}");
    }
}

/// Pillow's `convert("L")` of pure red, green, blue and white.
#[test]
fn colour_becomes_luma() {
    let pixels = vec![255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255];
    let grey = Picture { h: 1, w: 4, c: 3, pixels }.with_channels(1);
    assert_eq!(grey.pixels, [76, 150, 29, 255]);
    assert_eq!(grey.with_channels(3).pixels[..6], [76, 76, 76, 150, 150, 150]);
}

/// No prefix of any image may panic, and one that lacks more than a trailer must be refused.
#[test]
fn truncated_images_are_refused() {
    for entry in std::fs::read_dir(fixture("images")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        for len in 0..bytes.len() {
            let result = decode(&bytes[..len]);
            assert!(len > bytes.len() / 2 || result.is_err(), "{} cut to {len} bytes was accepted", path.display());
        }
    }
}

/// Stray bytes between headers and after the end are accepted, as other programs do; an image that stops early is not.
#[test]
fn untidy_jpegs_are_read_and_unfinished_ones_refused() {
    let good = std::fs::read(fixture("images/rgb.jpg")).unwrap();
    let expected = decode(&good).unwrap();
    let after_app0 = 4 + usize::from(u16::from_be_bytes([good[4], good[5]]));
    let stray = [&good[..after_app0], &[1, 2, 3, 4, 5, 6], &good[after_app0..]].concat();
    assert!(decode(&stray).unwrap() == expected);
    let trailing = [&good[..], &[0; 300]].concat();
    assert!(decode(&trailing).unwrap() == expected);
    assert!(decode(&good[..good.len() - 200]).unwrap_err().contains("truncated"));
}

#[test]
fn absurd_sizes_are_refused_before_anything_is_allocated() {
    assert!(check_size(MAX_SIDE, 1).is_ok());
    for (w, h, word) in [(0, 5, "no pixels"), (MAX_SIDE + 1, 1, "16385x1"), (16_384, 16_385, "16384x16385")] {
        let message = check_size(w, h).unwrap_err();
        assert!(message.contains(word), "{message}");
    }
    assert!(check_size(16_384, 16_384 + 1 - 1).is_ok(), "256 megapixels are still accepted");
    let mut png = std::fs::read(fixture("images/rgb.png")).unwrap();
    png[16..24].copy_from_slice(&[0x7F, 0xFF, 0xFF, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF]);
    let crc = {
        let mut crc = flate2::Crc::new();
        crc.update(&png[12..29]);
        crc.sum()
    };
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    assert!(decode(&png).unwrap_err().contains("2147483647x2147483647"));
    let mut jpeg = std::fs::read(fixture("images/rgb.jpg")).unwrap();
    let sof = jpeg.windows(2).position(|m| m == [0xFF, 0xC0]).unwrap();
    jpeg[sof + 5..sof + 9].fill(0xFF);
    assert!(decode(&jpeg).unwrap_err().contains("65535x65535"));
}

#[test]
fn elongated_pictures_do_not_explode() {
    let thin = Picture { h: 1, w: 16_384, c: 1, pixels: vec![9; 16_384] };
    assert!(fit(thin, 512).unwrap_err().contains("8388608x512"));
}
