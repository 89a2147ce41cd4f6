//! Event files, read back by a small reader of protocol buffers.

use iddpm::tensorboard::{Events, crc32c, record};
use std::path::{Path, PathBuf};

/// What an event says.
#[derive(Debug, Default)]
pub struct Event {
    pub step: u64,
    pub version: String,
    pub restart: bool,
    pub scalars: Vec<(String, f32)>,
    /// Tag, height, width, channels, PNG.
    pub image: Option<(String, [u64; 3], Vec<u8>)>,
}

/// A field of a message: a number or bytes.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn varint(data: &mut &[u8]) -> u64 {
    let (mut x, mut shift) = (0, 0);
    loop {
        let byte = data[0];
        *data = &data[1..];
        x |= u64::from(byte & 127) << shift;
        shift += 7;
        if byte < 128 {
            return x;
        }
    }
}

/// The fields of a message, by number.
fn fields(mut data: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut fields = Vec::new();
    while !data.is_empty() {
        let key = varint(&mut data);
        let len = match key & 7 {
            0 => {
                fields.push((key >> 3, Field::Number(varint(&mut data))));
                continue;
            }
            1 => 8,
            2 => varint(&mut data) as usize,
            5 => 4,
            kind => panic!("field {} of kind {kind}", key >> 3),
        };
        fields.push((key >> 3, Field::Bytes(&data[..len])));
        data = &data[len..];
    }
    fields
}

fn read_value(data: &[u8], event: &mut Event) {
    let mut tag = String::new();
    for field in fields(data) {
        match field {
            (1, Field::Bytes(text)) => tag = String::from_utf8(text.into()).unwrap(),
            (2, Field::Bytes(x)) => event.scalars.push((tag.clone(), f32::from_le_bytes(x.try_into().unwrap()))),
            (4, Field::Bytes(image)) => {
                let (mut size, mut png) = ([0; 3], Vec::new());
                for field in fields(image) {
                    match field {
                        (i @ 1..=3, Field::Number(x)) => size[i as usize - 1] = x,
                        (4, Field::Bytes(bytes)) => png = bytes.into(),
                        _ => panic!("unknown field of an image"),
                    }
                }
                event.image = Some((tag.clone(), size, png));
            }
            _ => panic!("unknown field of a value"),
        }
    }
}

/// Every event of a file, whose check sums must be right.
pub fn events(path: &Path) -> Vec<Event> {
    let data = std::fs::read(path).unwrap();
    let mut rest = data.as_slice();
    let mut events = Vec::new();
    while !rest.is_empty() {
        let len = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        let content = &rest[12..12 + len];
        assert_eq!(record(content), rest[..len + 16], "check sums");
        rest = &rest[len + 16..];
        let mut event = Event::default();
        for field in fields(content) {
            match field {
                (1, Field::Bytes(time)) => {
                    let time = f64::from_le_bytes(time.try_into().unwrap());
                    assert!((1.7e9..1e11).contains(&time), "{time} seconds since 1970");
                }
                (2, Field::Number(step)) => event.step = step,
                (3, Field::Bytes(text)) => event.version = String::from_utf8(text.into()).unwrap(),
                (5, Field::Bytes(summary)) => fields(summary).into_iter().for_each(|f| match f {
                    (1, Field::Bytes(value)) => read_value(value, &mut event),
                    _ => panic!("unknown field of a summary"),
                }),
                (7, Field::Bytes(log)) => event.restart = log == [8, 1],
                _ => panic!("unknown field of an event"),
            }
        }
        events.push(event);
    }
    events
}

/// The event files of a folder in the order of their names.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|p| p.to_string_lossy().contains("events.out.tfevents.")).collect();
    files.sort();
    files
}

#[test]
fn records_are_those_that_tensorboard_writes() {
    // Bytes of tensorboard 2.20, tensorboard.summary.writer.record_writer.
    let hex = |text: &str| -> Vec<u8> {
        (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
    };
    assert_eq!(record(b""), hex("000000000000000029039807d8ea82a2"));
    assert_eq!(record(b"iddpm"), hex("0500000000000000eab2043e696464706d007fa169"));
    assert_eq!(crc32c(b""), 0);
}

#[test]
fn scalars_and_pictures_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let png = folder.path().join("a.png");
    iddpm::grid::Images::new([2, 3, 3], &[7; 18]).write_png(&png).unwrap();
    let mut out = Events::create(folder.path(), 0).unwrap();
    out.scalars(300, [("train/loss", 0.5), ("train/mse", f64::NAN)]).unwrap();
    out.png(u64::from(u32::MAX), "samples", &png).unwrap();
    let read = events(out.path());
    assert_eq!((read.len(), read[0].version.as_str(), read[0].step), (3, "brain.Event:2", 0));
    assert_eq!((read[1].step, &read[1].scalars[0]), (300, &("train/loss".to_string(), 0.5)));
    assert!(read[1].scalars[1].1.is_nan());
    let image = read[2].image.as_ref().unwrap();
    assert_eq!((read[2].step, image.0.as_str(), image.1), (u64::from(u32::MAX), "samples", [2, 3, 3]));
    assert_eq!(image.2, std::fs::read(&png).unwrap());
    let name = out.path().file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("events.out.tfevents.") && name.ends_with(".v2"), "{name}");
}

#[test]
fn a_resumed_run_has_a_later_file_that_withdraws_later_steps() {
    let folder = tempfile::tempdir().unwrap();
    let first = Events::create(folder.path(), 0).unwrap();
    let second = Events::create(folder.path(), 20).unwrap();
    assert_eq!(files(folder.path()), [first.path(), second.path()]);
    assert!(events(first.path()).iter().all(|e| !e.restart));
    let restart = &events(second.path())[1];
    assert_eq!((restart.restart, restart.step), (true, 21));
}

#[test]
fn no_png_is_refused_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text.png");
    std::fs::write(&path, "no picture").unwrap();
    let mut out = Events::create(folder.path(), 0).unwrap();
    assert!(out.png(1, "samples", &path).unwrap_err().to_string().contains("text.png"));
    assert_eq!(events(out.path()).len(), 1, "nothing was written");
}
