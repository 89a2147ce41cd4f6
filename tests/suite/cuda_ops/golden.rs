//! The golden vectors through the kernels.

use super::*;

#[test]
fn kernels_match_the_golden_vectors() {
    crate::golden::check_ops(&gpu);
}
