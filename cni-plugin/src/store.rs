//! Leases on disk: one file each, whose name says all that finding an address or a lease needs.
//!
//! ```text
//! <state>/lock                       one lock for plugin and agent
//! <state>/leases/<boot>/10.244.1.7,fd00::7@<container>@<ifname>             held
//! <state>/leases/<boot>/10.244.1.7,fd00::7@<container>@<ifname>@<index>.<s> releasing: free when the link is gone
//! <state>/leases/<boot>/.last        addresses of the newest lease
//! ```
//!
//! Every change is one rename or unlink, so that a plugin that is killed leaves the state before or after. Nothing is
//! synced to the disk: a lease ends with the boot, as its namespace does, and a new boot finds another `<boot>`: the
//! kernel's boot id and the cookie of the node's network namespace (a simulated node boots oftener than its kernel).

use crate::{
    Error,
    bandwidth::Bandwidth,
    config::HostPort,
    error::Result,
    ipam::{Pool, Refusal},
    spec::Attachment,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, ErrorKind, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

const LAST: &str = ".last";
/// Room for an address of each family (15 and 45 letters at most).
const LAST_BYTES: usize = 64;
const MAKING: &str = ".making";

/// The pod that a lease is for; empty for callers that name none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRef {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl std::fmt::Display for PodRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub container: String,
    pub ifname: String,
    pub addresses: Vec<IpAddr>,
    /// As the runtime named it.
    pub netns: PathBuf,
    pub netns_cookie: u64,
    /// The node's end of the link.
    pub link: String,
    pub mac: [u8; 6],
    /// Name of the network in its configuration: GC of one network leaves those of others alone.
    #[serde(default)]
    pub network: String,
    #[serde(default, skip_serializing_if = "Bandwidth::is_unlimited")]
    pub bandwidth: Bandwidth,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<HostPort>,
    #[serde(flatten)]
    pub pod: PodRef,
}

impl Lease {
    pub fn is_for(&self, a: &Attachment) -> bool {
        self.container == a.container && self.ifname == a.ifname
    }
}

/// A lease that was given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Releasing {
    /// Index that the link had; another index under the same name is another link.
    pub ifindex: u32,
    /// Seconds since boot.
    pub since_s: u64,
}

/// What a file name says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub addresses: Vec<IpAddr>,
    pub attachment: Attachment,
    pub releasing: Option<Releasing>,
    file: String,
}

impl Entry {
    fn parse(file: &str) -> Option<Self> {
        let mut parts = file.split('@');
        let addresses = parts.next()?.split(',').map(str::parse).collect::<std::result::Result<_, _>>().ok()?;
        let (container, ifname) = (parts.next()?.to_owned(), parts.next()?.to_owned());
        let releasing = match parts.next() {
            None => None,
            Some(r) => {
                let (ifindex, since_s) = r.split_once('.')?;
                Some(Releasing { ifindex: ifindex.parse().ok()?, since_s: since_s.parse().ok()? })
            }
        };
        let attachment = Attachment { container, ifname };
        Some(Self { addresses, attachment, releasing, file: file.to_owned() })
    }
}

fn file_name(addresses: &[IpAddr], container: &str, ifname: &str) -> String {
    let addresses = addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    format!("{addresses}@{container}@{ifname}")
}

/// Held while it lives; two holders wait for each other.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock that plugin and agent share. A holder that dies gives it back.
    pub fn take(state_dir: &Path) -> Result<Self> {
        let path = state_dir.join("lock");
        let open = || File::options().create(true).truncate(false).write(true).open(&path);
        let file = match open() {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                fs::create_dir_all(state_dir).map_err(|e| Error::io("create", state_dir.display(), e))?;
                open()
            }
            other => other,
        };
        let file = file.map_err(|e| Error::io("open", path.display(), e))?;
        file.lock().map_err(|e| Error::io("lock", path.display(), e))?;
        Ok(Self { _file: file })
    }
}

/// The leases of this boot. Methods that change anything want the lock as witness.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// `boot` names the boot, see [`boot`].
    pub fn open(state_dir: &Path, boot: &str) -> Result<Self> {
        let leases = state_dir.join("leases");
        let dir = leases.join(boot);
        if !dir.is_dir() {
            // In this order, so that a plugin that is killed in between forgets them the next time.
            forget_other_boots(&leases, boot);
            fs::create_dir_all(&dir).map_err(|e| Error::io("create", dir.display(), e))?;
        }
        Ok(Self { dir })
    }

    /// All leases, by name only.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let listed = fs::read_dir(&self.dir).map_err(|e| Error::io("list", self.dir.display(), e))?;
        Ok(listed.flatten().filter_map(|e| Entry::parse(e.file_name().to_str()?)).collect())
    }

    /// The whole lease; `None` when it was removed meanwhile.
    pub fn read(&self, entry: &Entry) -> Result<Option<Lease>> {
        let path = self.dir.join(&entry.file);
        let text = match fs::read(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| Error::io("read lease", path.display(), e))?,
        };
        let damaged = || Error::Damaged { file: path.display().to_string(), addresses: entry.addresses.clone() };
        serde_json::from_slice(&text).map(Some).map_err(|_| damaged())
    }

    /// Leases that are held; damaged ones are left out, see [`Self::damaged`].
    pub fn held(&self) -> Result<Vec<Lease>> {
        let held = self.entries()?.into_iter().filter(|e| e.releasing.is_none());
        Ok(held.filter_map(|e| self.read(&e).ok().flatten()).collect())
    }

    /// Held leases whose files cannot be read, where `held` are the others. Their pods may run: what can be known of them is
    /// [`crate::wiring::guess`]'s to say.
    pub fn damaged(&self, held: &[Lease]) -> Result<Vec<Entry>> {
        let known: BTreeSet<(&str, &str)> = held.iter().map(|l| (l.container.as_str(), l.ifname.as_str())).collect();
        let unknown = |a: &Attachment| !known.contains(&(a.container.as_str(), a.ifname.as_str()));
        let others = self.entries()?.into_iter().filter(|e| e.releasing.is_none() && unknown(&e.attachment));
        Ok(others.filter(|e| self.read(e).is_err()).collect())
    }

    /// Held leases that are at least as old: an ADD that is under way has its lease, but not everything else yet.
    pub fn settled(&self, age: Duration) -> Result<Vec<Lease>> {
        let old = |e: &Entry| {
            let modified = fs::metadata(self.dir.join(&e.file)).and_then(|m| m.modified());
            // A clock that was set back makes a lease look younger; it is settled when the clock has caught up.
            modified.is_ok_and(|m| m.elapsed().is_ok_and(|a| a >= age))
        };
        let held = self.entries()?.into_iter().filter(|e| e.releasing.is_none() && old(e));
        Ok(held.filter_map(|e| self.read(&e).ok().flatten()).collect())
    }

    /// Addresses for a new lease, none of which any other lease holds or is still releasing.
    pub fn choose(&self, _lock: &Lock, pool: &Pool, entries: &[Entry], asked: &[IpAddr]) -> Result<Vec<IpAddr>> {
        let used: BTreeSet<IpAddr> = entries.iter().flat_map(|e| e.addresses.iter().copied()).collect();
        pool.choose(&used, &self.last(), asked).map_err(|refusal| match refusal {
            Refusal::Exhausted => Error::Exhausted {
                fill: pool.fill(&used),
                leases: entries.len(),
                releasing: entries.iter().filter(|e| e.releasing.is_some()).count(),
            },
            Refusal::NotOffered(address) => {
                let ranges = pool.ranges().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                Error::Asked { address, why: format!("it is reserved or outside {ranges}") }
            }
            Refusal::InUse(address) => Error::Asked { address, why: format!("{} has it", holder(entries, address)) },
            Refusal::TwoOfOneFamily(address, other) => {
                Error::Asked { address, why: format!("{other} too; a pod has one address of each family") }
            }
        })
    }

    fn last(&self) -> Vec<IpAddr> {
        let text = fs::read_to_string(self.dir.join(LAST)).unwrap_or_default();
        text.trim_end().split(',').filter_map(|a| a.parse().ok()).collect()
    }

    /// Writes a lease; from here on its addresses are held.
    pub fn write(&self, _lock: &Lock, lease: &Lease) -> Result<()> {
        let file = file_name(&lease.addresses, &lease.container, &lease.ifname);
        let text = serde_json::to_vec(lease).map_err(|e| Error::io("encode lease", &file, e.into()))?;
        let making = self.dir.join(MAKING);
        fs::write(&making, text).map_err(|e| Error::io("write lease", making.display(), e))?;
        let path = self.dir.join(&file);
        fs::rename(&making, &path).map_err(|e| Error::io("write lease", path.display(), e))?;
        let _ = self.remember(file.split('@').next().unwrap_or_default()); // losing it costs nothing
        Ok(())
    }

    /// Over what is there, without truncating: ext4 starts to write a truncated file to the disk when it is closed.
    fn remember(&self, addresses: &str) -> io::Result<()> {
        let mut file = File::options().create(true).truncate(false).write(true).open(self.dir.join(LAST))?;
        file.write_all(format!("{addresses:<LAST_BYTES$}").as_bytes())
    }

    /// From held to releasing.
    pub fn release(&self, _lock: &Lock, entry: &Entry, releasing: Releasing) -> Result<()> {
        let from = self.dir.join(&entry.file);
        let to = self.dir.join(format!("{}@{}.{}", entry.file, releasing.ifindex, releasing.since_s));
        fs::rename(&from, &to).map_err(|e| Error::io("release lease", from.display(), e))
    }

    /// Ends a lease: its addresses are free.
    pub fn remove(&self, _lock: &Lock, entry: &Entry) -> Result<()> {
        let path = self.dir.join(&entry.file);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove lease", path.display(), e)),
            _ => Ok(()),
        }
    }

    /// The lease of an attachment that is held.
    pub fn find<'a>(entries: &'a [Entry], attachment: &Attachment) -> Option<&'a Entry> {
        entries.iter().find(|e| e.releasing.is_none() && e.attachment == *attachment)
    }
}

fn holder(entries: &[Entry], address: IpAddr) -> String {
    let entry = entries.iter().find(|e| e.addresses.contains(&address));
    entry.map_or("another pod".into(), |e| format!("container {}", e.attachment.container))
}

/// Leases of earlier boots mean nothing: their namespaces are gone. Best effort, they are in nobody's way.
fn forget_other_boots(leases: &Path, boot: &str) {
    for entry in fs::read_dir(leases).into_iter().flatten().flatten() {
        if entry.file_name() != boot {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Name of this boot of the node, given the cookie of its network namespace.
pub fn boot(node_cookie: u64) -> Result<String> {
    const FILE: &str = "/proc/sys/kernel/random/boot_id";
    let id = fs::read_to_string(FILE).map_err(|e| Error::io("read", FILE, e))?;
    Ok(format!("{}-{node_cookie}", id.trim()))
}

/// Seconds since boot, sleep included.
pub fn uptime_s() -> u64 {
    u64::try_from(rustix::system::sysinfo().uptime).unwrap_or(0)
}

impl From<Error> for io::Error {
    fn from(e: Error) -> Self {
        io::Error::other(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipam::Range;

    fn lease(n: u8, container: &str) -> Lease {
        Lease {
            container: container.into(),
            ifname: "eth0".into(),
            addresses: vec![format!("10.0.0.{n}").parse().expect("ip"), format!("fd00::{n}").parse().expect("ip")],
            netns: "/run/netns/x".into(),
            netns_cookie: 5,
            link: "slc0".into(),
            mac: [2; 6],
            network: "n".into(),
            bandwidth: Bandwidth::default(),
            host_ports: vec![],
            pod: PodRef { namespace: "shop".into(), name: "web".into(), uid: "u".into() },
        }
    }

    #[test]
    fn a_lease_lives_from_held_to_releasing_to_free() {
        let dir = tempfile::tempdir().expect("folder");
        let store = Store::open(dir.path(), "boot-1").expect("open");
        let lock = Lock::take(dir.path()).expect("lock");
        let subnet: sluice_netlink::plan::Prefix = "10.0.0.0/30".parse().expect("range"); // .1 and .2
        let pool = Pool::new(vec![vec![Range::new(&subnet.into(), &[]).expect("range")]]).expect("pool");
        let first = lease(1, "a");
        store.write(&lock, &first).expect("write");
        let entries = store.entries().expect("entries");
        assert_eq!(store.read(&entries[0]).expect("read"), Some(first.clone()));
        assert_eq!(store.settled(Duration::ZERO).expect("settled"), [first]);
        assert_eq!(store.settled(Duration::from_secs(60)).expect("settled"), [], "it is being made");
        assert_eq!(store.choose(&lock, &pool, &entries, &[]).expect("room")[0].to_string(), "10.0.0.2");

        let releasing = Releasing { ifindex: 7, since_s: 100 };
        store.release(&lock, &entries[0], releasing).expect("release");
        let entries = store.entries().expect("entries");
        assert_eq!(entries[0].releasing, Some(releasing));
        assert_eq!(store.held().expect("held"), []);
        assert_eq!(store.settled(Duration::ZERO).expect("settled"), []);
        assert!(Store::find(&entries, &entries[0].attachment).is_none());
        store.write(&lock, &lease(2, "b")).expect("write");
        let full = store.choose(&lock, &pool, &store.entries().expect("entries"), &[]);
        let full = full.expect_err("a releasing address is not free");
        let want = "no free address: 10.0.0.0/30: 2 of 2 leased; 1 of 2 leases wait for their link to go";
        assert_eq!((full.to_string().as_str(), full.code()), (want, 102));
        let asked = |ip: &str| {
            let entries = store.entries().expect("entries");
            store.choose(&lock, &pool, &entries, &[ip.parse().expect(ip)]).expect_err("refused").to_string()
        };
        assert_eq!(asked("10.0.0.2"), "address 10.0.0.2 was asked for, but container b has it");
        assert!(asked("10.0.0.3").ends_with("it is reserved or outside 10.0.0.0/30"));

        store.remove(&lock, &entries[0]).expect("remove");
        store.remove(&lock, &entries[0]).expect("remove again");
        let entries = store.entries().expect("entries");
        assert_eq!(store.choose(&lock, &pool, &entries, &[]).expect("room")[0].to_string(), "10.0.0.1");
    }

    #[test]
    fn leases_end_with_the_boot() {
        let dir = tempfile::tempdir().expect("folder");
        let lock = Lock::take(dir.path()).expect("lock");
        Store::open(dir.path(), "one").expect("open").write(&lock, &lease(1, "a")).expect("write");
        let next = Store::open(dir.path(), "two").expect("open");
        assert_eq!(next.entries().expect("entries"), []);
        assert!(!dir.path().join("leases/one").exists());
    }

    #[test]
    fn foreign_and_damaged_files_are_no_leases_but_keep_their_address() {
        let dir = tempfile::tempdir().expect("folder");
        let store = Store::open(dir.path(), "b").expect("open");
        for junk in [".making", "x", "10.0.0.1@a", "10.0.0.1@a@eth0@7", "nonsense@a@eth0"] {
            fs::write(store.dir.join(junk), "").expect("junk");
        }
        assert_eq!(store.entries().expect("entries"), []);
        fs::write(store.dir.join("10.0.0.1@a@eth0"), "{").expect("damaged");
        let entries = store.entries().expect("entries");
        assert_eq!(entries[0].addresses.len(), 1);
        assert!(matches!(store.read(&entries[0]), Err(Error::Damaged { .. })));
        assert_eq!(store.held().expect("held"), []);
        assert_eq!(store.damaged(&[]).expect("damaged"), entries);
    }
}
