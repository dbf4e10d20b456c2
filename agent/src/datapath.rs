//! Keeps this node's kernel at what the snapshot wants: service maps, pods' flags and ports, node routes.
//!
//! What is wanted is decided in `ebpf::compile`, `pods` and `netlink::plan`; this opens, compares and writes. It makes
//! no pod (the plugin does) and serves no sidecar (`handover` does). Plugin and agent take turns by the store's lock.

mod node;
mod pods;
mod ports;
mod repair;
mod reset;

pub use repair::Extent;

use crate::{attest, error::describe, flows::kernel};
use node::Wires;
use pods::{Overrides, PodTable};
use ports::{Ports, Ways};
use sluice_cni::{Lease, Store, packets, store::Lock, wiring};
use sluice_ebpf::{
    common::{DSR, MASQUERADE, ServiceKey},
    compile::{self, Compiler, DnsOverlay},
    loader::{self, Loaded, Place},
    maps::{Counters, ServiceMaps, pin_dir},
    settings::SettingsMap,
    sweep::{self, Seen, Sweeper},
    table::{Changes, ServiceTable},
};
use sluice_model::Snapshot;
use sluice_netlink::{
    Connection,
    between::Mode,
    link,
    plan::{Prefix, server},
};
use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::watch;

const DNS_PORT: u16 = 53;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("find the node's cgroups")]
    Cgroup(#[source] attest::Error),
    #[error("load the data path")]
    Load(#[source] sluice_ebpf::Error),
    #[error("set the programs' settings")]
    Settings(#[source] sluice_ebpf::Error),
    #[error("bring the service maps to the snapshot")]
    Services(#[source] sluice_ebpf::Error),
    #[error("bring the pod maps to the snapshot")]
    Pods(#[source] sluice_ebpf::Error),
    #[error("read the plugin's leases")]
    Leases(#[source] sluice_cni::Error),
    #[error("read the clock of the programs' connections")]
    Clock(#[source] std::io::Error),
    #[error("put the packet programs on the node's links")]
    Packets(#[source] packets::Error),
    #[error("bring the maps of the node's links and addresses to what they are")]
    Ports(#[source] sluice_ebpf::Error),
    #[error("close sockets whose backend has gone")]
    Sockets(#[source] reset::Error),
    #[error("set up the node's own network")]
    Node(#[source] sluice_netlink::Error),
}

#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// Mount point of the BPF file system.
    pub bpffs: PathBuf,
    /// Root of the node's cgroup2 hierarchy; found when absent.
    pub cgroup: Option<PathBuf>,
    pub node: String,
    /// The cluster DNS addresses, answered by the node's resolver.
    pub dns: Vec<IpAddr>,
    /// Pods reach addresses outside the cluster under an address of the node.
    pub masquerade: bool,
    /// Ranges outside the cluster that they reach under their own.
    pub masquerade_excluded: Vec<Prefix>,
    /// Do as on a kernel without tcx links.
    pub clsact: bool,
    /// Have a program in the drivers of the node's links too, where they can.
    pub xdp: bool,
    /// Do as on a kernel without bpf_set_retval: what is refused sees EPERM.
    pub eperm: bool,
    /// Callers from outside are answered by the nodes of their backends.
    pub dsr: bool,
    /// Which other nodes' pods are reached through VXLAN.
    pub tunnel: Mode,
}

impl DatapathConfig {
    fn overlays(&self) -> impl Iterator<Item = DnsOverlay> {
        self.dns.iter().map(|vip| DnsOverlay { vip: *vip, server: SocketAddr::new(server(vip.is_ipv4()), DNS_PORT) })
    }
}

/// A pod of this node, by its lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInfo {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    /// Empty where it is not known.
    pub netns: PathBuf,
    pub addresses: Vec<IpAddr>,
    pub netns_cookie: u64,
}

impl From<Lease> for PodInfo {
    fn from(l: Lease) -> Self {
        let (addresses, netns_cookie) = (l.addresses, l.netns_cookie);
        Self { uid: l.pod.uid, namespace: l.pod.namespace, name: l.pod.name, netns: l.netns, addresses, netns_cookie }
    }
}

/// What bringing a snapshot into force did.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    pub services: Changes,
    /// Pods whose flags or ports changed.
    pub pods: usize,
    /// Connected UDP sockets that were closed because their service lost the backend.
    pub closed: usize,
    /// What the snapshot asks and cannot be had; the rest is in force.
    pub problems: Vec<String>,
}

pub struct Datapath {
    config: DatapathConfig,
    place: Place,
    loaded: Loaded,
    state_dir: PathBuf,
    store: Store,
    table: ServiceTable,
    pod_table: PodTable,
    counters: Counters,
    /// The process's only one: every part that has a say in the settings shares it.
    settings: Arc<SettingsMap>,
    /// Told when the pins were made anew.
    renewed: watch::Sender<()>,
    wires: Wires,
    ports: Ports,
    sweeper: Sweeper,
    swept: Seen,
    /// Nothing before the first snapshot: the entries of the agent before us stay as they are.
    compiler: Compiler,
    overrides: Overrides,
    /// Sockets whose backends went before this process began were closed.
    reset: bool,
    /// Connections are to be looked through once more for backends that went before this process began.
    look_again: bool,
    /// What could not be had when the last snapshot was applied.
    standing: Vec<String>,
}

impl Datapath {
    /// Loads what is not loaded and replaces what is; afterwards the plugin can make pods.
    pub fn open(config: &DatapathConfig) -> Result<Self, Error> {
        Self::open_from(config, None)
    }

    /// [`Self::open`] for an agent that knows what was in force before: maps of a new shape are filled from it.
    pub fn open_from(config: &DatapathConfig, last: Option<&Snapshot>) -> Result<Self, Error> {
        let cgroup = config.cgroup.clone().map_or_else(attest::cgroup_root, Ok).map_err(Error::Cgroup)?;
        let place = Place { bpffs: config.bpffs.clone(), cgroup };
        let state_dir = PathBuf::from(sluice_cni::STATE_DIR);
        let mut wires = Wires::open(config.tunnel, config.dns.iter().any(IpAddr::is_ipv6)).map_err(Error::Node)?;
        let host_netns = wires.netns_cookie().map_err(Error::Node)?;
        let boot = sluice_cni::store::boot(host_netns).map_err(Error::Leases)?;
        let store = Store::open(&state_dir, &boot).map_err(Error::Leases)?;
        let prepare = || loader::prepare(&place, !config.eperm).map_err(Error::Load);
        // The kernel takes long to verify the programs: where nothing else changes by it, no ADD and no DEL waits for that.
        let early = loader::is_settled(&place.bpffs).then(prepare).transpose()?;
        let (loaded, settings, prepared, lock) = {
            let lock = Lock::take(&state_dir).map_err(Error::Leases)?;
            let mut prepared = match early.filter(|_| loader::is_settled(&place.bpffs)) {
                Some(prepared) => prepared,
                None => prepare()?,
            };
            if prepared.unfilled()
                && let Err(error) = fill(config, &place.bpffs, wires.connection(), last)
            {
                // Control may send a view that fits, but only to an agent that runs.
                tracing::error!(error = describe(&error), "not all of the last view is in force");
            }
            let loaded = prepared.switch().map_err(Error::Load)?;
            if !loaded.ingress_ifindex {
                tracing::warn!("connections of pods with a sidecar are dropped: capturing them needs Linux 5.17");
            }
            let settings = settle(config, &place.bpffs, host_netns)?;
            let links = pod_links(wires.connection(), &store.held().map_err(Error::Leases)?)?;
            packets::renew_pods(&place.bpffs, wires.connection(), &links).map_err(Error::Packets)?;
            (loaded, settings, prepared, lock)
        };
        let (table, pod_table, counters) = open_maps(&place.bpffs).map_err(Error::Load)?;
        let dir = pin_dir(&place.bpffs);
        let sweeper = Sweeper::open(&dir).map_err(Error::Load)?;
        let clsact = config.clsact || !loader::has_tcx(&place.bpffs).map_err(Error::Load)?;
        let ways = Ways { clsact, xdp: config.xdp };
        let ports = Ports::open(&place.bpffs, config.masquerade_excluded.clone(), ways).map_err(Error::Load)?;
        let compiler = Compiler::new(config.node.clone(), config.overlays());
        let config = config.clone();
        let overrides = Overrides::default();
        let mut datapath = Self {
            config,
            place,
            loaded,
            state_dir,
            store,
            table,
            pod_table,
            counters,
            wires,
            ports,
            sweeper,
            swept: Seen::default(),
            settings,
            renewed: watch::channel(()).0,
            compiler,
            overrides,
            reset: false,
            look_again: false,
            standing: vec![],
        };
        datapath.reconcile_ports(None)?;
        // No program of another layout runs any more, neither in a link nor as a filter.
        prepared.finish().map_err(Error::Load)?;
        drop(lock);
        Ok(datapath)
    }

    /// Takes notice of links and addresses that came or went.
    pub fn follow(&mut self) -> Result<(), Error> {
        let snapshot = self.compiler.snapshot();
        self.reconcile_ports(snapshot.as_deref()).map(drop)
    }

    fn reconcile_ports(&mut self, snapshot: Option<&Snapshot>) -> Result<Vec<String>, Error> {
        let (connection, adjacent) = self.wires.parts();
        self.ports.reconcile(connection, snapshot, &self.config.node, adjacent)
    }

    /// What following the node's flows needs of it.
    pub fn pins(&self) -> Result<kernel::Pins, Error> {
        Ok(kernel::Pins {
            dir: pin_dir(&self.place.bpffs),
            settings: self.settings.clone(),
            host_netns: self.wires.netns_cookie().map_err(Error::Node)?,
            renewed: self.renewed.subscribe(),
        })
    }

    /// What loading found: whether refused connections see ECONNREFUSED, how many pods were steered on.
    pub fn loaded(&self) -> Loaded {
        self.loaded
    }

    /// What the kernel has of what not every kernel has, with what is done where it lacks it.
    pub fn kernel(&self) -> Result<Vec<(&'static str, Option<&'static str>)>, Error> {
        let btf = Path::new("/sys/kernel/btf/vmlinux").exists();
        let without = |there: bool, fallback| (!there).then_some(fallback);
        Ok(vec![
            // Loading fails without them.
            ("sk_lookup", None),
            ("redirect_peer", None),
            ("bpf_set_retval", without(self.loaded.set_retval, "refused callers see EPERM")),
            ("tcx", without(!self.ports.clsact(), "filters of clsact")),
            ("ingress_ifindex", without(self.loaded.ingress_ifindex, "connections of pods with a sidecar are dropped")),
            ("BTF", without(btf, "programs are loaded without it")),
            ("XDP", without(self.loaded.xdp, "--xdp does nothing")),
        ])
    }

    /// The MTU that pods are to be made with, as it changes; nothing before the first snapshot.
    pub fn pod_mtu(&self) -> watch::Receiver<Option<u32>> {
        self.wires.pod_mtu()
    }

    /// Brings the snapshot into force. Services change one by one, each at an instant; what could not be done is
    /// tried again by [`Self::repair`].
    pub fn apply(&mut self, snapshot: &Arc<Snapshot>) -> Result<Applied, Error> {
        let compiled = self.compiler.compile(snapshot.clone());
        let mut applied =
            Applied { problems: compiled.problems.iter().map(ToString::to_string).collect(), ..Applied::default() };
        let table = self.table.apply(&compiled.services).map_err(Error::Services);
        let pods = self.locked(|d, _| d.apply_pods());
        self.wires.want(snapshot, &self.config.node, &mut applied.problems);
        applied.services = table?;
        applied.pods = pods?;
        let leases = self.store.held().map_err(Error::Leases)?;
        let withdrawn = self.table.take_withdrawn();
        self.sweeper.forget(&withdrawn).map_err(Error::Ports)?;
        // The first time for an agent before us, which may have been killed before it did.
        if !self.reset {
            self.sweeper.forget_misled(&self.table).map_err(Error::Ports)?;
            self.look_again = true;
        }
        if !std::mem::replace(&mut self.reset, true) || !withdrawn.is_empty() {
            let (closed, failed) = reset::reset(&self.table, self.table.stranded(), namespaces(&leases));
            applied.closed = closed;
            applied.problems.extend(failed.iter().map(|e| describe(e)));
        }
        // A node that cannot be reached is no reason to keep the whole cluster from this snapshot.
        applied.problems.extend(self.wires.reconcile(&leases).err().map(|e| describe(&e)));
        applied.problems.extend(self.reconcile_ports(Some(snapshot)).err().map(|e| describe(&e)));
        self.standing = self.problems();
        applied.problems.extend(self.standing.iter().cloned());
        Ok(applied)
    }

    /// What cannot be had of what was applied has changed since it was said: it is to be applied again.
    pub fn is_news(&self) -> bool {
        self.compiler.compiled().is_some() && self.standing != self.problems()
    }

    /// What cannot be had at present, and is tried again.
    fn problems(&self) -> Vec<String> {
        self.unfit().into_iter().chain(self.ports.problems().cloned()).collect()
    }

    /// Services for which a map has no room.
    fn unfit(&self) -> Vec<String> {
        /// Beyond these their number must do.
        const NAMED: usize = 20;
        let compiled = self.compiler.compiled();
        let say = |(key, cause): (&ServiceKey, &str)| {
            let (ip, port) = (sluice_ebpf::ip(key.addr).to_canonical(), u16::from_be(key.port_be));
            let service =
                compiled.and_then(|c| c.owner(key)).map_or_else(String::new, |name| format!("service {name}: "));
            format!(
                "{service}{} has no room on this node, so that its callers are refused ({cause}); have fewer services \
                or endpoints",
                SocketAddr::new(ip, port)
            )
        };
        let mut said: Vec<String> = self.table.unfit().take(NAMED).map(say).collect();
        let more = self.table.unfit().count() - said.len();
        said.extend((more > 0).then(|| format!("{more} more addresses of services have no room on this node")));
        said
    }

    /// Says what a pod is before the snapshot does: between its namespace's making and its first container. The
    /// snapshot has the last word from when it knows the pod.
    pub fn set_pod_mesh(&mut self, uid: &str, meshed: bool, excluded_ports: &[u16]) -> Result<(), Error> {
        let ports: BTreeSet<u16> = excluded_ports.iter().copied().collect();
        self.overrides.set(uid, meshed, ports);
        self.locked(|d, _| d.apply_pods().map(drop))
    }

    /// The pods that the plugin has made and not yet been told to remove. Of one whose lease cannot be read it is not known
    /// where its namespace is.
    pub fn pods(&self) -> Result<Vec<PodInfo>, Error> {
        let held = self.store.held().map_err(Error::Leases)?;
        let damaged = self.damaged(&held)?;
        Ok(held.into_iter().chain(damaged).map(PodInfo::from).collect())
    }

    /// What can be known of the leases that cannot be read, where `held` are the others.
    fn damaged(&self, held: &[Lease]) -> Result<Vec<Lease>, Error> {
        let entries = self.store.damaged(held).map_err(Error::Leases)?;
        let guess = |e| wiring::guess(e, Some(&self.pod_table.maps)).map_err(Error::Leases);
        entries.iter().map(guess).collect()
    }

    /// The programs' counters with their labels, since boot; and how many connections their packets belong to.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, Error> {
        let mut all = self.counters.all().map_err(Error::Load)?;
        all.push(("connections", self.swept.connections));
        Ok(all)
    }

    /// Forgets some of the connections that are over.
    fn sweep(&mut self) -> Result<(), Error> {
        let now = sweep::since_start().map_err(Error::Clock)?;
        self.swept = self.sweeper.step(now).map_err(Error::Ports)?;
        if self.look_again {
            self.sweeper.forget_misled(&self.table).map_err(Error::Ports)?;
            self.look_again = false;
        }
        Ok(())
    }

    /// Under the lock. The number of flags and ports that changed.
    fn apply_pods(&mut self) -> Result<usize, Error> {
        let snapshot = self.compiler.compiled().map(|c| &c.pods);
        self.pod_table.apply(snapshot, &mut self.overrides).map_err(Error::Pods)
    }

    fn locked<T>(&mut self, work: impl FnOnce(&mut Self, &Lock) -> Result<T, Error>) -> Result<T, Error> {
        let lock = Lock::take(&self.state_dir).map_err(Error::Leases)?;
        work(self, &lock)
    }
}

/// Writes what the programs of another layout go by into maps that were made anew; maps that are shared with them say it
/// already. Without a view, the new ones begin empty: callers are not translated until control has answered.
fn fill(
    config: &DatapathConfig,
    bpffs: &Path,
    connection: &mut Connection,
    last: Option<&Snapshot>,
) -> Result<(), Error> {
    let Some(snapshot) = last else {
        tracing::warn!("maps have another shape now and no view is known: what is missing in them is so until one is");
        return Ok(());
    };
    let compiled = compile::compile(snapshot, &config.node, config.overlays());
    let maps = ServiceMaps::open(&pin_dir(bpffs)).and_then(ServiceTable::open);
    maps.and_then(|mut table| table.apply(&compiled.services)).map_err(Error::Services)?;
    ports::fill(bpffs, connection, snapshot, &config.node, &config.masquerade_excluded)
}

/// Tells the programs what this node is.
fn settle(config: &DatapathConfig, bpffs: &Path, host_netns: u64) -> Result<Arc<SettingsMap>, Error> {
    let settings = SettingsMap::open(&pin_dir(bpffs)).map_err(Error::Settings)?;
    let told = settings.update(|s| {
        s.host_netns = host_netns;
        // An agent that was killed may have left others on.
        s.flags = if config.masquerade { MASQUERADE } else { 0 } | if config.dsr { DSR } else { 0 };
    });
    told.map_err(Error::Settings)?;
    Ok(Arc::new(settings))
}

/// Of the pods.
fn namespaces(leases: &[Lease]) -> impl Iterator<Item = PathBuf> {
    leases.iter().map(|l| l.netns.clone())
}

/// Indexes of the links of pods that are there.
fn pod_links(connection: &mut Connection, leases: &[Lease]) -> Result<Vec<u32>, Error> {
    let links: HashMap<String, link::Found> = link::all(connection).map_err(Error::Node)?.into_iter().collect();
    Ok(leases.iter().filter_map(|l| links.get(&l.link)).map(|found| found.index).collect())
}

fn open_maps(bpffs: &Path) -> Result<(ServiceTable, PodTable, Counters), sluice_ebpf::Error> {
    let dir = pin_dir(bpffs);
    Ok((ServiceTable::open(ServiceMaps::open(&dir)?)?, PodTable::open(&dir)?, Counters::open(&dir)?))
}
