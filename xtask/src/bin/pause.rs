//! The first process of a pod's sandbox: it holds the pod's namespaces and reaps what is left to it. Nothing else.

use rustix::process::{WaitOptions, wait};
use std::{thread, time::Duration};

fn main() {
    loop {
        // With a child there is something to wait for; without one, look again now and then.
        if wait(WaitOptions::empty()).is_err() {
            thread::sleep(Duration::from_secs(5));
        }
    }
}
