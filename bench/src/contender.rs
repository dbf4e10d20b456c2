//! A proxy under measurement: its processes on a core of their own, and what they cost (CPU time, memory).

use anyhow::{Context, bail};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_setaffinity},
};
use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A proxy that runs, and what was measured of it in each scenario's rounds.
pub struct Contender {
    pub name: &'static str,
    pub address: SocketAddr,
    /// More than one where a request passes several.
    pub children: Vec<Child>,
    pub cpu_us: Vec<f64>,
    pub p50_us: Vec<f64>,
    pub p99_us: Vec<f64>,
}

impl Drop for Contender {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// This thread, and what it starts from now on, runs on `cpu` where there is one.
pub fn pin(cpu: usize) -> anyhow::Result<()> {
    if std::thread::available_parallelism()?.get() < 2 && cpu > 0 {
        return Ok(());
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None::<Pid>, &set).context("pin to a CPU")
}

/// Starts a program on the proxies' core.
pub fn start(mut command: Command) -> anyhow::Result<Child> {
    pin(1)?;
    let child = command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn();
    pin(0)?;
    child.with_context(|| format!("start {command:?}"))
}

pub fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

pub fn loopback() -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::from(([127, 0, 0, 1], free_port()?)))
}

/// A peer of Debian's or PyPI's, with its configuration's `@WORDS@` filled in; `None`, and a word about it, where it is not
/// installed.
pub fn peer(
    name: &'static str,
    program: &str,
    config: &str,
    flags: &[&str],
    dir: &Path,
    backend: u16,
) -> anyhow::Result<Option<Contender>> {
    let listen = loopback()?;
    let values = [
        ("@DIR@", dir.display().to_string()),
        ("@BACKEND@", backend.to_string()),
        ("@LISTEN@", listen.port().to_string()),
    ];
    let text = values.iter().fold(config.to_owned(), |t, (k, v)| t.replace(k, v));
    // Envoy tells the format by the name.
    let kind = if program == "envoy" { "yaml" } else { "conf" };
    let file = dir.join(format!("{name}-{}.{kind}", listen.port()));
    fs::write(&file, text)?;
    let places = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "target/peers"];
    let Some(path) = places.iter().map(|d| Path::new(d).join(program)).find(|p| p.exists()) else {
        println!("{program} is not installed; measured without it");
        return Ok(None);
    };
    let mut command = Command::new(path);
    command.args(flags).arg(file);
    contender(name, listen, vec![start(command)?]).map(Some)
}

/// Waits until it takes connections.
pub fn contender(name: &'static str, address: SocketAddr, children: Vec<Child>) -> anyhow::Result<Contender> {
    let (cpu_us, p50_us, p99_us) = (Vec::new(), Vec::new(), Vec::new());
    let mut contender = Contender { name, address, children, cpu_us, p50_us, p99_us };
    let until = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(address).is_err() {
        for child in &mut contender.children {
            if Instant::now() > until || child.try_wait()?.is_some() {
                bail!("{name} does not serve at {address}");
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(contender)
}

impl Contender {
    /// CPU time of all threads of the processes, from the scheduler's own clock: ticks would be too coarse.
    pub fn cpu_ns(&self) -> anyhow::Result<u64> {
        let mut sum = 0;
        for child in &self.children {
            for task in fs::read_dir(format!("/proc/{}/task", child.id()))? {
                let text = fs::read_to_string(task?.path().join("schedstat"))?;
                sum += text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).context("schedstat")?;
            }
        }
        Ok(sum)
    }

    /// Memory that is the processes' own.
    pub fn private_kib(&self) -> u64 {
        let of = |pid: u32| -> Option<u64> {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            status.lines().find_map(|l| l.strip_prefix("RssAnon:"))?.trim().split(' ').next()?.parse().ok()
        };
        self.children.iter().filter_map(|child| of(child.id())).sum()
    }
}
