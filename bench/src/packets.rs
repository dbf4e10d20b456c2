//! What a packet of a known connection costs: the production programs, run by the kernel on packets that rotate.

use anyhow::{Context, ensure};
use sluice_ebpf::{
    addr,
    common::{CT_ANSWERED, Flow, PodAddr, TCP, TICK_SHIFT, Translation, map},
    dry_run::{Program, Verdict},
    loader::XDP,
    maps::{HashMap, PodMaps, pin_dir},
};
use std::{net::Ipv4Addr, path::Path, time::Duration};

/// Connections, each of which is two flows.
const CONNECTIONS: u32 = 50_000;
/// Different packets, each run so often in a row.
const PACKETS: u32 = 1_000;
/// A packet that is sent on loses a hop with each run.
const REPEAT: u32 = 250;
const ATTEMPTS: u32 = 64;

const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const VIRTUAL: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 5);

/// Nanoseconds of each packet, as medians over packets are made of.
pub struct Hits {
    /// Of a packet that is looked at no further than its Ethernet header: what running a program costs here.
    pub floor: Vec<f64>,
    /// `from_wire`, to a pod of this node.
    pub tc: Vec<f64>,
    /// `from_wire`, to a pod by its own address: of no connection that is noted.
    pub pass: Vec<f64>,
    /// XDP, to another machine by way of the link that it came by.
    pub xdp: Vec<f64>,
}

/// Each run turns the packet of the run before into the other of two flows, so that every one of them finds a connection
/// and writes addresses, ports and checksums. `link` is one of the calling thread's namespace by which the way to both
/// addresses of `far` leads; its link-layer address, and that of the next machine, is 02:00:00:00:00:01.
pub fn hits(bpffs: &Path, link: u32, far: [Ipv4Addr; 2]) -> anyhow::Result<Hits> {
    let dir = pin_dir(bpffs);
    let flows = HashMap::<Flow, Translation>::open(&dir, map::FLOWS)?;
    let pods = PodMaps::open(&dir)?;
    for pod in [VIRTUAL, BACKEND] {
        pods.addrs.set(&addr(pod.into()), &PodAddr { netns: 1, flags: 0, ifindex: 1 })?;
    }
    let floor = Program::open(bpffs, "from_wire")?;
    let mut unread = packet(&flow(0, VIRTUAL, 80));
    unread[12..14].copy_from_slice(&[0x88, 0xb5]); // local experimental (IEEE 802)
    let floor = (0..PACKETS).map(|_| Ok(f64::from(floor.run_at(link, &unread, REPEAT)?.nanoseconds)));
    let floor = floor.collect::<anyhow::Result<_>>().context("run a packet program")?;
    let tc = known(bpffs, &flows, "from_wire", link, [VIRTUAL, BACKEND])?;
    let pass = unknown(bpffs, &flows, link)?;
    let xdp = known(bpffs, &flows, XDP, link, far)?;
    for pod in [VIRTUAL, BACKEND] {
        pods.addrs.remove(&addr(pod.into()))?;
    }
    Ok(Hits { floor, tc, pass, xdp })
}

fn known(
    bpffs: &Path,
    flows: &HashMap<Flow, Translation>,
    program: &str,
    link: u32,
    to: [Ipv4Addr; 2],
) -> anyhow::Result<Vec<f64>> {
    fill(flows, to)?;
    let run = Program::open(bpffs, program)?;
    let step = CONNECTIONS / PACKETS;
    let times = (0..PACKETS).map(|n| {
        let packet = packet(&flow(n * step, to[0], 80));
        // XDP lets one packet a second of each CPU pass: the way is known afterwards.
        let sent = |_| run.run_at(link, &packet, 1).ok().filter(|o| o.verdict == Verdict::Redirect);
        let once = (0..ATTEMPTS).find_map(sent).with_context(|| format!("{program} did not know a packet"))?;
        ensure!(once.packet[30..34] == to[1].octets(), "{program} did not rewrite a packet");
        Ok(f64::from(run.run_at(link, &packet, REPEAT)?.nanoseconds))
    });
    let times = times.collect::<anyhow::Result<Vec<f64>>>().context("run the packet program")?;
    empty(flows)?;
    Ok(times)
}

/// Among as many connections of others.
fn unknown(bpffs: &Path, flows: &HashMap<Flow, Translation>, link: u32) -> anyhow::Result<Vec<f64>> {
    fill(flows, [VIRTUAL, BACKEND])?;
    let run = Program::open(bpffs, "from_wire")?;
    let times = (0..PACKETS).map(|n| {
        let packet = packet(&flow(CONNECTIONS + n, BACKEND, 9090));
        let once = run.run_at(link, &packet, 1)?;
        ensure!(once.verdict == Verdict::Redirect && once.packet == packet, "a packet to a pod did not go there");
        Ok(f64::from(run.run_at(link, &packet, REPEAT)?.nanoseconds))
    });
    let times = times.collect::<anyhow::Result<Vec<f64>>>().context("run the packet program")?;
    empty(flows)?;
    Ok(times)
}

fn fill(flows: &HashMap<Flow, Translation>, to: [Ipv4Addr; 2]) -> anyhow::Result<()> {
    let used = (uptime()?.as_nanos() >> TICK_SHIFT) as u32;
    for number in 0..CONNECTIONS {
        let [there, then] = [(to[0], 80), (to[1], 8080)].map(|(address, port)| flow(number, address, port));
        for (key, to) in [(there, then), (then, there)] {
            flows.set(&key, &Translation { to, used, flags: CT_ANSWERED })?;
        }
    }
    Ok(())
}

fn empty(flows: &HashMap<Flow, Translation>) -> anyhow::Result<()> {
    for (key, _) in flows.entries()? {
        flows.remove(&key)?;
    }
    Ok(())
}

/// What the programs' clock shows, as long as the machine never slept.
fn uptime() -> anyhow::Result<Duration> {
    let text = std::fs::read_to_string("/proc/uptime").context("read /proc/uptime")?;
    let seconds = text.split(' ').next().and_then(|s| s.parse().ok()).context("understand /proc/uptime")?;
    Ok(Duration::from_secs_f64(seconds))
}

fn flow(number: u32, to: Ipv4Addr, port: u16) -> Flow {
    let source = Ipv4Addr::from_bits(CLIENT.to_bits() + number / 25_000);
    Flow {
        src: addr(source.into()),
        dst: addr(to.into()),
        sport_be: (10_000 + (number % 25_000) as u16).to_be(),
        dport_be: port.to_be(),
        proto: TCP,
        pad: [0; 3],
    }
}

/// An acknowledgement without data. The checksums are not right: they are patched, not checked.
fn packet(f: &Flow) -> Vec<u8> {
    let octets = |a: &sluice_ebpf::common::Addr| a.octets()[12..].to_vec();
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 255, TCP, 0, 0];
    frame.extend([octets(&f.src), octets(&f.dst)].concat());
    frame.extend(f.sport_be.to_ne_bytes());
    frame.extend(f.dport_be.to_ne_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame
}
