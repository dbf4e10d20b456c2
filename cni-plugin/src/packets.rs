//! The packet programs on links of the node, all of it in the namespace that the calling thread, or the connection, is in.
//!
//! A pod's link has them as filters of the `clsact` discipline on every kernel: to attach a tcx link waits for a grace
//! period of RCU (some 15 ms) while the kernel's whole network configuration is locked, and every pod would wait for
//! every other. The node's own links are few and long-lived: they have tcx links where the kernel knows them (Linux 6.6),
//! which others cannot replace by accident, else filters too.

use sluice_ebpf::loader::{self, DEVICE_PACKETS, POD_PACKETS, Packets};
use sluice_netlink::{
    Connection,
    filter::{self, Direction},
};
use std::{os::fd::AsFd, path::Path};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Programs(#[from] sluice_ebpf::Error),
    #[error(transparent)]
    Link(#[from] sluice_netlink::Error),
}

impl Error {
    /// The link is gone, and with it what was on it.
    pub fn is_gone(&self) -> bool {
        let errno = match self {
            Self::Programs(e) => e.errno(),
            Self::Link(e) => e.errno(),
        };
        errno == Some(rustix::io::Errno::NODEV.raw_os_error())
    }
}

type Result<T> = std::result::Result<T, Error>;

/// On the node's end of a pod's link, in place of what is there.
pub fn attach_pod(bpffs: &Path, connection: &mut Connection, ifindex: u32) -> Result<()> {
    attach_filters(bpffs, connection, &POD_PACKETS, ifindex)
}

/// Whether a pod's link has them.
pub fn pod_attached(connection: &mut Connection, ifindex: u32) -> Result<bool> {
    for p in &POD_PACKETS {
        if filter::find(connection, ifindex, direction(p), p.program)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// On a link of the node's own, as filters or as tcx links; the other way's go. True where one was missing.
pub fn attach_device(bpffs: &Path, ifindex: u32, filters: bool) -> Result<bool> {
    if filters {
        attach_filters(bpffs, &mut Connection::open()?, &DEVICE_PACKETS, ifindex)?;
        loader::detach_device(bpffs, ifindex)?;
        return Ok(true);
    }
    let missing = loader::attach_device(bpffs, ifindex)?;
    if missing {
        detach_filters(&DEVICE_PACKETS, ifindex)?;
    }
    Ok(missing)
}

/// Off a link of the node's own, which may be gone.
pub fn detach_device(bpffs: &Path, ifindex: u32) -> Result<()> {
    loader::detach_device(bpffs, ifindex)?;
    loader::detach_xdp(bpffs, ifindex)?;
    detach_filters(&DEVICE_PACKETS, ifindex)
}

/// After new programs were loaded: on the links of pods, by index, where no pin replaces them. Pods may end meanwhile.
pub fn renew_pods(bpffs: &Path, connection: &mut Connection, links: &[u32]) -> Result<()> {
    for ifindex in links {
        match attach_pod(bpffs, connection, *ifindex) {
            Err(e) if e.is_gone() => {}
            other => other?,
        }
    }
    Ok(loader::detach_pod_links(bpffs)?)
}

fn direction(p: &Packets) -> Direction {
    if p.ingress { Direction::Ingress } else { Direction::Egress }
}

fn attach_filters(bpffs: &Path, connection: &mut Connection, programs: &[Packets], ifindex: u32) -> Result<()> {
    let open = |p: &Packets| loader::packet_program(bpffs, p.program);
    let opened = programs.iter().map(open).collect::<std::result::Result<Vec<_>, _>>()?;
    let named = programs.iter().zip(&opened);
    let all: Vec<_> = named.map(|(p, program)| (direction(p), p.program, program.as_fd())).collect();
    Ok(filter::attach_all(connection, ifindex, &all)?)
}

/// An empty `clsact` is another's unless it was ours that left it empty.
fn detach_filters(programs: &[Packets], ifindex: u32) -> Result<()> {
    let mut connection = Connection::open()?;
    let mut detach = || -> std::result::Result<(), sluice_netlink::Error> {
        let mut ours = false;
        for p in programs {
            ours |= filter::detach(&mut connection, ifindex, direction(p), p.program)?;
        }
        if ours { filter::remove_clsact(&mut connection, ifindex).map(drop) } else { Ok(()) }
    };
    match detach().map_err(Error::Link) {
        Err(e) if e.is_gone() => Ok(()),
        other => other,
    }
}
