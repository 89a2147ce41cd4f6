//! The command lines of improved-diffusion: `image_train`, `image_sample`, `image_nll`, `super_res_train`, `super_res_sample`.
//!
//! A script takes the reference's flags ([`flags`]) and is rewritten as command lines of this program, which are printed and
//! run; nothing is trained, sampled or measured here. What goes another way than there is said in notes.
//! [`files`] writes results under the reference's names.

pub mod files;
pub mod flags;
mod run;

pub use run::main;

use crate::checkpoint;
use crate::error::{Error, Result};
use clap::{Arg, ArgMatches, Command, value_parser};
use flags::{BASE, Flag, IMAGE, MODEL, NLL, SAMPLE, SUPER_RES, TRAIN, UNTOLD};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Flags of this program that the scripts take too.
const OURS: [&str; 6] = ["threads", "seed", "out", "device", "steps", "help"];

/// What a script does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    /// Train a network.
    Train,
    /// Make pictures.
    Sample,
    /// Measure bits/dim.
    Nll,
}

/// A script of the reference.
#[derive(Debug)]
pub struct Script {
    /// Name, without `.py`.
    pub name: &'static str,
    /// What it does.
    pub does: Does,
    /// Its flags, in groups.
    pub groups: &'static [&'static [Flag]],
    about: &'static str,
    examples: &'static str,
}

/// Every script.
pub const SCRIPTS: [Script; 5] = [
    Script {
        name: "image_train",
        does: Does::Train,
        groups: &[TRAIN, IMAGE, MODEL],
        about: "Train, by the flags of the reference's scripts/image_train.py",
        examples: "Examples:\n  OPENAI_LOGDIR=runs/cifar iddpm image_train --data_dir cifar_train --image_size 32 \
            --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 --diffusion_steps 4000 \
            --noise_schedule cosine --lr 1e-4 --batch_size 128 --steps 500000\n  iddpm image_train --data_dir photos \
            --resume_checkpoint runs/image_train/model010000.pt",
    },
    Script {
        name: "image_sample",
        does: Does::Sample,
        groups: &[SAMPLE, IMAGE, MODEL],
        about: "Make pictures, by the flags of scripts/image_sample.py",
        examples: "Examples:\n  iddpm image_sample --model_path cifar10_uncond_50M_500K.pt --image_size 32 \
            --diffusion_steps 4000 --noise_schedule cosine --num_samples 64 --timestep_respacing 250\n  iddpm image_sample \
            --model_path runs/cifar --use_ddim True --timestep_respacing ddim50",
    },
    Script {
        name: "image_nll",
        does: Does::Nll,
        groups: &[NLL, IMAGE, MODEL],
        about: "Measure bits/dim, by the flags of scripts/image_nll.py",
        examples: "Example:\n  iddpm image_nll --data_dir cifar_test --model_path cifar10_uncond_vlb_50M_500K.pt \
            --image_size 32 --diffusion_steps 4000 --noise_schedule cosine --use_kl True",
    },
    Script {
        name: "super_res_train",
        does: Does::Train,
        groups: &[TRAIN, SUPER_RES, MODEL],
        about: "Train a network that enlarges, by the flags of scripts/super_res_train.py",
        examples: "Example:\n  OPENAI_LOGDIR=runs/enlarge iddpm super_res_train --data_dir photos --large_size 64 \
            --small_size 16 --num_channels 64 --learn_sigma True --batch_size 16",
    },
    Script {
        name: "super_res_sample",
        does: Does::Sample,
        groups: &[SAMPLE, BASE, SUPER_RES, MODEL],
        about: "Enlarge pictures, by the flags of scripts/super_res_sample.py",
        examples: "Example:\n  iddpm super_res_sample --model_path runs/enlarge --base_samples samples_64x16x16x3.npz \
            --num_samples 64 --timestep_respacing 250",
    },
];

impl Script {
    /// The script called `name`.
    pub fn find(name: &str) -> Option<&'static Script> {
        SCRIPTS.iter().find(|s| s.name == name)
    }

    /// Its flags.
    pub fn flags(&self) -> Vec<Flag> {
        self.groups.concat()
    }

    /// Whether it is about networks that enlarge.
    pub fn super_res(&self) -> bool {
        self.name.starts_with("super_res")
    }

    /// Its grammar.
    pub fn command(&self) -> Command {
        let hide = |f: &Flag| f.arg().hide_default_value(f.default.is_empty());
        let all = Command::new(self.name).about(self.about).after_help(self.examples).args_override_self(true);
        let all = all.args(self.flags().iter().map(hide));
        let steps = Arg::new("steps").long("steps").value_name("N").value_parser(value_parser!(u64));
        let steps = steps
            .help("End after this many steps: for lr_anneal_steps 0, which would go on for ever [default: 500000]");
        if self.does == Does::Train { all.arg(steps) } else { all }
    }
}

/// The arguments with flags written out in full, if they are a script's.
///
/// # Errors
/// [`Error::Config`] for an ambiguous flag.
pub fn spell_out(args: &[OsString]) -> Result<Option<Vec<OsString>>> {
    let script = command_of(args).and_then(Script::find);
    script.map(|s| flags::spell_out(args.to_vec(), &s.flags(), &OURS)).transpose()
}

/// The command among `args`: the first that is neither a flag nor the value of one.
fn command_of(args: &[OsString]) -> Option<&str> {
    let mut rest = args.iter().skip(1);
    loop {
        match rest.next()?.to_str()? {
            "-h" | "--help" | "-V" | "--version" => {}
            flag if flag.starts_with('-') && flag.contains('=') => {}
            flag if flag.starts_with('-') => _ = rest.next()?,
            command => return Some(command),
        }
    }
}

/// What the reference reads from the environment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Environment {
    /// `OPENAI_LOGDIR`, the output folder.
    pub log_dir: Option<PathBuf>,
    /// `OPENAI_LOG_FORMAT`, names of log files with commas.
    pub log_format: String,
    /// `DIFFUSION_TRAINING_TEST`: stop after the first checkpoint.
    pub training_test: bool,
}

impl Environment {
    /// That of the process.
    pub fn of_process() -> Self {
        let text = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        Environment {
            log_dir: text("OPENAI_LOGDIR").map(PathBuf::from),
            log_format: text("OPENAI_LOG_FORMAT").unwrap_or_default(),
            training_test: text("DIFFUSION_TRAINING_TEST").is_some(),
        }
    }
}

/// A script's command line in this program's words.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Translated {
    /// Command lines to run one after the other, without the program's name.
    pub lines: Vec<Vec<String>>,
    /// What goes another way than in the reference.
    pub notes: Vec<String>,
    /// The folder that the first line, an import, fills for the second.
    pub imported: Option<PathBuf>,
}

/// A script's flags on their way to our command lines.
struct Call<'a> {
    script: &'a Script,
    m: &'a ArgMatches,
    env: &'a Environment,
    notes: Vec<String>,
    imported: Option<PathBuf>,
}

/// Rewrites the command line `m` of `script`.
///
/// # Errors
/// [`Error::Config`] for a path that is needed and not given.
pub fn translate(script: &Script, m: &ArgMatches, env: &Environment) -> Result<Translated> {
    let mut call = Call { script, m, env, notes: Vec::new(), imported: None };
    let lines = match script.does {
        Does::Train => call.train()?,
        Does::Sample => vec![call.sample()?],
        Does::Nll => vec![call.nll()?],
    };
    Ok(Translated { lines, notes: call.notes, imported: call.imported })
}

fn is_pt(path: &str) -> bool {
    crate::cli::import::is_foreign(Path::new(path))
}

impl Call<'_> {
    fn text(&self, name: &str) -> String {
        let flag = self.script.flags().into_iter().find(|f| f.name == name);
        flag.map_or(String::new(), |f| f.value(self.m))
    }

    fn is_true(&self, name: &str) -> bool {
        self.m.try_get_one::<bool>(name).ok().flatten().is_some_and(|b| *b)
    }

    fn note(&mut self, what: impl Into<String>) {
        self.notes.push(what.into());
    }

    /// The path that flag `name` gives.
    fn needed(&self, name: &str, what: &str) -> Result<String> {
        Some(self.text(name))
            .filter(|p| !p.is_empty())
            .ok_or_else(|| Error::Config(format!("{} needs {what}: give --{name}", self.script.name)))
    }

    /// `--name=value` of every flag in `groups` that was given or is one of `always`.
    fn pass(&self, groups: &[&[Flag]], always: &[&str]) -> Vec<String> {
        let wanted = |f: &&Flag| (f.given(self.m) || always.contains(&f.name)) && !PATHS.contains(&f.name);
        groups
            .concat()
            .iter()
            .filter(wanted)
            .map(|f| format!("--{}={}", f.name.replace('_', "-"), f.value(self.m)))
            .collect()
    }

    /// Network and process, but for the subset of steps where none is asked for.
    fn model_groups(&self) -> Vec<&'static [Flag]> {
        let groups = if self.script.super_res() { SUPER_RES } else { IMAGE };
        vec![groups, MODEL]
    }

    /// Flags of this program.
    fn ours(&self, out: Option<&Path>) -> Vec<String> {
        let given = |name: &&str| self.m.value_source(name) == Some(clap::parser::ValueSource::CommandLine);
        let value = |name: &str| {
            let raw = self.m.get_raw(name).into_iter().flatten().next_back();
            format!("--{name}={}", raw.map_or(String::new(), |v| v.to_string_lossy().into_owned()))
        };
        let rest = ["threads", "seed", "device"].into_iter().filter(given).map(value);
        out.iter().map(|o| format!("--out={}", o.display())).chain(rest).collect()
    }

    fn given_out(&self) -> Option<PathBuf> {
        self.m.get_one::<PathBuf>("out").cloned().or_else(|| self.env.log_dir.clone())
    }

    /// Where results go.
    fn out(&mut self) -> PathBuf {
        self.given_out().unwrap_or_else(|| {
            let out = Path::new("runs").join(self.script.name);
            self.note(format!("OPENAI_LOGDIR is not set: results go to {}, not to a temporary folder", out.display()));
            out
        })
    }

    fn name(&self, ours: &str) -> Vec<String> {
        let words: &[&str] = if self.script.super_res() { &["super-res", ours] } else { &[ours] };
        words.iter().map(|w| w.to_string()).collect()
    }

    /// `--model-path`, and the flags that describe the network: for a file of the reference also those it does not tell.
    fn model(&mut self) -> Result<Vec<String>> {
        let path = self.needed("model_path", "a model")?;
        let always: &[&str] = if is_pt(&path) { &UNTOLD } else { &[] };
        let mut line = vec![format!("--model-path={path}")];
        line.extend(self.pass(&self.model_groups(), always));
        line.retain(|a| a != "--timestep-respacing=");
        Ok(line)
    }

    fn sample(&mut self) -> Result<Vec<String>> {
        let mut line = self.name("sample");
        line.extend(self.model()?);
        if self.script.super_res() {
            line.push(format!("--base-samples={}", self.needed("base_samples", "small images")?));
            if self.is_true("use_ddim") {
                self.note("the reference ignores use_ddim here; it is heeded");
            }
        }
        line.extend(self.pass(&[SAMPLE], &["num_samples"]));
        line.extend({
            let out = self.out();
            self.ours(Some(&out))
        });
        if self.is_true("class_cond") && !self.script.super_res() {
            self.note("labels go through the classes of the model in turn, rather than at random through 1000");
        }
        self.note("pixels are rounded to the nearest level, not down");
        Ok(line)
    }

    fn nll(&mut self) -> Result<Vec<String>> {
        let mut line = self.name("nll");
        line.extend(self.model()?);
        line.push(format!("--data-dir={}", self.needed("data_dir", "images")?));
        if self.is_true("class_cond") {
            line.push("--labels-from=prefix".into());
        }
        line.extend(self.pass(&[NLL], &["num_samples"]));
        line.push("--reference-files".into());
        let out = self.out();
        line.extend(self.ours(Some(&out)));
        self.note(format!(
            "the {} images are spread evenly over the set; the reference takes the first ones, often of one class",
            self.text("num_samples")
        ));
        Ok(line)
    }

    fn train(&mut self) -> Result<Vec<Vec<String>>> {
        let data = self.needed("data_dir", "images")?;
        let from = self.text("resume_checkpoint");
        let mut line = self.name("train");
        line.push(format!("--data-dir={data}"));
        if self.is_true("use_fp16") {
            self.note("use_fp16 and fp16_scale_growth have no effect: weights are f32, and there is no loss scale");
        }
        self.end(&mut line);
        if self.env.log_format.split(',').any(|f| f == "tensorboard") {
            line.push("--tensorboard".into());
        }
        line.push("--reference-files".into());
        let ours = if is_pt(&from) { beside(Path::new(&from)) } else { None };
        if from.is_empty() || (is_pt(&from) && ours.is_none()) {
            return self.train_in(line, &from);
        }
        // A run of this program: its folder, its settings.
        self.note("settings that are not given are those of the run, not the defaults of the flags");
        line.push(format!("--resume={}", ours.unwrap_or(from.into()).display()));
        line.extend(self.pass(&[TRAIN], &["save_interval"]));
        line.extend(self.pass(&self.model_groups(), &[]));
        let out = self.given_out();
        line.extend(self.ours(out.as_deref()));
        Ok(vec![line])
    }

    /// A new run, or one that begins with the files of the reference's run that `from` belongs to.
    fn train_in(&mut self, mut line: Vec<String>, from: &str) -> Result<Vec<Vec<String>>> {
        let out = self.out();
        let mut lines = Vec::new();
        if from.is_empty() {
            line.extend(["--preset=reference".into(), "--channels=3".into()]);
            line.extend(self.pass(&self.model_groups(), &["large_size", "small_size"]));
        } else {
            lines.push(self.import(Path::new(from), &out));
            self.imported = Some(out.clone());
            line.push("--resume".into());
            self.note("the order of the images begins anew, and so does the history of loss-second-moment, as in the reference");
        }
        line.push(format!("--labels-from={}", if self.is_true("class_cond") { "prefix" } else { "none" }));
        if self.is_true("class_cond") && from.is_empty() {
            self.note("the network has as many classes as the data, not 1000");
        }
        line.extend(self.pass(&[TRAIN], &["batch_size", "save_interval"]));
        line.extend(self.ours(Some(&out)));
        lines.push(line);
        Ok(lines)
    }

    /// When training ends.
    fn end(&mut self, line: &mut Vec<String>) {
        let steps = self.m.get_one::<u64>("steps").map(u64::to_string);
        let test = self.env.training_test.then(|| self.text("save_interval"));
        match steps.or(test) {
            Some(steps) => line.push(format!("--steps={steps}")),
            None if self.text("lr_anneal_steps").parse() == Ok(0) => {
                let steps = crate::config::TrainConfig::default().steps;
                self.note(format!(
                    "lr_anneal_steps 0 trains for ever in the reference; here a run ends at step {steps}, or where --steps says"
                ));
            }
            None => {}
        }
    }

    /// `import` of `model` and of the averages and the optimiser's state that lie beside it, into the folder `out`.
    fn import(&mut self, model: &Path, out: &Path) -> Vec<String> {
        let mut files = vec![model.to_path_buf()];
        if let Some(number) = number(model) {
            let rates = self.text("ema_rate");
            let averages = rates.split(',').map(|rate| format!("ema_{rate}_{number}.pt"));
            let names = averages.chain([format!("opt{number}.pt")]);
            files.extend(names.map(|name| model.with_file_name(name)).filter(|p| p.exists()));
        }
        if !files.iter().any(|f| f.file_name().is_some_and(|n| n.to_string_lossy().starts_with("opt"))) {
            self.note("no optNNNNNN.pt beside it: AdamW begins anew, and the count of steps from 0");
        }
        let mut line = vec!["import".to_string()];
        line.extend(files.iter().map(|f| f.display().to_string()));
        line.push(format!("--to={}/", out.display()));
        line.extend(self.pass(&self.model_groups(), &UNTOLD));
        line.retain(|a| !a.starts_with("--timestep-respacing="));
        line
    }
}

/// Flags whose value is handled by itself.
const PATHS: [&str; 7] =
    ["data_dir", "model_path", "base_samples", "resume_checkpoint", "use_fp16", "fp16_scale_growth", "steps"];

/// NNNNNN of `modelNNNNNN.pt`.
fn number(path: &Path) -> Option<&str> {
    let number = path.file_stem()?.to_str()?.strip_prefix("model")?;
    number.bytes().all(|b| b.is_ascii_digit()).then_some(number).filter(|n| !n.is_empty())
}

/// The checkpoint of this program that `modelNNNNNN.pt` was written beside: more than the three files hold.
fn beside(path: &Path) -> Option<PathBuf> {
    let step = number(path)?.parse().ok()?;
    Some(path.with_file_name(checkpoint::file_name(step))).filter(|p| p.exists())
}
