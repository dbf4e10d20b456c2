//! `sluice-agent`: see the library. This file says what is started, in which order, and how it stops.

use anyhow::Result;
use clap::Parser;
use sluice_agent::run::{Options, run};

fn main() -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let options = Options::parse();
    // The agent's work is short and bursty; two threads keep its memory small.
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(run(options))
}
