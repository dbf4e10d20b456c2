//! `sluice uninstall`: takes from a node what `sluice install` has put there. Pods that run keep their network: programs,
//! maps and leases stay until `--purge`, which is refused while there is a pod. The configuration goes first, so that the
//! runtime makes no pod that nobody would take care of.

use crate::install::{AGENT, CLI, LOOPBACK, PLUGIN, Places, SERVICE, SOCKET, next, sync, systemctl};
use anyhow::{Context, Result, bail};
use clap::Args;
use sluice_cni::{Store, packets, store, store::Lock};
use sluice_ebpf::loader;
use sluice_netlink::{
    Connection,
    between::LINKS,
    kernel, link,
    plan::{PROTOCOL_NODE, State},
};
use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

#[derive(Args, Clone, Debug)]
pub struct Options {
    #[command(flatten)]
    places: Places,
    /// Remove programs, maps, routes and the node's state too; refused while pods have addresses
    #[arg(long)]
    purge: bool,
    /// What is kept over a boot: leases, the agent's identity and view
    #[arg(long, default_value = "/var/lib/sluice")]
    state_dir: PathBuf,
    /// The agent's folder for what ends with the boot
    #[arg(long, default_value = "/run/sluice")]
    run_dir: PathBuf,
    #[arg(long, default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
}

impl Options {
    fn leases(&self) -> PathBuf {
        self.state_dir.join("cni")
    }
}

pub fn run(o: &Options) -> Result<()> {
    let places = &o.places;
    let _lock = places.bin_dir.is_dir().then(|| places.lock()).transpose()?;
    if o.purge {
        refuse_pods(&pods(o)?)?;
    }
    let conflist = places.conflist();
    if places.no_service {
        refuse_agent(&conflist)?;
    }
    remove(&conflist)?;
    if !places.no_service {
        remove_units(&[(SERVICE, places.service()), (SOCKET, places.socket())])?;
    }
    refuse_agent(&conflist)?;
    // An agent that ended after the first removal may have written it again.
    remove(&conflist)?;
    remove(&places.program_dir.join(AGENT))?;
    let pods = pods(o)?;
    if pods.is_empty() {
        remove_plugin(&places.bin_dir)?;
        remove(&places.program_dir.join(CLI))?;
    } else {
        println!(
            "{} stays, as this program does: the runtime needs it to remove {}; run this again when they are gone",
            places.bin_dir.join(PLUGIN).display(),
            pods.join(", ")
        );
    }
    if o.purge {
        purge(o)?;
    }
    println!("uninstalled{}", if o.purge { ", nothing is left" } else { "; --purge removes the node's state too" });
    Ok(())
}

/// Stops the agent, too. Those that are gone already systemd would not know.
fn remove_units(units: &[(&str, PathBuf)]) -> Result<()> {
    let there: Vec<&str> = units.iter().filter(|(_, path)| path.exists()).map(|(name, _)| *name).collect();
    if !there.is_empty() {
        systemctl(&[&["disable", "--now"], there.as_slice()].concat())?;
    }
    units.iter().try_for_each(|(_, path)| remove(path))?;
    if there.is_empty() { Ok(()) } else { systemctl(&["daemon-reload"]) }
}

/// Gone is gone, whoever did it.
fn remove(path: &Path) -> Result<()> {
    let _ = fs::remove_file(next(path)); // left by an installation that was killed
    match fs::remove_file(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("remove {}", path.display())),
        Ok(()) => sync(path.parent().unwrap_or(Path::new("/"))),
    }
}

/// The loopback plugin only where it is ours.
fn remove_plugin(bin_dir: &Path) -> Result<()> {
    let loopback = bin_dir.join(LOOPBACK);
    if fs::read_link(&loopback).is_ok_and(|to| to == Path::new(PLUGIN)) {
        remove(&loopback)?;
    }
    remove(&bin_dir.join(PLUGIN))
}

/// Pods that hold a lease of this boot, for people.
fn pods(o: &Options) -> Result<Vec<String>> {
    if !o.leases().join("leases").is_dir() {
        return Ok(vec![]);
    }
    let boot = store::boot(Connection::open()?.netns_cookie()?)?;
    let store = Store::open(&o.leases(), &boot)?;
    let held = store.entries()?.into_iter().filter(|e| e.releasing.is_none());
    let name = |e: &store::Entry| match store.read(e) {
        Ok(Some(lease)) if !lease.pod.name.is_empty() => lease.pod.to_string(),
        _ => format!("container {}", e.attachment.container),
    };
    Ok(held.map(|e| name(&e)).collect())
}

fn refuse_pods(pods: &[String]) -> Result<()> {
    if pods.is_empty() {
        return Ok(());
    }
    bail!("--purge would cut pods off that still run: {}; drain the node, then run this again", pods.join(", "))
}

fn refuse_agent(conflist: &Path) -> Result<()> {
    let Some(pid) = running_agent()? else { return Ok(()) };
    bail!(
        "sluice-agent runs (process {pid}) and would write {} again: stop it, then run this again",
        conflist.display()
    )
}

/// An agent of this node, which is who runs in this network namespace.
fn running_agent() -> Result<Option<i32>> {
    let own = fs::read_link("/proc/self/ns/net").context("read /proc/self/ns/net")?;
    let processes = fs::read_dir("/proc").context("list /proc")?.flatten();
    let agent = |path: &Path| {
        fs::read_to_string(path.join("comm")).is_ok_and(|c| c.trim() == AGENT)
            && fs::read_link(path.join("ns/net")).is_ok_and(|n| n == own)
    };
    let mut running = processes.filter(|p| agent(&p.path()));
    Ok(running.find_map(|p| p.file_name().to_str()?.parse().ok()))
}

/// Under the plugin's lock, so that no pod comes meanwhile. Everything may be gone already; the state is last, because it
/// says whether there are pods.
fn purge(o: &Options) -> Result<()> {
    let leases = o.leases();
    let lock = Lock::take(&leases)?;
    refuse_pods(&pods(o)?)?;
    let mut connection = Connection::open()?;
    // Filters have no pins that would take them along.
    for (_, found) in link::all(&mut connection)? {
        packets::detach_device(&o.bpffs, found.index)?;
    }
    loader::unload(&o.bpffs).context("remove the pinned programs and maps")?;
    kernel::reconcile_links(&mut connection, &LINKS, &[], |_| State::default(), Some(PROTOCOL_NODE))
        .context("remove routes and tunnels to other nodes")?;
    drop(lock);
    for dir in [o.run_dir.clone(), o.state_dir.join("agent"), leases] {
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e).with_context(|| format!("remove {}", dir.display()))?,
            _ => {}
        }
    }
    Ok(())
}
