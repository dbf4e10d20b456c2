//! Chores of the build: `cargo run -p xtask -- images --out DIR` makes the container images of the local cluster.

mod cpio;
mod image;
mod images;
mod kernels;

use clap::{Parser, Subcommand};
use std::{path::PathBuf, time::Duration};

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
    /// Runs the kernel's side of the tests under another kernel, emulated by QEMU.
    Kernel {
        /// Folder with an unpacked kernel package and its modules.dep.
        root: PathBuf,
        /// What `cargo test --no-run --message-format=json` has said.
        #[arg(long, default_value = "target/tests.json")]
        built: PathBuf,
        /// Folder with the built programs.
        #[arg(long, default_value = "target/release")]
        bin: PathBuf,
        /// The machine is killed after so many seconds.
        #[arg(long, default_value_t = 900)]
        patience_s: u64,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Images { bin, out } => images::build(&bin, &out),
        Command::Kernel { root, built, bin, patience_s } => {
            kernels::test(&root, &built, &bin, Duration::from_secs(patience_s))
        }
    }
}
