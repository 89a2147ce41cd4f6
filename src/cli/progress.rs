//! How far a long command has come: a bar on a terminal, otherwise a line every ten seconds.

use crate::train::log::duration;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// See the module.
pub struct Progress {
    bar: Option<ProgressBar>,
    what: &'static str,
    began: Instant,
    printed: Instant,
}

impl Progress {
    /// Progress of `what`, counted in steps.
    pub fn new(what: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{elapsed_precise} {bar:30} {pos}/{len} {msg}  ETA {eta}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style).with_message(what)
        });
        Progress { bar, what, began: Instant::now(), printed: Instant::now() }
    }

    /// `done` of `total` steps are done.
    pub fn at(&mut self, done: usize, total: usize) {
        if let Some(bar) = &self.bar {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        } else if self.printed.elapsed() > Duration::from_secs(10) {
            self.printed = Instant::now();
            let left = self.began.elapsed().as_secs_f64() * (total - done) as f64 / done.max(1) as f64;
            println!("{}: {done} of {total}, ETA {}", self.what, duration(left));
        }
    }

    /// Removes the bar; returns the seconds it all took.
    pub fn finish(self) -> f64 {
        self.bar.iter().for_each(ProgressBar::finish_and_clear);
        self.began.elapsed().as_secs_f64()
    }
}
