//! The maps. Who writes and who reads each is in ARCHITECTURE.md; sizes and layouts are in the common crate.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{HashMap, LruHashMap, PerCpuArray, SockHash},
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

#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(p) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: this CPU's own slot; programs of these hooks do not preempt each other mid-increment to any effect
        // worse than one lost count.
        unsafe { *p += 1 }
    }
}
