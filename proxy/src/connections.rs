//! The connections of one endpoint: how many are open, and who waits until there is room for his request.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};
use tokio::sync::{Notify, futures::Notified};

/// Used by one worker only, but connections belong to tasks that may end on any thread.
#[derive(Debug, Default)]
pub struct Connections {
    open: AtomicU32,
    room: Notify,
}

impl Connections {
    /// Those that are open or being opened.
    pub fn open(&self) -> u32 {
        self.open.load(Ordering::Relaxed)
    }

    /// Ends once there may be room at this endpoint; see [`Notify::notified`] for what has come before.
    pub fn room(&self) -> Notified<'_> {
        self.room.notified()
    }

    /// One has room for a request, or is gone, so that another one may be opened: who waits longest looks again.
    pub fn made_room(&self) {
        self.room.notify_one();
    }
}

/// A connection that is open or being opened; counted until dropped.
#[derive(Debug)]
pub struct Counted(Arc<Connections>);

impl Counted {
    pub fn new(of: &Arc<Connections>) -> Self {
        of.open.fetch_add(1, Ordering::Relaxed);
        Self(of.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
        self.0.made_room();
    }
}
