//! `make bench-cni`: the plugin beside the reference plugins, each on a node of its own: a network namespace, and for
//! ours a BPF file system and a cgroup with the data path loaded. Blocks are interleaved, medians compared.
//!
//! CPU time of a pair is everything from ADD until the link is gone after DEL: of the plugin's processes, and of the
//! kernel's unbound workers, which remove a namespace and what is in it. Needs root. Everything is removed at the end.

use anyhow::{Context, bail};
use clap::Parser;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;
use sluice_bench::stats::median;
use sluice_ebpf::loader::{self, Place};
use sluice_netlink::{Connection, Netns, link, ns};
use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Where Debian's containernetworking-plugins are.
const PEERS: &str = "/usr/lib/cni";
const GONE_WAIT: Duration = Duration::from_secs(30);

#[derive(Parser)]
struct Args {
    /// ADD and DEL in each block
    #[arg(long, default_value_t = 20)]
    pairs: usize,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// ADDs at once
    #[arg(long, default_value_t = 100)]
    concurrent: usize,
    /// Measure ours alone
    #[arg(long)]
    alone: bool,
}

/// A plugin, the node that it works on, and what was measured.
struct Contender {
    name: &'static str,
    program: PathBuf,
    config: String,
    node: PathBuf,
    netns: Netns,
    add_ms: Vec<f64>,
    del_ms: Vec<f64>,
    gone_ms: Vec<f64>,
    cpu_ms: Vec<f64>,
    /// The kernel's part of it, behind DEL.
    workers_ms: Vec<f64>,
    concurrent_s: Vec<f64>,
}

/// What is removed at the end, also after a failure.
struct Ground {
    base: PathBuf,
    cgroup: PathBuf,
    /// Where this process was before.
    home: PathBuf,
}

impl Drop for Ground {
    fn drop(&mut self) {
        // Best effort: the first failure is what is reported.
        let _ = move_to(&self.home);
        for folder in fs::read_dir(&self.base).into_iter().flatten().flatten().map(|e| e.path()) {
            for file in fs::read_dir(&folder).into_iter().flatten().flatten().map(|e| e.path()) {
                let _ = if file.is_file() { ns::remove_named(&file) } else { Ok(()) };
            }
            let _ = unmount(folder.join("bpf"), UnmountFlags::DETACH);
        }
        for entry in fs::read_dir(&self.cgroup).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(&self.cgroup);
        let _ = fs::remove_dir_all(&self.base);
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let ground = ground()?;
    let ours = std::env::current_exe()?.with_file_name("sluice-cni");
    let mut contenders = vec![contender(&ground, "sluice", ours, include_str!("../../peers/cni-sluice.json"))?];
    let place = Place { bpffs: ground.base.join("sluice/bpf"), cgroup: ground.cgroup.join("sluice") };
    fs::create_dir(&place.bpffs)?;
    mount("bpf", &place.bpffs, "bpf", MountFlags::empty(), None).context("mount a BPF file system; root is needed")?;
    loader::load(&place).context("load the data path")?;
    if !args.alone {
        contenders.extend(peer(&ground, "bridge", include_str!("../../peers/cni-bridge.json"))?);
        contenders.extend(peer(&ground, "ptp", include_str!("../../peers/cni-ptp.json"))?);
    }
    for round in 0..=args.rounds {
        for c in &mut contenders {
            block(&ground, c, &args).with_context(|| c.name)?;
            at_once(c, args.concurrent).with_context(|| c.name)?;
            if round == 0 {
                c.forget(); // files cached, modules loaded
            }
        }
    }
    print_table(&contenders);
    Ok(())
}

fn cgroup_root() -> anyhow::Result<PathBuf> {
    let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
    roots.into_iter().find(|p| p.join("cgroup.controllers").exists()).context("there is no cgroup2 mount")
}

fn ground() -> anyhow::Result<Ground> {
    let (root, id) = (cgroup_root()?, format!("sluice-bench-cni-{}", std::process::id()));
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let home = own.lines().find_map(|l| l.strip_prefix("0::")).context("this process is in no cgroup2")?;
    let home = root.join(home.trim_start_matches('/'));
    let ground = Ground { base: std::env::temp_dir().join(&id), cgroup: root.join(&id), home };
    fs::create_dir(&ground.base)?;
    fs::create_dir(&ground.cgroup).context("make a cgroup; root is needed")?;
    Ok(ground)
}

fn move_to(cgroup: &Path) -> anyhow::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
        .with_context(|| format!("move this process to {}", cgroup.display()))
}

fn contender(ground: &Ground, name: &'static str, program: PathBuf, config: &str) -> anyhow::Result<Contender> {
    let dir = ground.base.join(name);
    fs::create_dir(&dir)?;
    fs::create_dir(ground.cgroup.join(name))?;
    let netns = ns::make_named(&dir.join("node"))?;
    netns.run(sluice_netlink::lab::loopback_up)??;
    Ok(Contender {
        name,
        program,
        config: config.replace("@DIR@", &dir.display().to_string()),
        node: dir,
        netns,
        add_ms: Vec::new(),
        del_ms: Vec::new(),
        gone_ms: Vec::new(),
        cpu_ms: Vec::new(),
        workers_ms: Vec::new(),
        concurrent_s: Vec::new(),
    })
}

/// `None`, and a word about it, when the peer is not installed.
fn peer(ground: &Ground, name: &'static str, config: &str) -> anyhow::Result<Option<Contender>> {
    let program = Path::new(PEERS).join(name);
    if !program.exists() || !Path::new(PEERS).join("host-local").exists() {
        println!("{} is not installed (containernetworking-plugins); measured without it", program.display());
        return Ok(None);
    }
    contender(ground, name, program, config).map(Some)
}

impl Contender {
    fn forget(&mut self) {
        let lists = [&mut self.add_ms, &mut self.del_ms, &mut self.gone_ms, &mut self.cpu_ms, &mut self.workers_ms];
        lists.into_iter().chain([&mut self.concurrent_s]).for_each(Vec::clear);
    }

    fn make_pods(&self, count: usize) -> anyhow::Result<Vec<PathBuf>> {
        let paths = (0..count).map(|n| self.node.join(format!("pod{n}")));
        paths.map(|path| Ok(ns::make_named(&path).map(|_| path)?)).collect()
    }
}

/// Runs the plugin in the calling thread's namespace; its answer.
fn call(program: &Path, config: &str, verb: &str, pod: &Path) -> anyhow::Result<Value> {
    let mut command = Command::new(program);
    let id = pod.file_name().context("a pod's name")?;
    command.env_clear().env("CNI_COMMAND", verb).env("CNI_CONTAINERID", id).env("CNI_NETNS", pod);
    command.env("CNI_IFNAME", "eth0").env("CNI_PATH", PEERS).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("piped")?.write_all(config.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{verb}: {}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// Pairs one after the other, on a thread in the node's namespace.
fn block(ground: &Ground, c: &mut Contender, args: &Args) -> anyhow::Result<()> {
    let pods = c.make_pods(args.pairs)?;
    let cgroup = ground.cgroup.join(c.name);
    move_to(&cgroup)?;
    let (program, config, netns) = (&c.program, &c.config, &c.netns);
    let measured = thread::scope(|s| s.spawn(|| pairs(netns, program, config, &pods, &cgroup)).join());
    move_to(&ground.home)?;
    let (times, cpu) = measured.map_err(|_| anyhow::anyhow!("the measuring thread panicked"))??;
    c.cpu_ms.push((cpu.processes_ms + cpu.workers_ms) / args.pairs as f64);
    c.workers_ms.push(cpu.workers_ms / args.pairs as f64);
    for [add, del, gone] in times {
        c.add_ms.push(add);
        c.del_ms.push(del);
        c.gone_ms.push(gone);
    }
    Ok(())
}

/// Times of each pair, and CPU time of all.
fn pairs(
    netns: &Netns,
    program: &Path,
    config: &str,
    pods: &[PathBuf],
    cgroup: &Path,
) -> anyhow::Result<(Vec<[f64; 3]>, Cpu)> {
    netns.enter()?;
    let mut host = Connection::open()?;
    let before = cpu(cgroup)?;
    let mut times = Vec::new();
    for pod in pods {
        let begun = Instant::now();
        call(program, config, "ADD", pod)?;
        let add = ms(begun);
        let begun = Instant::now();
        call(program, config, "DEL", pod)?;
        let del = ms(begun);
        ns::remove_named(pod)?;
        wait_gone(&mut host)?;
        times.push([add, del, ms(begun)]);
    }
    let after = cpu(cgroup)?;
    let processes_ms = after.processes_ms - before.processes_ms;
    Ok((times, Cpu { processes_ms, workers_ms: after.workers_ms - before.workers_ms }))
}

/// Polls until no pod's link is left on the node: the bridge and the loopback stay.
fn wait_gone(host: &mut Connection) -> anyhow::Result<()> {
    let until = Instant::now() + GONE_WAIT;
    let stays = |name: &str| name == "lo" || name == "slcpeer0";
    while link::all(host)?.iter().any(|(name, _)| !stays(name)) {
        if Instant::now() > until {
            bail!("links are left after {} s", GONE_WAIT.as_secs());
        }
        thread::sleep(Duration::from_micros(500)); // between two looks
    }
    Ok(())
}

/// CPU time of the cgroup without this thread, and of the kernel's unbound workers.
struct Cpu {
    processes_ms: f64,
    workers_ms: f64,
}

fn cpu(cgroup: &Path) -> anyhow::Result<Cpu> {
    let stat = fs::read_to_string(cgroup.join("cpu.stat"))?;
    let usage = stat.lines().find_map(|l| l.strip_prefix("usage_usec ")).context("usage_usec in cpu.stat")?;
    let own_ms = runtime_ns(Path::new("/proc/thread-self"))? as f64 / 1e6;
    Ok(Cpu { processes_ms: usage.parse::<f64>()? / 1e3 - own_ms, workers_ms: workers_ns()? as f64 / 1e6 })
}

fn workers_ns() -> anyhow::Result<u64> {
    let unbound = |p: &PathBuf| fs::read_to_string(p.join("comm")).is_ok_and(|c| c.starts_with("kworker/u"));
    let processes = fs::read_dir("/proc")?.flatten().map(|e| e.path());
    // One that has ended meanwhile counts no more.
    Ok(processes.filter(unbound).map(|p| runtime_ns(&p).unwrap_or(0)).sum())
}

/// From the scheduler's own clock: ticks would be too coarse.
fn runtime_ns(process: &Path) -> anyhow::Result<u64> {
    let text = fs::read_to_string(process.join("schedstat"))?;
    text.split(' ').next().and_then(|n| n.parse().ok()).context("schedstat")
}

/// All ADDs at once; the time until the last answer.
fn at_once(c: &mut Contender, count: usize) -> anyhow::Result<()> {
    let pods = c.make_pods(count)?;
    let (program, config, netns) = (&c.program, &c.config, &c.netns);
    let taken = thread::scope(|s| s.spawn(|| all_at_once(netns, program, config, &pods)).join());
    c.concurrent_s.push(taken.map_err(|_| anyhow::anyhow!("the measuring thread panicked"))??);
    Ok(())
}

fn all_at_once(netns: &Netns, program: &Path, config: &str, pods: &[PathBuf]) -> anyhow::Result<f64> {
    netns.enter()?;
    let begun = Instant::now();
    let answers = thread::scope(|s| {
        let threads: Vec<_> = pods.iter().map(|pod| s.spawn(|| call(program, config, "ADD", pod))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| bail!("a thread panicked"))).collect::<Vec<_>>()
    });
    let taken = begun.elapsed().as_secs_f64();
    let answers = answers.into_iter().collect::<anyhow::Result<Vec<Value>>>()?;
    let addresses: BTreeSet<_> = answers.iter().map(|a| a["ips"][0]["address"].to_string()).collect();
    if addresses.len() != pods.len() {
        bail!("{} pods have {} addresses", pods.len(), addresses.len());
    }
    for pod in pods {
        call(program, config, "DEL", pod)?;
        ns::remove_named(pod)?;
    }
    wait_gone(&mut Connection::open()?)?;
    Ok(taken)
}

fn print_table(contenders: &[Contender]) {
    println!(
        "{:10} {:>8} {:>8} {:>14} {:>12} {:>14} {:>14}",
        "plugin", "ADD ms", "DEL ms", "DEL to gone ms", "CPU ms/pair", "(kernel's)", "concurrent s"
    );
    for c in contenders {
        println!(
            "{:10} {:>8.2} {:>8.2} {:>14.1} {:>12.2} {:>14.2} {:>14.3}",
            c.name,
            median(&c.add_ms),
            median(&c.del_ms),
            median(&c.gone_ms),
            median(&c.cpu_ms),
            median(&c.workers_ms),
            median(&c.concurrent_s)
        );
    }
    let of = |name, figure: fn(&Contender) -> &Vec<f64>| {
        contenders.iter().find(|c| c.name == name).map_or(0.0, |c| median(figure(c)))
    };
    let figure = |name: &str, unit: &str, values: fn(&Contender) -> &Vec<f64>| {
        let (ours, theirs) = (of("sluice", values), of("bridge", values));
        println!("RESULT {name} ours={ours:.3} peer={theirs:.3} unit={unit}");
        println!("RESULT {name}_vs_ptp ours={ours:.3} peer={:.3} unit={unit}", of("ptp", values));
    };
    figure("cni_add_ms", "ms", |c| &c.add_ms);
    figure("cni_cpu_ms_per_pair", "ms", |c| &c.cpu_ms);
    figure("cni_100_concurrent_s", "s", |c| &c.concurrent_s);
}
