//! PURE: tables of consistent hashing by the Maglev algorithm (Eisenbud et al., NSDI 2016, §3.4), with weights.
//!
//! Each backend prefers the slots in an order of its own, and all take turns at taking the first that is free. A table
//! depends on nothing but its backends and their weights: every node makes the same one, and when a backend goes, few
//! slots but its own change hands.

use crate::layout::{Target, WantedGroup};
use sluice_ebpf_common::{MAGLEV_NOBODY, mix};

/// Up to so many backends, a service's table has [`SMALL`] slots, beyond it has [`LARGE`]: some hundred for each, as the
/// paper advises, up to 600 backends. One step only, because crossing it moves connections.
const FEW: usize = 32;
const SMALL: usize = 16_384;
const LARGE: usize = 65_536;

struct Backend {
    index: u16,
    /// Turns per round; at most 1.
    share: f64,
    credit: f64,
    next: usize,
    skip: usize,
}

/// For each slot the index of a backend, counted over all groups, or [`MAGLEV_NOBODY`] for a group without any. Empty
/// where there is no backend at all, or more than indexes.
pub fn table(groups: &[WantedGroup]) -> Vec<u16> {
    let Some(slots) = slots(groups) else { return vec![] };
    let mut backends = Vec::new();
    let mut first = 0;
    for (at, group) in groups.iter().enumerate() {
        let each = f64::from(group.weight) / group.targets.len().max(1) as f64;
        if group.targets.is_empty() {
            backends.push(backend(MAGLEV_NOBODY, at as u64, each, slots));
        }
        for (index, target) in (first..).zip(&group.targets) {
            backends.push(backend(index, identity(target), each, slots));
        }
        first += group.targets.len() as u16;
    }
    let most = backends.iter().map(|b| b.share).fold(0.0, f64::max);
    backends.iter_mut().for_each(|b| b.share /= most);
    fill(&mut backends, slots)
}

/// The length of the table; none where there is no table.
pub fn slots(groups: &[WantedGroup]) -> Option<usize> {
    match groups.iter().map(|g| g.targets.len()).sum() {
        0 => None,
        1..=FEW => Some(SMALL),
        count if count < usize::from(MAGLEV_NOBODY) => Some(LARGE),
        _ => None,
    }
}

fn backend(index: u16, identity: u64, share: f64, slots: usize) -> Backend {
    // A step that is odd meets every slot of a table whose length is a power of two.
    let skip = (mix(identity ^ 0x9e37_79b9_7f4a_7c15) as usize % slots) | 1;
    Backend { index, share, credit: 0.0, next: mix(identity) as usize % slots, skip }
}

fn fill(backends: &mut [Backend], slots: usize) -> Vec<u16> {
    const FREE: u32 = u32::MAX;
    let mut table = vec![FREE; slots];
    let mut left = slots;
    while left > 0 {
        for b in backends.iter_mut() {
            b.credit += b.share;
            if b.credit < 1.0 || left == 0 {
                continue;
            }
            b.credit -= 1.0;
            while table[b.next] != FREE {
                b.next = (b.next + b.skip) % slots;
            }
            table[b.next] = u32::from(b.index);
            left -= 1;
        }
    }
    table.into_iter().map(|index| index as u16).collect()
}

fn identity(t: &Target) -> u64 {
    let words = t.addr.words.iter().fold(u64::from(t.port_be), |h, w| mix(h ^ u64::from(*w)));
    mix(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_ebpf_common::Addr;

    fn group(weight: u32, hosts: impl Iterator<Item = u32>) -> WantedGroup {
        let targets = hosts.map(|h| Target { addr: Addr::from_v4(0x0af4_0000 + h), port_be: 80 }).collect();
        WantedGroup { weight, targets }
    }

    fn slots_of(table: &[u16], index: u16) -> usize {
        table.iter().filter(|i| **i == index).count()
    }

    #[test]
    fn slots_are_shared_evenly_and_by_weight() {
        for count in [1, 2, 3, 7, 32, 100, 500] {
            let table = table(&[group(1, 0..count)]);
            let each: Vec<usize> = (0..count as u16).map(|i| slots_of(&table, i)).collect();
            assert!(each.iter().max().expect("some") - each.iter().min().expect("some") <= 1, "{count}: {each:?}");
        }
        let table = table(&[group(90, 0..3), group(10, 3..4)]);
        assert!((slots_of(&table, 3) as f64 / table.len() as f64 - 0.1).abs() < 0.001);
        let half = super::table(&[group(1, 0..0), group(1, 0..2)]);
        assert_eq!(slots_of(&half, MAGLEV_NOBODY), half.len() / 2);
        assert!(super::table(&[]).is_empty() && super::table(&[group(1, 0..0)]).is_empty());
    }

    /// Slots of others that change hands when each backend in turn goes: on average, of all slots.
    #[test]
    fn few_slots_move_when_a_backend_goes() {
        for count in [2_u32, 5, 10, 32, 40, 200] {
            let before = table(&[group(1, 0..count)]);
            let name = |table: &[u16], hosts: &[u32], at: usize| hosts[usize::from(table[at])];
            let all: Vec<u32> = (0..count).collect();
            let goers: Vec<u32> = (0..count).step_by((count as usize / 8).max(1)).collect();
            let mut moved = 0;
            for gone in &goers {
                let left: Vec<u32> = all.iter().copied().filter(|h| h != gone).collect();
                let after = table(&[group(1, left.iter().copied())]);
                if after.len() != before.len() {
                    continue; // the one step in size
                }
                let kept = (0..before.len()).filter(|at| name(&before, &all, *at) != *gone);
                moved += kept.filter(|at| name(&before, &all, *at) != name(&after, &left, *at)).count();
            }
            let share = moved as f64 / (goers.len() * before.len()) as f64;
            println!("{count} backends: {:.2} % of the slots of others move", share * 100.0);
            assert!(share <= 0.01, "{count} backends: {share}");
        }
    }
}
