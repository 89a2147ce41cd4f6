//! Event files that TensorBoard reads: scalars and pictures by step.
//!
//! ```text
//! record = length (u64), masked CRC of the length (u32), Event, masked CRC of the Event (u32)
//! masked CRC = rotate_right(crc32c, 15) + 0xa282ead8
//! Event   { 1: wall_time (double)  2: step (int64)  3: file_version  5: Summary  7: SessionLog }
//! Summary { 1: Value* }    Value { 1: tag  2: simple_value (float)  4: Image }
//! Image   { 1: height  2: width  3: colorspace  4: encoded_image_string }    SessionLog { 1: status }
//! ```
//!
//! (Integers little-endian; `Event` and below are protocol buffers with these field numbers.) A run that is resumed
//! writes a new file beside the old ones; its first event says from which step on the old ones no longer count.

use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// An event file that is being written; every call is one event.
#[derive(Debug)]
pub struct Events {
    file: File,
    path: PathBuf,
}

impl Events {
    /// Starts a new file `events.out.tfevents.<time>.<host>.v2` in `folder` for a run that has done `done` steps; what
    /// earlier files there say of later steps is withdrawn.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn create(folder: &Path, done: u64) -> Result<Self> {
        let host = host();
        let name = |seconds: u64| folder.join(format!("events.out.tfevents.{seconds:010}.{host}.v2"));
        let mut seconds = now() as u64;
        // Files are read in the order of their names: a run that is resumed within a second gets a later one.
        while name(seconds).exists() {
            seconds += 1;
        }
        let path = name(seconds);
        let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(Error::io(&path, "create"))?;
        let mut events = Events { file, path };
        events.write(0, &bytes_field(3, b"brain.Event:2"))?;
        if done > 0 {
            const START: u64 = 1;
            events.write(done + 1, &bytes_field(7, &number_field(1, START)))?;
        }
        Ok(events)
    }

    /// Where the events go.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the values of some scalars at `step`.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses.
    pub fn scalars<'a>(&mut self, step: u64, scalars: impl IntoIterator<Item = (&'a str, f64)>) -> Result<()> {
        let value = |(tag, x): (&str, f64)| {
            let number = [&[2 << 3 | 5], &(x as f32).to_le_bytes()[..]].concat();
            bytes_field(1, &[bytes_field(1, tag.as_bytes()), number].concat())
        };
        let values: Vec<u8> = scalars.into_iter().flat_map(value).collect();
        self.write(step, &bytes_field(5, &values))
    }

    /// Writes the PNG file at `path` as the picture `tag` at `step`.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read or the disk refuses, [`Error::Data`] when it is no PNG.
    pub fn png(&mut self, step: u64, tag: &str, path: &Path) -> Result<()> {
        let png = std::fs::read(path).map_err(Error::io(path, "read"))?;
        let reader = png::Decoder::new(std::io::Cursor::new(&png)).read_info();
        let reader = reader.map_err(|e| Error::data(path, format!("is no PNG: {e}")))?;
        let info = reader.info();
        let size = [number_field(1, info.height.into()), number_field(2, info.width.into())].concat();
        let channels = number_field(3, info.color_type.samples() as u64);
        let image = bytes_field(4, &[size, channels, bytes_field(4, &png)].concat());
        let value = bytes_field(1, &[bytes_field(1, tag.as_bytes()), image].concat());
        self.write(step, &bytes_field(5, &value))
    }

    fn write(&mut self, step: u64, content: &[u8]) -> Result<()> {
        let time = [&[1 << 3 | 1], &now().to_le_bytes()[..]].concat();
        let event = [&time, &number_field(2, step), content].concat();
        self.file.write_all(&record(&event)).map_err(Error::io(&self.path, "write"))
    }
}

/// `data` with its length and check sums: one record of the file.
pub fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length).to_le_bytes(), data, &masked_crc(data).to_le_bytes()].concat()
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli): polynomial 0x1edc6f41, bits reflected, all ones at the start and turned over at the end.
pub fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0u32; 256];
        let mut i = 0;
        while i < 256 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 8 {
                crc = (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !data.iter().fold(!0, |crc, byte| (crc >> 8) ^ TABLE[((crc ^ u32::from(*byte)) & 255) as usize])
}

/// A number in groups of seven bits, the lowest first, all but the last marked.
fn varint(mut x: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while x >= 128 {
        out.push(x as u8 | 128);
        x >>= 7;
    }
    out.push(x as u8);
    out
}

/// Field `field` with a whole number.
fn number_field(field: u64, x: u64) -> Vec<u8> {
    [varint(field << 3), varint(x)].concat()
}

/// Field `field` with bytes, a text or a message.
fn bytes_field(field: u64, bytes: &[u8]) -> Vec<u8> {
    [&varint(field << 3 | 2), &varint(bytes.len() as u64), bytes].concat()
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Name of this machine, as far as it fits into the name of a file.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).collect();
    if name.is_empty() { "localhost".into() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_sums_are_the_published_ones() {
        // RFC 3720, B.4.
        let ascending: Vec<u8> = (0..32).collect();
        let cases: [(&[u8], u32); 4] = [
            (&[0; 32], 0x8a91_36aa),
            (&[255; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (b"123456789", 0xe306_9283),
        ];
        for (data, crc) in cases {
            assert_eq!(crc32c(data), crc, "{data:?}");
        }
    }

    #[test]
    fn numbers_are_written_in_groups_of_seven_bits() {
        assert_eq!([varint(0), varint(127), varint(300)], [vec![0], vec![127], vec![0xac, 0x02]]);
        assert_eq!(varint(u64::MAX).len(), 10);
        assert_eq!(bytes_field(2, b"testing"), *b"\x12\x07testing");
        assert_eq!(number_field(1, 150), [0x08, 0x96, 0x01]);
    }
}
