//! Chores of the build: `cargo run -p xtask -- images --out DIR` makes the container images of the local cluster.

mod image;
mod images;

use clap::{Parser, Subcommand};
use std::path::PathBuf;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Builds the images from programs of this machine, as OCI archives that containerd imports.
    Images {
        /// Folder with the built programs.
        #[arg(long, default_value = "target/release")]
        bin: PathBuf,
        #[arg(long, default_value = "target/images")]
        out: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Images { bin, out } => images::build(&bin, &out),
    }
}
