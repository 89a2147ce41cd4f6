//! Conversion between bytes and the range [-1, 1] the network works in.

/// `byte/127.5 - 1`, the value of a pixel.
pub fn to_unit(byte: u8) -> f32 {
    f32::from(byte) / 127.5 - 1.0
}

/// The nearest byte: `(x + 1)·127.5` rounded, after clamping; every byte survives [`to_unit`] and back. NaN gives 0.
pub fn to_byte(x: f32) -> u8 {
    ((x + 1.0) * 127.5).round() as u8
}

/// The byte the reference writes: `(x + 1)·127.5` truncated, after clamping; 63 of the 256 exact levels come back one lower.
/// NaN gives 0.
pub fn to_byte_truncate(x: f32) -> u8 {
    ((x + 1.0) * 127.5) as u8
}
