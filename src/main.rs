//! The `vineyard-fs` command.

fn main() -> std::process::ExitCode {
    vineyard_fs::cli::main()
}
