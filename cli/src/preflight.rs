//! What must be there before a local cluster can start: each missing thing is named with the way to get it, all at once.

use crate::cluster::Family;
use anyhow::{Result, bail};
use std::{net::TcpListener, path::Path, process::Command};

const MIN_DISK_MIB: u64 = 2048;
const MIN_MEMORY_MIB: u64 = 1024;
/// Oldest kubectl that applies on the server's terms.
const MIN_KUBECTL: u32 = 28;

/// The listening socket of the API, taken while checking so that nobody else gets it in between.
pub fn check(port: u16, families: &[Family], bin: &Path, images: &Path) -> Result<TcpListener> {
    let mut missing = vec![];
    if !rustix::process::geteuid().is_root() {
        missing.push("root: a local cluster makes namespaces and loads eBPF; run this with sudo".to_owned());
    }
    for (program, package) in [
        ("containerd", "containerd"),
        ("ctr", "containerd"),
        ("runc", "runc"),
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
        ("kubectl", "kubectl 1.28 or later (Debian 13: kubernetes-client)"),
    ] {
        if !on_path(program) {
            missing.push(format!("the program {program}: install {package}, or run `make setup`"));
        }
    }
    for program in ["sluice-control", "sluice-agent", "sluice-cni"] {
        if !bin.join(program).exists() {
            missing.push(format!("{}: build it with `make build`", bin.join(program).display()));
        }
    }
    if !images.join("pause.tar").exists() {
        missing.push(format!("container images in {}: make them with `make images`", images.display()));
    }
    if families.contains(&Family::Ipv6) && !Path::new("/proc/net/if_inet6").exists() {
        missing.push("IPv6 in the kernel: switch it on, or start a cluster with --ip-families ipv4".to_owned());
    }
    missing.extend(old_kubectl());
    missing.extend(disk("/var/lib"));
    missing.extend(memory());
    let socket = TcpListener::bind(("127.0.0.1", port));
    if let Err(e) = &socket {
        missing.push(format!(
            "port {port} on 127.0.0.1 ({e}): stop what listens there, or choose another with --api-port"
        ));
    }
    match socket {
        Ok(s) if missing.is_empty() => Ok(s),
        _ => bail!("this machine lacks:\n  - {}", missing.join("\n  - ")),
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin:/sbin";
    path.split(':').any(|d| Path::new(d).join(program).is_file())
}

fn old_kubectl() -> Option<String> {
    let out = Command::new("kubectl").args(["version", "--client", "-o", "json"]).output().ok()?;
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).ok()?;
    let minor: u32 = v["clientVersion"]["minor"].as_str()?.trim_end_matches('+').parse().ok()?;
    (minor < MIN_KUBECTL).then(|| format!("a newer kubectl: 1.{minor} is here, 1.{MIN_KUBECTL} is needed"))
}

fn disk(path: &str) -> Option<String> {
    let s = rustix::fs::statvfs(path).ok()?;
    let free = s.f_bavail * s.f_frsize / (1 << 20);
    (free < MIN_DISK_MIB).then(|| format!("disk: {free} MiB free in {path}, {MIN_DISK_MIB} MiB are needed; free some"))
}

fn memory() -> Option<String> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib: u64 =
        text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?.trim().trim_end_matches(" kB").parse().ok()?;
    let free = kib / 1024;
    (free < MIN_MEMORY_MIB).then(|| format!("memory: {free} MiB available, {MIN_MEMORY_MIB} MiB are needed"))
}
