//! Loads the object, pins its maps, programs and links, and replaces programs in place.
//!
//! Everything pinned outlives this process: a second start finds the maps with their entries and puts new programs
//! into the links that are there, so that no call goes untranslated in between. Who calls must hold the node's lock
//! (shared with the plugin), because a pod made meanwhile would get the old program; [`prepare`] alone may do without where
//! the pins [are settled](is_settled): it then changes nothing, and takes the kernel long.

use crate::{
    Error,
    error::Result,
    maps::{not_pinned, open_pin, other_layouts, pin_dir},
    sys::{self, Hook},
    upgrade::{self, Rules, Step, Upgrade},
};
use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError},
};
use sluice_ebpf_common::map;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice.bpf.o"));

const CGROUP_PROGRAMS: [(&str, Hook); 9] = [
    ("connect4", Hook::Connect4),
    ("connect6", Hook::Connect6),
    ("sendmsg4", Hook::Sendmsg4),
    ("sendmsg6", Hook::Sendmsg6),
    ("recvmsg4", Hook::Recvmsg4),
    ("recvmsg6", Hook::Recvmsg6),
    ("getpeername4", Hook::Getpeername4),
    ("getpeername6", Hook::Getpeername6),
    ("sock_release", Hook::SockRelease),
];
pub(crate) const STEER: &str = "steer_pod";
/// A packet program at one side of a link.
#[derive(Clone, Copy, Debug)]
pub struct Packets {
    pub program: &'static str,
    /// It sees what the link receives; otherwise what it sends.
    pub ingress: bool,
    /// What the name of its pin ends with.
    suffix: &'static str,
}

impl Packets {
    const fn at(program: &'static str, ingress: bool) -> Self {
        Self { program, ingress, suffix: if ingress { "_in" } else { "_out" } }
    }

    fn hook(&self) -> Hook {
        if self.ingress { Hook::TcxIngress } else { Hook::TcxEgress }
    }
}

/// The programs of a pod's link: packets from the pod, packets of the node's own stack to it.
pub const POD_PACKETS: [Packets; 2] = [Packets::at("from_pod", true), Packets::at("from_host", false)];
/// The same of a link of the node's.
pub const DEVICE_PACKETS: [Packets; 2] = [Packets::at("from_wire", true), Packets::at("from_host", false)];
const PACKET_PROGRAMS: [&str; 3] = ["from_pod", "from_wire", "from_host"];
/// The program ahead of `from_wire`, at XDP.
pub const XDP: &str = "from_wire_xdp";
const XDP_SUFFIX: &str = "_xdp";

/// In the driver (linux/if_link.h): what the kernel does in its place on a structure of its own is slower than
/// `from_wire`, and shows packets whose checksums are still to be computed.
const XDP_FLAGS_DRV_MODE: u32 = 4;

/// `f_type` of a BPF file system (linux/magic.h).
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// Where things are on this node.
#[derive(Clone, Debug)]
pub struct Place {
    /// Mount point of the BPF file system, usually /sys/fs/bpf.
    pub bpffs: PathBuf,
    /// Root of the node's cgroup2 hierarchy.
    pub cgroup: PathBuf,
}

/// What `load` found and did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Refused connections see ECONNREFUSED; otherwise (before Linux 5.18) EPERM.
    pub set_retval: bool,
    /// There is a program for XDP (Linux 5.18: packets of more than one part).
    pub xdp: bool,
    /// Connections of meshed pods are captured; otherwise (before Linux 5.17) they are dropped.
    pub ingress_ifindex: bool,
    /// Pods whose steering program was replaced.
    pub pods: usize,
}

/// Loads everything and puts it in force; after it, the pins are complete. Falls back where the kernel lacks a feature.
/// Of another layout's maps, those that only an agent can fill may be empty: an agent takes the steps of [`Prepared`].
pub fn load(place: &Place) -> Result<Loaded> {
    prepare(place, true)?.load()
}

/// [`load`] with the fallback for kernels before 5.18 forced.
pub fn load_with(place: &Place, set_retval: bool) -> Result<Loaded> {
    prepare(place, set_retval)?.load()
}

/// [`load_with`] with the fallback for kernels before 5.17 forced or forbidden as well.
pub fn load_as(place: &Place, set_retval: bool, ingress_ifindex: bool) -> Result<Loaded> {
    prepare_as(place, set_retval, ingress_ifindex, Rules::default())?.load()
}

/// Does all that changes nothing for those who are connected: maps, and programs that are not in force. Falls back where
/// the kernel lacks a feature.
pub fn prepare(place: &Place, set_retval: bool) -> Result<Prepared> {
    let ways = [(true, true), (true, false), (false, true), (false, false)];
    let mut ways = ways.into_iter().filter(|(retval, _)| set_retval || !retval).peekable();
    while let Some((retval, ifindex)) = ways.next() {
        match prepare_as(place, retval, ifindex, Rules::default()) {
            Err(Error::Program { cause, .. }) if refused(&cause) && ways.peek().is_some() => {}
            other => return other,
        }
    }
    unreachable!("the last way returns")
}

/// [`prepare`] without falling back.
pub fn prepare_as(place: &Place, set_retval: bool, ingress_ifindex: bool, mut rules: Rules) -> Result<Prepared> {
    check_bpffs(&place.bpffs)?;
    let dir = pin_dir(&place.bpffs);
    let cgroup = File::open(&place.cgroup).map_err(|e| Error::syscall("open cgroup", place.cgroup.display(), e))?;
    let upgrade = Upgrade::begin(&dir, OBJECT, &mut rules)?;
    (rules.step)("load")?;
    let mut object = open_object(&dir, set_retval, ingress_ifindex)?;
    let xdp = load_xdp(&mut object)?;
    upgrade.copy(&mut rules.step)?;
    Ok(Prepared { dir, cgroup, object, xdp, set_retval, ingress_ifindex, upgrade, step: rules.step })
}

/// Maps and programs that are there, but in force nowhere.
pub struct Prepared {
    dir: PathBuf,
    cgroup: File,
    object: Ebpf,
    xdp: Option<OwnedFd>,
    set_retval: bool,
    ingress_ifindex: bool,
    upgrade: Upgrade,
    step: Step,
}

impl Prepared {
    /// Programs of another layout are in force, and of the new ones' maps some are empty that the agent fills.
    pub fn unfilled(&self) -> bool {
        self.upgrade.unfilled
    }

    /// Puts the programs into the links that there are, and where there is none.
    pub fn switch(&mut self) -> Result<Loaded> {
        let (dir, step, object) = (&self.dir, &mut self.step, &mut self.object);
        self.upgrade.take_links("links", |name| CGROUP_PROGRAMS.iter().any(|(n, _)| *n == name), step)?;
        self.upgrade.take_links("devices", |_| true, step)?;
        self.upgrade.take_links("pods", |_| true, step)?;
        for (name, hook) in CGROUP_PROGRAMS {
            step(name)?;
            attach_cgroup(dir, program(object, name)?, name, hook, &self.cgroup)?;
        }
        let mut current = BTreeMap::new();
        for name in PACKET_PROGRAMS.into_iter().chain([STEER]) {
            step(name)?;
            let program = program(object, name)?;
            pin_over(program.as_fd(), &dir.join(name))?;
            current.insert(name, program);
        }
        let xdp = self.xdp.take();
        if let Some(program) = &xdp {
            pin_over(program.as_fd(), &dir.join(XDP))?;
        }
        let xdp = xdp.map(|program| current.insert(XDP, program)).is_some();
        let at = |packets: [Packets; 2]| packets.map(|p| (p.suffix, p.program));
        let [ingress, egress] = at(DEVICE_PACKETS);
        step("devices")?;
        replace(&devices(dir), &[ingress, egress, (XDP_SUFFIX, XDP)], &current)?;
        step("pods")?;
        let pods = replace(&pods(dir), &at(POD_PACKETS), &current)?;
        Ok(Loaded { set_retval: self.set_retval, ingress_ifindex: self.ingress_ifindex, xdp, pods })
    }

    /// Once no old program runs any more, also none of those that have no link: what other layouts have left goes.
    pub fn finish(mut self) -> Result<()> {
        self.upgrade.finish(&mut self.step)
    }

    /// All of it, for where nobody has anything to do in between.
    pub fn load(mut self) -> Result<Loaded> {
        let loaded = self.switch()?;
        self.finish()?;
        Ok(loaded)
    }
}

/// Puts back any of the cgroup links that somebody took away; true when one was missing. Programs are loaded again
/// only then.
pub fn repair(place: &Place) -> Result<bool> {
    Ok(damaged(place)? && load(place).map(|_| true)?)
}

/// Whether somebody took away a pin, or a link from the cgroup.
pub fn damaged(place: &Place) -> Result<bool> {
    let dir = pin_dir(&place.bpffs);
    let cgroup = cgroup_id(&place.cgroup)?;
    let whole = CGROUP_PROGRAMS.iter().all(|(name, _)| {
        sys::pinned(&links(&dir).join(name)).and_then(|l| sys::link_info(l.as_fd())).is_ok_and(|i| i.cgroup() == cgroup)
    });
    let pins = map::ALL.iter().chain(&PACKET_PROGRAMS).chain([&STEER]).all(|name| dir.join(name).exists());
    Ok(!(whole && pins))
}

/// Whether everything is pinned that a pod needs: maps, programs, and the links that translate at sockets. Else the first
/// that is missing.
pub fn complete(bpffs: &Path) -> Result<()> {
    let dir = pin_dir(bpffs);
    let links = CGROUP_PROGRAMS.iter().map(|(name, _)| links(&dir).join(name));
    let pins = map::ALL.iter().chain(&PACKET_PROGRAMS).chain([&STEER]).map(|name| dir.join(name));
    pins.chain(links).find(|path| !path.exists()).map_or(Ok(()), |path| Err(not_pinned(&path)))
}

/// Whether everything is pinned, and nothing of another layout is left: to prepare changes nothing then.
pub fn is_settled(bpffs: &Path) -> bool {
    complete(bpffs).is_ok() && other_layouts(&pin_dir(bpffs)).is_ok_and(|others| others.is_empty())
}

/// Removes every pin, of every layout: the programs detach and the maps go. For uninstalling and for tests.
pub fn unload(bpffs: &Path) -> Result<()> {
    let dir = pin_dir(bpffs);
    let others = other_layouts(&dir)?.into_iter().map(|(_, other)| other);
    let mut nobody = Rules::default().step;
    others.chain([dir]).try_for_each(|dir| upgrade::remove(&dir, &mut nobody))
}

/// Each pinned link, by its name with its folder: its id, and that of the program in it.
pub fn pinned_links(bpffs: &Path) -> Result<BTreeMap<String, (u32, u32)>> {
    let dir = pin_dir(bpffs);
    let mut all = BTreeMap::new();
    for folder in [links(&dir), devices(&dir), pods(&dir)] {
        let entries = fs::read_dir(&folder).map_err(|e| Error::syscall("list", folder.display(), e))?;
        for path in entries.flatten().map(|e| e.path()) {
            let info =
                sys::link_info(open_pin(&path)?.as_fd()).map_err(|e| Error::syscall("inspect", path.display(), e))?;
            let name = path.strip_prefix(&dir).unwrap_or(&path).to_string_lossy().into_owned();
            all.insert(name, (info.id, info.program));
        }
    }
    Ok(all)
}

/// The id of a cgroup2 folder as programs see it: its inode number.
pub fn cgroup_id(cgroup: &Path) -> Result<u64> {
    fs::metadata(cgroup).map(|m| m.ino()).map_err(|e| Error::syscall("inspect cgroup", cgroup.display(), e))
}

fn links(dir: &Path) -> PathBuf {
    dir.join("links")
}

fn pods(dir: &Path) -> PathBuf {
    dir.join("pods")
}

fn devices(dir: &Path) -> PathBuf {
    dir.join("devices")
}

/// Pin of the steering link of one pod.
fn pod_link(bpffs: &Path, netns_cookie: u64) -> PathBuf {
    pods(&pin_dir(bpffs)).join(netns_cookie.to_string())
}

/// Puts the packet programs on a link of the node's own; true where one was missing.
pub fn attach_device(bpffs: &Path, ifindex: u32) -> Result<bool> {
    let dir = pin_dir(bpffs);
    let path = devices(&dir).join(ifindex.to_string());
    let mut attached = false;
    for packets in &DEVICE_PACKETS {
        let path = with_suffix(&path, packets.suffix);
        match sys::pinned(&path).and_then(|l| sys::link_info(l.as_fd())) {
            Ok(info) if info.ifindex() == ifindex => continue,
            // Of a link that is gone, whose name another has now.
            Ok(_) => fs::remove_file(&path).map_err(|e| Error::syscall("unpin", path.display(), e))?,
            Err(_) => {}
        }
        let program = open_pin(&dir.join(packets.program))?;
        let link = sys::device_link_create(program.as_fd(), ifindex, packets.hook(), 0)
            .map_err(|e| Error::syscall("attach packet programs to link", ifindex, e))?;
        sys::pin(link.as_fd(), &path).map_err(|e| Error::syscall("pin", path.display(), e))?;
        attached = true;
    }
    Ok(attached)
}

/// Takes them off.
pub fn detach_device(bpffs: &Path, ifindex: u32) -> Result<()> {
    let path = devices(&pin_dir(bpffs)).join(ifindex.to_string());
    DEVICE_PACKETS.iter().try_for_each(|p| unpin(&with_suffix(&path, p.suffix)))
}

/// Puts [`XDP`] on a link of the node's own; true where it was missing. Not every driver can, and none where
/// another has a program there.
pub fn attach_xdp(bpffs: &Path, ifindex: u32) -> Result<bool> {
    let dir = pin_dir(bpffs);
    let path = with_suffix(&devices(&dir).join(ifindex.to_string()), XDP_SUFFIX);
    if sys::pinned(&path).and_then(|l| sys::link_info(l.as_fd())).is_ok_and(|info| info.ifindex() == ifindex) {
        return Ok(false);
    }
    unpin(&path)?;
    let program = open_pin(&dir.join(XDP))?;
    let link = sys::device_link_create(program.as_fd(), ifindex, Hook::Xdp, XDP_FLAGS_DRV_MODE)
        .map_err(|e| Error::syscall("attach the XDP program to link", ifindex, e))?;
    sys::pin(link.as_fd(), &path).map_err(|e| Error::syscall("pin", path.display(), e))?;
    Ok(true)
}

/// Takes it off.
pub fn detach_xdp(bpffs: &Path, ifindex: u32) -> Result<()> {
    unpin(&with_suffix(&devices(&pin_dir(bpffs)).join(ifindex.to_string()), XDP_SUFFIX))
}

/// Links of the node's own, by index, that have programs; also such as are gone.
pub fn attached_devices(bpffs: &Path) -> Result<BTreeSet<u32>> {
    let dir = devices(&pin_dir(bpffs));
    let entries = fs::read_dir(&dir).map_err(|e| Error::syscall("list", dir.display(), e))?;
    Ok(entries.flatten().filter_map(|e| e.file_name().to_str()?.split('_').next()?.parse().ok()).collect())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

fn unpin(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::syscall("unpin", path.display(), e)),
        _ => Ok(()),
    }
}

/// Attaches the pinned steering program to a pod's namespace; a link that is there already stays.
pub fn attach_pod(bpffs: &Path, netns: BorrowedFd<'_>, netns_cookie: u64) -> Result<()> {
    let steer = open_pin(&pin_dir(bpffs).join(STEER))?;
    let path = pod_link(bpffs, netns_cookie);
    if path.exists() {
        return Ok(());
    }
    let link = sys::link_create(steer.as_fd(), netns, Hook::SkLookup)
        .map_err(|e| Error::syscall("attach steering to the namespace of pod", netns_cookie, e))?;
    sys::pin(link.as_fd(), &path).map_err(|e| Error::syscall("pin", path.display(), e))
}

/// Whether the pod's steering link is pinned.
pub fn pod_attached(bpffs: &Path, netns_cookie: u64) -> bool {
    pod_link(bpffs, netns_cookie).exists()
}

/// Takes the packet programs off pods' links that hold them by tcx links, as they once did: for when filters are there.
pub fn detach_pod_links(bpffs: &Path) -> Result<()> {
    let dir = pods(&pin_dir(bpffs));
    let entries = fs::read_dir(&dir).map_err(|e| Error::syscall("list", dir.display(), e))?;
    let held = |name: &str| POD_PACKETS.iter().any(|p| name.ends_with(p.suffix));
    let mut paths = entries.flatten().filter(|e| e.file_name().to_str().is_some_and(held)).map(|e| e.path());
    paths.try_for_each(|p| unpin(&p))
}

/// A pinned packet program.
pub fn packet_program(bpffs: &Path, name: &str) -> Result<OwnedFd> {
    open_pin(&pin_dir(bpffs).join(name))
}

/// Whether the kernel has tcx links (Linux 6.6): one is made on `lo`, and goes again at once.
pub fn has_tcx(bpffs: &Path) -> Result<bool> {
    const LO: u32 = 1;
    let program = packet_program(bpffs, "from_host")?;
    Ok(sys::device_link_create(program.as_fd(), LO, Hook::TcxEgress, 0).is_ok())
}

/// Takes a pod's programs away; a link dies with its pin.
pub fn detach_pod(bpffs: &Path, netns_cookie: u64) -> Result<()> {
    unpin(&pod_link(bpffs, netns_cookie))
}

/// Cookies of the pods that have a pinned steering link.
pub fn attached_pods(bpffs: &Path) -> Result<Vec<u64>> {
    let dir = pods(&pin_dir(bpffs));
    let entries = fs::read_dir(&dir).map_err(|e| Error::syscall("list", dir.display(), e))?;
    let cookie = |e: fs::DirEntry| e.file_name().to_str()?.split('_').next()?.parse().ok();
    let cookies: BTreeSet<u64> = entries.flatten().filter_map(cookie).collect();
    Ok(cookies.into_iter().collect())
}

fn check_bpffs(bpffs: &Path) -> Result<()> {
    let stat = rustix::fs::statfs(bpffs).map_err(|e| Error::syscall("inspect", bpffs.display(), e.into()))?;
    if stat.f_type as u64 != BPF_FS_MAGIC {
        return Err(Error::NotBpffs(bpffs.to_owned()));
    }
    Ok(())
}

/// Object with its maps (pinned ones reused) and all programs loaded.
fn open_object(dir: &Path, set_retval: bool, ingress_ifindex: bool) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    let (set_retval, ingress_ifindex) = (u8::from(set_retval), u8::from(ingress_ifindex));
    loader.override_global("HAS_SET_RETVAL", &set_retval, true);
    loader.override_global("HAS_INGRESS_IFINDEX", &ingress_ifindex, true);
    for name in map::ALL {
        loader.map_pin_path(name, dir.join(name));
    }
    let mut object = loader.load(OBJECT).map_err(|e| Error::Object(Box::new(e)))?;
    // First what an old kernel may refuse: the packet programs take it seconds to verify.
    for name in CGROUP_PROGRAMS.iter().map(|(n, _)| *n).chain([STEER]).chain(PACKET_PROGRAMS) {
        verify(&mut object, name)?.map_err(|e| Error::Program { name, cause: Box::new(e) })?;
    }
    Ok(object)
}

/// `None` where the kernel does not take it.
fn load_xdp(object: &mut Ebpf) -> Result<Option<OwnedFd>> {
    match verify(object, XDP)? {
        Ok(()) => program(object, XDP).map(Some),
        Err(e) if refused(&e) => Ok(None),
        Err(e) => Err(Error::Program { name: XDP, cause: Box::new(e) }),
    }
}

/// What the kernel says of a program.
type Verdict = std::result::Result<(), ProgramError>;

/// Has the kernel verify a program and keep it. It stops for a signal, whatever it is for (`EAGAIN`, as libbpf takes it too): once
/// more then.
fn verify(object: &mut Ebpf, name: &'static str) -> Result<Verdict> {
    const TRIES: usize = 5;
    let program = object.program_mut(name).ok_or(Error::NoProgram(name))?;
    let mut load = || match program {
        Program::CgroupSockAddr(p) => Ok(p.load()),
        Program::CgroupSock(p) => Ok(p.load()),
        Program::SkLookup(p) => Ok(p.load()),
        Program::SchedClassifier(p) => Ok(p.load()),
        Program::Xdp(p) => Ok(p.load()),
        _ => Err(Error::NoProgram(name)),
    };
    let stopped = |v: &Result<Verdict>| matches!(v, Ok(Err(e)) if errno(e) == Some(libc::EAGAIN));
    (1..TRIES).map(|_| load()).find(|v| !stopped(v)).unwrap_or_else(&mut load)
}

/// PURE: whether the kernel has looked at the program and will never take it, which one with a feature less may change. Else it
/// was prevented: by want of memory, for instance.
fn refused(e: &ProgramError) -> bool {
    const PREVENTED: [i32; 5] = [libc::EAGAIN, libc::EINTR, libc::ENOMEM, libc::EMFILE, libc::ENFILE];
    errno(e).is_some_and(|errno| !PREVENTED.contains(&errno))
}

fn errno(e: &ProgramError) -> Option<i32> {
    match e {
        ProgramError::LoadError { io_error, .. } => io_error.raw_os_error(),
        _ => None,
    }
}

fn program(object: &mut Ebpf, name: &'static str) -> Result<OwnedFd> {
    let program = object.program_mut(name).ok_or(Error::NoProgram(name))?;
    let fd = program.fd().map_err(|e| Error::Program { name, cause: Box::new(e) })?;
    fd.as_fd().try_clone_to_owned().map_err(|e| Error::syscall("duplicate the descriptor of", name, e))
}

/// Into the pinned link if there is one on this cgroup, else a new link.
fn attach_cgroup(dir: &Path, program: OwnedFd, name: &'static str, hook: Hook, cgroup: &File) -> Result<()> {
    let path = links(dir).join(name);
    let id = cgroup.metadata().map_err(|e| Error::syscall("inspect the cgroup for", name, e))?.ino();
    if let Ok(link) = sys::pinned(&path) {
        let same = sys::link_info(link.as_fd()).is_ok_and(|i| i.cgroup() == id);
        if same && sys::link_update(link.as_fd(), program.as_fd()).is_ok() {
            return Ok(());
        }
    }
    let link = sys::link_create(program.as_fd(), cgroup.as_fd(), hook)
        .map_err(|e| Error::syscall("attach to the cgroup", name, e))?;
    pin_over(link.as_fd(), &path)
}

/// Pins under another name and renames: readers see the old object or the new one, never none.
fn pin_over(object: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let mut next = path.as_os_str().to_owned();
    next.push("_next"); // a dot is refused in names on a BPF file system
    let next = PathBuf::from(next);
    let _ = fs::remove_file(&next); // left by a process that was killed here
    sys::pin(object, &next).map_err(|e| Error::syscall("pin", next.display(), e))?;
    fs::rename(&next, path).map_err(|e| Error::syscall("rename pin to", path.display(), e))
}

/// New programs for the links pinned in `folder`: by the suffix of the pin, steering where there is none. Links of what
/// is gone are removed. The number of pods, or of devices.
fn replace(folder: &Path, programs: &[(&str, &'static str)], current: &BTreeMap<&str, OwnedFd>) -> Result<usize> {
    let mut owners = BTreeSet::new();
    let entries = fs::read_dir(folder).map_err(|e| Error::syscall("list", folder.display(), e))?;
    for path in entries.flatten().map(|e| e.path()) {
        let file = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let name = programs.iter().find(|(suffix, _)| file.ends_with(suffix)).map_or(STEER, |(_, program)| program);
        let Some(program) = current.get(name) else { continue };
        if replace_one(&path, program.as_fd())? {
            owners.insert(file.split('_').next().unwrap_or_default().to_owned());
        }
    }
    Ok(owners.len())
}

/// False where the link's target is gone.
fn replace_one(path: &Path, program: BorrowedFd<'_>) -> Result<bool> {
    let link = open_pin(path)?;
    match sys::link_update(link.as_fd(), program) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOLINK) => {
            fs::remove_file(path).map_err(|e| Error::syscall("unpin", path.display(), e))?;
            Ok(false)
        }
        Err(e) => {
            let current = sys::link_info(link.as_fd()).map(|i| i.program);
            let wanted = sys::program_id(program).map_err(|e| Error::syscall("inspect", path.display(), e))?;
            if current.ok() == Some(wanted) { Ok(true) } else { Err(Error::syscall("replace", path.display(), e)) }
        }
    }
}
