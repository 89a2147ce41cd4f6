//! Kinds 09 and 10: layers, residual blocks, attention, U-Nets, the optimiser and training.

use super::vectors::VectorFile;

/// File 09_layers: timestep embedding, normalisation, resampling.
pub fn layers(file: &VectorFile) {
    file.fail(format!("not implemented: {}", file.settings));
}

/// File 09_resblocks: residual blocks and their gradients.
pub fn resblocks(file: &VectorFile) {
    file.fail(format!("not implemented: {}", file.settings));
}

/// File 09_attention: attention blocks and their gradients.
pub fn attention(file: &VectorFile) {
    file.fail(format!("not implemented: {}", file.settings));
}

/// Files 10_unet_*: whole networks, every gradient, one training loss.
pub fn unet(file: &VectorFile) {
    file.fail(format!("not implemented: {}", file.settings));
}

/// File 10_adamw_ema: the optimiser and the moving averages.
pub fn adamw_ema(file: &VectorFile) {
    file.fail(format!("not implemented: {}", file.settings));
}

/// File 10_training: three training steps.
pub fn training(file: &VectorFile) {
    file.fail(format!("not implemented: {}", file.settings));
}
