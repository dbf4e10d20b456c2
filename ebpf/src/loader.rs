//! Loads the object, pins its maps, programs and links, and replaces programs in place.
//!
//! Everything pinned outlives this process: a second start finds the maps with their entries and puts new programs
//! into the links that are there, so that no call goes untranslated in between. Who calls must hold the node's lock
//! (shared with the plugin), because a pod made meanwhile would get the old program.

use crate::{
    Error,
    error::Result,
    maps::{open_pin, pin_dir},
    sys::{self, Hook},
};
use aya::{Ebpf, EbpfLoader, programs::Program};
use sluice_ebpf_common::map;
use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice.bpf.o"));

const CGROUP_PROGRAMS: [(&str, Hook); 8] = [
    ("connect4", Hook::Connect4),
    ("connect6", Hook::Connect6),
    ("sendmsg4", Hook::Sendmsg4),
    ("sendmsg6", Hook::Sendmsg6),
    ("recvmsg4", Hook::Recvmsg4),
    ("recvmsg6", Hook::Recvmsg6),
    ("getpeername4", Hook::Getpeername4),
    ("getpeername6", Hook::Getpeername6),
];
const STEER: &str = "steer_pod";
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
    /// Pods whose steering program was replaced.
    pub pods: usize,
}

/// Loads everything and puts it in force; after it, the pins are complete. Falls back where the kernel lacks a feature.
pub fn load(place: &Place) -> Result<Loaded> {
    match load_with(place, true) {
        Err(Error::Program { .. }) => load_with(place, false),
        other => other,
    }
}

/// [`load`] with the fallback for kernels before 5.18 forced or forbidden.
pub fn load_with(place: &Place, set_retval: bool) -> Result<Loaded> {
    check_bpffs(&place.bpffs)?;
    let dir = pin_dir(&place.bpffs);
    for folder in [dir.clone(), links(&dir), pods(&dir)] {
        fs::create_dir_all(&folder).map_err(|e| Error::syscall("create", folder.display(), e))?;
    }
    let cgroup = File::open(&place.cgroup).map_err(|e| Error::syscall("open cgroup", place.cgroup.display(), e))?;
    let mut object = open_object(&dir, set_retval)?;
    for (name, hook) in CGROUP_PROGRAMS {
        attach_cgroup(&dir, program(&mut object, name)?, name, hook, &cgroup)?;
    }
    let steer = program(&mut object, STEER)?;
    pin_over(steer.as_fd(), &dir.join(STEER))?;
    let pods = replace_in_pods(&dir, steer.as_fd())?;
    Ok(Loaded { set_retval, pods })
}

/// Puts back any of the cgroup links that somebody took away; true when one was missing. Programs are loaded again
/// only then.
pub fn repair(place: &Place) -> Result<bool> {
    let dir = pin_dir(&place.bpffs);
    let cgroup = cgroup_id(&place.cgroup)?;
    let whole = CGROUP_PROGRAMS.iter().all(|(name, _)| {
        sys::pinned(&links(&dir).join(name)).and_then(|l| sys::link_info(l.as_fd())).is_ok_and(|i| i.cgroup() == cgroup)
    });
    let pins = map::ALL.iter().chain([&STEER]).all(|name| dir.join(name).exists());
    if whole && pins {
        return Ok(false);
    }
    load(place).map(|_| true)
}

/// Removes every pin: the programs detach and the maps go. For uninstalling and for tests.
pub fn unload(bpffs: &Path) -> Result<()> {
    let dir = pin_dir(bpffs);
    for folder in [pods(&dir), links(&dir), dir] {
        let entries = match fs::read_dir(&folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(|e| Error::syscall("list", folder.display(), e))?,
        };
        for entry in entries.flatten() {
            let path = entry.path();
            fs::remove_file(&path).map_err(|e| Error::syscall("unpin", path.display(), e))?;
        }
        fs::remove_dir(&folder).map_err(|e| Error::syscall("remove", folder.display(), e))?;
    }
    Ok(())
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

/// Pin of the steering link of one pod.
fn pod_link(bpffs: &Path, netns_cookie: u64) -> PathBuf {
    pods(&pin_dir(bpffs)).join(netns_cookie.to_string())
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

/// Ends steering for a pod; the link dies with its pin.
pub fn detach_pod(bpffs: &Path, netns_cookie: u64) -> Result<()> {
    let path = pod_link(bpffs, netns_cookie);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::syscall("unpin", path.display(), e)),
        _ => Ok(()),
    }
}

/// Cookies of the pods that have a pinned steering link.
pub fn attached_pods(bpffs: &Path) -> Result<Vec<u64>> {
    let dir = pods(&pin_dir(bpffs));
    let entries = fs::read_dir(&dir).map_err(|e| Error::syscall("list", dir.display(), e))?;
    Ok(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
}

fn check_bpffs(bpffs: &Path) -> Result<()> {
    let stat = rustix::fs::statfs(bpffs).map_err(|e| Error::syscall("inspect", bpffs.display(), e.into()))?;
    if stat.f_type as u64 != BPF_FS_MAGIC {
        return Err(Error::NotBpffs(bpffs.to_owned()));
    }
    Ok(())
}

/// Object with its maps (pinned ones reused) and all programs loaded.
fn open_object(dir: &Path, set_retval: bool) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    let flag = u8::from(set_retval);
    loader.override_global("HAS_SET_RETVAL", &flag, true);
    for name in map::ALL {
        loader.map_pin_path(name, dir.join(name));
    }
    let mut object = loader.load(OBJECT).map_err(|e| Error::Object(Box::new(e)))?;
    for name in CGROUP_PROGRAMS.iter().map(|(n, _)| *n).chain([STEER]) {
        let program = object.program_mut(name).ok_or(Error::NoProgram(name))?;
        let loaded = match program {
            Program::CgroupSockAddr(p) => p.load(),
            Program::SkLookup(p) => p.load(),
            _ => return Err(Error::NoProgram(name)),
        };
        loaded.map_err(|e| Error::Program { name, cause: Box::new(e) })?;
    }
    Ok(object)
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

/// New steering for the pods that run; links of namespaces that are gone are removed.
fn replace_in_pods(dir: &Path, steer: BorrowedFd<'_>) -> Result<usize> {
    let folder = pods(dir);
    let wanted = sys::program_id(steer).map_err(|e| Error::syscall("inspect", STEER, e))?;
    let mut replaced = 0;
    let entries = fs::read_dir(&folder).map_err(|e| Error::syscall("list", folder.display(), e))?;
    for entry in entries.flatten() {
        let path = entry.path();
        let link = open_pin(&path)?;
        match sys::link_update(link.as_fd(), steer) {
            Ok(()) => replaced += 1,
            Err(e) if e.raw_os_error() == Some(libc::ENOLINK) => {
                fs::remove_file(&path).map_err(|e| Error::syscall("unpin", path.display(), e))?;
            }
            Err(e) => {
                let current = sys::link_info(link.as_fd()).map(|i| i.program);
                if current.ok() != Some(wanted) {
                    return Err(Error::syscall("replace steering in", path.display(), e));
                }
            }
        }
    }
    Ok(replaced)
}
