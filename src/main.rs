//! The program `kube-tunnel`; everything it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    kube_tunnel::cli::main(std::env::args_os())
}
