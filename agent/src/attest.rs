//! Who is at the other end of a unix stream: which process, which cgroup, which pod.
//!
//! The namespace in which the stream was made says the pod: abstract sockets are per namespace, and the kernel tells
//! the namespace's cookie. The process is held by a pidfd while its cgroup is read, so that the answer cannot be about
//! a later process with the same number.

use sluice_netlink::sock;
use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("ask the kernel who the peer is")]
    Peer(#[source] sluice_netlink::Error),
    #[error("the peer has ended before its cgroup was known")]
    Ended,
    #[error("{operation} {path}")]
    Read {
        operation: &'static str,
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("process {pid} is in cgroup {cgroup:?}, which is not below this node's")]
    Foreign { pid: i32, cgroup: String },
    #[error("process {pid} in cgroup {cgroup:?} is not the pod's sidecar")]
    NotSidecar { pid: i32, cgroup: String },
    #[error("ask the kernel for the cgroup")]
    Maps(#[source] sluice_ebpf::Error),
    #[error("neither /sys/fs/cgroup/unified nor /sys/fs/cgroup is a cgroup2 mount; mount one")]
    NoCgroup2,
}

/// The process at the other end.
#[derive(Debug)]
pub struct Peer {
    pub pid: i32,
    /// Readable once the process has ended.
    pub pidfd: OwnedFd,
    /// As eBPF programs see it: the inode of the cgroup's folder.
    pub cgroup_id: u64,
    /// The cgroup's path below the root.
    pub cgroup: String,
    pub netns_cookie: u64,
}

/// Root of the node's cgroup2 hierarchy, on hybrid machines and on pure ones.
pub fn cgroup_root() -> Result<PathBuf, Error> {
    let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
    roots
        .into_iter()
        .find(|r| r.join("cgroup.procs").exists() && r.join("cgroup.controllers").exists())
        .ok_or(Error::NoCgroup2)
}

/// Attests the peer of a connected stream; takes std's and tokio's alike.
pub fn peer(stream: BorrowedFd<'_>, cgroup_root: &Path) -> Result<Peer, Error> {
    let netns_cookie = sock::netns_cookie(stream).map_err(Error::Peer)?;
    let pidfd = sock::peer_pidfd(stream).map_err(Error::Peer)?;
    let pid = pid_of(&pidfd)?;
    let (cgroup_id, cgroup) = cgroup_of(pid, cgroup_root)?;
    // Still the same process: then what was read of its number was its own.
    if pid_of(&pidfd)? != pid {
        return Err(Error::Ended);
    }
    Ok(Peer { pid, pidfd, cgroup_id, cgroup, netns_cookie })
}

/// Number of the process that a pidfd stands for.
fn pid_of(pidfd: &OwnedFd) -> Result<i32, Error> {
    let path = PathBuf::from(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()));
    let text = read(&path)?;
    let pid = text.lines().find_map(|l| l.strip_prefix("Pid:")).and_then(|p| p.trim().parse::<i32>().ok());
    pid.filter(|p| *p > 0).ok_or(Error::Ended)
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|cause| Error::Read { operation: "read", path: path.to_owned(), cause })
}

fn cgroup_of(pid: i32, root: &Path) -> Result<(u64, String), Error> {
    let text = read(Path::new(&format!("/proc/{pid}/cgroup")))?;
    let cgroup = unified(&text).ok_or_else(|| Error::Foreign { pid, cgroup: text.clone() })?;
    let path = root.join(cgroup.trim_start_matches('/'));
    Ok((sluice_ebpf::loader::cgroup_id(&path).map_err(Error::Maps)?, cgroup.to_owned()))
}

/// The cgroup2 line of /proc/<pid>/cgroup; `None` also for a path that leads out of our cgroup namespace.
fn unified(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|l| l.strip_prefix("0::"))?;
    (path.starts_with('/') && !path.split('/').any(|p| p == "..")).then_some(path)
}

/// Whether the process of a pidfd has ended.
pub fn ended(pidfd: impl AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0)
}

/// Which container of each pod is its sidecar. Only that one may register listeners and ask for certificates: another
/// process of the pod would get past the capture, or speak in the pod's name.
pub struct Gate {
    cgroup_root: PathBuf,
    sidecars: Mutex<Sidecars>,
}

/// Containers' ids by their pods' UIDs.
#[derive(Default)]
struct Sidecars {
    /// By whoever starts them: from before they run, so it counts more than the list.
    told: HashMap<String, String>,
    /// By the runtime, all that run: after a restart the agent knows them without asking control.
    listed: HashMap<String, String>,
}

impl Sidecars {
    fn contain(&self, uid: &str, cgroup: &str) -> bool {
        self.told.get(uid).or_else(|| self.listed.get(uid)).is_some_and(|id| in_container(cgroup, id))
    }
}

impl Gate {
    /// Nobody is admitted yet.
    pub fn new() -> Result<Self, Error> {
        Ok(Self { cgroup_root: cgroup_root()?, sidecars: Mutex::default() })
    }

    fn sidecars(&self) -> MutexGuard<'_, Sidecars> {
        self.sidecars.lock().expect("no holder panics")
    }

    /// The runtime's id of the pod's sidecar, from before it runs.
    pub fn expect(&self, uid: &str, container: &str) {
        self.sidecars().told.insert(uid.to_owned(), container.to_owned());
    }

    /// The runtime's list of all pods' sidecars, in the place of the one before.
    pub fn listed(&self, sidecars: HashMap<String, String>) {
        self.sidecars().listed = sidecars;
    }

    pub fn forget(&self, uid: &str) {
        self.sidecars().told.remove(uid);
    }

    /// The stream's peer is the pod's sidecar.
    pub fn admits(&self, uid: &str, stream: BorrowedFd<'_>) -> Result<(), Error> {
        let peer = peer(stream, &self.cgroup_root)?;
        if self.sidecars().contain(uid, &peer.cgroup) {
            Ok(())
        } else {
            Err(Error::NotSidecar { pid: peer.pid, cgroup: peer.cgroup })
        }
    }
}

/// Runtimes name a container's cgroup by its id, with or without decoration (`cri-containerd-<id>.scope`).
fn in_container(cgroup: &str, id: &str) -> bool {
    !id.is_empty() && cgroup.split('/').any(|part| part.contains(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_cgroup2_line_is_found_and_never_leads_out() {
        assert_eq!(unified("12:cpu:/x\n0::/kube/pod1\n"), Some("/kube/pod1"));
        assert_eq!(unified("0::/\n"), Some("/"));
        for bad in ["", "1:cpu:/x\n", "0::/../other\n", "0::relative\n"] {
            assert_eq!(unified(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_the_container_that_is_expected_is_admitted() {
        for (cgroup, id, inside) in [
            ("/pods/u/abc123", "abc123", true),
            ("/x.slice/cri-containerd-abc123.scope", "abc123", true),
            ("/pods/u/def456", "abc123", false),
            ("/pods/u/abc123", "", false),
        ] {
            assert_eq!(in_container(cgroup, id), inside, "{cgroup} {id}");
        }
        let gate = Gate::new().expect("cgroup2");
        let (a, _b) = UnixStream::pair().expect("pair");
        assert!(gate.admits("u", a.as_fd()).is_err(), "nobody is expected");
    }

    #[test]
    fn after_a_restart_the_runtime_says_who_the_sidecars_are() {
        let gate = Gate::new().expect("cgroup2");
        let contain = |cgroup: &str| gate.sidecars().contain("u", cgroup);
        gate.listed(HashMap::from([("u".to_owned(), "abc".to_owned())]));
        assert!(contain("/pods/u/abc") && !contain("/pods/u/def"));
        gate.expect("u", "def");
        assert!(contain("/pods/u/def") && !contain("/pods/u/abc"), "a list may be older than the next container");
        gate.forget("u");
        gate.listed(HashMap::new());
        assert!(!contain("/pods/u/abc") && !contain("/pods/u/def"), "gone");
    }

    #[test]
    fn a_peer_is_this_process() {
        let (a, _b) = UnixStream::pair().expect("pair");
        let peer = peer(a.as_fd(), &cgroup_root().expect("cgroup2")).expect("attested");
        assert_eq!(peer.pid, std::process::id() as i32);
        assert!(peer.cgroup_id > 0 && peer.netns_cookie > 0 && !ended(&peer.pidfd));
    }
}
