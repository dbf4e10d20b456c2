//! The maps. Who writes and who reads each is in ARCHITECTURE.md; sizes and layouts are in the common crate.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockHash},
    macros::btf_map,
};
use sluice_ebpf_common::*;

/// Entries are allocated when written: an idle node pays for what it uses, not for the bounds.
const LAZY: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static SERVICES: HashMap<ServiceKey, Service, { bound::SERVICES }, LAZY> = HashMap::new();
#[btf_map]
pub static BACKENDS: HashMap<BackendKey, Backend, { bound::BACKENDS }, LAZY> = HashMap::new();
#[btf_map]
pub static REVERSE: LruHashMap<ReverseKey, Reverse, { bound::REVERSE }> = LruHashMap::new();
/// What connected UDP sockets have dialled, for as long as they are open: whoever closes those whose backend has gone looks
/// here, so that nothing else may crowd them out.
#[btf_map]
pub static CONNECTED: LruHashMap<ReverseKey, Reverse, { bound::CONNECTED }> = LruHashMap::new();
#[btf_map]
pub static PODS: HashMap<u64, Pod, { bound::PODS }, LAZY> = HashMap::new();
#[btf_map]
pub static ADDRS: HashMap<Addr, PodAddr, { bound::ADDRS }, LAZY> = HashMap::new();
/// Flags of pods that are expected, by UID; the plugin reads it when it makes the pod. No program does.
#[btf_map]
pub static INTENTS: HashMap<Uid, u32, { bound::INTENTS }, LAZY> = HashMap::new();
#[btf_map]
pub static PORTS: HashMap<PortKey, u32, { bound::PORTS }, LAZY> = HashMap::new();
#[btf_map]
pub static LISTENERS: SockHash<ListenKey, { bound::LISTENERS }> = SockHash::new();
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { MAX_REASONS as usize }> = PerCpuArray::new();

#[btf_map]
pub static MEMBERS: HashMap<MemberKey, u32, { bound::MEMBERS }, LAZY> = HashMap::new();
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, { bound::AFFINITY }> = LruHashMap::new();

/// Maglev tables of services that callers from outside reach.
#[btf_map]
pub static MAGLEV: HashMap<MaglevKey, MaglevBlock, { bound::MAGLEV }, LAZY> = HashMap::new();
#[btf_map]
pub static CLIENTS: LruHashMap<ClientKey, Affinity, { bound::CLIENTS }> = LruHashMap::new();
/// Host ports, written by the plugin with the pod.
#[btf_map]
pub static HOST_PORTS: HashMap<ServiceKey, Reverse, { bound::HOST_PORTS }, LAZY> = HashMap::new();
/// Connections whose packets are translated.
#[btf_map]
pub static FLOWS: LruHashMap<Flow, Translation, { bound::FLOWS }> = LruHashMap::new();
/// The same of those whose caller has not gone on after an answer. Anybody can begin any number under addresses that are not
/// his: what that makes a map forget is not what is open.
#[btf_map]
pub static HALVES: LruHashMap<Flow, Translation, { bound::HALVES }> = LruHashMap::new();
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, { bound::FRAGMENTS }> = LruHashMap::new();
/// The node's own addresses.
#[btf_map]
pub static LOCALS: HashMap<Addr, u32, { bound::LOCALS }, LAZY> = HashMap::new();
/// Ranges that pods reach under their own address: other pods, nodes, and what the operator excludes.
#[btf_map]
pub static CLUSTER: LpmTrie<Addr, u32, { bound::CLUSTER }, LAZY> = LpmTrie::new();
#[btf_map]
pub static DEVICES: HashMap<u32, Device, { bound::DEVICES }, LAZY> = HashMap::new();
/// Addresses that this node answers for in its network.
#[btf_map]
pub static ANNOUNCED: HashMap<Addr, u32, { bound::ANNOUNCED }, LAZY> = HashMap::new();
/// Clients of services that not all may use.
#[btf_map]
pub static SOURCES: LpmTrie<Source, u32, { bound::SOURCES }, LAZY> = LpmTrie::new();
#[btf_map]
pub static SETTINGS: Array<Settings, 1> = Array::new();
#[btf_map]
pub static EVENTS: RingBuf<Event, { bound::EVENTS }, 0> = RingBuf::new();

/// Ways on of packets that leave by the link they came by, as this CPU found them in this second.
#[btf_map]
pub static HOPS: PerCpuArray<Hop, { MAX_HOPS }> = PerCpuArray::new();

/// ICMP errors that this CPU may send.
#[btf_map]
pub static REPORTS: PerCpuArray<Reports, 1> = PerCpuArray::new();

/// Room of a packet program on one CPU, where the stack (512 bytes) does not reach: a [`crate::work::Work`].
#[btf_map]
pub static WORK: PerCpuArray<[u64; crate::work::WORDS], 1> = PerCpuArray::new();

#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(p) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: this CPU's own slot; programs of these hooks do not preempt each other mid-increment to any effect
        // worse than one lost count.
        unsafe { *p += 1 }
    }
}
