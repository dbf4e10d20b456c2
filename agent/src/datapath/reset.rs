//! Connected UDP sockets whose backend a service, node port or host port has lost are closed: their owners are told at once (ECONNABORTED) and
//! connect again, instead of sending to nobody for ever. TCP goes on until the backend ends it. A socket that was
//! connected to a pod's own address, or by another service that still has the backend, is not touched.

use sluice_ebpf::{
    layout::Target,
    table::{ServiceTable, Stranded},
};
use sluice_netlink::{Netns, diag};
use std::path::PathBuf;

/// What could not be looked through; its sockets stay.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read which sockets the lost backends had")]
    Translations(#[source] sluice_ebpf::Error),
    #[error("close sockets to lost backends in {netns}")]
    Namespace {
        netns: String,
        #[source]
        cause: sluice_netlink::Error,
    },
}

/// Closes them in the node's own namespace and in those of its pods. How many, and what failed.
pub fn reset(
    table: &ServiceTable,
    stranded: Result<Stranded, sluice_ebpf::Error>,
    pods: impl IntoIterator<Item = PathBuf>,
) -> (usize, Vec<Error>) {
    let stranded = match stranded {
        Ok(stranded) if stranded.is_empty() => return (0, vec![]),
        Ok(stranded) => stranded,
        Err(e) => return (0, vec![Error::Translations(e)]),
    };
    let (mut closed, mut failed) = (0, vec![]);
    let mut take = |netns: String, done: Result<usize, sluice_netlink::Error>| match done {
        Ok(n) => closed += n,
        Err(cause) => failed.push(Error::Namespace { netns, cause }),
    };
    take("the node".into(), close(&stranded));
    for path in pods {
        // One that has gone has no sockets.
        if let Ok(netns) = Netns::open(&path) {
            take(path.display().to_string(), netns.run(|| close(&stranded)).and_then(|done| done));
        }
    }
    // What could not be looked through is tried again.
    if failed.is_empty() {
        failed.extend(table.forget(&stranded).err().map(Error::Translations));
    }
    (closed, failed)
}

/// In the calling thread's namespace. Only a socket that still is connected to the backend that was lost.
fn close(stranded: &Stranded) -> Result<usize, sluice_netlink::Error> {
    let mut sockets = diag::Sockets::open()?;
    let mut closed = 0;
    for socket in sockets.connected_udp()? {
        let peer = Target { addr: sluice_ebpf::addr(socket.peer.ip()), port_be: socket.peer.port().to_be() };
        if stranded.get(&socket.cookie).is_some_and(|lost| lost.contains(&peer)) {
            closed += usize::from(sockets.destroy(&socket)?);
        }
    }
    Ok(closed)
}
