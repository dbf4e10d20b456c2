//! The packet programs on a link of the node: as tcx links where the kernel has them (Linux 6.6), else as filters of the
//! `clsact` discipline. Which of the two is in the programs' settings, so that plugin and agent do the same.
//!
//! All of it concerns links in the calling thread's namespace.

use sluice_ebpf::{
    common::CLSACT,
    loader::{self, DEVICE_PACKETS, POD_PACKETS, Packets},
    maps::pin_dir,
    settings::SettingsMap,
};
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

type Result<T> = std::result::Result<T, Error>;

/// Whether filters are used.
pub fn clsact(bpffs: &Path) -> Result<bool> {
    Ok(SettingsMap::open(&pin_dir(bpffs))?.get()?.flags & CLSACT != 0)
}

/// On the node's end of a pod's link; what is there already stays.
pub fn attach_pod(bpffs: &Path, netns_cookie: u64, ifindex: u32) -> Result<()> {
    match clsact(bpffs)? {
        true => attach_filters(bpffs, &POD_PACKETS, ifindex),
        false => Ok(loader::attach_pod_link(bpffs, netns_cookie, ifindex)?),
    }
}

/// Whether a pod's link has them.
pub fn pod_attached(bpffs: &Path, netns_cookie: u64, ifindex: u32) -> Result<bool> {
    if !clsact(bpffs)? {
        return Ok(loader::pod_link_attached(bpffs, netns_cookie));
    }
    let mut connection = Connection::open()?;
    for p in &POD_PACKETS {
        if filter::find(&mut connection, ifindex, direction(p), p.program)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// On a link of the node's own; programs of before are replaced. True where one was missing.
pub fn attach_device(bpffs: &Path, ifindex: u32) -> Result<bool> {
    match clsact(bpffs)? {
        true => attach_filters(bpffs, &DEVICE_PACKETS, ifindex).map(|()| true),
        false => Ok(loader::attach_device(bpffs, ifindex)?),
    }
}

/// Off a link of the node's own, which may be gone.
pub fn detach_device(bpffs: &Path, ifindex: u32) -> Result<()> {
    loader::detach_device(bpffs, ifindex)?;
    detach_filters(&DEVICE_PACKETS, ifindex)
}

/// After new programs were loaded: on the links of pods, by cookie and index, where no pin keeps them; and what the
/// other way has left goes.
pub fn renew_pods(bpffs: &Path, pods: &[(u64, u32)], before: bool) -> Result<()> {
    let now = clsact(bpffs)?;
    for (cookie, ifindex) in pods {
        match now {
            true => {
                attach_filters(bpffs, &POD_PACKETS, *ifindex)?;
                loader::detach_pod_link(bpffs, *cookie)?;
            }
            false if before => {
                loader::attach_pod_link(bpffs, *cookie, *ifindex)?;
                detach_filters(&POD_PACKETS, *ifindex)?;
            }
            false => {}
        }
    }
    Ok(())
}

fn direction(p: &Packets) -> Direction {
    if p.ingress { Direction::Ingress } else { Direction::Egress }
}

fn attach_filters(bpffs: &Path, programs: &[Packets], ifindex: u32) -> Result<()> {
    let mut connection = Connection::open()?;
    filter::ensure_clsact(&mut connection, ifindex)?;
    for p in programs {
        let program = loader::packet_program(bpffs, p.program)?;
        filter::attach(&mut connection, ifindex, direction(p), p.program, program.as_fd())?;
    }
    Ok(())
}

fn detach_filters(programs: &[Packets], ifindex: u32) -> Result<()> {
    let mut connection = Connection::open()?;
    let outcome =
        programs.iter().try_for_each(|p| filter::detach(&mut connection, ifindex, direction(p), p.program).map(drop));
    match outcome.and_then(|()| filter::remove_clsact(&mut connection, ifindex).map(drop)) {
        // With the link went what was on it.
        Err(e) if e.errno() == Some(rustix::io::Errno::NODEV.raw_os_error()) => Ok(()),
        other => Ok(other?),
    }
}
