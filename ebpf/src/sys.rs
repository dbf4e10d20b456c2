//! bpf(2), one safe function per command that is used. Sizes are the caller's to get right: only `maps` and `loader`
//! call these.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const MAP_LOOKUP_ELEM: i64 = 1;
const MAP_UPDATE_ELEM: i64 = 2;
const MAP_DELETE_ELEM: i64 = 3;
const MAP_GET_NEXT_KEY: i64 = 4;
const OBJ_PIN: i64 = 6;
const OBJ_GET: i64 = 7;
const PROG_TEST_RUN: i64 = 10;
const OBJ_GET_INFO_BY_FD: i64 = 15;
const MAP_LOOKUP_AND_DELETE_ELEM: i64 = 21;
const MAP_LOOKUP_BATCH: i64 = 24;
const LINK_CREATE: i64 = 28;
const LINK_UPDATE: i64 = 29;

/// Hooks, as `enum bpf_attach_type` numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Hook {
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getpeername4 = 29,
    Getpeername6 = 30,
    SockRelease = 34,
    SkLookup = 36,
    Xdp = 37,
    TcxIngress = 46,
    TcxEgress = 47,
}

#[repr(C)]
#[derive(Default)]
struct Elem {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoRequest {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    hook: u32,
    flags: u32,
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old: u32,
}

#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    verdict: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration_ns: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
}

/// `attr` must be the kernel's layout for `command`, and pointers in it valid for the call.
fn bpf<T>(command: i64, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the attribute lives through the call and its true size is passed; the callers below fill it with
    // pointers to buffers of the size that the map's definition says (checked when a map is opened).
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as i32) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: a descriptor that the kernel has just returned and nobody else holds.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    bpf(OBJ_PIN, &mut Object { path: path.as_ptr() as u64, fd: raw(fd), flags: 0 }).map(drop)
}

pub(crate) fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    bpf(OBJ_GET, &mut Object { path: path.as_ptr() as u64, fd: 0, flags: 0 }).map(owned)
}

pub(crate) fn link_create(program: BorrowedFd<'_>, target: BorrowedFd<'_>, hook: Hook) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate { program: raw(program), target: raw(target), hook: hook as u32, flags: 0 };
    bpf(LINK_CREATE, &mut attr).map(owned)
}

/// At a network device, by its index in the calling thread's namespace. Of tcx `EINVAL` before Linux 6.6.
pub(crate) fn device_link_create(program: BorrowedFd<'_>, ifindex: u32, hook: Hook, flags: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate { program: raw(program), target: ifindex, hook: hook as u32, flags };
    bpf(LINK_CREATE, &mut attr).map(owned)
}

/// Puts `program` into `link` in place of the one there: no packet and no call sees none.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(LINK_UPDATE, &mut LinkUpdate { link: raw(link), program: raw(program), flags: 0, old: 0 }).map(drop)
}

fn info<const N: usize>(fd: BorrowedFd<'_>) -> io::Result<[u32; N]> {
    let mut words = [0u32; N];
    let len = size_of_val(&words) as u32;
    bpf(OBJ_GET_INFO_BY_FD, &mut InfoRequest { fd: raw(fd), len, info: words.as_mut_ptr() as u64 })?;
    Ok(words)
}

/// (key size, value size) of a map.
pub(crate) fn map_sizes(map: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    map_info(map).map(|w| (w[2], w[3]))
}

/// `struct bpf_map_info` begins with type, id, key_size, value_size, max_entries, map_flags.
pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<[u32; 6]> {
    info(map)
}

/// What a link is on: `struct bpf_link_info` begins with type, id, prog_id, padding, then for a cgroup its 64-bit id
/// and the hook, for a namespace its inode number and the hook. A link whose target is gone says 0.
pub(crate) struct LinkInfo {
    pub(crate) id: u32,
    pub(crate) program: u32,
    words: [u32; 2],
}

impl LinkInfo {
    /// Of a link at a network device; 0 when the device is gone.
    pub(crate) fn ifindex(&self) -> u32 {
        self.words[0]
    }

    pub(crate) fn cgroup(&self) -> u64 {
        self.words[0] as u64 | (self.words[1] as u64) << 32
    }
}

pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info::<8>(link).map(|w| LinkInfo { id: w[1], program: w[2], words: [w[4], w[5]] })
}

/// `struct bpf_prog_info` begins with type, id.
pub(crate) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    info::<2>(program).map(|w| w[1])
}

pub(crate) fn map_lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr =
        Elem { map: raw(map), key: key.as_ptr() as u64, value: value.as_mut_ptr() as u64, ..Elem::default() };
    found(bpf(MAP_LOOKUP_ELEM, &mut attr))
}

pub(crate) fn map_update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr = Elem { map: raw(map), key: key.as_ptr() as u64, value: value.as_ptr() as u64, ..Elem::default() };
    bpf(MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Writes an entry that is not there yet, of a hash map; false where it is.
pub(crate) fn map_add(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<bool> {
    const NOEXIST: u64 = 1;
    let (key, value) = (key.as_ptr() as u64, value.as_ptr() as u64);
    match bpf(MAP_UPDATE_ELEM, &mut Elem { map: raw(map), key, value, flags: NOEXIST, ..Elem::default() }) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Runs a packet program `repeat` times on one packet; (verdict, bytes of the packet afterwards, nanoseconds per run).
/// The context is that of the program's hook.
pub(crate) fn test_run(
    program: BorrowedFd<'_>,
    packet: &[u8],
    context: &[u32],
    after: &mut [u8],
    repeat: u32,
) -> io::Result<(i32, usize, u32)> {
    let mut attr = TestRun {
        program: raw(program),
        size_in: packet.len() as u32,
        size_out: after.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: after.as_mut_ptr() as u64,
        repeat,
        context_size_in: size_of_val(context) as u32,
        context_in: context.as_ptr() as u64,
        ..TestRun::default()
    };
    bpf(PROG_TEST_RUN, &mut attr)?;
    Ok((attr.verdict as i32, attr.size_out as usize, attr.duration_ns))
}

/// Runs a program that has no packet, once, on a context, which is afterwards as the kernel has left it; the verdict.
pub(crate) fn test_run_context(program: BorrowedFd<'_>, context: &mut [u32]) -> io::Result<i32> {
    let (size, at) = (size_of_val(context) as u32, context.as_mut_ptr() as u64);
    let mut attr = TestRun {
        program: raw(program),
        context_size_in: size,
        context_size_out: size,
        context_in: at,
        context_out: at,
        ..TestRun::default()
    };
    bpf(PROG_TEST_RUN, &mut attr)?;
    Ok(attr.verdict as i32)
}

/// Whether there was such an entry.
pub(crate) fn map_delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    found(bpf(MAP_DELETE_ELEM, &mut Elem { map: raw(map), key: key.as_ptr() as u64, ..Elem::default() }))
}

/// Removes an entry of a hash map and writes what it was, in one; whether there was one. Since Linux 5.14.
pub(crate) fn map_take(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let (key, value) = (key.as_ptr() as u64, value.as_mut_ptr() as u64);
    found(bpf(MAP_LOOKUP_AND_DELETE_ELEM, &mut Elem { map: raw(map), key, value, ..Elem::default() }))
}

/// Writes the key after `key` (the first for `None`); false at the end.
pub(crate) fn map_next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let key = key.map_or(0, |k| k.as_ptr() as u64);
    found(bpf(MAP_GET_NEXT_KEY, &mut Elem { map: raw(map), key, value: next.as_mut_ptr() as u64, ..Elem::default() }))
}

fn found(r: io::Result<i32>) -> io::Result<bool> {
    match r {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// A place in a hash map between two batches.
#[derive(Default)]
pub struct Cursor {
    bucket: u32,
    begun: bool,
}

/// Reads up to `count` entries into the buffers, which hold that many; (entries read, end reached).
pub(crate) fn map_batch(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> io::Result<(u32, bool)> {
    let mut next = 0u32;
    let mut attr = Batch {
        from: if cursor.begun { &raw const cursor.bucket as u64 } else { 0 },
        to: &raw mut next as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map: raw(map),
        ..Batch::default()
    };
    let more = found(bpf(MAP_LOOKUP_BATCH, &mut attr))?;
    *cursor = Cursor { bucket: next, begun: true };
    Ok((attr.count, !more))
}
