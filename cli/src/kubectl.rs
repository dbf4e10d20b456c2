//! The user's own kubectl, told which cluster.

use anyhow::{Context, Result, bail};
use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

pub fn command(kubeconfig: &Path) -> Command {
    let mut c = Command::new("kubectl");
    c.arg("--kubeconfig").arg(kubeconfig);
    c
}

/// Applies manifests given as text.
pub fn apply(kubeconfig: &Path, manifests: &str) -> Result<()> {
    let mut child = command(kubeconfig)
        .args(["apply", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("run kubectl")?;
    child.stdin.take().context("kubectl's input")?.write_all(manifests.as_bytes())?;
    finish(child.wait_with_output()?, "kubectl apply")
}

pub fn run(kubeconfig: &Path, args: &[&str]) -> Result<()> {
    let out = command(kubeconfig).args(args).stdin(Stdio::null()).output().context("run kubectl")?;
    finish(out, &format!("kubectl {}", args.join(" ")))
}

fn finish(out: std::process::Output, what: &str) -> Result<()> {
    if out.status.success() {
        return Ok(());
    }
    bail!("{what}: {}", String::from_utf8_lossy(&out.stderr).trim())
}
