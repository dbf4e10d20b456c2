//! Types and numbers shared by the kernel side and user space. No logic beyond conversions, no dependency.
//!
//! Byte order is decided here once: an [`Addr`] holds the 16 bytes of an IPv6 address as they travel (IPv4 as
//! `::ffff:a.b.c.d`), ports named `port_be` are in network order, ports named `port` in host order. Every type is
//! `repr(C)` without implicit padding and its size is asserted: it is also the layout of pinned maps, so that a change
//! here needs a new [`LAYOUT`].
#![no_std]
#![allow(unsafe_code)] // `unsafe impl Plain` only: each type below is padding-free plain data

/// Version of everything pinned: maps live under `/sys/fs/bpf/sluice/v<LAYOUT>/`.
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

/// A virtual address, port and protocol.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServiceKey {
    pub addr: Addr,
    pub port_be: u16,
    pub proto: u8,
    pub pad: u8,
}

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
}

/// Why a program decided as it did: index into the per-CPU counters.
macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Reason { $($(#[$doc])* $name,)* }

        impl Reason {
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)*];

            /// Label of the counter.
            pub const fn label(self) -> &'static str {
                match self { $(Reason::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// connect: service address replaced by a backend.
    Translated = "translated",
    /// sendmsg: the same for one datagram.
    TranslatedDatagram = "translated_datagram",
    /// Service without a backend: refused.
    NoBackend = "no_backend",
    /// Entry changed under the reader, looked up again.
    Raced = "raced",
    /// Still inconsistent after all attempts: refused.
    RaceLost = "race_lost",
    /// The translation could not be noted: getpeername will show the backend.
    ReverseFull = "reverse_full",
    /// getpeername answered with the service address.
    PeerRestored = "peer_restored",
    /// recvmsg: source shown as the service address.
    SourceRestored = "source_restored",
    /// connect: marked for the sidecar.
    Captured = "captured",
    /// connect by the sidecar itself.
    SidecarConnect = "sidecar_connect",
    /// connect inside the pod or to the node.
    LocalConnect = "local_connect",
    /// Meshed pod without a live sidecar: refused.
    RefusedNoSidecar = "refused_no_sidecar",
    /// Socket was bound to a device, which would pass the capture: unbound.
    Unbound = "unbound",
    /// It could not be unbound: refused.
    RefusedBound = "refused_bound",
    /// The mark could not be set: refused.
    RefusedMark = "refused_mark",
    /// sk_lookup: handed to the outbound listener.
    SteeredOutbound = "steered_outbound",
    /// sk_lookup: handed to the inbound listener.
    SteeredInbound = "steered_inbound",
    /// sk_lookup: a port that is excluded from capture.
    ExcludedPort = "excluded_port",
    /// sk_lookup: no live outbound listener, dropped.
    DroppedOutbound = "dropped_outbound",
    /// sk_lookup: no live inbound listener, dropped.
    DroppedInbound = "dropped_inbound",
    /// sk_lookup: the listener could not be assigned, dropped.
    AssignFailed = "assign_failed",
    /// connect, sendmsg: the client was kept with the backend that it had.
    Affine = "affine",
    /// The client's backend could not be noted: the next connection chooses anew.
    AffinityFull = "affinity_full",
}

/// Size of the counters' array; the enum may grow up to it without a new layout.
pub const MAX_REASONS: u32 = 64;
const _: () = assert!(Reason::ALL.len() <= MAX_REASONS as usize);

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
    pub const ALL: [&str; 11] =
        [SERVICES, BACKENDS, REVERSE, PODS, ADDRS, INTENTS, PORTS, LISTENERS, COUNTERS, MEMBERS, AFFINITY];
}

/// Sizes of the maps. At the bound an update fails and is reported by who made it; `REVERSE` and
/// `AFFINITY` forget their oldest entries.
pub mod bound {
    pub const SERVICES: usize = 65_536;
    pub const BACKENDS: usize = 524_288;
    pub const REVERSE: usize = 131_072;
    pub const PODS: usize = 4_096;
    pub const ADDRS: usize = 2 * PODS;
    pub const INTENTS: usize = 4_096;
    pub const PORTS: usize = 16_384;
    pub const LISTENERS: usize = 4 * PODS;
    pub const MEMBERS: usize = 131_072;
    pub const AFFINITY: usize = 32_768;
}
