//! `load`: open-loop HTTP load. See `sluice_bench::load`.

use clap::Parser;
use sluice_bench::load::{self, LoadArgs};

fn main() -> anyhow::Result<()> {
    let args = LoadArgs::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    let summary = runtime.block_on(load::run(args))?;
    println!("{}", serde_json::to_string(&summary)?);
    Ok(())
}
