//! What a file is that is no checkpoint: cut off, damaged, or another program's.

/// The message for a file that torch.save wrote.
const PYTORCH: &str = "a PyTorch file (.pt): bring it in with `iddpm import`, which writes a checkpoint";

/// Tells files of other kinds and truncated ones by their first bytes and their length.
pub(super) fn check_length(bytes: &[u8]) -> std::result::Result<(), String> {
    match bytes {
        [b'P', b'K', 3, 4, ..] => return Err(PYTORCH.into()),
        [0x80, 2..=5, ..] if bytes.get(8) != Some(&b'{') => return Err(PYTORCH.into()),
        _ if bytes.len() < 8 => return Err(format!("truncated: {} bytes, the header alone has 8", bytes.len())),
        _ if bytes.len() > 8 && bytes[8] != b'{' => return Err("not a safetensors file".into()),
        _ => {}
    }
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    let (have, need) = (bytes.len() as u64, header.saturating_add(8));
    if need > have {
        return Err(format!("truncated: the header ends at byte {need}, the file at {have}"));
    }
    match data_length(&bytes[8..need as usize]).map(|data| need.saturating_add(data)) {
        Some(end) if end > have => Err(format!("truncated: the tensors end at byte {end}, the file at {have}")),
        Some(end) if end < have => Err(format!("damaged: the tensors end at byte {end}, the file at {have}")),
        _ => Ok(()),
    }
}

/// Where the last tensor of a header ends.
fn data_length(header: &[u8]) -> Option<u64> {
    let header: serde_json::Value = serde_json::from_slice(header).ok()?;
    header.as_object()?.values().filter_map(|t| t.get("data_offsets")?.get(1)?.as_u64()).max()
}

/// What a safetensors file of another program is.
pub(super) fn foreign(names: &[String]) -> String {
    let first = names.first().map_or("none", String::as_str);
    let kind = match () {
        () if names.iter().any(|n| n.starts_with("input_blocks.")) => "a state dict of the reference",
        () if names.iter().any(|n| n.starts_with("down_blocks.")) => "weights of diffusers",
        () => {
            let n = names.len();
            return format!("no checkpoint: a safetensors file of another program ({n} tensors, the first is {first})");
        }
    };
    format!("{kind}, no checkpoint (the first tensor is {first}): bring it in with `iddpm import`, which writes one")
}
