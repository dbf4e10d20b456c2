//! Namespaces that stand for machines, and end with the test.

use sluice_netlink::{Netns, ns};
use std::{
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

static MADE: AtomicU32 = AtomicU32::new(0);

pub struct Named(PathBuf);

impl Named {
    pub fn new(name: &str) -> (Self, Netns) {
        // Tests of one process use the same names at once.
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("sluice-test-{name}-{}-{number}", std::process::id()));
        let ns = ns::make_named(&path).expect("make (root is needed)");
        (Self(path), ns)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = ns::remove_named(&self.0);
    }
}
