//! Types and numbers shared by the kernel side and user space. No logic beyond conversions, no dependency.
//!
//! Byte order is decided here once: an [`Addr`] holds the 16 bytes of an IPv6 address as they travel (IPv4 as
//! `::ffff:a.b.c.d`), ports named `port_be` are in network order, ports named `port` in host order. Every type is
//! `repr(C)` without implicit padding and its size is asserted: it is also the layout of pinned maps, so that a change
//! here needs a new [`LAYOUT`].
#![no_std]
#![allow(unsafe_code)] // `unsafe impl Plain` only: each type below is padding-free plain data

mod limit;
mod reason;

pub use limit::{Bucket, Limit, Reports};
pub use reason::{MAX_REASONS, Reason};

/// Version of everything pinned: maps live under `/sys/fs/bpf/sluice/v<LAYOUT>/`. What a new one asks for: ARCHITECTURE.md,
/// "Hooks and pins".
pub const LAYOUT: u32 = 1;

/// Types whose bytes are all initialized and all valid.
///
/// # Safety
/// The type is `repr(C)`, has no padding and every bit pattern is a value of it.
pub unsafe trait Plain: Copy + 'static {}

macro_rules! plain {
    ($($t:ty = $size:literal),* $(,)?) => { $(
        // SAFETY: repr(C) of integers and arrays of them; the assert below shows that no padding was added.
        unsafe impl Plain for $t {}
        const _: () = assert!(size_of::<$t>() == $size);
    )* };
}

/// An address of either family, v4-mapped, in network order.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Addr {
    pub words: [u32; 4],
}

const MAPPED: u32 = 0xffff_u32.to_be();

impl Addr {
    pub const UNSET: Self = Self { words: [0; 4] };

    /// From an IPv4 address as the kernel keeps it (network order in a u32).
    #[inline(always)]
    pub const fn from_v4(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self {
            words: [
                u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
                u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
                u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
                u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
            ],
        }
    }

    pub const fn octets(self) -> [u8; 16] {
        let [a, b, c, d] = self.words;
        let (a, b, c, d) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes());
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// Compared word by word: the derived `==` may call memcmp, which the kernel side does not have.
    #[inline(always)]
    pub const fn same(&self, o: &Self) -> bool {
        self.words[0] == o.words[0]
            && self.words[1] == o.words[1]
            && self.words[2] == o.words[2]
            && self.words[3] == o.words[3]
    }

    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.words[3]) >> 24 == 127;
        }
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && self.words[3] == 1_u32.to_be()
    }

    /// 0.0.0.0 or ::, which a connection takes for loopback.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        let high = self.words[0] | self.words[1] | self.words[3];
        high == 0 && (self.words[2] == 0 || self.words[2] == MAPPED)
    }

    #[inline(always)]
    pub const fn is_multicast(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.words[3]) >> 28 == 0xe || self.words[3] == u32::MAX;
        }
        u32::from_be(self.words[0]) >> 24 == 0xff
    }

    /// The unspecified address of the same family.
    #[inline(always)]
    pub const fn unspecified(&self) -> Self {
        Self { words: [0, 0, if self.is_v4() { MAPPED } else { 0 }, 0] }
    }

    #[inline(always)]
    pub const fn is_link_local(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.words[3]) >> 16 == 0xa9fe;
        }
        u32::from_be(self.words[0]) >> 22 == 0xfe80 >> 6
    }
}

/// Transport protocol numbers as in the IP header.
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

/// Callers in the cluster: pods and nodes.
pub const INSIDE: u8 = 0;
/// Callers that come in over a node's own links. A key that is not there for them is looked up as [`INSIDE`].
pub const OUTSIDE: u8 = 1;

/// A virtual address, port and protocol. Node ports are under the unspecified address of their family
/// (`0.0.0.0`, mapped, or `::`), which stands for every address of the node.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServiceKey {
    pub addr: Addr,
    pub port_be: u16,
    pub proto: u8,
    /// [`INSIDE`] or [`OUTSIDE`].
    pub scope: u8,
}

/// Ports of every node's addresses that node ports are taken from (Kubernetes' default range); nothing else on the node
/// gets them by itself.
pub const NODE_PORTS: core::ops::RangeInclusive<u16> = 30_000..=32_767;
/// Source ports for connections that go on under an address of the node: above the kernel's default
/// `ip_local_port_range`, and taken out of it where it is wider.
pub const SNAT_PORTS: core::ops::RangeInclusive<u16> = 61_000..=65_535;

/// Most weighted groups behind one service port: Gateway API allows 16 backends per rule.
pub const MAX_GROUPS: usize = 16;

/// One weighted group: takes the numbers below `upto` that the group before it does not.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Group {
    /// Cumulative weight; that of the last group is the total.
    pub upto: u32,
    /// Index of its first backend in the set.
    pub first: u32,
    /// Number of its backends, never 0.
    pub count: u32,
}

/// The service answers at the node itself and is never captured by a sidecar.
pub const SERVICE_NODE_LOCAL: u32 = 1;
/// Callers from outside have an entry of their own ([`OUTSIDE`]).
pub const SERVICE_OUTSIDE: u32 = 2;
/// Only clients in the ranges of its set may use it ([`SourceRange`]).
pub const SERVICE_RESTRICTED: u32 = 4;
/// The node's own processes may too.
pub const SERVICE_NODE_ADMITTED: u32 = 8;

/// Where flags keep the binary logarithm of the length of the service's Maglev table; 0 there: it has none.
pub const MAGLEV_SHIFT: u32 = 8;
/// Slots in one entry of the map of Maglev tables.
pub const MAGLEV_BLOCK: usize = 256;
/// A slot whose share of the connections is refused.
pub const MAGLEV_NOBODY: u16 = u16::MAX;

/// A block of a service's Maglev table, which says for each slot the index of a backend.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MaglevKey {
    pub set: u32,
    pub block: u32,
}

pub type MaglevBlock = [u16; MAGLEV_BLOCK];

/// What a service key stands for at present. Replaced as a whole, so that a reader sees one state or the next.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Service {
    /// Names the backends that belong to this state; never used twice.
    pub set: u32,
    /// 0: no backend, connections are refused.
    pub groups: u32,
    pub flags: u32,
    /// Seconds for which a client without a new connection keeps its backend; 0: each connection chooses.
    pub affinity_s: u32,
    pub group: [Group; MAX_GROUPS],
}

#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BackendKey {
    pub set: u32,
    pub index: u32,
}

/// Where a connection goes, and for whom this entry was written: a reader that raced with a replacement sees a
/// stranger's entry and looks again.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Backend {
    pub addr: Addr,
    pub port_be: u16,
    pub service_port_be: u16,
    /// Last word of the service's address.
    pub service_word: u32,
}

/// A backend by its address: whether it still belongs to a set. Written for services with affinity only.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MemberKey {
    pub set: u32,
    pub port_be: u16,
    pub pad: u16,
    pub addr: Addr,
}

/// A client of a service that not all may use.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Source {
    pub set: u32,
    pub addr: Addr,
}

impl Source {
    /// Of the set and of the address.
    pub const BITS: u32 = 32 + 128;
}

/// Clients that may use it, for longest-prefix lookup: `len` counts the bits of the set, then of the 128 of the address.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SourceRange {
    pub len: u32,
    pub source: Source,
}

/// A client of a service: all sockets of one network namespace.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub struct AffinityKey {
    pub netns: u64,
    pub addr: Addr,
    pub port_be: u16,
    pub proto: u8,
    pub pad: [u8; 5],
}

/// The backend that such a client has, and when it last connected.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Affinity {
    pub addr: Addr,
    pub port_be: u16,
    pub pad: u16,
    /// Seconds since boot.
    pub used_s: u32,
}

/// The same of a client that is known by its address, and not by its socket.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub struct ClientKey {
    pub client: Addr,
    pub service: ServiceKey,
}

/// A packet's addresses and ports. Of an ICMP echo the identifier is the port of the side that asks, and the other is 0.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Flow {
    pub src: Addr,
    pub dst: Addr,
    pub sport_be: u16,
    pub dport_be: u16,
    pub proto: u8,
    pub pad: [u8; 3],
}

impl Flow {
    #[inline(always)]
    pub const fn same(&self, o: &Self) -> bool {
        self.src.same(&o.src)
            && self.dst.same(&o.dst)
            && self.sport_be == o.sport_be
            && self.dport_be == o.dport_be
            && self.proto == o.proto
    }

    /// As answers to it come.
    #[inline(always)]
    pub const fn flipped(&self) -> Self {
        Self { src: self.dst, dst: self.src, sport_be: self.dport_be, dport_be: self.sport_be, ..*self }
    }
}

/// What becomes of the packets of one [`Flow`]: two of these, one for each direction, are a connection.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Translation {
    /// What the packet says afterwards.
    pub to: Flow,
    /// When the last packet came, in [ticks](TICK_SHIFT) of the monotonic clock; written once a tick at most.
    pub used: u32,
    /// [`CT_REPLY`] and so on; with [`CT_HERE`], the upper bits are a [`stamp`].
    pub flags: u32,
}

/// A tick is 2^30 nanoseconds (1.07 s): the programs shift where they would have to divide.
pub const TICK_SHIFT: u32 = 30;

/// The direction of the answers.
pub const CT_REPLY: u32 = 1;
/// An answer was seen: the connection lives for longer.
pub const CT_ANSWERED: u32 = 2;
/// A FIN was seen in this direction.
pub const CT_FIN: u32 = 4;
/// Over: a RST, or FINs from both sides.
pub const CT_CLOSED: u32 = 8;
/// Packets stay as they are and go to the node of `to.dst`, which answers by itself: there is no other direction here.
/// Answered is one whose caller has gone on.
pub const CT_RELAYED: u32 = 16;
/// The caller has not gone on since it was answered: of TCP, the handshake is not complete. Such entries are in a map of their
/// own; those of the other are without, also from before this flag.
pub const CT_HALF: u32 = 32;
/// The service has lost the backend: what goes on goes on, but who begins gets another one. Written by the agent.
pub const CT_WITHDRAWN: u32 = 64;
/// `to.dst` was a pod of this node, and the upper bits say which: the address may be another's since.
pub const CT_HERE: u32 = 1 << 31;

/// Bits of flags that are not a stamp.
const STAMP_SHIFT: u32 = 8;
/// What tells a pod from those that have its address later: [`CT_HERE`], and the end of its namespace's cookie. Cookies are
/// counted up, so that it takes eight million namespaces for two to look alike.
#[inline(always)]
pub const fn stamp(netns: u64) -> u32 {
    CT_HERE | (netns as u32) << STAMP_SHIFT & !CT_HERE
}

/// Ticks without a packet after which a connection is forgotten: TCP that is open, that was never answered, that was answered
/// and has not gone on, that is over; UDP and ICMP that was answered, and that was not (RFC 5382 §5 asks for 2 h 4 min, RFC 4787
/// §4.3 for 2 min). What has not begun in earnest is kept for as short as a caller's second and third try need: anybody can
/// begin any number under addresses that are not his.
pub mod timeout {
    pub const TCP_OPEN: u32 = 7_000;
    pub const TCP_NEW: u32 = 15;
    pub const TCP_HALF: u32 = 30;
    pub const TCP_CLOSED: u32 = 10;
    pub const ANSWERED: u32 = 120;
    pub const NEW: u32 = 30;
}

impl Translation {
    /// Ticks for which it outlives its last packet.
    #[inline(always)]
    pub const fn timeout(&self) -> u32 {
        let answered = self.flags & CT_ANSWERED != 0;
        match (self.to.proto, self.flags & CT_CLOSED != 0) {
            (TCP, true) => timeout::TCP_CLOSED,
            // The other side's FIN is not seen here; a caller that only reads goes on acknowledging.
            (TCP, false) if self.flags & (CT_RELAYED | CT_FIN) == CT_RELAYED | CT_FIN => timeout::ANSWERED,
            (TCP, false) if !answered => timeout::TCP_NEW,
            (TCP, false) if self.flags & CT_HALF != 0 => timeout::TCP_HALF,
            (TCP, false) => timeout::TCP_OPEN,
            _ if answered => timeout::ANSWERED,
            _ => timeout::NEW,
        }
    }

    /// Whether it is over at `now`, in ticks. Each CPU has its own clock, and the agent another: that of who wrote last may
    /// be ahead of that of who asks.
    #[inline(always)]
    pub const fn expired(&self, now: u32) -> bool {
        self.idle_for(now, self.timeout())
    }

    /// Whether it was used last before `now`.
    #[inline(always)]
    pub const fn used_before(&self, now: u32) -> bool {
        self.idle_for(now, 0)
    }

    /// Whether it was used last more than so many ticks before `now`.
    #[inline(always)]
    pub const fn idle_for(&self, now: u32, ticks: u32) -> bool {
        now.wrapping_sub(self.used) as i32 > ticks as i32
    }

    /// The stamp of the pod that `to.dst` was; 0: it was none of this node.
    #[inline(always)]
    pub const fn stamped(&self) -> u32 {
        if self.flags & CT_HERE != 0 { self.flags >> STAMP_SHIFT << STAMP_SHIFT } else { 0 }
    }
}

/// The first fragment of a packet alone has ports.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub struct FragmentKey {
    pub src: Addr,
    pub dst: Addr,
    pub id: u32,
    pub proto: u8,
    pub pad: [u8; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct FragmentPorts {
    pub sport_be: u16,
    pub dport_be: u16,
}

/// A range of addresses, for longest-prefix lookup: `len` counts bits of the 128, also for mapped addresses.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Range {
    pub len: u32,
    pub addr: Addr,
}

/// A link of the node that is no pod's: what leaves there with an address of the node's has this one.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Device {
    pub addr4: Addr,
    pub addr6: Addr,
    pub mac: [u8; 6],
    /// [`DEVICE_TUNNEL`].
    pub flags: u16,
}

/// What the link carries is packed into packets of the node's own, which the node sends in fragments where they are too large.
pub const DEVICE_TUNNEL: u16 = 1;

/// Finalizer of MurmurHash3 with 64 bits: spreads what is counted up.
#[inline(always)]
pub const fn mix(mut k: u64) -> u64 {
    k ^= k >> 33;
    k = k.wrapping_mul(0xff51_afd7_ed55_8ccd);
    k ^= k >> 33;
    k = k.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    k ^ (k >> 33)
}

/// Where packets to an address go on, by the link that they came by.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Hop {
    pub to: Addr,
    /// The link.
    pub from: u32,
    /// When it was found; good as long as the clock shows the same.
    pub tick: u32,
    /// 0: they do not leave by that link.
    pub mtu: u32,
    /// The Ethernet header's destination and source.
    pub macs: [[u16; 3]; 2],
}

/// A power of two.
pub const MAX_HOPS: usize = 256;

/// Who asks for events.
pub const WATCH_DROPS: u32 = 1;
pub const WATCH_FLOWS: u32 = 2;
/// Pods' packets to addresses outside the cluster get an address of the node.
pub const MASQUERADE: u32 = 4;
/// Callers from outside are answered by the nodes of their backends (direct server return).
pub const DSR: u32 = 8;

/// Of an entry in the map of the cluster's ranges: the address of a node.
pub const CLUSTER_NODE: u32 = 2;
/// The next hop to it is the node that has it: that takes packets to services too.
pub const CLUSTER_ADJACENT: u32 = 4;

/// Settings of the programs: the only entry of its map.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Cookie of the node's own network namespace.
    pub host_netns: u64,
    /// [`WATCH_DROPS`], [`WATCH_FLOWS`], [`MASQUERADE`], [`DSR`].
    pub flags: u32,
    pub pad: u32,
}

/// Where an event was made.
pub mod hook {
    /// A socket's connect or sendmsg.
    pub const SOCKET: u8 = 0;
    /// Packet from a pod.
    pub const POD: u8 = 1;
    /// Packet that came in over a link of the node.
    pub const WIRE: u8 = 2;
    /// Packet from the node's own network stack.
    pub const HOST: u8 = 3;
    /// New connection at the listeners of a pod's namespace.
    pub const LISTENER: u8 = 4;
}

/// A new flow or a drop, as it goes through the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Event {
    /// Since boot.
    pub time_ns: u64,
    /// Of the caller's socket; 0 for packets.
    pub netns: u64,
    /// As it came. The own end of a socket that dials is not known yet: [`Addr::UNSET`] and 0.
    pub before: Flow,
    /// As it goes on; the same where nothing is translated.
    pub after: Flow,
    /// A [`Reason`], as a number.
    pub reason: u32,
    /// Of the link; 0 for sockets.
    pub ifindex: u32,
    /// Bytes of the packet; 0 for sockets.
    pub len: u32,
    /// One of [`hook`].
    pub hook: u8,
    /// 1: the packet or connection ends here.
    pub dropped: u8,
    pub pad: u16,
}

/// A socket and the backend that was chosen for it.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub struct ReverseKey {
    pub socket: u64,
    pub addr: Addr,
    pub port_be: u16,
    pub proto: u8,
    pub pad: [u8; 5],
}

/// The address that the application used.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Reverse {
    pub addr: Addr,
    pub port_be: u16,
    pub pad: u16,
}

/// The pod has a sidecar: its TCP is captured, and refused while no sidecar lives.
pub const POD_MESHED: u32 = 1;
/// What comes to the pod is limited by a queue on the node's end of its link, which must not be passed by.
pub const POD_SHAPED: u32 = 2;

/// A pod, by the cookie of its network namespace. Names are zero-padded.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pod {
    /// Cgroup id of the sidecar, which alone is not captured; 0 while none is registered.
    pub sidecar_cgroup: u64,
    pub flags: u32,
    /// Of the host's end of the link.
    pub ifindex: u32,
    /// [`Addr::UNSET`] where the pod has none of that family.
    pub addr4: Addr,
    pub addr6: Addr,
    pub uid: [u8; 40],
    pub namespace: [u8; 64],
    pub name: [u8; 256],
}

impl Default for Pod {
    fn default() -> Self {
        Self {
            sidecar_cgroup: 0,
            flags: 0,
            ifindex: 0,
            addr4: Addr::UNSET,
            addr6: Addr::UNSET,
            uid: [0; 40],
            namespace: [0; 64],
            name: [0; 256],
        }
    }
}

/// A pod, by each of its addresses: all that `sk_lookup` can ask with.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct PodAddr {
    pub netns: u64,
    pub flags: u32,
    pub ifindex: u32,
}

/// A pod's TCP port that passes the sidecar by.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PortKey {
    pub addr: Addr,
    pub port: u16,
    pub pad: u16,
}

/// The sidecar's own port, never captured.
pub const ADMIN_PORT: u16 = 15020;

/// A sidecar's listener, by the pod's address and what it is for.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ListenKey {
    pub addr: Addr,
    pub direction: u32,
}

pub const OUTBOUND: u32 = 0;
pub const INBOUND: u32 = 1;

/// Routing mark of captured sockets; the pod's policy rule sends it to [`CAPTURE_TABLE`].
pub const CAPTURE_MARK: u32 = 0x51c0_0001;
/// Routing table in the pod that loops marked traffic over `lo`.
pub const CAPTURE_TABLE: u32 = 0x51c;

/// A pod's UID, zero-padded: what is wanted of a pod that the plugin has not made yet.
pub type Uid = [u8; 40];

plain! {
    Addr = 16, ServiceKey = 20, Group = 12, Service = 208, BackendKey = 8, Backend = 24, ReverseKey = 32, Reverse = 20,
    MemberKey = 24, AffinityKey = 32, Affinity = 24, Pod = 408, PodAddr = 16, PortKey = 20, ListenKey = 20, Uid = 40, u8 = 1, u32 = 4, u64 = 8,
    MaglevKey = 8, MaglevBlock = 512, ClientKey = 36, Flow = 40, Translation = 48, FragmentKey = 40, FragmentPorts = 4,
    Range = 20, Device = 40, Settings = 16, Event = 112, Hop = 40, Reports = 16, Source = 20, SourceRange = 24,
}

/// Names of the maps, as in the object and as pinned.
pub mod map {
    pub const SERVICES: &str = "SERVICES";
    pub const BACKENDS: &str = "BACKENDS";
    pub const REVERSE: &str = "REVERSE";
    pub const PODS: &str = "PODS";
    pub const ADDRS: &str = "ADDRS";
    pub const INTENTS: &str = "INTENTS";
    pub const PORTS: &str = "PORTS";
    pub const LISTENERS: &str = "LISTENERS";
    pub const COUNTERS: &str = "COUNTERS";
    pub const MEMBERS: &str = "MEMBERS";
    pub const AFFINITY: &str = "AFFINITY";
    pub const MAGLEV: &str = "MAGLEV";
    pub const CLIENTS: &str = "CLIENTS";
    pub const HOST_PORTS: &str = "HOST_PORTS";
    pub const FLOWS: &str = "FLOWS";
    pub const HALVES: &str = "HALVES";
    pub const FRAGMENTS: &str = "FRAGMENTS";
    pub const LOCALS: &str = "LOCALS";
    pub const CLUSTER: &str = "CLUSTER";
    pub const DEVICES: &str = "DEVICES";
    pub const ANNOUNCED: &str = "ANNOUNCED";
    pub const SETTINGS: &str = "SETTINGS";
    pub const EVENTS: &str = "EVENTS";
    pub const SOURCES: &str = "SOURCES";
    pub const CONNECTED: &str = "CONNECTED";
    pub const REPORTS: &str = "REPORTS";
    pub const ALL: [&str; 26] = [
        SERVICES, BACKENDS, REVERSE, PODS, ADDRS, INTENTS, PORTS, LISTENERS, COUNTERS, MEMBERS, AFFINITY, MAGLEV,
        CLIENTS, HOST_PORTS, FLOWS, FRAGMENTS, LOCALS, CLUSTER, DEVICES, ANNOUNCED, SETTINGS, EVENTS, SOURCES,
        CONNECTED, HALVES, REPORTS,
    ];
}

/// Sizes of the maps. At the bound an update fails and is reported by who made it; `REVERSE`, `CONNECTED`,
/// `AFFINITY`, `CLIENTS`, `FLOWS`, `HALVES` and `FRAGMENTS` forget their oldest entries.
pub mod bound {
    pub const SERVICES: usize = 65_536;
    pub const BACKENDS: usize = 524_288;
    pub const REVERSE: usize = 131_072;
    pub const CONNECTED: usize = 65_536;
    pub const PODS: usize = 4_096;
    pub const ADDRS: usize = 2 * PODS;
    pub const INTENTS: usize = 4_096;
    pub const PORTS: usize = 16_384;
    pub const LISTENERS: usize = 4 * PODS;
    pub const MEMBERS: usize = 131_072;
    pub const AFFINITY: usize = 32_768;
    /// Blocks of [`super::MAGLEV_BLOCK`] slots.
    pub const MAGLEV: usize = 262_144;
    pub const CLIENTS: usize = 32_768;
    pub const HOST_PORTS: usize = 4_096;
    /// Directions of connections: two each.
    pub const FLOWS: usize = 131_072;
    /// The same of those that have not begun in earnest: what a flood of beginnings can displace. With a
    /// tenth of a second to his answer, a caller gets through as long as fewer than 300,000 begin in a second.
    pub const HALVES: usize = 65_536;
    pub const FRAGMENTS: usize = 8_192;
    pub const LOCALS: usize = 1_024;
    pub const CLUSTER: usize = 16_384;
    pub const DEVICES: usize = 256;
    pub const ANNOUNCED: usize = 4_096;
    /// Ranges of clients; what is wanted at a time is half of it, for the old and the new state are there together.
    pub const SOURCES: usize = 65_536;
    /// Bytes of the ring buffer: some thousand events.
    pub const EVENTS: usize = 512 * 1024;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(proto: u8, flags: u32) -> Translation {
        Translation { to: Flow { proto, ..Flow::default() }, used: 1_000, flags }
    }

    #[test]
    fn connections_outlive_their_last_packet_by_what_they_are() {
        let cases = [
            (TCP, 0, timeout::TCP_NEW),
            (TCP, CT_REPLY | CT_HALF, timeout::TCP_NEW),
            (TCP, CT_ANSWERED | CT_HALF, timeout::TCP_HALF),
            (TCP, CT_ANSWERED, timeout::TCP_OPEN),
            (TCP, CT_ANSWERED | CT_FIN, timeout::TCP_OPEN),
            (TCP, CT_ANSWERED | CT_CLOSED, timeout::TCP_CLOSED),
            (TCP, CT_HALF | CT_CLOSED, timeout::TCP_CLOSED),
            (TCP, CT_ANSWERED | CT_RELAYED, timeout::TCP_OPEN),
            (TCP, CT_ANSWERED | CT_RELAYED | CT_FIN, timeout::ANSWERED),
            (TCP, CT_ANSWERED | stamp(u64::MAX), timeout::TCP_OPEN),
            (UDP, 0, timeout::NEW),
            (UDP, CT_ANSWERED | CT_REPLY, timeout::ANSWERED),
            (ICMP, CT_ANSWERED, timeout::ANSWERED),
        ];
        for (proto, flags, ticks) in cases {
            let t = of(proto, flags);
            assert_eq!(t.timeout(), ticks, "{proto} {flags:#x}");
            assert!(!t.expired(1_000 + ticks) && t.expired(1_001 + ticks), "{proto} {flags:#x}");
        }
    }

    /// Clocks of CPUs differ by a tick at its boundary: what was used "after now" is as alive as can be.
    #[test]
    fn a_connection_that_another_cpu_used_a_tick_ahead_lives() {
        for used in [1_000, 0, u32::MAX] {
            let t = Translation { used, ..of(TCP, CT_ANSWERED) };
            for behind in 0..3 {
                assert!(!t.expired(used.wrapping_sub(behind)), "{used}, {behind} ticks ahead");
                assert!(!t.used_before(used.wrapping_sub(behind)));
            }
            assert!(t.used_before(used.wrapping_add(1)));
        }
    }

    #[test]
    fn pods_are_told_by_their_stamps() {
        let t = of(TCP, CT_REPLY | CT_ANSWERED | CT_WITHDRAWN | stamp(0x1234_5678_9abc));
        assert_eq!(t.stamped(), stamp(0x1234_5678_9abc));
        assert_ne!(stamp(7), stamp(8));
        assert_ne!(stamp(0), 0, "whatever the cookie");
        assert_eq!(of(TCP, CT_ANSWERED | CT_WITHDRAWN).stamped(), 0);
    }

    #[test]
    fn reasons_are_known_by_their_numbers() {
        for (number, reason) in (0..).zip(Reason::ALL) {
            assert_eq!((*reason as u32, Reason::from_number(number)), (number, Some(*reason)));
        }
        assert_eq!(Reason::from_number(Reason::ALL.len() as u32), None);
        assert_eq!(Reason::from_number(u32::MAX), None);
    }

    #[test]
    fn what_is_called_dropped_or_refused_ends() {
        let called = |r: &&Reason| r.label().starts_with("dropped") || r.label().starts_with("refused");
        assert!(Reason::ALL.iter().filter(called).all(|r| r.ends()));
        assert!(Reason::NoBackend.ends() && !Reason::Translated.ends() && !Reason::EventLost.ends());
    }
}
