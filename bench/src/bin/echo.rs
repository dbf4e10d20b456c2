//! `echo serve`: the test application of the examples and benches. See `sluice_bench::echo`.

use clap::{Parser, Subcommand};
use sluice_bench::echo::{self, ServeArgs};

#[derive(Parser)]
#[command(about = "A small application that answers who it is and remembers what it has seen")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve HTTP and optionally TCP and UDP until SIGTERM
    Serve(ServeArgs),
}

fn main() -> anyhow::Result<()> {
    let Command::Serve(args) = Args::parse().command;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(echo::serve(args))
}
