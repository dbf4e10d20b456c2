//! Work that waits for a lock, the disk or the kernel, in the midst of asynchronous code.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Hands this thread's other tasks to another one meanwhile: on a node of two CPUs, two pods that waited at once would
/// else stop heartbeats, the view and names for all.
pub(crate) fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|h| h.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}
