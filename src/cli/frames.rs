//! Flags that show how pictures come out of noise: a strip of steps, an animation.

use crate::animation::{Format, Frames};
use crate::error::{Error, Result};
use crate::sampler::Walk;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

/// Pictures in a strip and in an animation.
const STRIP_PICTURES: usize = 8;
const ANIMATION_PICTURES: usize = 64;
/// Frames of each, if none are asked for.
const STRIP_FRAMES: usize = 10;
const ANIMATION_FRAMES: usize = 60;

/// What a frame shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FrameOf {
    /// The clean picture as it is predicted at the step.
    X0,
    /// The noised picture as it is at the step.
    Xt,
}

/// Flags for strips and animations.
#[derive(Args, Clone, Debug)]
pub struct FrameFlags {
    /// Write the way of the first 8 pictures out of noise as a PNG: a row each, steps from left to right
    #[arg(long, value_name = "FILE", help_heading = "Trajectory")]
    strip: Option<PathBuf>,
    /// Write the way of the first 64 pictures out of noise as an animation, .gif or .png
    #[arg(long, value_name = "FILE", help_heading = "Trajectory")]
    animation: Option<PathBuf>,
    /// Evenly spaced steps that are shown [default: 10 in a strip, 60 in an animation]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000), help_heading = "Trajectory")]
    frames: Option<u64>,
    /// What is shown of a step [default: x0]
    #[arg(long, value_enum, help_heading = "Trajectory")]
    frame_of: Option<FrameOf>,
}

/// Collects frames during a walk and writes them after it; without a strip or an animation it does nothing.
pub struct Trajectory<'a> {
    flags: &'a FrameFlags,
    /// The frames, and the steps of one batch's walk.
    frames: Option<(Frames, usize)>,
}

impl FrameFlags {
    /// Frames of `pictures` pictures of size (h, w, c), each of which takes `steps` steps.
    ///
    /// # Errors
    /// [`Error::Config`] for flags that need others, an ending that is no format, and pictures that are neither grey nor
    /// RGB.
    pub fn trajectory(&self, size: [usize; 3], pictures: usize, steps: usize) -> Result<Trajectory<'_>> {
        let bad = |what: String| Err(Error::Config(what));
        if self.strip.is_none() && self.animation.is_none() {
            return match (self.frames, self.frame_of) {
                (None, None) => Ok(Trajectory { flags: self, frames: None }),
                _ => bad("--frames and --frame-of need --strip FILE or --animation FILE".into()),
            };
        }
        if !matches!(size[2], 1 | 3) {
            return bad(format!("pictures with {} channels cannot be shown: only 1 and 3 can", size[2]));
        }
        if let Some(path) =
            self.strip.as_deref().filter(|p| !p.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")))
        {
            return bad(format!("{}: a strip is written as .png", path.display()));
        }
        self.animation.as_deref().map(Format::of).transpose()?;
        let (shown, count) = match self.animation {
            Some(_) => (ANIMATION_PICTURES, ANIMATION_FRAMES),
            None => (STRIP_PICTURES, STRIP_FRAMES),
        };
        let count = self.frames.map_or(count, |n| n as usize);
        Ok(Trajectory { flags: self, frames: Some((Frames::new(size, pictures.min(shown), steps, count), steps)) })
    }
}

impl Trajectory<'_> {
    /// Whether a strip or an animation is wanted.
    pub fn is_wanted(&self) -> bool {
        self.frames.is_some()
    }

    /// Takes what the walk shows, if it belongs to a frame.
    ///
    /// # Errors
    /// What the device reports.
    pub fn take(&mut self, walk: &Walk) -> Result<()> {
        let Some((frames, steps)) = &mut self.frames else { return Ok(()) };
        let done = (walk.done - 1) % *steps + 1;
        if frames.wants(walk.first, done) {
            let x = if self.flags.frame_of == Some(FrameOf::Xt) { walk.x()? } else { walk.x_0()? };
            frames.add(walk.first, done, &x);
        }
        Ok(())
    }

    /// Writes the files and names them.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot be written.
    pub fn write(&self) -> Result<()> {
        let Some((frames, _)) = &self.frames else { return Ok(()) };
        if let Some(path) = &self.flags.strip {
            make_room(path)?;
            frames.write_strip(path, STRIP_PICTURES, self.flags.frames.map_or(STRIP_FRAMES, |n| n as usize))?;
            println!("          {}", path.display());
        }
        if let Some(path) = &self.flags.animation {
            make_room(path)?;
            frames.write_animation(path, Format::of(path)?)?;
            println!("          {}", path.display());
        }
        Ok(())
    }
}

/// Makes the folder that a file is to lie in.
fn make_room(path: &Path) -> Result<()> {
    path.parent().filter(|p| !p.as_os_str().is_empty()).map_or(Ok(()), super::create_folder)
}
