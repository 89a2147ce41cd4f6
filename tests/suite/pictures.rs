//! Pictures of what happens: charts, strips, animations, event files.

mod animation;
mod charts;
mod tensorboard;

use std::path::Path;
use std::process::{Command, Output};

/// Runs the program in `folder`.
fn iddpm(folder: &Path, args: &[&str]) -> Output {
    let program = std::env::var_os("CARGO_BIN_EXE_iddpm").unwrap_or_else(|| env!("CARGO_BIN_EXE_iddpm").into());
    Command::new(program).args(args).current_dir(folder).output().unwrap()
}

/// Runs the program, which must succeed.
fn succeeds(folder: &Path, args: &[&str]) -> String {
    let output = iddpm(folder, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the program, which must refuse with a message that holds `words`.
fn refuses(folder: &Path, args: &[&str], words: &[&str]) {
    let output = iddpm(folder, args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
    assert!(words.iter().all(|w| text.contains(w)), "{args:?}: {text}");
}

/// Height, width, channels and pixels of every image of a PNG file, the one that is shown without animation first.
fn read_png(path: &Path) -> (usize, usize, usize, Vec<Vec<u8>>) {
    let file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let info = reader.info();
    let (h, w, c) = (info.height as usize, info.width as usize, info.color_type.samples());
    let animated = info.animation_control.map_or(0, |a| a.num_frames as usize);
    let images = (0..=animated).map(|_| {
        let mut pixels = vec![0; h * w * c];
        reader.next_frame(&mut pixels).unwrap();
        pixels
    });
    let images = images.collect();
    (h, w, c, images)
}

/// A run of a small model on the built-in digits: trained, stopped, resumed, then everything that shows it.
#[test]
fn a_run_can_be_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let common = ["--out", "run", "--log-interval", "1", "--save-interval", "2", "--sample-interval", "0"];
    let model = "--diffusion-steps 20 --noise-schedule cosine --num-channels 32 --num-res-blocks 1 --channel-mult 1 \
        --attention-resolutions 16 --batch-size 4 --schedule-sampler loss-second-moment --steps 4";
    let new: Vec<&str> = ["train", "--tensorboard"].into_iter().chain(common).chain(model.split_whitespace()).collect();
    succeeds(folder.path(), &new);
    let more: Vec<&str> = ["train", "--tensorboard", "--resume", "--steps", "6"].into_iter().chain(common).collect();
    succeeds(folder.path(), &more);
    let files = tensorboard::files(&at("run"));
    assert_eq!(files.len(), 2, "{files:?}");
    let steps = |i: usize| {
        tensorboard::events(&files[i]).iter().filter(|e| !e.scalars.is_empty()).map(|e| e.step).collect::<Vec<_>>()
    };
    assert_eq!((steps(0), steps(1)), (vec![1, 2, 3, 4], vec![5, 6]));
    let second = tensorboard::events(&files[1]);
    assert_eq!((second[1].step, second[1].restart), (5, true));
    let line = std::fs::read_to_string(at("run/log.jsonl")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line.lines().last().unwrap()).unwrap();
    let last = second.iter().rfind(|e| !e.scalars.is_empty()).unwrap();
    let loss = last.scalars.iter().find(|(tag, _)| tag == "train/loss").unwrap().1;
    assert_eq!(loss, line["loss"].as_f64().unwrap() as f32);
    assert!(second.iter().any(|e| e.image.is_some()), "the last grid of samples is shown");

    succeeds(folder.path(), &["plot", "log", "run"]);
    assert!(std::fs::read_to_string(at("run/plots/log.svg")).unwrap().contains("Speed"));
    succeeds(folder.path(), &["plot", "timesteps", "run", "--panels", "history,loss", "--out", "t.png"]);
    let (h, w, c, _) = read_png(&at("t.png"));
    assert_eq!((h, w, c), (640, 1840, 3));

    let sample = "sample --model-path run --num-samples 5 --batch-size 2 --strip s/strip.png --animation walk.gif \
        --frames 4 --frame-of xt --ema-rate 0 --out samples";
    succeeds(folder.path(), &sample.split_whitespace().collect::<Vec<_>>());
    let side = 64 + 2;
    let (h, w, c, _) = read_png(&at("s/strip.png"));
    assert_eq!((h, w, c), (5 * side + 2, 4 * side + 2, 1), "5 pictures, 4 steps");
    let frames = animation::read_gif(&at("walk.gif"));
    assert_eq!(frames.len(), 4);
    // The walk ends at the pictures that are written: the last frame is their grid.
    let (h, w, _, grid) = read_png(&at("samples/grid.png"));
    let grey: Vec<u8> = frames[3].pixels.iter().map(|p| p[0]).collect();
    assert_eq!((frames[3].h, frames[3].w), (h, w));
    assert!(grey == grid[0], "the last frame is the grid");
    refuses(folder.path(), &["sample", "--model-path", "run", "--frames", "3"], &["--strip", "--animation"]);
    refuses(folder.path(), &["sample", "--model-path", "run", "--animation", "a.webp"], &["a.webp", ".gif"]);
    refuses(folder.path(), &["sample", "--model-path", "run", "--strip", "a.gif"], &["a.gif", ".png"]);
}
