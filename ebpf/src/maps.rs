//! Typed access to pinned maps: keys and values are the common crate's plain types, sizes are checked at opening.

use crate::{Error, error::Result, sys};
use sluice_ebpf_common::{
    Addr, Backend, BackendKey, Device, LAYOUT, ListenKey, MAX_REASONS, MaglevBlock, MaglevKey, MemberKey, Plain, Pod,
    PodAddr, PortKey, Range, Reason, Reverse, ReverseKey, Service, ServiceKey, SourceRange, Uid, map,
};
use std::{
    marker::PhantomData,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};
pub use sys::Cursor;

pub(crate) fn bytes<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `Plain` promises that all bytes of the type are initialized.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn bytes_mut<T: Plain>(value: &mut MaybeUninit<T>) -> &mut [u8] {
    // SAFETY: written before it is read, by a system call that fills exactly this many bytes.
    unsafe { std::slice::from_raw_parts_mut(value.as_mut_ptr().cast(), size_of::<T>()) }
}

/// The folder of this layout's pins under a BPF file system.
pub fn pin_dir(bpffs: &Path) -> PathBuf {
    bpffs.join("sluice").join(format!("v{LAYOUT}"))
}

/// A hash map of plain keys and values.
pub struct HashMap<K, V> {
    fd: OwnedFd,
    path: PathBuf,
    types: PhantomData<fn(K, V)>,
}

/// Entries per batch: two buffers of some ten KB.
const BATCH: usize = 256;

/// More than the largest map has.
const KEYS: usize = 1 << 20;

impl<K: Plain, V: Plain> HashMap<K, V> {
    /// Opens the map pinned as `name` in `dir`.
    pub fn open(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(name);
        let fd = open_pin(&path)?;
        let (key, value) = sys::map_sizes(fd.as_fd()).map_err(|e| Error::syscall("inspect", path.display(), e))?;
        let (want_key, want_value) = (size_of::<K>() as u32, size_of::<V>() as u32);
        if (key, value) != (want_key, want_value) {
            return Err(Error::Layout { path, key, value, want_key, want_value });
        }
        Ok(Self { fd, path, types: PhantomData })
    }

    fn error(&self, operation: &'static str) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |e| Error::syscall(operation, self.path.display(), e)
    }

    /// Entries that it has room for.
    pub fn capacity(&self) -> Result<usize> {
        let [.., entries, _] = sys::map_info(self.fd.as_fd()).map_err(self.error("inspect"))?;
        Ok(entries as usize)
    }

    pub fn get(&self, key: &K) -> Result<Option<V>> {
        let mut value = MaybeUninit::uninit();
        let found = sys::map_lookup(self.fd.as_fd(), bytes(key), bytes_mut(&mut value));
        // SAFETY: the kernel has filled it when it says that it found the key; every bit pattern is a value.
        Ok(found.map_err(self.error("read an entry of"))?.then(|| unsafe { value.assume_init() }))
    }

    pub fn set(&self, key: &K, value: &V) -> Result<()> {
        sys::map_update(self.fd.as_fd(), bytes(key), bytes(value)).map_err(self.error("write an entry of"))
    }

    /// Whether there was such an entry.
    pub fn remove(&self, key: &K) -> Result<bool> {
        sys::map_delete(self.fd.as_fd(), bytes(key)).map_err(self.error("remove an entry of"))
    }

    /// Removes an entry; what it was at that moment.
    pub fn take(&self, key: &K) -> Result<Option<V>> {
        let mut value = MaybeUninit::uninit();
        let found = sys::map_take(self.fd.as_fd(), bytes(key), bytes_mut(&mut value));
        // SAFETY: as in `get`.
        Ok(found.map_err(self.error("remove an entry of"))?.then(|| unsafe { value.assume_init() }))
    }

    /// Writes an entry that is not there yet; false where it is.
    pub fn add(&self, key: &K, value: &V) -> Result<bool> {
        sys::map_add(self.fd.as_fd(), bytes(key), bytes(value)).map_err(self.error("write an entry of"))
    }

    /// All keys, one call each: for maps whose values are large and not wanted.
    pub fn keys(&self) -> Result<Vec<K>> {
        let mut keys = Vec::<K>::new();
        let mut next = MaybeUninit::uninit();
        // An entry that goes meanwhile makes the kernel begin anew.
        while keys.len() < KEYS
            && sys::map_next_key(self.fd.as_fd(), keys.last().map(bytes), bytes_mut(&mut next))
                .map_err(self.error("list"))?
        {
            // SAFETY: the kernel wrote the key.
            keys.push(unsafe { next.assume_init() });
        }
        Ok(keys)
    }

    /// All entries of a map that is small, or cannot be read in batches (prefix trees, before Linux 5.16).
    pub fn all(&self) -> Result<Vec<(K, V)>> {
        let keys = self.keys()?;
        let read = |key: K| Ok(self.get(&key)?.map(|value| (key, value)));
        keys.into_iter().filter_map(|key| read(key).transpose()).collect()
    }

    /// All entries; those that change meanwhile may be seen in either state.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let (mut all, mut cursor) = (Vec::new(), Cursor::default());
        loop {
            let (some, end) = self.some(&mut cursor, BATCH * 4)?;
            all.extend(some);
            if end {
                return Ok(all);
            }
        }
    }

    /// The next entries from where the cursor is, `count` of them unless one bucket of the map has more; whether they
    /// are the last.
    pub fn some(&self, cursor: &mut Cursor, count: usize) -> Result<(Vec<(K, V)>, bool)> {
        let mut keys = vec![MaybeUninit::<K>::uninit(); count];
        let mut values = vec![MaybeUninit::<V>::uninit(); count];
        loop {
            let count = keys.len();
            let read = {
                // SAFETY: views of the vectors' own memory, written by the kernel before `assume_init` below.
                let (k, v) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(keys.as_mut_ptr().cast(), count * size_of::<K>()),
                        std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), count * size_of::<V>()),
                    )
                };
                sys::map_batch(self.fd.as_fd(), cursor, k, v, count as u32)
            };
            let (n, end) = match read {
                // One bucket holds more than the buffers: grow them.
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                    keys.resize(count * 2, MaybeUninit::uninit());
                    values.resize(count * 2, MaybeUninit::uninit());
                    continue;
                }
                other => other.map_err(self.error("read"))?,
            };
            let read = keys.iter().zip(&values).take(n as usize);
            // SAFETY: the kernel says that it has written the first n of each.
            return Ok((read.map(|(k, v)| unsafe { (k.assume_init(), v.assume_init()) }).collect(), end));
        }
    }
}

/// Listeners of sidecars. The kernel holds the sockets; a listener that is closed everywhere leaves by itself.
pub struct Listeners {
    fd: OwnedFd,
    path: PathBuf,
}

impl Listeners {
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(map::LISTENERS);
        Ok(Self { fd: open_pin(&path)?, path })
    }

    pub fn set(&self, key: &ListenKey, listener: BorrowedFd<'_>) -> Result<()> {
        let fd = listener.as_raw_fd() as u32;
        sys::map_update(self.fd.as_fd(), bytes(key), bytes(&fd))
            .map_err(|e| Error::syscall("put a listener into", self.path.display(), e))
    }

    pub fn remove(&self, key: &ListenKey) -> Result<bool> {
        sys::map_delete(self.fd.as_fd(), bytes(key))
            .map_err(|e| Error::syscall("remove a listener of", self.path.display(), e))
    }

    pub fn keys(&self) -> Result<Vec<ListenKey>> {
        let mut keys = Vec::<ListenKey>::new();
        let mut next = MaybeUninit::uninit();
        while keys.len() < sluice_ebpf_common::bound::LISTENERS {
            let more = sys::map_next_key(self.fd.as_fd(), keys.last().map(bytes), bytes_mut(&mut next))
                .map_err(|e| Error::syscall("list", self.path.display(), e))?;
            if !more {
                break;
            }
            // SAFETY: the kernel wrote the key.
            keys.push(unsafe { next.assume_init() });
        }
        Ok(keys)
    }
}

/// The programs' counters, one slot per CPU each.
pub struct Counters {
    fd: OwnedFd,
    path: PathBuf,
    cpus: usize,
}

impl Counters {
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(map::COUNTERS);
        Ok(Self { fd: open_pin(&path)?, path, cpus: possible_cpus()? })
    }

    pub fn get(&self, reason: Reason) -> Result<u64> {
        debug_assert!((reason as u32) < MAX_REASONS);
        let mut slots = vec![0u8; self.cpus * 8];
        sys::map_lookup(self.fd.as_fd(), bytes(&(reason as u32)), &mut slots)
            .map_err(|e| Error::syscall("read", self.path.display(), e))?;
        let number = |s: &[u8]| u64::from_ne_bytes(s.try_into().expect("chunks of eight bytes"));
        Ok(slots.chunks_exact(8).map(number).sum())
    }

    /// All counters with their labels.
    pub fn all(&self) -> Result<Vec<(&'static str, u64)>> {
        Reason::ALL.iter().map(|r| Ok((r.label(), self.get(*r)?))).collect()
    }
}

/// The kernel gives per-CPU values for every CPU that could exist: `0-3` or `0,2-5`.
pub(crate) fn possible_cpus() -> Result<usize> {
    const FILE: &str = "/sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string(FILE).map_err(|e| Error::syscall("read", FILE, e))?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|n| n.parse::<usize>().ok());
    last.map(|n| n + 1).ok_or_else(|| Error::syscall("understand", FILE, std::io::ErrorKind::InvalidData.into()))
}

pub(crate) fn open_pin(path: &Path) -> Result<OwnedFd> {
    sys::pinned(path).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOENT) => not_pinned(path),
        _ => Error::syscall("open pinned", path.display(), e),
    })
}

/// Why there is no such pin: nothing was loaded yet, or only by another release.
pub(crate) fn not_pinned(path: &Path) -> Error {
    let path = path.to_owned();
    let Some((dir, layout)) = path.ancestors().find_map(|a| Some((a, layout_of(a)?))) else {
        return Error::NotPinned { path };
    };
    match other_layouts(dir).as_deref() {
        Ok([.., (found, _)]) if !dir.exists() => Error::OtherLayout { path, layout, found: *found },
        _ => Error::NotPinned { path },
    }
}

/// Folders of other layouts beside the folder of one, lowest first.
pub(crate) fn other_layouts(dir: &Path) -> Result<Vec<(u32, PathBuf)>> {
    let Some(parent) = dir.parent() else { return Ok(vec![]) };
    let entries = match std::fs::read_dir(parent) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        other => other.map_err(|e| Error::syscall("list", parent.display(), e))?,
    };
    let paths = entries.flatten().map(|e| e.path()).filter(|p| p != dir);
    let mut all: Vec<_> = paths.filter_map(|p| Some((layout_of(&p)?, p))).collect();
    all.sort();
    Ok(all)
}

fn layout_of(dir: &Path) -> Option<u32> {
    dir.file_name()?.to_str()?.strip_prefix('v')?.parse().ok()
}

/// The maps that say which pods there are.
pub struct PodMaps {
    pub pods: HashMap<u64, Pod>,
    pub addrs: HashMap<Addr, PodAddr>,
    pub intents: HashMap<Uid, u32>,
    pub ports: HashMap<PortKey, u32>,
    pub host_ports: HashMap<ServiceKey, Reverse>,
}

impl PodMaps {
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self {
            pods: HashMap::open(dir, map::PODS)?,
            addrs: HashMap::open(dir, map::ADDRS)?,
            intents: HashMap::open(dir, map::INTENTS)?,
            ports: HashMap::open(dir, map::PORTS)?,
            host_ports: HashMap::open(dir, map::HOST_PORTS)?,
        })
    }
}

/// The maps that say what the node's own links and addresses are.
pub struct NodeMaps {
    pub locals: HashMap<Addr, u32>,
    pub cluster: HashMap<Range, u32>,
    pub devices: HashMap<u32, Device>,
    pub announced: HashMap<Addr, u32>,
}

impl NodeMaps {
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self {
            locals: HashMap::open(dir, map::LOCALS)?,
            cluster: HashMap::open(dir, map::CLUSTER)?,
            devices: HashMap::open(dir, map::DEVICES)?,
            announced: HashMap::open(dir, map::ANNOUNCED)?,
        })
    }
}

/// The maps that say where services lead.
pub struct ServiceMaps {
    pub services: HashMap<ServiceKey, Service>,
    pub backends: HashMap<BackendKey, Backend>,
    pub members: HashMap<MemberKey, u32>,
    pub maglev: HashMap<MaglevKey, MaglevBlock>,
    pub reverse: HashMap<ReverseKey, Reverse>,
    pub connected: HashMap<ReverseKey, Reverse>,
    pub host_ports: HashMap<ServiceKey, Reverse>,
    pub sources: HashMap<SourceRange, u32>,
}

impl ServiceMaps {
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self {
            services: HashMap::open(dir, map::SERVICES)?,
            backends: HashMap::open(dir, map::BACKENDS)?,
            members: HashMap::open(dir, map::MEMBERS)?,
            maglev: HashMap::open(dir, map::MAGLEV)?,
            reverse: HashMap::open(dir, map::REVERSE)?,
            connected: HashMap::open(dir, map::CONNECTED)?,
            host_ports: HashMap::open(dir, map::HOST_PORTS)?,
            sources: HashMap::open(dir, map::SOURCES)?,
        })
    }
}

/// Text in a zero-padded field, cut at a character where it is too long.
pub fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let end = (0..=text.len().min(N)).rev().find(|n| text.is_char_boundary(*n)).unwrap_or(0);
    field[..end].copy_from_slice(&text.as_bytes()[..end]);
    field
}

/// Text of a zero-padded field.
pub fn unpadded(field: &[u8]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_fields_are_padded_and_cut_at_characters() {
        assert_eq!(padded::<4>("ab"), *b"ab\0\0");
        assert_eq!(padded::<4>("abcdef"), *b"abcd");
        assert_eq!(padded::<4>("abcé"), *b"abc\0");
        assert_eq!(unpadded(&padded::<8>("pod")), "pod");
        assert_eq!(unpadded(&padded::<3>("pod")), "pod");
    }
}
