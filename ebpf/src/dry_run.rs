//! Runs a packet program on a packet that is on no link, with the maps that are pinned: for tests, benches and `check`. And the
//! program that steers connections to pods, on one that nobody has begun.
//! What the program does to connections, counters and events it does; what it sends is not sent.

use crate::{
    Error,
    error::Result,
    loader::{STEER, XDP},
    maps::{open_pin, pin_dir},
    sys,
};
use std::{
    net::{IpAddr, SocketAddr},
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

/// A connection, or a datagram, that comes to a pod.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    pub proto: u8,
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// Of the link that it comes over. Kernels take 0 only.
    pub ifindex: u32,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steered {
    pub passed: bool,
    /// Cookie of the listener that was chosen for it; 0: whose it is without the program.
    pub socket: u64,
}

/// The pinned program `steer_pod`.
pub struct Steering {
    fd: OwnedFd,
}

/// Words of `struct bpf_sk_lookup` (linux/bpf.h). Of its fields the first is the chosen socket's cookie, in two words.
const LOOKUP_WORDS: usize = 18;
const LOOKUP_FAMILY: usize = 2;
const LOOKUP_PROTOCOL: usize = 3;
const LOOKUP_REMOTE_IP4: usize = 4;
const LOOKUP_REMOTE_IP6: usize = 5;
const LOOKUP_REMOTE_PORT: usize = 9;
const LOOKUP_LOCAL_IP4: usize = 10;
const LOOKUP_LOCAL_IP6: usize = 11;
const LOOKUP_LOCAL_PORT: usize = 15;
const LOOKUP_IFINDEX: usize = 16;

impl Steering {
    pub fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self { fd: open_pin(&pin_dir(bpffs).join(STEER))? })
    }

    pub fn run(&self, arrival: &Arrival) -> Result<Steered> {
        let mut c = [0u32; LOOKUP_WORDS];
        let family = if arrival.to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        (c[LOOKUP_FAMILY], c[LOOKUP_PROTOCOL]) = (family as u32, u32::from(arrival.proto));
        for (address, v4, v6) in [
            (arrival.from.ip(), LOOKUP_REMOTE_IP4, LOOKUP_REMOTE_IP6),
            (arrival.to.ip(), LOOKUP_LOCAL_IP4, LOOKUP_LOCAL_IP6),
        ] {
            match address {
                IpAddr::V4(a) => c[v4] = u32::from_ne_bytes(a.octets()),
                IpAddr::V6(_) => c[v6..v6 + 4].copy_from_slice(&crate::addr(address).words),
            }
        }
        // The one in network order, and half a word; the other in host order.
        c[LOOKUP_REMOTE_PORT] = u32::from_ne_bytes({
            let [high, low] = arrival.from.port().to_be_bytes();
            [high, low, 0, 0]
        });
        (c[LOOKUP_LOCAL_PORT], c[LOOKUP_IFINDEX]) = (u32::from(arrival.to.port()), arrival.ifindex);
        let verdict =
            sys::test_run_context(self.fd.as_fd(), &mut c).map_err(|e| Error::syscall("run program", STEER, e))?;
        let words = [c[0].to_ne_bytes(), c[1].to_ne_bytes()].concat();
        let socket = u64::from_ne_bytes(words.try_into().expect("two words"));
        Ok(Steered { passed: verdict == 1, socket })
    }
}
