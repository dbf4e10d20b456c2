//! `make bench-proxy`: the sidecar beside nginx and HAProxy. Each proxy is alone on one core, client and backend are on
//! another; CPU time of the proxy's process per request, rounds interleaved, medians compared. The sidecar routes,
//! splits, balances and counts; the peers pass on.

use anyhow::{Context, bail};
use clap::Parser;
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_setaffinity},
};
use sluice_bench::{backend::Backend, closed};
use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

#[derive(Parser)]
struct Args {
    /// Requests per proxy and round
    #[arg(long, default_value_t = 100_000)]
    requests: u64,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Measure the sidecar alone
    #[arg(long)]
    alone: bool,
}

/// A proxy that runs, and what was measured of it.
struct Contender {
    name: &'static str,
    address: SocketAddr,
    child: Child,
    cpu_us: Vec<f64>,
    p50_us: Vec<f64>,
}

impl Drop for Contender {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let dir = tempfile::tempdir()?;
    pin(0)?;
    let backend = Backend::start_at("v1", "0.0.0.0:0".parse()?)?;
    let port = backend.address.port();
    let mut contenders = vec![sluice(dir.path(), port)?];
    if !args.alone {
        contenders.extend(peer("nginx", include_str!("../../peers/nginx.conf"), &["-c"], dir.path(), port)?);
        contenders.extend(peer("haproxy", include_str!("../../peers/haproxy.cfg"), &["-db", "-f"], dir.path(), port)?);
    }
    for c in &contenders {
        // Pools filled, code warm.
        closed::run(c.address, args.connections, args.requests / 5).with_context(|| c.name)?;
    }
    for _ in 0..args.rounds {
        for c in &mut contenders {
            measure(c, &args)?;
        }
    }
    print_table(&contenders);
    Ok(())
}

/// This thread, and what it starts from now on, runs on `cpu` where there is one.
fn pin(cpu: usize) -> anyhow::Result<()> {
    if std::thread::available_parallelism()?.get() < 2 && cpu > 0 {
        return Ok(());
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None::<Pid>, &set).context("pin to a CPU")
}

fn start(mut command: Command) -> anyhow::Result<Child> {
    pin(1)?;
    let child = command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn();
    pin(0)?;
    child.with_context(|| format!("start {command:?}"))
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn sluice(dir: &Path, backend: u16) -> anyhow::Result<Contender> {
    let config = dir.join("sluice.json");
    fs::write(&config, include_str!("../../peers/sluice.json").replace("@BACKEND@", &backend.to_string()))?;
    let program = std::env::current_exe()?.with_file_name("sluice-proxy");
    let listen = SocketAddr::from(([127, 0, 0, 1], free_port()?));
    let mut command = Command::new(program);
    command.arg("--static-config").arg(config).args(["--outbound-to", "10.96.0.1:80", "--workers", "1"]);
    command.args(["--outbound-listen", &listen.to_string(), "--admin", "127.0.0.1:0"]).env("SLUICE_LOG", "warn");
    contender("sluice", listen, start(command)?)
}

/// `None`, and a word about it, when the peer is not installed.
fn peer(
    name: &'static str,
    config: &str,
    flags: &[&str],
    dir: &Path,
    backend: u16,
) -> anyhow::Result<Option<Contender>> {
    let listen = SocketAddr::from(([127, 0, 0, 1], free_port()?));
    let values = [("@DIR@", dir.display().to_string()), ("@BACKEND@", backend.to_string())];
    let text = values.iter().fold(config.replace("@LISTEN@", &listen.port().to_string()), |t, (k, v)| t.replace(k, v));
    let file = dir.join(format!("{name}.conf"));
    fs::write(&file, text)?;
    let path =
        ["/usr/sbin", "/usr/bin", "/usr/local/sbin"].iter().map(|d| Path::new(d).join(name)).find(|p| p.exists());
    let Some(path) = path else {
        println!("{name} is not installed; measured without it");
        return Ok(None);
    };
    let mut command = Command::new(path);
    command.args(flags).arg(file);
    contender(name, listen, start(command)?).map(Some)
}

fn contender(name: &'static str, address: SocketAddr, child: Child) -> anyhow::Result<Contender> {
    let mut contender = Contender { name, address, child, cpu_us: Vec::new(), p50_us: Vec::new() };
    let until = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(address).is_err() {
        if Instant::now() > until || contender.child.try_wait()?.is_some() {
            bail!("{name} does not listen at {address}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(contender)
}

fn measure(c: &mut Contender, args: &Args) -> anyhow::Result<()> {
    let before = cpu_ns(c.child.id())?;
    let mut times = closed::run(c.address, args.connections, args.requests).with_context(|| c.name)?;
    let used = cpu_ns(c.child.id())? - before;
    times.sort_unstable();
    c.cpu_us.push(used as f64 / 1000.0 / args.requests as f64);
    c.p50_us.push(times[times.len() / 2].as_secs_f64() * 1e6);
    Ok(())
}

/// CPU time of all threads of a process, from the scheduler's own clock: ticks would be too coarse.
fn cpu_ns(pid: u32) -> anyhow::Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat"))?;
        sum += text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).context("schedstat")?;
    }
    Ok(sum)
}

fn private_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    line.and_then(|l| l.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

fn print_table(contenders: &[Contender]) {
    println!(
        "{:10} {:>16} {:>18} {:>10} {:>12}",
        "proxy", "CPU us/request", "(least to most)", "p50 us", "private KiB"
    );
    for c in contenders {
        let spread = c.cpu_us.iter().fold((f64::MAX, 0.0f64), |(a, b), v| (a.min(*v), b.max(*v)));
        println!(
            "{:10} {:>16.2} {:>18} {:>10.0} {:>12}",
            c.name,
            median(&c.cpu_us),
            format!("({:.2}-{:.2})", spread.0, spread.1),
            median(&c.p50_us),
            private_kib(c.child.id())
        );
    }
    let of = |name| contenders.iter().find(|c| c.name == name).map_or(0.0, |c| median(&c.cpu_us));
    for peer in ["nginx", "haproxy"] {
        let (ours, theirs) = (of("sluice"), of(peer));
        println!("RESULT h1_cpu_us_per_request_vs_{peer} ours={ours:.2} peer={theirs:.2} unit=us");
    }
}
