//! Kind 12_image_codes: bytes to [-1, 1] and back by truncation, as the reference writes samples.

use iddpm::diffusion::{to_byte_truncate, to_unit};

use super::vectors::VectorFile;

/// Every level there and back, and values inside and outside the range.
pub fn check(file: &VectorFile) {
    let levels: Vec<f32> = (0..=255).map(to_unit).collect();
    file.compare_f32("levels/x", &levels);
    let bytes = |x: &[f32]| x.iter().map(|&x| f64::from(to_byte_truncate(x))).collect::<Vec<_>>();
    file.compare("levels/back", &bytes(&levels));
    file.compare("random/u8", &bytes(&file.get("random/x").f32s()));
}
