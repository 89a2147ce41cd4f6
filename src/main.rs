fn main() {
    std::process::exit(iddpm::cli::main());
}
