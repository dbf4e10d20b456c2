//! Network namespaces: opening, naming by cookie, running code inside one.
//!
//! A thread that has entered a namespace never comes back to the pool: work inside runs on a thread of its own that
//! ends with it, so no other code can find itself in a foreign namespace.

use crate::{Error, error::Result};
use std::{
    fs::File,
    io,
    net::UdpSocket,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    thread,
};

/// An open network namespace; it lives at least as long as this.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
}

impl Netns {
    /// Opens a namespace by its file: a bind mount as runtimes make them, or `/proc/<pid>/ns/net`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| Error::io("open network namespace", path.display(), e))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// The namespace that the calling thread is in.
    pub fn current() -> Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number by which eBPF programs know it; not used again until the next boot.
    pub fn cookie(&self) -> Result<u64> {
        self.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").map_err(|e| Error::io("make a socket in", "namespace", e))?;
            crate::sock::netns_cookie(socket.as_fd())
        })?
    }

    /// Whether both are the same namespace.
    pub fn same(&self, other: &Netns) -> Result<bool> {
        let id = |n: &Netns| {
            let m = n.file.metadata().map_err(|e| Error::io("inspect network namespace", n.path.display(), e))?;
            Ok::<_, Error>((m.dev(), m.ino()))
        };
        Ok(id(self)? == id(other)?)
    }

    /// Runs `work` inside, on a thread of its own, and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let inside = || {
            self.enter()?;
            Ok(work())
        };
        let joined = thread::scope(|s| {
            let spawned = thread::Builder::new().name("netns".into()).spawn_scoped(s, inside);
            spawned.map(|t| t.join()).map_err(|e| Error::io("start a thread for", self.path.display(), e))
        })?;
        joined.map_err(|_| Error::Thread(self.path.display().to_string()))?
    }

    /// Moves the calling thread into the namespace for the rest of its life. Only for a thread that was made for it.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: no memory is involved; the descriptor is open, and CLONE_NEWNET makes the kernel check its kind.
        let r = unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) };
        if r != 0 {
            return Err(Error::io("enter network namespace", self.path.display(), io::Error::last_os_error()));
        }
        Ok(())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What the calling thread leaves for a namespace of its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unshare {
    pub net: bool,
    /// Mounts made afterwards are seen by this thread and its children only.
    pub mounts: bool,
    /// The cgroup that the caller is in becomes the root of what it sees in mounts made afterwards.
    pub cgroups: bool,
}

/// Gives the calling thread (and threads and processes it starts from now on) namespaces of its own. For test nodes
/// and the local cluster; call it before other threads are started.
pub fn unshare(what: Unshare) -> Result<()> {
    let mut flags = 0;
    if what.net {
        flags |= libc::CLONE_NEWNET;
    }
    if what.mounts {
        flags |= libc::CLONE_NEWNS;
    }
    if what.cgroups {
        flags |= libc::CLONE_NEWCGROUP;
    }
    // SAFETY: namespaces only; descriptor tables and memory stay shared.
    if unsafe { libc::unshare(flags) } != 0 {
        return Err(Error::io("unshare namespaces of", "this thread", io::Error::last_os_error()));
    }
    if what.mounts {
        use rustix::mount::{MountPropagationFlags, mount_change};
        mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
            .map_err(|e| Error::io("make private the mounts under", "/", e.into()))?;
    }
    Ok(())
}

/// Makes a namespace that stays until the returned path is removed by [`remove_named`]. The folder must exist.
pub fn make_named(path: &Path) -> Result<Netns> {
    File::create_new(path).map_err(|e| Error::io("create", path.display(), e))?;
    let target = path.to_owned();
    let made = thread::spawn(move || {
        unshare(Unshare { net: true, ..Unshare::default() })?;
        rustix::mount::mount_bind("/proc/thread-self/ns/net", &target)
            .map_err(|e| Error::io("keep a network namespace at", target.display(), e.into()))
    });
    made.join().map_err(|_| Error::Thread(path.display().to_string()))??;
    Netns::open(path)
}

/// Undoes [`make_named`]; the namespace ends when nobody uses it.
pub fn remove_named(path: &Path) -> Result<()> {
    rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH)
        .map_err(|e| Error::io("unmount", path.display(), e.into()))?;
    std::fs::remove_file(path).map_err(|e| Error::io("remove", path.display(), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_its_own_cookie_and_work_inside_stays_inside() {
        let path = std::env::temp_dir().join(format!("sluice-test-ns-{}", std::process::id()));
        let ns = make_named(&path).expect("make (root is needed)");
        let home = Netns::current().expect("current");
        assert_ne!(ns.cookie().expect("cookie"), home.cookie().expect("cookie"));
        let inside = ns.run(|| Netns::current().expect("current").same(&ns).expect("same")).expect("run");
        assert!(inside && !home.same(&ns).expect("same"));
        assert!(matches!(ns.run(|| panic!("on purpose")), Err(Error::Thread(_))));
        remove_named(&path).expect("remove");
    }
}
