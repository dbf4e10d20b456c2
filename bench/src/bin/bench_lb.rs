//! `make bench-lb`: what a service's address costs a client, beside no program at all, the pod's own address, and the
//! nftables rules that kube-proxy writes; and how long the service maps take to follow a snapshot.
//!
//! One connection is connect, one byte there, one byte back, reset. Blocks of connections are interleaved and each is
//! compared with the direct block of its round; the interval is that of the median of those ratios (95 %, by order
//! statistics). CPU is the client thread's own, with what the kernel does in its name.
//!
//! The same for one long stream, whose CPU is that of both ends and of the kernel's packet threads; also from outside, to
//! a pod behind a node that forwards, where each packet is translated.

use anyhow::{Context, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use rustix::{
    mount::{MountFlags, UnmountFlags, mount, unmount},
    thread::{CpuSet, gettid, sched_setaffinity},
};
use sluice_bench::{
    outside::{self, Outside},
    stats::interval,
    stream::{self, Tasks},
};
use sluice_ebpf::{
    common::{INSIDE, ServiceKey, TCP},
    compile::Compiler,
    layout::{Target, Wanted, WantedGroup},
    loader::{self, Place},
    maps::{ServiceMaps, pin_dir},
    table::ServiceTable,
};
use sluice_model as m;
use sluice_netlink::{Connection, Netns, lab, link, ns};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    time::Instant,
};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    client: Option<Role>,
    #[command(flatten)]
    args: Plan,
}

#[derive(Args)]
struct Plan {
    /// Connections per block
    #[arg(long, default_value_t = 2000)]
    connections: usize,
    /// Rounds, one block of every arm each
    #[arg(long, default_value_t = 24)]
    rounds: usize,
    /// Millions of bytes of a stream
    #[arg(long, default_value_t = 100)]
    megabytes: usize,
    /// One part only
    #[arg(long, value_enum)]
    only: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Connections,
    Throughput,
    Following,
    Packets,
}

#[derive(Subcommand)]
enum Role {
    /// Makes one block of connections and prints what it cost (used by this program)
    #[command(hide = true)]
    Client(Client),
    /// Sends one stream and prints what it cost (used by this program)
    #[command(hide = true)]
    Sender(Client),
}

#[derive(Args)]
struct Client {
    netns: PathBuf,
    cgroup: PathBuf,
    to: SocketAddr,
    /// Connections, or bytes
    amount: usize,
}

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const PORT: u16 = 8080;
const SIZES: [usize; 3] = [1, 1_000, 10_000];

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.client {
        Some(Role::Client(c)) => client(&c),
        Some(Role::Sender(c)) => sender(&c),
        None => {
            let ground = Ground::new()?;
            let served_by = server_at(&ground.server, SERVER)?;
            let asked = |part| cli.args.only.is_none_or(|only| only == part);
            if asked(Part::Connections) {
                connections(&ground, &cli.args)?;
            }
            if asked(Part::Throughput) {
                throughput(&ground, &served_by, &cli.args)?;
            }
            if asked(Part::Following) {
                following(&ground)?;
            }
            if asked(Part::Packets) {
                passing(&ground)?;
            }
            Ok(())
        }
    }
}

/// Namespaces, cgroups and maps of this run; gone with it.
struct Ground {
    base: PathBuf,
    server: Netns,
    plain: Netns,
    nft: Netns,
    /// With the programs attached, and without.
    place: Place,
    bare: PathBuf,
}

impl Ground {
    fn new() -> anyhow::Result<Self> {
        let id = format!("sluice-bench-lb-{}", std::process::id());
        let base = std::env::temp_dir().join(&id);
        let bpffs = base.join("bpf");
        fs::create_dir_all(&bpffs)?;
        mount("bpf", &bpffs, "bpf", MountFlags::empty(), None).context("mount bpffs; run it as root")?;
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
        let root = root.into_iter().find(|p| p.join("cgroup.controllers").exists()).context("a cgroup2 mount")?;
        let [cgroup, bare] = ["programs", "bare"].map(|n| root.join(format!("{id}-{n}")));
        fs::create_dir(&cgroup)?;
        fs::create_dir(&bare)?;
        let [server, plain, nft] = ["server", "plain", "nft"].map(|n| ns::make_named(&base.join(n)));
        let ground = Self { server: server?, plain: plain?, nft: nft?, place: Place { bpffs, cgroup }, bare, base };
        lab::bridge(&ground.server, "br0", SERVER.into(), 16)?;
        for (netns, port, last) in [(&ground.plain, "plain", 2), (&ground.nft, "nft", 3)] {
            lab::cable(&ground.server, "br0", port, netns, "eth0", Ipv4Addr::new(10, 9, 0, last).into(), 16)?;
            // Service addresses need a way out, also where it is taken only to find a rule.
            ip(netns, &["route", "add", "default", "via", &SERVER.to_string()])?;
        }
        loader::load(&ground.place)?;
        Ok(ground)
    }

    fn table(&self) -> anyhow::Result<ServiceTable> {
        Ok(ServiceTable::open(ServiceMaps::open(&pin_dir(&self.place.bpffs))?)?)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // What cannot be undone is left to the next boot; the first error was told already.
        let _ = loader::unload(&self.place.bpffs);
        let _ = unmount(&self.place.bpffs, UnmountFlags::DETACH);
        for name in ["server", "plain", "nft"] {
            let _ = ns::remove_named(&self.base.join(name));
        }
        let _ = fs::remove_dir(&self.place.cgroup);
        let _ = fs::remove_dir(&self.bare);
        let _ = fs::remove_dir_all(&self.base);
    }
}

fn ip(netns: &Netns, args: &[&str]) -> anyhow::Result<()> {
    let status = netns.run(|| Command::new("ip").args(args).status())??;
    ensure!(status.success(), "ip {} failed", args.join(" "));
    Ok(())
}

/// Returns who serves.
fn server_at(netns: &Netns, address: Ipv4Addr) -> anyhow::Result<Tasks> {
    let listener = netns.run(|| TcpListener::bind((address, PORT)))??;
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        // Whoever asked waits for it.
        let _ = tell.send(gettid().as_raw_nonzero().get());
        serve(&listener);
    });
    Tasks::with_kernel(told.recv().context("the server's thread")?)
}

/// On the other core than the client, one connection at a time.
fn serve(listener: &TcpListener) {
    pin(1);
    for mut stream in listener.incoming().flatten() {
        let mut byte = [0];
        // How a connection ends is the client's affair.
        let _ = stream.set_nodelay(true).and_then(|()| stream.read_exact(&mut byte));
        if byte == [stream::MARK] {
            let _ = stream::take(&mut stream);
            continue;
        }
        let _ = stream.write_all(&byte).and_then(|()| stream.read(&mut byte));
    }
}

/// Where there is such a CPU.
fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    let _ = sched_setaffinity(None, &set);
}

fn client(c: &Client) -> anyhow::Result<()> {
    let (mut times, cpu) = c.measured(|| {
        block(c.to, c.amount / 10)?; // warm
        let before = cpu_ns()?;
        let times = block(c.to, c.amount)?;
        Ok((times, cpu_ns()? - before))
    })?;
    times.sort_unstable();
    println!("{} {}", times[times.len() / 2], cpu / c.amount as u64);
    Ok(())
}

fn sender(c: &Client) -> anyhow::Result<()> {
    let (took, cpu) = c.measured(|| {
        let before = cpu_ns()?;
        let took = stream::send(c.to, c.amount)?;
        Ok((took, cpu_ns()? - before))
    })?;
    println!("{} {cpu}", took.as_nanos());
    Ok(())
}

impl Client {
    /// Where and as whom it is meant to run.
    fn measured<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        fs::write(self.cgroup.join("cgroup.procs"), std::process::id().to_string()).context("join the cgroup")?;
        Netns::open(&self.netns)?.run(|| {
            pin(0);
            work()
        })?
    }
}

fn block(to: SocketAddr, connections: usize) -> anyhow::Result<Vec<u64>> {
    (0..connections)
        .map(|_| {
            let began = Instant::now();
            let mut stream = TcpStream::connect(to)?;
            stream.write_all(b"?")?;
            stream.read_exact(&mut [0])?;
            let took = began.elapsed();
            // Reset: neither side is left with a connection that waits to be forgotten.
            socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO))?;
            Ok(u64::try_from(took.as_nanos())?)
        })
        .collect()
}

/// Of this thread, from the scheduler's own clock.
fn cpu_ns() -> anyhow::Result<u64> {
    stream::cpu_ns(Path::new("/proc/thread-self/schedstat"))
}

/// One way of reaching the server, and what its blocks cost: p50 and CPU, ns; of streams Gbit/s, and CPU us per MB.
struct Arm<'a> {
    name: &'static str,
    services: usize,
    netns: &'a Netns,
    cgroup: &'a Path,
    to: SocketAddr,
    blocks: Vec<(f64, f64)>,
}

fn connections(ground: &Ground, plan: &Plan) -> anyhow::Result<()> {
    for services in SIZES {
        let mut arms = at_sockets(ground, services)?;
        for _ in 0..plan.rounds {
            for a in &mut arms {
                a.blocks.push(measure(a, "client", plan.connections).with_context(|| a.name)?);
            }
        }
        report(&arms);
    }
    Ok(())
}

fn at_sockets(ground: &Ground, services: usize) -> anyhow::Result<Vec<Arm<'_>>> {
    ground.table()?.apply(&wanted(services, SERVER))?;
    let direct = SocketAddr::new(SERVER.into(), PORT);
    let vip = SocketAddr::new(address(services - 1).into(), 80);
    let arm = |name, netns, cgroup, to| Arm { name, services, netns, cgroup, to, blocks: vec![] };
    let with = ground.place.cgroup.as_path();
    let mut arms = vec![
        arm("direct", &ground.plain, with, direct),
        arm("no programs", &ground.plain, &ground.bare, direct),
        arm("vip", &ground.plain, with, vip),
    ];
    if rules(&ground.nft, services, SERVER)? {
        arms.push(arm("nftables", &ground.nft, &ground.bare, vip));
    }
    Ok(arms)
}

fn measure(arm: &Arm<'_>, role: &str, amount: usize) -> anyhow::Result<(f64, f64)> {
    let output = Command::new(std::env::current_exe()?)
        .arg(role)
        .arg(arm.netns.path())
        .arg(arm.cgroup)
        .args([arm.to.to_string(), amount.to_string()])
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the client ended with {}", output.status);
    let text = String::from_utf8(output.stdout)?;
    let (p50, cpu) = text.trim().split_once(' ').context("the client's figures")?;
    Ok((p50.parse()?, cpu.parse()?))
}

fn address(index: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 1)) + index as u32)
}

/// Every service leads to one server: the one that is dialled is the last.
fn wanted(services: usize, server: Ipv4Addr) -> BTreeMap<ServiceKey, Arc<Wanted>> {
    let target = Target { addr: sluice_ebpf::addr(server.into()), port_be: PORT.to_be() };
    let service = |index: usize| {
        let addr = sluice_ebpf::addr(IpAddr::V4(address(index)));
        let key = ServiceKey { addr, port_be: 80_u16.to_be(), proto: TCP, scope: INSIDE };
        (key, Arc::new(Wanted::new(false, vec![WantedGroup { weight: 1, targets: vec![target] }])))
    };
    (0..services).map(service).collect()
}

/// As kube-proxy in its nftables mode: one verdict map from address, protocol and port to a chain per service, which
/// chooses a chain per endpoint, which translates. False when there is no nft.
fn rules(netns: &Netns, services: usize, server: Ipv4Addr) -> anyhow::Result<bool> {
    let Some(nft) = ["/usr/sbin/nft", "/sbin/nft"].iter().find(|p| Path::new(p).exists()) else {
        println!("nft is not installed (Debian package nftables); measured without it");
        return Ok(false);
    };
    let mut text = String::from("add table ip kube-proxy\ndelete table ip kube-proxy\ntable ip kube-proxy {\n");
    for index in 0..services {
        let vip = address(index);
        writeln!(text, " chain endpoint-{index} {{\n  ip saddr {server} jump mark-for-masquerade")?;
        writeln!(text, "  meta l4proto tcp dnat to {server}:{PORT}\n }}\n chain service-{index} {{")?;
        writeln!(text, "  ip daddr {vip} tcp dport 80 ip saddr != 10.9.0.0/16 jump mark-for-masquerade")?;
        writeln!(text, "  numgen random mod 1 vmap {{ 0 : goto endpoint-{index} }}\n }}")?;
    }
    text.push_str(" chain mark-for-masquerade {\n  mark set mark or 0x4000\n }\n map service-ips {\n");
    text.push_str("  type ipv4_addr . inet_proto . inet_service : verdict\n  elements = {\n");
    for index in 0..services {
        writeln!(text, "   {} . tcp . 80 : goto service-{index},", address(index))?;
    }
    text.push_str("  }\n }\n chain services {\n  ip daddr . meta l4proto . th dport vmap @service-ips\n }\n");
    text.push_str(" chain nat-prerouting {\n  type nat hook prerouting priority -100\n  jump services\n }\n");
    text.push_str(" chain nat-output {\n  type nat hook output priority -100\n  jump services\n }\n");
    text.push_str(" chain nat-postrouting {\n  type nat hook postrouting priority 100\n");
    text.push_str("  mark and 0x4000 != 0 masquerade fully-random\n }\n}\n");
    let mut child = netns.run(|| Command::new(nft).args(["-f", "-"]).stdin(Stdio::piped()).spawn())??;
    child.stdin.take().context("stdin of nft")?.write_all(text.as_bytes())?;
    ensure!(child.wait()?.success(), "nft did not take the rules for {services} services");
    Ok(true)
}

fn report(arms: &[Arm<'_>]) {
    let services = arms[0].services;
    println!("{services} services: p50 us, CPU us per connection; ratios to the direct block of each round");
    for a in arms {
        let (_, p50, _) = interval(a.blocks.iter().map(|b| b.0 / 1000.0));
        let (_, cpu, _) = interval(a.blocks.iter().map(|b| b.1 / 1000.0));
        let ratios = a.blocks.iter().zip(&arms[0].blocks);
        let of = |pick: fn(&(f64, f64)) -> f64| interval(ratios.clone().map(|(x, y)| pick(x) / pick(y)));
        let ((l, r, h), (cl, c, ch)) = (of(|b| b.0), of(|b| b.1));
        println!("  {:12} {p50:>7.1} {cpu:>7.1}   p50 {r:.3} ({l:.3}-{h:.3})   CPU {c:.3} ({cl:.3}-{ch:.3})", a.name);
    }
    let p50 = |name| arms.iter().find(|a| a.name == name).map(|a| interval(a.blocks.iter().map(|b| b.0 / 1000.0)).1);
    let size = match services {
        1 => "1_service".to_owned(),
        n if n % 1000 == 0 => format!("{}k_services", n / 1000),
        n => format!("{n}_services"),
    };
    let (vip, direct) = (p50("vip").unwrap_or(f64::NAN), p50("direct").unwrap_or(f64::NAN));
    println!("RESULT vip_connect_p50_{size} ours={vip:.2} peer={direct:.2} unit=us");
    if let Some(nft) = p50("nftables") {
        println!("RESULT vip_connect_p50_{size}_vs_nftables ours={vip:.2} peer={nft:.2} unit=us");
    }
}

/// Streams, from the two namespaces of the connections, and from outside.
fn throughput(ground: &Ground, served_by: &Tasks, plan: &Plan) -> anyhow::Result<()> {
    for services in SIZES {
        let mut arms = at_sockets(ground, services)?;
        streams(&mut arms.iter_mut().map(|a| (a, served_by)).collect::<Vec<_>>(), plan)?;
        report_streams("from a socket of the node", &arms, "vip_throughput_gbps", "direct");
    }
    let [plain, ours, nft] = ["out-plain", "out-ours", "out-nft"].map(|name| Outside::new(&ground.base, name));
    let (plain, ours, nft) = (plain?, ours?, nft?);
    let [by_plain, by_ours, by_nft] = [&plain, &ours, &nft].map(|o| server_at(&o.pod, outside::POD));
    let (by_plain, by_ours, by_nft) = (by_plain?, by_ours?, by_nft?);
    ours.attach(&ground.place.bpffs)?;
    for services in SIZES {
        ground.table()?.apply(&wanted(services, outside::POD))?;
        let direct = SocketAddr::new(outside::POD.into(), PORT);
        let vip = SocketAddr::new(address(services - 1).into(), 80);
        let cgroup = ground.bare.as_path();
        let arm = |name, netns, to| Arm { name, services, netns, cgroup, to, blocks: vec![] };
        let mut arms = vec![
            arm("direct", &ours.caller, direct),
            arm("no programs", &plain.caller, direct),
            arm("vip", &ours.caller, vip),
        ];
        let mut served_by = vec![&by_ours, &by_plain, &by_ours];
        if rules(&nft.node, services, outside::POD)? {
            arms.push(arm("nftables", &nft.caller, vip));
            served_by.push(&by_nft);
        }
        streams(&mut arms.iter_mut().zip(served_by).collect::<Vec<_>>(), plan)?;
        report_streams("from outside", &arms, "outside_throughput_gbps", "nftables");
    }
    Ok(())
}

fn streams(arms: &mut [(&mut Arm<'_>, &Tasks)], plan: &Plan) -> anyhow::Result<()> {
    let bytes = plan.megabytes * 1_000_000;
    for _ in 0..plan.rounds {
        for (arm, served_by) in arms.iter_mut() {
            let before = served_by.cpu_ns()?;
            let (took_ns, cpu_ns) = measure(arm, "sender", bytes).with_context(|| arm.name)?;
            let all_ns = cpu_ns + (served_by.cpu_ns()? - before) as f64;
            arm.blocks.push((8.0 * bytes as f64 / took_ns, all_ns / 1000.0 / plan.megabytes as f64));
        }
    }
    Ok(())
}

fn report_streams(from: &str, arms: &[Arm<'_>], result: &str, peer: &str) {
    let services = arms[0].services;
    println!("{services} services, streams {from}: Gbit/s, CPU us per MB; ratios to the direct block of each round");
    for a in arms {
        let of = |pick: fn(&(f64, f64)) -> f64| interval(a.blocks.iter().map(pick)).1;
        let (gbps, cpu) = (of(|b| b.0), of(|b| b.1));
        let ratios = a.blocks.iter().zip(&arms[0].blocks);
        let of = |pick: fn(&(f64, f64)) -> f64| interval(ratios.clone().map(|(x, y)| pick(x) / pick(y)));
        let ((l, r, h), (cl, c, ch)) = (of(|b| b.0), of(|b| b.1));
        println!("  {:12} {gbps:>7.2} {cpu:>7.1}   rate {r:.3} ({l:.3}-{h:.3})   CPU {c:.3} ({cl:.3}-{ch:.3})", a.name);
    }
    let median = |name| arms.iter().find(|a| a.name == name).map(|a| interval(a.blocks.iter().map(|b| b.0)).1);
    // One figure of each: with the most services.
    if let (Some(ours), Some(peer)) = (median("vip"), median(peer))
        && Some(&services) == SIZES.last()
    {
        println!("RESULT {result} ours={ours:.2} peer={peer:.2} unit=Gbit/s");
    }
}

const SERVICES: usize = 5_000;
const ENDPOINTS: usize = 50;

fn snapshot(changed: bool) -> m::Snapshot {
    let resources = (0..SERVICES).flat_map(|index| {
        let name = m::Name::new("bench", format!("s{index}"));
        let port = m::ServicePort {
            name: "http".into(),
            protocol: m::Protocol::Tcp,
            port: 80,
            app_protocol: m::AppProtocol::Detect,
            node_port: None,
        };
        let endpoint = |n: usize| m::Endpoint {
            address: Ipv4Addr::from(0x0a00_0000 + (index * ENDPOINTS + n) as u32).into(),
            ready: !(changed && index == 0 && n == 0),
            draining: false,
            node: format!("n{}", n % 100),
            zone: String::new(),
            workload: None,
            hostname: None,
            mesh: m::Mesh::Plain,
            ports: vec![m::EndpointPort { name: "http".into(), protocol: m::Protocol::Tcp, port: PORT }],
        };
        let service = m::Service {
            name: name.clone(),
            virtual_ips: vec![address(index).into()],
            ports: vec![port],
            ..m::Service::default()
        };
        let endpoints = (0..ENDPOINTS).map(endpoint).collect();
        [m::Resource::Service(service), m::Resource::EndpointSet(m::EndpointSet { name, endpoints })]
    });
    m::Snapshot::new(m::Revision(1), resources)
}

/// From an agent's view to the kernel, as the agent does it.
fn following(ground: &Ground) -> anyhow::Result<()> {
    let mut table = ground.table()?;
    table.apply(&BTreeMap::new())?;
    let before = Arc::new(snapshot(false));
    let delta = before.diff(&snapshot(true));
    let after = Arc::new(before.apply(&delta, m::Revision(2)));
    let mut compiler = Compiler::new("n1".into(), None);
    let began = Instant::now();
    let compiled = compiler.compile(before.clone());
    let decided = began.elapsed();
    let changes = table.apply(&compiled.services)?;
    let full = began.elapsed();
    if changes.written != SERVICES {
        bail!("{} of {SERVICES} services were written", changes.written);
    }
    let mut one = vec![];
    for round in 0..21 {
        let next = if round % 2 == 0 { &after } else { &before };
        let began = Instant::now();
        let compiled = compiler.compile(next.clone());
        let changes = table.apply(&compiled.services)?;
        one.push(began.elapsed().as_secs_f64() * 1000.0);
        ensure!(changes.written == 1, "{changes:?}");
    }
    let (low, median, high) = interval(one.into_iter());
    println!(
        "{SERVICES} services with {ENDPOINTS} endpoints each: decided in {decided:.2?}, in force after {full:.2?}"
    );
    println!("  one endpoint's change in force after {median:.2} ms ({low:.2}-{high:.2})");
    println!("RESULT lb_full_sync_s ours={:.3} peer=0 unit=s", full.as_secs_f64());
    println!("RESULT lb_one_change_ms ours={median:.2} peer=0 unit=ms");
    Ok(())
}

/// Packets of known connections, beside as many services as a large cluster has.
fn passing(ground: &Ground) -> anyhow::Result<()> {
    const BESIDE: usize = 10_000;
    const MAC: &str = "02:00:00:00:00:01";
    const FAR: [Ipv4Addr; 2] = [Ipv4Addr::new(203, 0, 113, 1), Ipv4Addr::new(203, 0, 113, 2)];
    ground.table()?.apply(&wanted(BESIDE, SERVER))?;
    let router = Ipv4Addr::new(10, 9, 0, 200).to_string();
    // The router has the link's own address, so that a packet that was sent on is one to the link again.
    ip(&ground.plain, &["link", "set", "eth0", "address", MAC])?;
    ip(&ground.plain, &["neigh", "replace", &router, "lladdr", MAC, "dev", "eth0"])?;
    ip(&ground.plain, &["route", "replace", "203.0.113.0/24", "via", &router])?;
    let hits = ground.plain.run(|| {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("forward")?;
        let link = link::find(&mut Connection::open()?, "eth0")?.context("the link of the namespace")?.index;
        sluice_bench::packets::hits(&ground.place.bpffs, link, FAR)
    })??;
    let say = |what: &str, times: Vec<f64>| {
        let (low, median, high) = interval(times.into_iter());
        println!("{what}: {median:.0} ns ({low:.0}-{high:.0})");
        median
    };
    let floor = say("a packet that is not looked at", hits.floor);
    let tc = say("a packet of a known connection, rewritten, to a pod", hits.tc);
    let pass = say("a packet of no connection, to a pod by its own address", hits.pass);
    let xdp = say("one of a known connection at XDP, back over its link", hits.xdp);
    println!("RESULT tc_hit_ns ours={tc:.0} peer={floor:.0} unit=ns");
    println!("RESULT tc_pass_ns ours={pass:.0} peer={floor:.0} unit=ns");
    println!("RESULT xdp_hit_ns ours={xdp:.0} peer={floor:.0} unit=ns");
    Ok(())
}
