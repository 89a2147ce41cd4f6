//! One encoded picture (PNG, JPEG, GIF or WebP) to 8-bit grey or RGB, as Pillow's `convert` would give it:
//! palettes looked up, alpha dropped, 16 bits cut to the high byte, the first frame of an animation.
//!
//! The format is taken from the content, not from the name. JPEG decoders differ by a few levels of 255 from each
//! other (inverse cosine transform, chroma upsampling); the others are exact.

use std::io::Cursor;

use zune_jpeg::zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions};

/// Longest accepted side in pixels.
pub const MAX_SIDE: usize = 16_384;
/// Largest accepted picture in pixels.
pub const MAX_PIXELS: usize = 256 << 20;

/// A decoded picture: pixels (h, w, c), c = 1 (grey) or 3 (RGB).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Height in pixels.
    pub h: usize,
    /// Width in pixels.
    pub w: usize,
    /// Channels, 1 or 3.
    pub c: usize,
    /// Rows from the top, channels interleaved.
    pub pixels: Vec<u8>,
}

impl Picture {
    /// The same picture with `c` channels: grey is repeated; colour becomes ITU-R 601 luma in Pillow's integers,
    /// `(19595 R + 38470 G + 7471 B + 2^15) >> 16`.
    pub fn with_channels(self, c: usize) -> Picture {
        let pixels = match (self.c, c) {
            (1, 3) => self.pixels.iter().flat_map(|&v| [v; 3]).collect(),
            (3, 1) => self.pixels.chunks_exact(3).map(luma).collect(),
            (from, to) => {
                assert!(from == to, "no conversion from {from} to {to} channels");
                return self;
            }
        };
        Picture { c, pixels, ..self }
    }

    /// Grey if every pixel has R = G = B.
    fn grey_if_possible(self) -> Picture {
        match self.c == 3 && self.pixels.chunks_exact(3).all(|p| p[0] == p[1] && p[1] == p[2]) {
            true => Picture { c: 1, pixels: self.pixels.iter().copied().step_by(3).collect(), ..self },
            false => self,
        }
    }
}

fn luma(p: &[u8]) -> u8 {
    ((19_595 * u32::from(p[0]) + 38_470 * u32::from(p[1]) + 7_471 * u32::from(p[2]) + 0x8000) >> 16) as u8
}

/// Decodes a PNG, JPEG, GIF or WebP file. Grey means that the file says so, or that every colour of its palette image or of its WebP
/// is grey.
///
/// # Errors
/// What is wrong in words, without the file's name: unknown format, damaged or truncated data, absurd size.
pub fn decode(bytes: &[u8]) -> Result<Picture, String> {
    match bytes {
        [] => Err("the file is empty".into()),
        [0x89, b'P', b'N', b'G', ..] => png(bytes),
        [0xFF, 0xD8, ..] => jpeg(bytes),
        [b'G', b'I', b'F', b'8', ..] => gif(bytes),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => webp(bytes),
        [a, b, c, d, ..] => {
            Err(format!("not a PNG, JPEG, GIF or WebP image (it begins with {a:02x} {b:02x} {c:02x} {d:02x})"))
        }
        _ => Err(format!("not an image: only {} bytes long", bytes.len())),
    }
}

/// Refuses sizes that no training set has but a hostile header may state.
///
/// # Errors
/// The size and the limit it breaks.
pub fn check_size(w: usize, h: usize) -> Result<(), String> {
    match (w, h) {
        (0, _) | (_, 0) => Err(format!("the image has no pixels ({w}x{h})")),
        _ if w > MAX_SIDE || h > MAX_SIDE => Err(format!("{w}x{h} pixels: a side may have at most {MAX_SIDE}")),
        _ if w * h > MAX_PIXELS => {
            Err(format!("{w}x{h} pixels = {} megapixels: at most {} are accepted", (w * h) >> 20, MAX_PIXELS >> 20))
        }
        _ => Ok(()),
    }
}

fn png(bytes: &[u8]) -> Result<Picture, String> {
    let damaged = |e: png::DecodingError| format!("damaged or truncated PNG: {e}");
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: 4 * MAX_PIXELS });
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    decoder.set_ignore_text_chunk(true);
    let header = decoder.read_header_info().map_err(damaged)?;
    check_size(header.width as usize, header.height as usize)?;
    let indexed = header.color_type == png::ColorType::Indexed;
    let mut reader = decoder.read_info().map_err(damaged)?;
    let size = reader.output_buffer_size().ok_or("damaged PNG: its size overflows")?;
    let mut raw = vec![0; size];
    let info = reader.next_frame(&mut raw).map_err(damaged)?;
    raw.truncate(info.buffer_size());
    let (c, pixels) = match info.color_type {
        png::ColorType::Grayscale => (1, raw),
        png::ColorType::Rgb => (3, raw),
        png::ColorType::GrayscaleAlpha => (1, raw.into_iter().step_by(2).collect()),
        png::ColorType::Rgba => (3, raw.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect()),
        png::ColorType::Indexed => return Err("damaged PNG: a palette that cannot be expanded".into()),
    };
    let picture = Picture { h: info.height as usize, w: info.width as usize, c, pixels };
    Ok(if indexed { picture.grey_if_possible() } else { picture })
}

/// Strict first. A file that ends as a JPEG must (FF D9) but breaks a rule on the way is decoded leniently, as other
/// programs do; one that ends early is refused, since the missing part would silently be grey.
fn jpeg(bytes: &[u8]) -> Result<Picture, String> {
    jpeg_with(bytes, true).or_else(|strict| {
        let tail = &bytes[bytes.len().saturating_sub(1024)..];
        match tail.windows(2).any(|m| m == [0xFF, 0xD9]) {
            true => jpeg_with(bytes, false),
            false => Err(strict),
        }
    })
}

fn jpeg_with(bytes: &[u8], strict: bool) -> Result<Picture, String> {
    let damaged = |e: zune_jpeg::errors::DecodeErrors| format!("damaged or truncated JPEG: {e}");
    let options = DecoderOptions::default()
        .set_max_width(u16::MAX as usize)
        .set_max_height(u16::MAX as usize)
        .set_strict_mode(strict);
    let mut decoder = zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(damaged)?;
    let (w, h) = decoder.dimensions().ok_or("damaged JPEG: it states no size")?;
    check_size(w, h)?;
    let grey = decoder.input_colorspace() == Some(ColorSpace::Luma);
    let (c, out) = if grey { (1, ColorSpace::Luma) } else { (3, ColorSpace::RGB) };
    decoder.set_options(options.jpeg_set_out_colorspace(out));
    let pixels = decoder.decode().map_err(damaged)?;
    match pixels.len() == h * w * c {
        true => Ok(Picture { h, w, c, pixels }),
        false => Err(format!("JPEG with an unusual number of channels ({} bytes for {w}x{h} pixels)", pixels.len())),
    }
}

/// WebP knows no grey: what is grey all over is taken for it.
fn webp(bytes: &[u8]) -> Result<Picture, String> {
    let damaged = |e: image_webp::DecodingError| format!("damaged or truncated WebP: {e}");
    let mut decoder = image_webp::WebPDecoder::new(Cursor::new(bytes)).map_err(damaged)?;
    let (w, h) = decoder.dimensions();
    let (w, h) = (w as usize, h as usize);
    check_size(w, h)?;
    decoder.set_memory_limit(4 * MAX_PIXELS);
    let mut pixels = vec![0; decoder.output_buffer_size().ok_or("damaged WebP: its size overflows")?];
    decoder.read_image(&mut pixels).map_err(damaged)?;
    if decoder.has_alpha() {
        pixels = pixels.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect();
    }
    Ok(Picture { h, w, c: 3, pixels }.grey_if_possible())
}

/// The first frame; what it leaves of the canvas has the transparent colour, else colour 0, as in Pillow.
fn gif(bytes: &[u8]) -> Result<Picture, String> {
    let damaged = |e: gif::DecodingError| format!("damaged or truncated GIF: {e}");
    let mut options = gif::DecodeOptions::new();
    options.set_color_output(gif::ColorOutput::Indexed);
    options.set_memory_limit(gif::MemoryLimit::Bytes(std::num::NonZeroU64::MIN.saturating_add(MAX_PIXELS as u64)));
    let mut decoder = options.read_info(bytes).map_err(damaged)?;
    let (w, h) = (usize::from(decoder.width()), usize::from(decoder.height()));
    check_size(w, h)?;
    let frame = decoder.next_frame_info().map_err(damaged)?.ok_or("the GIF has no frame")?;
    let (fw, fh) = (usize::from(frame.width), usize::from(frame.height));
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let rest = frame.transparent.map_or(0, usize::from);
    check_size(fw, fh)?;
    if left + fw > w || top + fh > h {
        return Err(format!("damaged GIF: its first frame, {fw}x{fh} at ({left}, {top}), leaves the {w}x{h} canvas"));
    }
    let palette = decoder.palette().map_err(damaged)?.to_vec();
    let mut indices = vec![0; decoder.buffer_size()];
    decoder.read_into_buffer(&mut indices).map_err(damaged)?;
    let colour = |i: usize| palette.get(3 * i..3 * i + 3).map_or([0; 3], |p| [p[0], p[1], p[2]]);
    let mut pixels = colour(rest).repeat(h * w);
    for (y, row) in indices.chunks_exact(fw).enumerate() {
        for (x, &i) in row.iter().enumerate() {
            let at = 3 * ((top + y) * w + left + x);
            pixels[at..at + 3].copy_from_slice(&colour(usize::from(i)));
        }
    }
    Ok(Picture { h, w, c: 3, pixels }.grey_if_possible())
}
