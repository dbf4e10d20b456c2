//! `make bench-proxy`: the sidecar beside nginx and HAProxy. Each proxy is alone on one core, client and backend are on
//! another; CPU time of the proxy's process per request, rounds interleaved, medians compared. The sidecar routes,
//! splits, balances and counts; the peers pass on. A pair of sidecars with mTLS between them is measured as one.

use anyhow::{Context, bail};
use clap::Parser;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_setaffinity},
};
use sluice_bench::{backend::Backend, closed, stats::median};
use std::{
    fs,
    net::{SocketAddr, TcpListener},
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
    /// More than one where a request passes several.
    children: Vec<Child>,
    cpu_us: Vec<f64>,
    p50_us: Vec<f64>,
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

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let dir = tempfile::tempdir()?;
    pin(0)?;
    let backend = Backend::start_at("v1", "0.0.0.0:0".parse()?)?;
    let port = backend.address.port();
    let mut contenders = vec![sluice(dir.path(), port)?, mtls_pair(dir.path(), port)?];
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
    contender("sluice", listen, vec![start(command)?])
}

/// A client's sidecar and a server's, with mTLS between them.
fn mtls_pair(dir: &Path, backend: u16) -> anyhow::Result<Contender> {
    let (near, far) = (dir.join("client"), dir.join("server"));
    make_certificates(&[(&near, "client"), (&far, "server")])?;
    let listens = [free_port()?, free_port()?].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let [outbound, inbound] = listens.map(|a| a.to_string());
    let view = include_str!("../../peers/sluice-mtls.json").replace("@SERVER@", &listens[1].port().to_string());
    let app = format!("127.0.0.1:{backend}");
    let mut children = Vec::new();
    for (folder, flags) in [
        (&far, ["--inbound-listen", &inbound, "--inbound-to", &app]),
        (&near, ["--outbound-listen", &outbound, "--outbound-to", "10.96.0.1:80"]),
    ] {
        let config = folder.join("view.json");
        fs::write(&config, &view)?;
        let mut command = Command::new(std::env::current_exe()?.with_file_name("sluice-proxy"));
        command.arg("--static-config").arg(config).arg("--static-tls").arg(folder).args(flags);
        command.args(["--workers", "1", "--admin", "127.0.0.1:0"]).env("SLUICE_LOG", "warn");
        children.push(start(command)?);
    }
    contender("mtls pair", listens[0], children)
}

/// For each folder a certificate of that service account, all of one authority.
fn make_certificates(accounts: &[(&Path, &str)]) -> anyhow::Result<()> {
    let (key, mut params) = (KeyPair::generate()?, CertificateParams::default());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let bundle = params.self_signed(&key)?.pem();
    let authority = Issuer::new(params, key);
    for (folder, account) in accounts {
        let (key, mut params) = (KeyPair::generate()?, CertificateParams::default());
        params.subject_alt_names =
            vec![SanType::URI(format!("spiffe://cluster.local/ns/shop/sa/{account}").try_into()?)];
        fs::create_dir(folder)?;
        fs::write(folder.join("certificate.pem"), params.signed_by(&key, &authority)?.pem())?;
        fs::write(folder.join("key.pem"), key.serialize_pem())?;
        fs::write(folder.join("bundle.pem"), &bundle)?;
    }
    Ok(())
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
    contender(name, listen, vec![start(command)?]).map(Some)
}

fn contender(name: &'static str, address: SocketAddr, children: Vec<Child>) -> anyhow::Result<Contender> {
    let mut contender = Contender { name, address, children, cpu_us: Vec::new(), p50_us: Vec::new() };
    let until = Instant::now() + Duration::from_secs(10);
    // One request: of several proxies behind each other, the last may not listen yet.
    while closed::run(address, 1, 1).is_err() {
        for child in &mut contender.children {
            if Instant::now() > until || child.try_wait()?.is_some() {
                bail!("{name} does not serve at {address}");
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(contender)
}

fn measure(c: &mut Contender, args: &Args) -> anyhow::Result<()> {
    let before = cpu_ns(c)?;
    let mut times = closed::run(c.address, args.connections, args.requests).with_context(|| c.name)?;
    let used = cpu_ns(c)? - before;
    times.sort_unstable();
    c.cpu_us.push(used as f64 / 1000.0 / args.requests as f64);
    c.p50_us.push(times[times.len() / 2].as_secs_f64() * 1e6);
    Ok(())
}

/// CPU time of all threads of the processes, from the scheduler's own clock: ticks would be too coarse.
fn cpu_ns(c: &Contender) -> anyhow::Result<u64> {
    let mut sum = 0;
    for child in &c.children {
        for task in fs::read_dir(format!("/proc/{}/task", child.id()))? {
            let text = fs::read_to_string(task?.path().join("schedstat"))?;
            sum += text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).context("schedstat")?;
        }
    }
    Ok(sum)
}

fn private_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    line.and_then(|l| l.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
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
            c.children.iter().map(|child| private_kib(child.id())).sum::<u64>()
        );
    }
    let of = |name| contenders.iter().find(|c| c.name == name).map_or(0.0, |c| median(&c.cpu_us));
    for peer in ["nginx", "haproxy"] {
        let (ours, theirs) = (of("sluice"), of(peer));
        println!("RESULT h1_cpu_us_per_request_vs_{peer} ours={ours:.2} peer={theirs:.2} unit=us");
    }
    println!("RESULT mtls_pair_h1_cpu_us_per_request ours={:.2} peer=0 unit=us", of("mtls pair"));
}
