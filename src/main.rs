//! The program: see [`iddpm::cli`].
fn main() {
    std::process::exit(iddpm::cli::main());
}
