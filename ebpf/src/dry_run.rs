//! Runs a packet program on a packet that is on no link, with the maps that are pinned: for tests, benches and `check`.
//! What the program does to connections, counters and events it does; what it sends is not sent.

use crate::{
    Error,
    error::Result,
    loader::XDP,
    maps::{open_pin, pin_dir},
    sys,
};
use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

/// What a program says of a packet (linux/pkt_cls.h, linux/bpf.h).
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

/// A pinned program: `from_pod`, `from_wire`, `from_host`, or `from_wire_xdp` of the hook XDP.
pub struct Program {
    fd: OwnedFd,
    name: String,
}

/// Words of `struct __sk_buff` and of `struct xdp_md` (linux/bpf.h), and where they hold the link.
const SKB_WORDS: usize = 48;
const SKB_IFINDEX: usize = 10;
const XDP_WORDS: usize = 6;
const XDP_DATA_END: usize = 1;
const XDP_IFINDEX: usize = 3;
const LO: u32 = 1;

impl Program {
    pub fn open(bpffs: &Path, name: &str) -> Result<Self> {
        Ok(Self { fd: open_pin(&pin_dir(bpffs).join(name))?, name: name.to_owned() })
    }

    /// The packet begins with its Ethernet header; it comes in over `lo` of the calling thread's namespace. With more
    /// than one run, each works on what the run before has left.
    pub fn run(&self, packet: &[u8], repeat: u32) -> Result<Outcome> {
        self.run_at(LO, packet, repeat)
    }

    /// [`Self::run`] over another link of that namespace.
    pub fn run_at(&self, ifindex: u32, packet: &[u8], repeat: u32) -> Result<Outcome> {
        let mut after = vec![0; packet.len() + SPARE];
        let mut context = [0; SKB_WORDS];
        let xdp = self.name == XDP;
        let words = if xdp {
            (context[XDP_DATA_END], context[XDP_IFINDEX]) = (packet.len() as u32, ifindex);
            XDP_WORDS
        } else {
            context[SKB_IFINDEX] = ifindex;
            SKB_WORDS
        };
        let (verdict, size, nanoseconds) =
            sys::test_run(self.fd.as_fd(), packet, &context[..words], &mut after, repeat)
                .map_err(|e| Error::syscall("run program", &self.name, e))?;
        after.truncate(size);
        let verdict = match (xdp, verdict) {
            (false, -1) | (true, 2) => Verdict::Next,
            (false, 2) | (true, 1) => Verdict::Drop,
            (false, 7) | (true, 3) => Verdict::Redirect,
            (_, other) => Verdict::Other(other),
        };
        Ok(Outcome { verdict, packet: after, nanoseconds })
    }
}
