//! The command line: one file per subcommand.
//!
//! Long flags may be written with underscores, as the reference has them, and booleans with or without a value.

pub mod data;
mod flags;

use crate::error::Result;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

/// Improved Denoising Diffusion Probabilistic Models: train, sample, measure bits/dim
#[derive(Parser, Debug)]
#[command(version, infer_long_args = true, arg_required_else_help = true)]
#[command(after_help = "Start with: iddpm train   (built-in digits, a few minutes on a laptop), then: iddpm sample")]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags of every subcommand.
#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Threads to compute with [default: one per core]
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Seed of all random numbers [default: 0]
    #[arg(long, global = true)]
    pub seed: Option<u64>,
    /// Folder for everything that is written [default: runs/<preset> for training, else inside the run's folder]
    #[arg(long, global = true, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Where to compute
    #[arg(long, global = true, value_enum, default_value_t = DeviceKind::Cpu)]
    pub device: DeviceKind,
}

/// Devices that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// The processor, in f32.
    Cpu,
}

#[derive(Subcommand, Debug)]
enum Command {}

/// Runs the program with the process's arguments; returns its exit code.
pub fn main() -> i32 {
    let matches = command().try_get_matches_from(normalise(std::env::args_os()));
    let cli = match matches.and_then(|m| Cli::from_arg_matches(&m)) {
        Ok(cli) => cli,
        Err(e) => {
            // A closed pipe while printing help is no failure worth a second message.
            let _ = e.print();
            return e.exit_code();
        }
    };
    match run(cli) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("error: {e}");
            e.exit_code()
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {}
}

/// The command line's grammar: what clap derives, with the reference's booleans.
fn command() -> clap::Command {
    fn booleans(c: clap::Command) -> clap::Command {
        let marked = |a: &clap::Arg| a.get_value_names().is_some_and(|names| names[0] == flags::BOOL);
        c.mut_subcommands(booleans).mut_args(|a| {
            if marked(&a) { a.value_parser(flags::boolean).num_args(0..=1).default_missing_value("true") } else { a }
        })
    }
    booleans(Cli::command())
}

/// Writes `--a_b=c_d` as `--a-b=c_d`, up to a lone `--`.
fn normalise(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut over = false;
    let one = |arg: OsString| {
        over |= arg == "--";
        match arg.to_str() {
            Some(text) if !over && text.starts_with("--") => {
                let (flag, value) = text.split_at(text.find('=').unwrap_or(text.len()));
                format!("{}{value}", flag.replace('_', "-")).into()
            }
            _ => arg,
        }
    };
    args.into_iter().map(one).collect()
}
