//! Running a script: its notes, the command lines that it becomes, and these one after the other.

use super::{Environment, Script, translate};
use crate::checkpoint;
use crate::error::Result;
use clap::ArgMatches;
use std::path::Path;

/// Runs a script.
///
/// # Errors
/// Those of [`translate`] and of the commands it becomes.
pub fn main(script: &Script, m: &ArgMatches) -> Result<()> {
    let t = translate(script, m, &Environment::of_process())?;
    t.notes.iter().for_each(|note| eprintln!("note: {note}"));
    for line in &t.lines {
        eprintln!("same as: iddpm {}", line.iter().map(|a| quoted(a)).collect::<Vec<_>>().join(" "));
    }
    let [first, rest @ ..] = &t.lines[..] else { return Ok(()) };
    crate::cli::run(crate::cli::parse(first)?)?;
    for line in rest {
        let done = crate::cli::parse(line).and_then(crate::cli::run);
        // Training that could not begin leaves no folder behind that the next attempt would find taken.
        if let (Some(folder), Err(_)) = (&t.imported, &done) {
            remove_import(folder);
        }
        done?;
    }
    Ok(())
}

/// Removes the imported checkpoint of `folder` if no step was trained from it, and the folder if that was all.
fn remove_import(folder: &Path) {
    if let [(_, path)] = &checkpoint::list(folder)[..] {
        // The error of training is the one to report.
        let _ = std::fs::remove_file(path).and_then(|()| std::fs::remove_dir(folder));
    }
}

/// An argument as a shell takes it.
fn quoted(arg: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_=./,:+".contains(c);
    if arg.chars().all(plain) { arg.into() } else { format!("'{}'", arg.replace('\'', r"'\''")) }
}
