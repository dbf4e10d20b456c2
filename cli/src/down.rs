//! `sluice down`: switches a local cluster off and leaves nothing behind.

use crate::{cluster::Cluster, kubeconfig};
use anyhow::{Context, Result, bail};
use std::fs;

pub fn run(name: &str) -> Result<()> {
    let _lock = Cluster::lock(name)?;
    let Some(cluster) = Cluster::load(name)? else {
        println!("no local cluster {name:?} is there");
        return Ok(());
    };
    tear_down(&cluster)?;
    println!("cluster {name:?} is down, nothing of it is left");
    Ok(())
}

/// Every step is tried; what could not be done is said at the end.
pub fn tear_down(cluster: &Cluster) -> Result<()> {
    let mut left = vec![];
    for m in cluster.machines() {
        m.kill();
        left.extend(m.remove_cgroups());
    }
    if let Err(e) = kubeconfig::remove(&kubeconfig::path(), &cluster.context()) {
        left.push(format!("kubeconfig: {e:#}"));
    }
    if let Err(e) = fs::remove_dir_all(cluster.dir()).with_context(|| format!("remove {}", cluster.dir().display())) {
        left.push(format!("{e:#}"));
    }
    // The folder above goes with the last cluster.
    let _ = cluster.dir().parent().map(fs::remove_dir);
    if left.is_empty() { Ok(()) } else { bail!("left behind:\n  - {}", left.join("\n  - ")) }
}
