//! Why a packet or a connection went where it did, as counters and events name it.

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

            /// By its number, as maps and events hold it; `None` for one that is not known here.
            pub fn from_number(number: u32) -> Option<Self> {
                Self::ALL.get(number as usize).copied()
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
    /// Packet: a new connection to a service was given its backend.
    PacketTranslated = "packet_translated",
    /// Packet: a new connection to a host port was given its pod.
    HostPort = "host_port",
    /// Packet: a pod's new connection to the outside goes on under an address of the node.
    Masqueraded = "masqueraded",
    /// Packet to a pod of this node, handed to it past the node's own stack.
    ToPod = "to_pod",
    /// Packet sent on over a link of the node, past the node's own stack.
    Forwarded = "forwarded",
    /// ICMP error about a translated packet, translated back.
    IcmpTranslated = "icmp_translated",
    /// ARP request or neighbour solicitation for an announced address, answered.
    AddressAnswered = "address_answered",
    /// Packet to a service without a backend: dropped.
    DroppedNoBackend = "dropped_no_backend",
    /// Headers cut short or contradictory: dropped.
    DroppedMalformed = "dropped_malformed",
    /// Fragment whose first one was not seen: dropped.
    DroppedFragment = "dropped_fragment",
    /// No port of the node is free for the connection: dropped.
    DroppedNoPort = "dropped_no_port",
    /// The connection could not be noted: dropped.
    DroppedTableFull = "dropped_table_full",
    /// No route: dropped.
    DroppedNoRoute = "dropped_no_route",
    /// Hop limit used up and no way to say so: dropped.
    DroppedHopLimit = "dropped_hop_limit",
    /// Larger than the way on: dropped and answered with ICMP, where that is possible.
    DroppedTooBig = "dropped_too_big",
    /// The packet could not be rewritten: dropped.
    DroppedRewrite = "dropped_rewrite",
    /// An event was lost because nobody read the ring buffer in time.
    EventLost = "event_lost",
    /// Packet sent back over the link that it came by, before the kernel had a structure for it (XDP).
    ForwardedXdp = "forwarded_xdp",
    /// Packet of a pod with a source address that is not the pod's: dropped.
    DroppedSpoofed = "dropped_spoofed",
    /// First packet of a connection that the node of its backend answers by itself.
    Relayed = "packet_relayed",
    /// connect, sendmsg: the caller is in none of the service's source ranges: refused.
    RefusedSourceRange = "refused_source_range",
    /// Packet to a service from a client that is in none of its source ranges: dropped.
    DroppedSourceRange = "dropped_source_range",
    /// An ICMP error was due about the packet, and too many were sent already: dropped without.
    DroppedErrorLimit = "dropped_error_limit",
}

impl Reason {
    /// Whether the packet or connection ends with it.
    pub const fn ends(self) -> bool {
        matches!(
            self,
            Self::NoBackend
                | Self::RaceLost
                | Self::RefusedNoSidecar
                | Self::RefusedBound
                | Self::RefusedMark
                | Self::DroppedOutbound
                | Self::DroppedInbound
                | Self::AssignFailed
                | Self::DroppedNoBackend
                | Self::DroppedMalformed
                | Self::DroppedFragment
                | Self::DroppedNoPort
                | Self::DroppedTableFull
                | Self::DroppedNoRoute
                | Self::DroppedHopLimit
                | Self::DroppedTooBig
                | Self::DroppedRewrite
                | Self::DroppedSpoofed
                | Self::RefusedSourceRange
                | Self::DroppedSourceRange
                | Self::DroppedErrorLimit
        )
    }
}

/// Size of the counters' array; the enum may grow up to it without a new layout.
pub const MAX_REASONS: u32 = 64;
const _: () = assert!(Reason::ALL.len() <= MAX_REASONS as usize);
