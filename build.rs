//! Compiles `kernels/*.cu` twice: with nvcc to one embedded fatbin per file, and, with the feature `emulator`, as C++ to
//! a static library that runs the same kernels on the CPU. Writes `$OUT_DIR/kernels.rs`, which `device/driver` includes.
//!
//! | variable | meaning |
//! |---|---|
//! | `NVCC`; `CUDA_HOME`, `CUDA_PATH`, `CUDA_ROOT` | the compiler, or the toolkit that holds `bin/nvcc` |
//! | `IDDPM_CUDA` | `require`: no nvcc is an error; `off`: do not look for it (`DOCS_RS` means the same) |
//! | `IDDPM_CUDA_ARCHS` | list such as `90a` or `80,90a,+80` (`+` is PTX); default below |
//! | `CXX` | the C++ compiler of the emulator, default g++ |
//!
//! Results are cached in `OUT_DIR` under a hash of source, headers, flags and compiler version.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

/// Architectures of a release: sm_80 (also runs on 86 and 89), Hopper, Blackwell families, and PTX for all newer ones.
const ARCHS: &str = "80,90a,100f,120f,+80";
const NVCC_FLAGS: &str = "-std=c++20 -O3 -fatbin -compress-mode=size --threads 0 -Werror all-warnings -Xptxas -v";
/// The access checks and the traffic meter of the emulator live in the callbacks that `-fsanitize=thread` inserts.
const EMULATOR_FLAGS: &str = "-std=c++20 -O2 -g1 -fPIC -DIDDPM_EMULATOR -fno-strict-aliasing -ffp-contract=fast \
    -fno-exceptions -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-psabi -Wno-unused-parameter";

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    for v in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "IDDPM_CUDA_ARCHS", "IDDPM_CUDA", "DOCS_RS", "CXX"] {
        println!("cargo::rerun-if-env-changed={v}");
    }
    let emulator = env::var_os("CARGO_FEATURE_EMULATOR").is_some();
    let dir = root.join("kernels");
    let mut sources = files(&dir, &["cu"]);
    if emulator {
        sources.extend(files(&dir.join("test"), &["cu"]));
    }
    let mut text = String::new();
    text += &cuda(&root, &out, &sources);
    if emulator {
        text += &emulated(&dir, &out, &sources);
    }
    fs::write(out.join("kernels.rs"), text).unwrap();
}

/// Files of `dir` with one of the extensions, sorted.
fn files(dir: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut v: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    v.retain(|p| p.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e)));
    v.sort();
    v
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_str().expect("kernel file names are UTF-8").to_string()
}

/// Prints each line as an error of the build and ends it.
fn fail(message: &str) -> ! {
    for line in message.lines() {
        println!("cargo::error={line}");
    }
    std::process::exit(1);
}

// ---- compiling, in parallel and once per content ------------------------------------------------------------------

/// One compiler call: `output` is named after a hash of everything that goes into it, so an existing one is right.
struct Job {
    source: PathBuf,
    output: PathBuf,
    command: Vec<String>,
}

impl Job {
    /// What the compiler wrote to stderr, kept beside the output.
    fn log(&self) -> PathBuf {
        self.output.with_extension("log")
    }

    fn run(&self) -> Result<(), String> {
        if self.output.exists() && self.log().exists() {
            return Ok(());
        }
        let partial = self.output.with_extension("partial");
        let done = Command::new(&self.command[0])
            .args(&self.command[1..])
            .arg("-o")
            .arg(&partial)
            .arg(&self.source)
            .output()
            .map_err(|e| format!("{}: cannot run: {e}", self.command[0]))?;
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        if !done.status.success() {
            return Err(format!("{}: {} failed\n{stderr}", self.source.display(), self.command[0]));
        }
        fs::write(self.log(), stderr).map_err(|e| e.to_string())?;
        fs::rename(&partial, &self.output).map_err(|e| e.to_string())
    }
}

/// Runs the jobs on as many threads as Cargo grants; all messages of the failed ones end the build.
fn run_all(jobs: &[Job]) {
    let threads: usize = env::var("NUM_JOBS").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let (next, failed) = (Mutex::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|s| {
        for _ in 0..threads.clamp(1, jobs.len().max(1)) {
            s.spawn(|| {
                loop {
                    let i = {
                        let mut n = next.lock().unwrap();
                        *n += 1;
                        *n - 1
                    };
                    let Some(job) = jobs.get(i) else { return };
                    if let Err(e) = job.run() {
                        failed.lock().unwrap().push(e);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    if !failed.is_empty() {
        fail(&failed.join("\n"));
    }
}

/// Hash of the flags, the compiler's version and the headers: what every output of one compiler shares.
fn hash_common(command: &[String], headers: &[PathBuf]) -> DefaultHasher {
    let mut h = DefaultHasher::new();
    command.hash(&mut h);
    match Command::new(&command[0]).arg("--version").output() {
        Ok(v) => v.stdout.hash(&mut h),
        Err(e) => fail(&format!("{}: cannot run: {e}", command[0])),
    }
    for f in headers {
        fs::read(f).unwrap().hash(&mut h);
    }
    h
}

fn job(source: &Path, hash: &DefaultHasher, command: &[String], out: &Path, extension: &str) -> Job {
    let mut h = hash.clone();
    source.hash(&mut h);
    fs::read(source).unwrap().hash(&mut h);
    let output = out.join(format!("{}-{:016x}.{extension}", stem(source), h.finish()));
    Job { source: source.into(), output, command: command.to_vec() }
}

// ---- the CUDA kernels ---------------------------------------------------------------------------------------------

/// First hit of: `NVCC`, the toolkit variables, `.cuda` in every folder above the crate or the output, `PATH`, /usr/local.
fn find_nvcc(root: &Path, out: &Path) -> Option<PathBuf> {
    let exe = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let mut places: Vec<PathBuf> = env::var_os("NVCC").map(PathBuf::from).into_iter().collect();
    for v in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"] {
        places.extend(env::var_os(v).map(|p| Path::new(&p).join("bin").join(&exe)));
    }
    places.extend(root.ancestors().chain(out.ancestors()).map(|d| d.join(".cuda/nvidia/cu13/bin").join(&exe)));
    if let Some(path) = env::var_os("PATH") {
        places.extend(env::split_paths(&path).map(|d| d.join(&exe)));
    }
    places.push(Path::new("/usr/local/cuda/bin").join(&exe));
    places.into_iter().find(|p| p.is_file())
}

fn cuda(root: &Path, out: &Path, sources: &[PathBuf]) -> String {
    let want = env::var("IDDPM_CUDA").unwrap_or_default();
    if !matches!(want.as_str(), "" | "require" | "off") {
        fail(&format!("IDDPM_CUDA is {want:?}; it can be \"require\", \"off\" or unset"));
    }
    let off = want == "off" || env::var_os("DOCS_RS").is_some();
    let nvcc = if off { None } else { find_nvcc(root, out) };
    let Some(nvcc) = nvcc else {
        let how = "nvcc was not found, so this build has no CUDA kernels and runs on the CPU only: \
                   run scripts/setup-cuda.sh, or set NVCC or CUDA_HOME";
        if want == "require" {
            fail(how);
        }
        if !off {
            println!("cargo::warning={how}");
        }
        return modules(&[], "");
    };
    let archs = env::var("IDDPM_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    let mut command = vec![nvcc.display().to_string(), format!("-I{}", root.join("kernels").display())];
    command.extend(NVCC_FLAGS.split_whitespace().map(String::from));
    for a in archs.split(',').map(str::trim).filter(|a| !a.is_empty()) {
        let target = match a.strip_prefix('+') {
            Some(ptx) => format!("arch=compute_{ptx},code=compute_{ptx}"),
            None => format!("arch=compute_{a},code=sm_{a}"),
        };
        command.extend(["-gencode".into(), target]);
    }
    let headers = files(&root.join("kernels"), &["cuh"]);
    let hash = hash_common(&command, &headers);
    // Planted bugs are for the emulator's detectors alone: a GPU would hang on some of them.
    let real = sources.iter().filter(|s| !stem(s).starts_with("bugs"));
    let jobs: Vec<Job> = real.map(|s| job(s, &hash, &command, out, "fatbin")).collect();
    run_all(&jobs);
    modules(&jobs, &archs)
}

/// Registers and spilled bytes of one kernel on one architecture, as ptxas reports them.
struct Resources {
    kernel: String,
    arch: String,
    registers: u32,
    spilled: u32,
}

/// Reads ptxas' `-v` report: `Compiling entry function 'k' for 'sm_80'`, `.. 8 bytes spill stores ..`, `Used 40 registers ..`.
fn resources(log: &str) -> Vec<Resources> {
    let number = |line: &str, before: &str| -> u32 {
        let head = line.split(before).next().unwrap_or("").trim_end();
        head.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|d| d.parse().ok()).unwrap_or(0)
    };
    let mut all: Vec<Resources> = Vec::new();
    for line in log.lines() {
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'').skip(1).step_by(2);
            let (kernel, arch) = (quoted.next().unwrap_or("").into(), quoted.next().unwrap_or("").into());
            all.push(Resources { kernel, arch, registers: 0, spilled: 0 });
        } else if let Some(r) = all.last_mut() {
            if line.contains("bytes spill stores") {
                r.spilled = number(line, " bytes spill stores");
            } else if line.contains("Used ") && line.contains(" registers") {
                r.registers = number(line, " registers");
            }
        }
    }
    all
}

/// The Rust text of `ARCHS`, `MODULES` and `RESOURCES`; a spilling kernel is also a warning of the build.
fn modules(jobs: &[Job], archs: &str) -> String {
    let mut text = String::new();
    if !jobs.is_empty() {
        text += "/// A fatbin at an address that the driver may read as 16-byte words.\n\
                 #[repr(C)]\nstruct Aligned<const N: usize> {\n    align: [u128; 0],\n    bytes: [u8; N],\n}\n";
    }
    let (mut table, mut report) = (String::new(), String::new());
    for j in jobs {
        let found = resources(&fs::read_to_string(j.log()).unwrap());
        let mut names: Vec<&str> = found.iter().map(|r| r.kernel.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        table += &format!(
            "    Module {{ file: {:?}, kernels: &{names:?}, image: &Aligned {{ align: [], bytes: *include_bytes!({:?}) }}.bytes }},\n",
            stem(&j.source),
            j.output
        );
        for r in &found {
            if r.spilled > 0 {
                println!("cargo::warning={} on {}: {} bytes of registers spilled", r.kernel, r.arch, r.spilled);
            }
            report += &format!(
                "    Resources {{ kernel: {:?}, arch: {:?}, registers: {}, spilled_bytes: {} }},\n",
                r.kernel, r.arch, r.registers, r.spilled
            );
        }
    }
    let list: Vec<&str> = archs.split(',').map(str::trim).filter(|a| !a.is_empty()).collect();
    text += &format!(
        "/// Architectures compiled into this binary; `+` marks PTX.\npub static ARCHS: &[&str] = &{list:?};\n"
    );
    text += &format!(
        "/// One entry for each `kernels/*.cu`; empty when the build had no nvcc.\npub(crate) static MODULES: &[Module] = &[\n{table}];\n"
    );
    text += &format!("/// What ptxas reported.\npub static RESOURCES: &[Resources] = &[\n{report}];\n");
    text
}

// ---- the emulator -------------------------------------------------------------------------------------------------

fn emulated(dir: &Path, out: &Path, sources: &[PathBuf]) -> String {
    let target = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if target != "linux" {
        fail(&format!(
            "the feature \"emulator\" needs Linux (fibers, mmap), and this target is {target:?}: build without it"
        ));
    }
    let compiler = env::var("CXX").unwrap_or_else(|_| "g++".into());
    let mut base = vec![compiler, format!("-I{}", dir.display())];
    base.extend(EMULATOR_FLAGS.split_whitespace().map(String::from));
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("fma") && std::is_x86_feature_detected!("avx2") {
        base.push("-march=x86-64-v3".into());
    }
    let mut headers = files(dir, &["cuh"]);
    headers.extend(files(&dir.join("emu"), &["h"]));
    let emu = out.join("emulator");
    fs::create_dir_all(&emu).unwrap();
    let (mut names, mut wrappers) = (Vec::new(), Vec::new());
    for s in sources {
        let kernels = scan(&base, s);
        let wrapper = emu.join(format!("{}.cpp", stem(s)));
        let mut text = format!("#include \"{}\"\n", s.display());
        for k in &kernels {
            text += &format!("EMU_KERNEL({}, {})\n", k.name, k.bounds);
        }
        if fs::read_to_string(&wrapper).ok().as_deref() != Some(&text) {
            fs::write(&wrapper, text).unwrap();
        }
        names.extend(kernels.into_iter().map(|k| k.name));
        wrappers.push((wrapper, s));
    }
    let mut instrumented = base.clone();
    instrumented.extend(["-c".into(), "-fsanitize=thread".into()]);
    let (plain, mut jobs) = ([base, vec!["-c".into()]].concat(), Vec::new());
    for (wrapper, source) in &wrappers {
        let mut hash = hash_common(&instrumented, &headers);
        fs::read(source).unwrap().hash(&mut hash);
        jobs.push(job(wrapper, &hash, &instrumented, &emu, "o"));
    }
    let hash = hash_common(&plain, &headers);
    jobs.extend(files(&dir.join("emu"), &["cpp"]).iter().map(|s| job(s, &hash, &plain, &emu, "o")));
    run_all(&jobs);
    archive(&emu, &jobs);
    names.sort();
    emulated_table(&names)
}

struct Kernel {
    name: String,
    /// First argument of `__launch_bounds__`, 1024 where there is none.
    bounds: String,
}

/// Finds every `extern "C" __global__ void [__launch_bounds__(..)] name(` of the preprocessed source.
fn scan(command: &[String], source: &Path) -> Vec<Kernel> {
    let done = Command::new(&command[0])
        .args(&command[1..])
        .args(["-E", "-P", "-DIDDPM_EMULATOR_SCAN", "-x", "c++"])
        .arg(source)
        .output();
    let done = done.unwrap_or_else(|e| fail(&format!("{}: cannot run: {e} (install g++, or set CXX)", command[0])));
    if !done.status.success() {
        fail(&String::from_utf8_lossy(&done.stderr));
    }
    let text = String::from_utf8_lossy(&done.stdout);
    let mut kernels = Vec::new();
    for (at, _) in text.match_indices("__global__") {
        if !text[..at].trim_end().ends_with("extern \"C\"") {
            fail(&format!(
                "{}: a kernel without extern \"C\": give each instantiation a name of its own",
                source.display()
            ));
        }
        let head: String = text[at + "__global__".len()..].chars().take_while(|c| !matches!(c, '{' | ';')).collect();
        let (mut rest, mut bounds) = (head.trim(), "1024".to_string());
        loop {
            rest = rest.trim_start();
            if let Some(tail) = rest.strip_prefix("__launch_bounds__") {
                let inside = parenthesised(tail);
                bounds = first_argument(inside).to_string();
                rest = &tail[tail.find('(').unwrap() + inside.len() + 2..];
            } else if let Some(tail) = rest.strip_prefix("void") {
                rest = tail;
            } else {
                break;
            }
        }
        let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        kernels.push(Kernel { name, bounds });
    }
    kernels
}

/// The text between the first `(` and its partner.
fn parenthesised(text: &str) -> &str {
    let start = text.find('(').expect("a parenthesis after __launch_bounds__") + 1;
    let mut depth = 1;
    for (i, c) in text[start..].char_indices() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if depth == 0 {
            return &text[start..start + i];
        }
    }
    fail("unbalanced parentheses after __launch_bounds__")
}

/// The text up to the first comma outside parentheses.
fn first_argument(text: &str) -> &str {
    let mut depth = 0;
    for (i, c) in text.char_indices() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if c == ',' && depth == 0 {
            return text[..i].trim();
        }
    }
    text.trim()
}

/// Bundles the objects into `libiddpm_emulator.a` and tells Cargo to link it.
fn archive(emu: &Path, jobs: &[Job]) {
    let lib = emu.join("libiddpm_emulator.a");
    let _ = fs::remove_file(&lib);
    let done = Command::new("ar").arg("crs").arg(&lib).args(jobs.iter().map(|j| &j.output)).output();
    match done {
        Ok(d) if d.status.success() => {}
        Ok(d) => fail(&String::from_utf8_lossy(&d.stderr)),
        Err(e) => fail(&format!("ar: cannot run: {e} (install binutils)")),
    }
    println!("cargo::rustc-link-search=native={}", emu.display());
    println!("cargo::rustc-link-lib=static=iddpm_emulator");
    println!("cargo::rustc-link-lib=stdc++");
}

/// The Rust text of `EMULATED_KERNELS`: name and descriptor of every kernel, sorted by name.
fn emulated_table(names: &[String]) -> String {
    let mut text = String::from("unsafe extern \"C\" {\n");
    for n in names {
        text += &format!("    static emu_kernel_{n}: EmulatedKernel;\n");
    }
    text += "}\n/// Every kernel of the emulator, sorted by name.\npub(crate) fn emulated_kernels() -> Vec<(&'static str, *const EmulatedKernel)> {\n    vec![\n";
    for n in names {
        text += &format!("        ({n:?}, &raw const emu_kernel_{n}),\n");
    }
    text + "    ]\n}\n"
}
