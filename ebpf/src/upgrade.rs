//! Takes over what an agent of another layout has pinned: its maps as they are where their shape is still wanted, their
//! entries where it is not, and its links. Its folder goes last, so that a start that was killed is done again.
//!
//! [`plan`] is pure; the rest acts, on behalf of `loader`. Which programs run is not decided here.

use crate::{
    Error,
    error::Result,
    maps::{open_pin, other_layouts, possible_cpus},
    sys::{self, Cursor},
};
use sluice_ebpf_common::map;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

/// All that makes two maps interchangeable, as long as their bytes mean the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// As `enum bpf_map_type` numbers it.
    pub kind: u32,
    pub key: u32,
    pub value: u32,
    pub entries: u32,
    pub flags: u32,
}

mod kind {
    pub(super) const HASH: u32 = 1;
    pub(super) const ARRAY: u32 = 2;
    pub(super) const PERCPU_ARRAY: u32 = 6;
    pub(super) const LRU_HASH: u32 = 9;
}

impl Shape {
    fn hash(&self) -> bool {
        matches!(self.kind, kind::HASH | kind::LRU_HASH)
    }

    fn array(&self) -> bool {
        matches!(self.kind, kind::ARRAY | kind::PERCPU_ARRAY)
    }

    /// Entries can be read from one such map and written to the other. Sockets cannot be read.
    fn copies_to(&self, to: &Self) -> bool {
        self.hash() && to.hash() || self.array() && self.kind == to.kind
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, key, value, entries, flags } = self;
        write!(f, "type {kind} key {key} value {value} entries {entries} flags {flags}")
    }
}

/// An entry of an old map as that of the new one: key and value. `None`: it is left behind. The values of a per-CPU map are
/// those of all CPUs.
pub type Conversion = fn(&[u8], &[u8]) -> Option<(Vec<u8>, Vec<u8>)>;

/// A map that is not what it was in layout `from`, though it may have the same shape.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub map: &'static str,
    pub from: u32,
    pub conversion: Conversion,
}

/// Changes between the layouts that there were and this one.
pub const CHANGES: &[Change] = &[];

/// Maps that the agent fills from its view and from the node: they may begin empty, but programs do not run on them before.
/// Those of a line name each other's entries, so that they change together.
const DERIVED: [&[&str]; 5] = [
    &[map::SERVICES, map::BACKENDS, map::MEMBERS, map::MAGLEV, map::SOURCES],
    &[map::LOCALS],
    &[map::CLUSTER],
    &[map::DEVICES],
    &[map::ANNOUNCED],
];
/// Maps whose entries live for less than a second, or may be lost. All others hold what nobody else knows.
const PASSING: [&str; 2] = [map::FRAGMENTS, map::EVENTS];

/// The folders of a layout's links.
const FOLDERS: [&str; 3] = ["pods", "devices", "links"];

/// What becomes of a wanted map.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    /// The old one is pinned anew.
    Share,
    /// A new one gets the old one's entries.
    Convert(Conversion),
    /// A new one begins empty.
    Anew,
}

/// A map that would lose what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    pub map: String,
    pub had: Shape,
    pub wanted: Shape,
}

/// PURE: what becomes of each wanted map, where layout `from` has `old`. Maps in `own` are pinned under the new layout already.
pub fn plan(
    from: u32,
    old: &BTreeMap<String, Shape>,
    wanted: &BTreeMap<String, Shape>,
    own: &BTreeSet<String>,
    changes: &[Change],
) -> std::result::Result<BTreeMap<String, Way>, Lost> {
    let changed = |name: &str| changes.iter().find(|c| c.map == name && c.from == from);
    let same = |name: &str| old.contains_key(name) && old.get(name) == wanted.get(name) && changed(name).is_none();
    let way = |name: &String, want: &Shape| {
        if let Some(group) = DERIVED.iter().find(|g| g.contains(&name.as_str())) {
            return Ok(if group.iter().all(|n| same(n)) { Way::Share } else { Way::Anew });
        }
        let Some(had) = old.get(name) else { return Ok(Way::Anew) };
        let sizes = (had.key, had.value) == (want.key, want.value);
        match changed(name) {
            _ if same(name) => Ok(Way::Share),
            _ if PASSING.contains(&name.as_str()) => Ok(Way::Anew),
            Some(change) if had.copies_to(want) => Ok(Way::Convert(change.conversion)),
            None if had.copies_to(want) && sizes => Ok(Way::Convert(as_it_is)),
            _ if own.contains(name) => Ok(Way::Anew),
            _ => Err(Lost { map: name.clone(), had: *had, wanted: *want }),
        }
    };
    wanted.iter().map(|(name, want)| Ok((name.clone(), way(name, want)?))).collect()
}

fn as_it_is(key: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    Some((key.to_vec(), value.to_vec()))
}

/// The maps that are pinned, as the object has them.
pub fn wanted(object: &[u8]) -> Result<BTreeMap<String, Shape>> {
    let object = aya_obj::Object::parse(object).map_err(Error::Parse)?;
    let shape = |m: &aya_obj::Map| Shape {
        kind: m.map_type(),
        key: m.key_size(),
        value: m.value_size(),
        entries: m.max_entries(),
        flags: m.map_flags(),
    };
    let pinned = object.maps.iter().filter(|(name, _)| map::ALL.contains(&name.as_str()));
    Ok(pinned.map(|(name, m)| (name.clone(), shape(m))).collect())
}

/// Told what is done next; an error ends there.
pub type Step = Box<dyn FnMut(&str) -> Result<()>>;

/// How a layout is taken over: the changes that are known, and who follows it step by step.
pub struct Rules {
    pub changes: &'static [Change],
    pub step: Step,
}

impl Default for Rules {
    fn default() -> Self {
        Self { changes: CHANGES, step: Box::new(|_| Ok(())) }
    }
}

/// A map pinned under another layout.
struct Old {
    fd: OwnedFd,
    id: u32,
    shape: Shape,
}

fn open(path: &Path) -> Result<Old> {
    let fd = open_pin(path)?;
    let info = sys::map_info(fd.as_fd()).map_err(|e| Error::syscall("inspect", path.display(), e))?;
    let [kind, id, key, value, entries, flags] = info;
    Ok(Old { fd, id, shape: Shape { kind, key, value, entries, flags } })
}

/// Those of the wanted maps that are pinned in a folder.
fn pinned(dir: &Path, wanted: &BTreeMap<String, Shape>) -> Result<BTreeMap<String, Old>> {
    let there = wanted.keys().filter(|name| dir.join(name).exists());
    there.map(|name| Ok((name.clone(), open(&dir.join(name))?))).collect()
}

struct Copy {
    name: String,
    from: Old,
    conversion: Conversion,
}

/// What other layouts have left, on its way into this one's folder.
pub(crate) struct Upgrade {
    dir: PathBuf,
    others: Vec<PathBuf>,
    copies: Vec<Copy>,
    /// Maps that are the agent's to fill are empty.
    pub(crate) unfilled: bool,
}

impl Upgrade {
    /// Pins in `dir` the maps that stay. Before anything is done it is known that nothing is lost.
    pub(crate) fn begin(dir: &Path, object: &[u8], rules: &mut Rules) -> Result<Self> {
        let wanted = wanted(object)?;
        let mut own: BTreeMap<String, u32> = BTreeMap::new();
        for (name, map) in pinned(dir, &wanted)? {
            if map.shape != wanted[&name] {
                return Err(lost(dir, Lost { had: map.shape, wanted: wanted[&name], map: name }));
            }
            own.insert(name, map.id);
        }
        let others = other_layouts(dir)?.into_iter().rev().map(|(n, other)| Ok((n, pinned(&other, &wanted)?, other)));
        let others: Vec<_> = others.collect::<Result<_>>()?;
        // A start that ended before its programs were in force has copied what the old ones have changed since.
        if !others.is_empty() && entries(&dir.join("links"))?.is_empty() {
            let shared: BTreeSet<u32> = others.iter().flat_map(|(_, old, _)| old.values().map(|m| m.id)).collect();
            for (name, _) in own.extract_if(.., |_, id| !shared.contains(id)) {
                let path = dir.join(name);
                fs::remove_file(&path).map_err(|e| Error::syscall("unpin", path.display(), e))?;
            }
        }
        let mut plans = Vec::new();
        let mut provided: BTreeSet<String> = own.keys().cloned().collect();
        for (layout, old, other) in others {
            let shapes = old.iter().map(|(name, map)| (name.clone(), map.shape)).collect();
            let ways = plan(layout, &shapes, &wanted, &provided, rules.changes).map_err(|l| lost(&other, l))?;
            provided.extend(old.keys().cloned());
            plans.push((other, old, ways));
        }
        for folder in FOLDERS.map(|name| dir.join(name)) {
            fs::create_dir_all(&folder).map_err(|e| Error::syscall("create", folder.display(), e))?;
        }
        let mut upgrade = Self { dir: dir.to_owned(), others: vec![], copies: vec![], unfilled: false };
        for (other, old, ways) in plans {
            upgrade.take(&mut own, old, &ways, &mut rules.step)?;
            upgrade.others.push(other);
        }
        Ok(upgrade)
    }

    /// The maps of one other layout.
    fn take(
        &mut self,
        own: &mut BTreeMap<String, u32>,
        mut old: BTreeMap<String, Old>,
        ways: &BTreeMap<String, Way>,
        step: &mut Step,
    ) -> Result<()> {
        for (name, way) in ways {
            let derived = DERIVED.iter().any(|g| g.contains(&name.as_str()));
            let (from, has) = (old.remove(name), own.get(name));
            match (way, from, has) {
                (Way::Share, Some(from), None) => {
                    step(&format!("share {name}"))?;
                    let path = self.dir.join(name);
                    sys::pin(from.fd.as_fd(), &path).map_err(|e| Error::syscall("pin", path.display(), e))?;
                    own.insert(name.clone(), from.id);
                }
                (Way::Share, Some(from), Some(id)) if from.id == *id => {}
                _ if derived => self.unfilled = true,
                // There was one under this layout too: it gets what it lacks.
                (Way::Share, Some(from), _) if from.shape.copies_to(&from.shape) => {
                    self.copies.push(Copy { name: name.clone(), from, conversion: as_it_is });
                }
                (Way::Convert(conversion), Some(from), _) => {
                    self.copies.push(Copy { name: name.clone(), from, conversion: *conversion });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Fills the maps made anew with what they lack of the old ones' entries.
    pub(crate) fn copy(&self, step: &mut Step) -> Result<()> {
        for c in &self.copies {
            step(&format!("copy {}", c.name))?;
            let to = open(&self.dir.join(&c.name))?;
            copy(&c.from, &to, c.conversion).map_err(|e| Error::syscall("take over the entries of map", &c.name, e))?;
        }
        Ok(())
    }

    /// Pins the links of other layouts in this one's folders; `known` says which of a folder are still wanted.
    pub(crate) fn take_links(&self, folder: &str, known: impl Fn(&str) -> bool, step: &mut Step) -> Result<()> {
        for from in self.others.iter().map(|o| o.join(folder)) {
            let mut names: Vec<_> =
                entries(&from)?.iter().filter_map(|p| Some(p.file_name()?.to_str()?.to_owned())).collect();
            names.sort();
            for name in names.iter().filter(|n| known(n)) {
                step(&format!("take over {folder}/{name}"))?;
                let path = self.dir.join(folder).join(name);
                if path.exists() {
                    continue;
                }
                let link = open_pin(&from.join(name))?;
                sys::pin(link.as_fd(), &path).map_err(|e| Error::syscall("pin", path.display(), e))?;
            }
        }
        Ok(())
    }

    /// After the last old program: what it has written since, then its folder goes.
    pub(crate) fn finish(self, step: &mut Step) -> Result<()> {
        self.copy(step)?;
        self.others.iter().try_for_each(|other| remove(other, step))
    }
}

fn lost(folder: &Path, Lost { map, had, wanted }: Lost) -> Error {
    Error::Shape { map, folder: folder.to_owned(), had, wanted }
}

/// Paths in a folder that may not be there.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        Err(e) => Err(Error::syscall("list", folder.display(), e)),
        Ok(entries) => Ok(entries.flatten().map(|e| e.path()).collect()),
    }
}

/// Removes a layout's folder with all its pins.
pub(crate) fn remove(dir: &Path, step: &mut Step) -> Result<()> {
    // Another layout may have other folders.
    let folders: Vec<PathBuf> = entries(dir)?.into_iter().filter(|path| path.is_dir()).collect();
    for folder in folders.into_iter().chain([dir.to_owned()]) {
        step(&format!("remove {}", folder.display()))?;
        for path in entries(&folder)? {
            fs::remove_file(&path).map_err(|e| Error::syscall("unpin", path.display(), e))?;
        }
        match fs::remove_dir(&folder) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Error::syscall("remove", folder.display(), e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Entries that are there stay. Entries of an array always are: those that are not zero stay.
fn copy(from: &Old, to: &Old, conversion: Conversion) -> io::Result<()> {
    let put = |key: &[u8], value: &[u8]| {
        let Some((key, value)) = conversion(key, value) else { return Ok(()) };
        let sizes = (to.shape.key as usize, value_size(&to.shape)?);
        if (key.len(), value.len()) != sizes {
            return Err(io::Error::other("the conversion gives entries of another size"));
        }
        if to.shape.hash() {
            return sys::map_add(to.fd.as_fd(), &key, &value).map(drop);
        }
        let mut present = vec![0; value.len()];
        match sys::map_lookup(to.fd.as_fd(), &key, &mut present)? && present.iter().all(|b| *b == 0) {
            true => sys::map_update(to.fd.as_fd(), &key, &value),
            false => Ok(()),
        }
    };
    if from.shape.hash() { each_of_hash(from.fd.as_fd(), &from.shape, put) } else { each_of_array(from, put) }
}

/// Bytes of a value as user space reads it.
fn value_size(shape: &Shape) -> io::Result<usize> {
    let value = shape.value as usize;
    if shape.kind != kind::PERCPU_ARRAY {
        return Ok(value);
    }
    Ok(value.next_multiple_of(8) * possible_cpus().map_err(io::Error::other)?)
}

fn each_of_hash(
    map: BorrowedFd<'_>,
    shape: &Shape,
    mut put: impl FnMut(&[u8], &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (key, value) = (shape.key as usize, shape.value as usize);
    let (mut cursor, mut count) = (Cursor::default(), 1024);
    loop {
        let (mut keys, mut values) = (vec![0; count * key], vec![0; count * value]);
        let (n, end) = match sys::map_batch(map, &mut cursor, &mut keys, &mut values, count as u32) {
            // One bucket has more.
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                count *= 2;
                continue;
            }
            other => other?,
        };
        keys.chunks_exact(key).zip(values.chunks_exact(value)).take(n as usize).try_for_each(|(k, v)| put(k, v))?;
        if end {
            return Ok(());
        }
    }
}

fn each_of_array(from: &Old, mut put: impl FnMut(&[u8], &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut value = vec![0; value_size(&from.shape)?];
    for index in 0..from.shape.entries {
        let key = index.to_ne_bytes();
        sys::map_lookup(from.fd.as_fd(), &key, &mut value)?;
        if value.iter().any(|b| *b != 0) {
            put(&key, &value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "upgrade_tests.rs"]
mod tests;
