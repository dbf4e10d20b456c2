//! Runs a packet program on a packet that is on no link, with the maps that are pinned: for tests, benches and `check`.
//! What the program does to connections, counters and events it does; what it sends is not sent.

use crate::{
    Error,
    error::Result,
    maps::{open_pin, pin_dir},
    sys,
};
use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

/// What a program says of a packet (linux/pkt_cls.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The packet goes on to the node's stack.
    Next,
    Drop,
    /// The program has sent it somewhere.
    Redirect,
    Other(i32),
}

/// The outcome of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: Verdict,
    pub packet: Vec<u8>,
    /// Mean of all runs.
    pub nanoseconds: u32,
}

/// Room for what an ICMP answer adds.
const SPARE: usize = 256;

/// A pinned program: `from_pod`, `from_wire` or `from_host`.
pub struct Program {
    fd: OwnedFd,
    name: String,
}

impl Program {
    pub fn open(bpffs: &Path, name: &str) -> Result<Self> {
        Ok(Self { fd: open_pin(&pin_dir(bpffs).join(name))?, name: name.to_owned() })
    }

    /// The packet begins with its Ethernet header; it comes in over `lo` of the calling thread's namespace. With more
    /// than one run, each works on what the run before has left.
    pub fn run(&self, packet: &[u8], repeat: u32) -> Result<Outcome> {
        let mut after = vec![0; packet.len() + SPARE];
        let (verdict, size, nanoseconds) = sys::test_run(self.fd.as_fd(), packet, &mut after, repeat)
            .map_err(|e| Error::syscall("run program", &self.name, e))?;
        after.truncate(size);
        let verdict = match verdict {
            -1 => Verdict::Next,
            2 => Verdict::Drop,
            7 => Verdict::Redirect,
            other => Verdict::Other(other),
        };
        Ok(Outcome { verdict, packet: after, nanoseconds })
    }
}
