//! `iddpm doctor`: what this machine's GPU is, what this binary holds for it, and whether training on it will work.

use std::io::Write;

use crate::bench::gpu_rates::Rates;
use crate::device::driver::{ARCHS, Driver, FunctionInfo, arch_list, cuda_present, driver_version};
use crate::error::{Error, Result};

/// Memory that the smallest preset of real images needs for training.
const SMALL_PRESET_BYTES: usize = 1 << 30;

/// Writes the report to `out`. What is missing is part of the report, not an error.
///
/// # Errors
/// [`Error::Io`] when `out` cannot be written.
pub fn run(out: &mut impl Write) -> Result<()> {
    let mut report = Report { text: String::new() };
    report.line("kernels in this binary", &arch_list());
    let opened = report.driver().then(|| Driver::cuda(0));
    match opened {
        None => {}
        Some(Err(e)) => report.verdict(false, &e.to_string()),
        Some(Ok(driver)) => match report.gpu(&driver) {
            Ok(()) => {}
            Err(e) => report.verdict(false, &e.to_string()),
        },
    }
    report.emulator();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    report.line("CPU", &format!("training and sampling work with --device cpu, on {threads} threads"));
    out.write_all(report.text.as_bytes()).map_err(Error::io("standard output", "write"))
}

struct Report {
    text: String,
}

impl Report {
    fn line(&mut self, what: &str, value: &str) {
        self.text += &format!("{what:<24} {value}\n");
    }

    fn verdict(&mut self, works: bool, why: &str) {
        let word = if works { "will work" } else { "will not work" };
        self.line("training on this GPU", &format!("{word}: {why}"));
    }

    /// The driver's version; false when there is no use in going on.
    fn driver(&mut self) -> bool {
        if !cuda_present() {
            self.line("NVIDIA driver", "none: libcuda was not found");
            self.verdict(false, "install the NVIDIA driver, 580 or newer");
            return false;
        }
        match driver_version() {
            Ok(v) => self.line("NVIDIA driver", &format!("supports CUDA {}.{}", v / 1000, v % 1000 / 10)),
            Err(e) => {
                self.verdict(false, &e.to_string());
                return false;
            }
        }
        if ARCHS.is_empty() {
            self.verdict(false, "this binary was built without nvcc: run scripts/setup-cuda.sh and build again");
        }
        !ARCHS.is_empty()
    }

    fn gpu(&mut self, driver: &Driver) -> Result<()> {
        let info = driver.info()?;
        let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
        let (major, minor) = info.compute_capability;
        self.line("GPU 0", &format!("{}, compute capability {major}.{minor}", info.name));
        self.line("multiprocessors", &info.multiprocessors.to_string());
        self.line("memory", &format!("{:.1} of {:.1} GiB free", gib(info.free_bytes), gib(info.total_bytes)));
        let function = driver.function_info("copy_16")?;
        self.line("machine code chosen", &chosen(function, info.compute_capability));
        let rates = Rates { driver, info: &info };
        self.line("copy ceiling", &format!("{:.0} GB/s (read and written)", rates.copy()? / 1e9));
        self.line("mma.sync ceiling", &format!("{:.0} TFLOP/s (bf16)", rates.mma()? / 1e12));
        if major == 9 {
            self.line("wgmma ceiling", &format!("{:.0} TFLOP/s (bf16)", rates.wgmma()? / 1e12));
        }
        if major < 8 {
            self.verdict(false, "bf16 matrix products need compute capability 8.0 or newer");
        } else if info.free_bytes < SMALL_PRESET_BYTES {
            self.verdict(false, &format!("{:.1} GiB are free; small presets need about 1 GiB", gib(info.free_bytes)));
        } else {
            self.verdict(true, "the kernels load and run; `iddpm plan` tells how much memory a configuration needs");
        }
        Ok(())
    }

    fn emulator(&mut self) {
        match Driver::emulated().and_then(|d| d.info()) {
            Ok(info) => self.line("emulator", &format!("{}; for checking only, its times say nothing", info.name)),
            Err(_) => self.line("emulator", "not in this build (feature \"emulator\")"),
        }
    }
}

/// Which machine code the driver took, and whether it compiled it from PTX at load time.
fn chosen(function: Option<FunctionInfo>, (major, minor): (i32, i32)) -> String {
    let Some(f) = function else { return "none: the kernels are C++".into() };
    let version = f.binary_version;
    let family = version / 10 == major as u32;
    let how = if family { "" } else { ", compiled from PTX by the driver" };
    format!("sm_{version} for sm_{major}{minor}{how}")
}
