//! The command line: one file per subcommand.
//!
//! Long flags may be written with underscores, as the reference has them, and booleans with or without a value.

mod bench;
pub mod data;
mod device;
pub mod doctor;
mod encode;
mod export;
mod flags;
mod frames;
mod images;
mod import;
mod import_check;
mod latents;
mod model;
mod nll;
mod parts;
mod plan;
mod plot;
mod progress;
pub mod reference;
mod sample;
mod train;
mod walks;

use crate::device::Device;
use crate::error::{Error, Result};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use device::DeviceFlags;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

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

/// More threads than any machine has cores for; a mistyped number should not start them.
const MOST_THREADS: usize = 1024;
/// Columns that an example of the help fills.
const HELP_WIDTH: usize = 78;

/// Help of `--out`; in a document the default would be taken for a link.
const OUT: &str =
    "Folder for everything that is written [default: runs/<preset> for training, else inside the run's folder]";

/// Flags of every subcommand.
#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Threads to compute with [default: one per core]
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Seed of all random numbers [default: 0]
    #[arg(long, global = true)]
    pub seed: Option<u64>,
    /// Folder for everything that is written.
    #[arg(long, global = true, value_name = "DIR", help = OUT)]
    pub out: Option<PathBuf>,
    /// Where to compute.
    #[command(flatten)]
    pub device: DeviceFlags,
}

impl Global {
    /// Opens the device that was asked for.
    ///
    /// # Errors
    /// [`Error::Device`] for a device that is not there; [`Error::Config`] for a precision that it has not.
    pub fn open_device(&self) -> Result<Device> {
        self.device.open(self.threads)
    }
}

/// Examples of a command whose work is kept while it is done.
macro_rules! kept {
    ($examples:literal) => {
        concat!($examples, "\nWhat is done is kept: ended at any moment, the same command goes on.")
    };
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Train a model; alone, on built-in digits
    #[command(after_help = "Examples:\n  iddpm train\n  iddpm train --preset cifar10 --data-dir cifar-10-batches-bin \
        --out runs/cifar\n  iddpm train --resume --out runs/cifar --device cuda\n  iddpm train --data_dir photos --image_size 64 \
        --num_channels 64 --learn_sigma True --noise_schedule cosine --batch_size 16")]
    Train(Box<train::TrainArgs>),
    /// Make pictures with a trained model
    #[command(after_help = kept!("Examples:\n  iddpm sample\n  iddpm sample --model-path runs/cifar --use-ddim \
        --timestep-respacing 50 --num-samples 16\n  iddpm sample --model-path runs/cond --labels 3,5 --guidance 3 --device cuda\n  iddpm \
        sample --strip strip.png --animation walk.gif --frame-of xt\n  iddpm sample --sampler dpm-solver++ \
        --timestep-respacing logsnr20\n  iddpm sample --interpolate 3,8"))]
    Sample(Box<sample::SampleArgs>),
    /// Turn images into the noise that they come from
    #[command(
        after_help = kept!("Examples:\n  iddpm encode --num-samples 10 --timestep-respacing 250\n  iddpm encode --model-path \
        runs/cifar --data-dir photos\nBack again:\n  iddpm sample --latents runs/digits/latents/latents_10x16x16x1.npz \
        --timestep-respacing 250")
    )]
    Encode(Box<encode::EncodeArgs>),
    /// Measure bits/dim by the variational bound
    #[command(after_help = kept!("Examples:\n  iddpm nll --num-samples 50\n  iddpm nll --model-path runs/cifar --data-dir \
        cifar-10-batches-bin --split test --num-samples 200 --device cuda"))]
    Nll(Box<nll::NllArgs>),
    /// Print the recorded steps of training: shapes, bytes, FLOPs, places in memory
    #[command(
        after_help = "Examples:\n  iddpm plan --preset cifar10 --batch-size 16\n  iddpm plan --preset cifar10 --device cuda \
        --totals yes        (no GPU is needed)"
    )]
    Plan(Box<plan::PlanArgs>),
    /// Draw charts of schedules, training and bits/dim
    #[command(subcommand)]
    Plot(plot::PlotCommand),
    /// Look at a set of images before training on it
    #[command(subcommand)]
    Data(DataCommand),
    /// Train a model that enlarges images, or enlarge with one
    #[command(subcommand)]
    SuperRes(SuperResCommand),
    /// Bring in a model of improved-diffusion, guided-diffusion or diffusers
    #[command(after_help = "Examples:\n  iddpm import cifar10_uncond_50M_500K.pt --preset cifar10\n  iddpm import \
        model500000.pt ema_0.9999_500000.pt opt500000.pt --preset cifar10 --to runs/cifar/checkpoint-00500000.safetensors\n  \
        iddpm import ema_0.9999_200000.pt --image_size 64 --num_heads 4 --diffusion_steps 4000 --noise_schedule \
        cosine --rescale_timesteps True")]
    Import(Box<import::ImportArgs>),
    /// Take a model out: a .pt or .safetensors state dict, or a diffusers folder
    #[command(after_help = "Examples:\n  iddpm export runs/cifar --to cifar.pt\n  iddpm export runs/cifar --to \
        cifar-diffusers")]
    Export(Box<export::ExportArgs>),
    /// Tell what this machine and this program can do
    #[command(after_help = "Example:\n  iddpm doctor")]
    Doctor,
    /// Measure speed
    #[command(
        subcommand,
        after_help = "Examples:\n  iddpm bench step --config t1\n  iddpm bench kernels --config cifar10 --batch-size 4\n  \
                      iddpm bench sample --device cuda --batches 1,128 --json sample.json\n  iddpm bench memory --device emulated"
    )]
    Bench(bench::BenchCommand),
}

#[derive(Subcommand, Debug)]
enum SuperResCommand {
    /// Train on large images, which are made small by averaging
    #[command(after_help = "Example:\n  iddpm super-res train --data-dir photos --large-size 64 --small-size 16 \
        --num-channels 64 --learn-sigma True --batch-size 16 --out runs/enlarge")]
    Train(Box<train::TrainArgs>),
    /// Enlarge small images
    #[command(after_help = kept!("Example:\n  iddpm super-res sample --model-path runs/enlarge --base-samples \
        samples_64x16x16x3.npz --timestep-respacing 250"))]
    Sample(Box<sample::SampleArgs>),
}

#[derive(Subcommand, Debug)]
enum DataCommand {
    /// Number, sizes, channels, classes, brightness, duplicates
    #[command(after_help = "Example:\n  iddpm data inspect --data-dir photos --image-size 64")]
    Inspect {
        #[command(flatten)]
        data: images::DataFlags,
        /// Side in pixels after resizing [default: as they are]
        #[arg(long)]
        image_size: Option<usize>,
        /// Channels, 1 or 3 [default: as they are]
        #[arg(long)]
        channels: Option<usize>,
    },
}

/// Runs the program with the process's arguments; returns its exit code.
pub fn main() -> i32 {
    // A closed pipe, as of `iddpm plan | head`, ends the program as it ends others, rather than in a panic of `println!`.
    // If that cannot be set up, nothing else is lost.
    let always = Arc::new(AtomicBool::new(true));
    let _ = signal_hook::flag::register_conditional_default(signal_hook::consts::SIGPIPE, always.clone());
    // A file that grows over its limit (`ulimit -f`) is then an error like a full disk.
    let _ = signal_hook::flag::register(libc::SIGXFSZ, always);
    match start(std::env::args_os().collect()) {
        Ok(Ok(())) => 0,
        Ok(Err(e)) => {
            // A closed pipe while printing help is no failure worth a second message.
            let _ = e.print();
            e.exit_code()
        }
        Err(e) => {
            eprintln!("error: {e}");
            e.exit_code()
        }
    }
}

/// Runs what `args` ask for; the inner error is clap's, which help is too.
fn start(args: Vec<OsString>) -> Result<std::result::Result<(), clap::Error>> {
    let args = reference::spell_out(&args)?.unwrap_or_else(|| normalise(args));
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(e) => return Ok(Err(e)),
    };
    if let Some((script, m)) = matches.subcommand().and_then(|(name, m)| Some((reference::Script::find(name)?, m))) {
        return reference::main(script, m).map(Ok);
    }
    Cli::from_arg_matches(&matches).map_or_else(|e| Ok(Err(e)), |cli| run(cli).map(Ok))
}

/// The command line `args`, without the program's name.
///
/// # Errors
/// [`Error::Config`] with clap's message.
fn parse(args: &[String]) -> Result<Cli> {
    let matches = command().try_get_matches_from(["iddpm"].into_iter().chain(args.iter().map(String::as_str)));
    matches.and_then(|m| Cli::from_arg_matches(&m)).map_err(|e| {
        let text = e.to_string();
        let message = text.lines().next().unwrap_or_default();
        Error::Config(message.strip_prefix("error: ").unwrap_or(message).into())
    })
}

fn run(cli: Cli) -> Result<()> {
    let g = &cli.global;
    if let Some(n) = g.threads.filter(|n| !(1..=MOST_THREADS).contains(n)) {
        return Err(Error::Config(format!("--threads {n}: must lie between 1 and {MOST_THREADS}")));
    }
    match cli.command {
        Command::Train(a) => train::main(&a, g),
        Command::Sample(a) => sample::main(&a, g),
        Command::Encode(a) => encode::main(&a, g),
        Command::Nll(a) => nll::main(&a, g),
        Command::Plan(a) => plan::main(&a, g),
        Command::SuperRes(SuperResCommand::Train(a)) => train::super_res(&a, g),
        Command::SuperRes(SuperResCommand::Sample(a)) => sample::main(&a, g),
        Command::Import(a) => import::main(&a, g),
        Command::Export(a) => export::main(&a, g),
        Command::Plot(c) => plot::main(&c, g),
        Command::Bench(c) => bench::main(&c, g),
        Command::Doctor => doctor::run(&mut std::io::stdout()),
        Command::Data(DataCommand::Inspect { data, image_size, channels }) => {
            let mut spec = data.spec(&Default::default(), g.threads)?;
            (spec.image_size, spec.channels) = (image_size, channels);
            data::inspect(&spec, &mut std::io::stdout())
        }
    }
}

/// Makes the folder `path`, its parents too.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn create_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(Error::io(path, "create the folder"))
}

/// The command line's grammar: what clap derives, with the reference's booleans, and negative numbers as values.
fn command() -> clap::Command {
    fn finish(c: clap::Command) -> clap::Command {
        let marked = |a: &clap::Arg| a.get_value_names().is_some_and(|names| names[0] == flags::BOOL);
        c.mut_subcommands(finish).mut_args(|a| match () {
            () if marked(&a) => a.value_parser(flags::boolean).num_args(0..=1).default_missing_value("true"),
            () if a.get_action().takes_values() => a.allow_negative_numbers(true),
            () => a,
        })
    }
    fn fold(c: clap::Command) -> clap::Command {
        let examples = c.get_after_help().map(|help| folded(&help.to_string()));
        let c = c.mut_subcommands(fold);
        if let Some(examples) = examples { c.after_help(examples) } else { c }
    }
    fold(finish(Cli::command()).subcommands(reference::SCRIPTS.iter().map(|s| s.command())))
}

/// Examples with long commands cut at blanks and joined by `\`, so that they can be copied.
fn folded(help: &str) -> String {
    let fold = |line: &str| {
        let (mut text, mut column) = (String::new(), 0);
        for word in line.split_inclusive(' ') {
            if column + word.len() > HELP_WIDTH && line.starts_with("  ") {
                text += "\\\n      ";
                column = 6;
            }
            text += word;
            column += word.len();
        }
        text
    };
    help.lines().map(fold).collect::<Vec<_>>().join("\n")
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The command lines among the examples of `c` and of its subcommands, long ones joined again.
    fn examples(c: &clap::Command) -> Vec<String> {
        let help = c.get_after_help().map(ToString::to_string).unwrap_or_default().replace("\\\n      ", "");
        let own = help.lines().filter_map(|l| l.strip_prefix("  ")?.split_once("iddpm ")).map(|(_, rest)| rest.into());
        own.chain(c.get_subcommands().flat_map(examples)).collect()
    }

    #[test]
    fn every_example_is_a_command_line_and_every_command_has_one() {
        let grammar = command();
        let found = examples(&grammar);
        for example in &found {
            let line = example.split("        ").next().unwrap_or_default();
            let args: Vec<OsString> =
                ["iddpm"].into_iter().chain(line.split_whitespace()).map(OsString::from).collect();
            let args = reference::spell_out(&args).unwrap().unwrap_or_else(|| normalise(args));
            command().try_get_matches_from(args).unwrap_or_else(|e| panic!("iddpm {line}: {e}"));
        }
        for c in grammar.get_subcommands().filter(|c| c.get_name() != "help") {
            let of = |e: &String| e.split_whitespace().next() == Some(c.get_name());
            assert!(found.iter().any(of), "{} has no example", c.get_name());
        }
    }

    #[test]
    fn long_examples_are_cut_at_blanks() {
        let word = "x".repeat(30);
        let long = format!("Example:\n  iddpm {word} {word} {word}");
        assert_eq!(folded(&long), format!("Example:\n  iddpm {word} {word} \\\n      {word}"));
        assert_eq!(folded("Panels: a\n  iddpm b"), "Panels: a\n  iddpm b");
    }
}
