//! The real kernel takes the programs: load, load again over the pins, repair what was taken away, unload. Needs root;
//! uses a BPF file system and a cgroup of its own, so it can run beside anything.

mod ground;
mod kernel;

use aya::programs::ProgramInfo;
use ground::Ground;
use kernel::since;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sluice_ebpf::{
    Error,
    common::{
        Addr, Backend, BackendKey, MASQUERADE, MemberKey, Range, Reason, Service, ServiceKey, Settings, WATCH_DROPS,
        WATCH_FLOWS, map,
    },
    events::{EventReader, since_boot},
    layout::{Sources, Target, Wanted, WantedGroup},
    loader::{self, Place},
    maps::{Counters, Listeners, PodMaps, ServiceMaps, pin_dir},
    settings::SettingsMap,
    table::{Changes, ServiceTable},
};
use std::{collections::BTreeMap, fs, sync::Arc};

fn one_service(port: u16, targets: u16) -> BTreeMap<ServiceKey, Arc<Wanted>> {
    let key = ServiceKey { port_be: port.to_be(), proto: 6, ..ServiceKey::default() };
    let target = |n: u16| Target { addr: key.addr, port_be: n };
    let group = WantedGroup { weight: 3, targets: (1..=targets).map(target).collect() };
    BTreeMap::from([(key, Arc::new(Wanted::new(false, vec![group])))])
}

#[test]
fn loads_twice_repairs_and_unloads() {
    let ground = Ground::new("loader");
    let first = loader::load(&ground.place).expect("load");
    let dir = pin_dir(&ground.place.bpffs);
    PodMaps::open(&dir).expect("pod maps");
    assert_eq!(Listeners::open(&dir).expect("listeners").keys().expect("keys"), []);
    assert_eq!(Counters::open(&dir).expect("counters").get(Reason::Captured).expect("count"), 0);
    assert_eq!(loader::load(&ground.place).expect("load over the pins"), first);
    assert!(!loader::repair(&ground.place).expect("nothing to repair"));
    fs::remove_file(dir.join("links/connect6")).expect("take a link away");
    fs::remove_file(dir.join(map::PORTS)).expect("take a map away");
    assert!(loader::repair(&ground.place).expect("repair"));
    assert!(!loader::repair(&ground.place).expect("whole again"));
    loader::unload(&ground.place.bpffs).expect("unload");
    assert!(!dir.exists());
}

/// A verifier gives up after a million instructions, and 5.15's takes four times as many as newer ones: of the largest program
/// 598,000 where Linux 6.18's took 136,000.
#[test]
fn programs_keep_clear_of_the_verifiers_limit() {
    const MOST: u32 = 180_000;
    let ground = Ground::new("loader-limit");
    loader::load(&ground.place).expect("load");
    for name in ["from_pod", "from_wire", "from_host"] {
        let pin = pin_dir(&ground.place.bpffs).join(name);
        match ProgramInfo::from_pin(&pin).expect(name).verified_instruction_count() {
            Some(taken) => assert!(taken < MOST, "{name}: {taken} instructions"),
            None => println!("{name}: this kernel does not say what its verifier took (5.16 and later do)"),
        }
    }
}

/// Each part of an agent changes its own bits; what they are stays when the pins are made anew.
#[test]
fn settings_are_shared_and_outlive_their_pin() {
    let ground = Ground::new("settings");
    loader::load(&ground.place).expect("load");
    let dir = pin_dir(&ground.place.bpffs);
    let settings = SettingsMap::open(&dir).expect("settings");
    assert_eq!(settings.get().expect("get"), Settings::default());
    settings.update(|s| (s.host_netns, s.flags) = (9, MASQUERADE)).expect("one part");
    settings.set_flags(WATCH_DROPS | WATCH_FLOWS, WATCH_DROPS).expect("another");
    let wanted = Settings { host_netns: 9, flags: MASQUERADE | WATCH_DROPS, pad: 0 };
    assert_eq!(SettingsMap::open(&dir).expect("settings").get().expect("get"), wanted);
    fs::remove_file(dir.join(map::SETTINGS)).expect("take the map away");
    assert!(loader::repair(&ground.place).expect("repair"));
    assert_eq!(SettingsMap::open(&dir).expect("settings").get().expect("get"), Settings::default());
    settings.reopen().expect("reopen");
    assert_eq!(SettingsMap::open(&dir).expect("settings").get().expect("get"), wanted);
}

/// Nobody watches: there is nothing to read, and waiting for it does not fail.
#[test]
fn the_events_ring_buffer_opens_from_its_pin() {
    let ground = Ground::new("events");
    let dir = pin_dir(&ground.place.bpffs);
    assert!(matches!(EventReader::open(&dir), Err(Error::NotPinned { .. })));
    loader::load(&ground.place).expect("load");
    let mut events = EventReader::open(&dir).expect("events");
    assert_eq!(events.next_record(), None);
    events.discard();
    let mut fds = [PollFd::new(&events, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("poll"), 0);
    let twice = (since_boot().expect("clock"), since_boot().expect("clock"));
    assert!(twice.0 <= twice.1 && !twice.0.is_zero());
}

/// What old kernels do not know is in a branch that their verifier drops.
#[test]
fn the_fallback_for_old_kernels_loads_over_the_other() {
    let ground = Ground::new("fallback");
    let newest = loader::load(&ground.place).expect("load");
    assert_eq!((newest.set_retval, newest.xdp), (since(5, 18), since(5, 18)));
    assert_eq!(newest.ingress_ifindex, since(5, 17));
    assert!(!loader::load_with(&ground.place, false).expect("load the fallback").set_retval);
    let oldest = loader::load_as(&ground.place, false, false).expect("load all fallbacks");
    assert!(!oldest.set_retval && !oldest.ingress_ifindex);
}

#[test]
fn a_folder_that_is_no_bpf_file_system_is_named() {
    let place = Place { bpffs: std::env::temp_dir(), cgroup: "/sys/fs/cgroup".into() };
    let error = loader::load(&place).expect_err("not a bpffs").to_string();
    assert!(error.contains("mount -t bpf"), "{error}");
}

#[test]
fn the_table_writes_differences_and_survives_a_restart() {
    let ground = Ground::new("table");
    loader::load(&ground.place).expect("load");
    let dir = pin_dir(&ground.place.bpffs);
    let maps = || ServiceMaps::open(&dir).expect("maps");
    let mut table = ServiceTable::open(maps()).expect("open");
    let (mut both, other) = (one_service(80, 3), one_service(81, 2000));
    both.extend(other.clone());
    assert_eq!(table.apply(&both).expect("apply"), Changes { written: 2, ..Changes::default() });

    let mut table = ServiceTable::open(maps()).expect("reopen");
    assert_eq!(table.apply(&both).expect("apply"), Changes { unchanged: 2, ..Changes::default() });
    both.extend(one_service(80, 4));
    assert_eq!(table.apply(&both).expect("apply"), Changes { written: 1, unchanged: 1, ..Changes::default() });
    assert_eq!(maps().backends.entries().expect("entries").len(), 2004);

    // Somebody deletes a backend behind the table's back.
    let (victim, _) = maps().backends.entries().expect("entries")[0];
    maps().backends.remove(&victim).expect("remove");
    table.reread().expect("reread");
    assert_eq!(table.apply(&both).expect("apply").written, 1);
    assert_eq!(table.apply(&BTreeMap::new()).expect("apply").removed, 2);
    assert_eq!(maps().backends.entries().expect("entries").len(), 0);
}

#[test]
fn members_and_withdrawals_follow_the_services() {
    let ground = Ground::new("members");
    loader::load(&ground.place).expect("load");
    let dir = pin_dir(&ground.place.bpffs);
    let maps = || ServiceMaps::open(&dir).expect("maps");
    let sticky = |targets: u16| -> BTreeMap<_, _> {
        let services = one_service(80, targets).into_iter();
        services.map(|(key, w)| (key, Arc::new((*w).clone().affine(Some(60))))).collect()
    };
    let mut table = ServiceTable::open(maps()).expect("open");
    table.apply(&sticky(3)).expect("apply");
    assert_eq!(maps().members.entries().expect("entries").len(), 3);
    assert!(table.take_withdrawn().is_empty());
    // Whose membership somebody deletes would lose its clients.
    let (victim, _) = maps().members.entries().expect("entries")[0];
    maps().members.remove(&victim).expect("remove");
    let mut table = ServiceTable::open(maps()).expect("reopen");
    assert_eq!(table.apply(&sticky(3)).expect("apply").written, 1);
    assert_eq!(maps().members.entries().expect("entries").len(), 3);
    table.take_withdrawn();
    table.apply(&sticky(1)).expect("apply");
    let ports: Vec<u16> = table.take_withdrawn().iter().map(|(_, target)| target.port_be).collect();
    assert_eq!(ports, [2, 3]);
    table.apply(&BTreeMap::new()).expect("apply");
    assert_eq!(table.take_withdrawn().len(), 1);
    assert_eq!(maps().members.entries().expect("entries").len(), 0);
}

/// Ranges come and go with their service's state, and an agent that has a new map starts over the pins of one without.
#[test]
fn source_ranges_follow_the_services() {
    let ground = Ground::new("sources");
    loader::load(&ground.place).expect("load");
    let dir = pin_dir(&ground.place.bpffs);
    fs::remove_file(dir.join(map::SOURCES)).expect("as an agent before this one left it");
    assert!(loader::complete(&ground.place.bpffs).is_err());
    loader::load(&ground.place).expect("load over the pins of an agent without the map");
    let maps = || ServiceMaps::open(&dir).expect("maps");
    let ranges = || maps().sources.keys().expect("keys").len();
    let only_for = |count: u32, node| -> BTreeMap<_, _> {
        let range = |n| Range { len: 128, addr: Addr::from_v4(n) };
        let sources = Some(Arc::new(Sources { ranges: (0..count).map(range).collect(), node }));
        let restricted = |w: Arc<Wanted>| Arc::new(Wanted { sources: sources.clone(), ..(*w).clone() });
        one_service(80, 3).into_iter().map(|(key, w)| (key, restricted(w))).collect()
    };
    let mut table = ServiceTable::open(maps()).expect("open");
    for (wanted, written) in
        [(only_for(3, false), 1), (only_for(3, false), 0), (only_for(3, true), 1), (only_for(0, true), 1)]
    {
        assert_eq!(table.apply(&wanted).expect("apply").written, written);
        let count = wanted.values().flat_map(|w| w.source_ranges(0)).count();
        assert_eq!(ranges(), count);
        table = ServiceTable::open(maps()).expect("reopen");
        assert_eq!(table.apply(&wanted).expect("apply").unchanged, 1);
    }
    table.apply(&only_for(300, false)).expect("apply");
    // A range that somebody removes comes back, and with it what else the set had.
    let victim = maps().sources.keys().expect("keys")[0];
    maps().sources.remove(&victim).expect("remove");
    table.reread().expect("reread");
    assert_eq!(table.apply(&only_for(300, false)).expect("apply").written, 1);
    assert_eq!(ranges(), 300);
    table.apply(&one_service(80, 3)).expect("everybody may use it");
    assert_eq!(ranges(), 0);
    table.apply(&only_for(2, false)).expect("apply");
    // Killed before it removed a set's ranges: the next one does.
    let mut left = maps().sources.keys().expect("keys")[0];
    left.source.set += 1;
    maps().sources.set(&left, &1).expect("left behind");
    let mut table = ServiceTable::open(maps()).expect("reopen");
    assert_eq!(ranges(), 2);
    table.apply(&BTreeMap::new()).expect("apply");
    assert_eq!(ranges(), 0);
}

/// Fills a map with what is nobody's; how much that was, from the number on.
fn fill<K: sluice_ebpf::common::Plain, V: sluice_ebpf::common::Plain + Default>(
    map: &sluice_ebpf::maps::HashMap<K, V>,
    key: impl Fn(u32) -> K,
) -> u32 {
    let full = |n: &u32| map.set(&key(*n), &V::default()).is_err_and(|e| e.is_full());
    (0..).find(full).expect("the map has a bound")
}

/// Their ports, each with the map that its cause names.
fn unfit(table: &ServiceTable) -> Vec<(u16, &'static str)> {
    let maps = [map::SERVICES, map::BACKENDS, map::MEMBERS];
    let named = |cause: &str| maps.into_iter().find(|m| cause.contains(m)).expect("it names a map");
    table.unfit().map(|(k, cause)| (u16::from_be(k.port_be), named(cause))).collect()
}

/// A service that does not fit keeps no other from changing: it refuses its callers, is named, and fits when there is room.
#[test]
fn a_service_that_does_not_fit_stops_no_other() {
    let ground = Ground::new("full");
    loader::load(&ground.place).expect("load");
    let dir = pin_dir(&ground.place.bpffs);
    let maps = ServiceMaps::open(&dir).expect("maps");
    let mut table = ServiceTable::open(ServiceMaps::open(&dir).expect("maps")).expect("open");
    let all = |parts: &[BTreeMap<ServiceKey, Arc<Wanted>>]| {
        parts.iter().flatten().map(|(key, w)| (*key, w.clone())).collect::<BTreeMap<_, _>>()
    };
    let groups = |port: u16| {
        let service = maps.services.get(one_service(port, 1).keys().next().expect("one")).expect("read");
        service.map(|s| s.group[..s.groups as usize].iter().map(|g| g.count).sum::<u32>())
    };
    let sticky = |port: u16, targets: u16| -> BTreeMap<_, _> {
        let services = one_service(port, targets).into_iter();
        services.map(|(key, w)| (key, Arc::new((*w).clone().affine(Some(60))))).collect()
    };
    table.apply(&all(&[one_service(80, 3), sticky(81, 2)])).expect("apply");

    let stray = |n| BackendKey { set: u32::MAX, index: n };
    let filled = fill(&maps.backends, stray);
    // One that shrinks fits, one that grows takes the room of its old state, a new one refuses, an empty one is no matter.
    let wanted = all(&[one_service(80, 2), sticky(81, 2), one_service(82, 9), one_service(83, 0), one_service(84, 7)]);
    let changes = table.apply(&wanted).expect("no error of all");
    assert_eq!((changes.unchanged, changes.unfit), (1, 2), "{changes:?}");
    assert_eq!(unfit(&table), [(82, map::BACKENDS), (84, map::BACKENDS)]);
    assert_eq!([80, 81, 82, 83, 84].map(groups), [Some(2), Some(2), Some(0), Some(0), Some(0)]);
    assert_eq!(table.apply(&wanted).expect("again").unfit, 2);
    // One that loses a backend, and does not fit, does not go on leading there.
    let grown = all(&[one_service(80, 40), sticky(81, 2), one_service(83, 0)]);
    assert_eq!(table.apply(&grown).expect("apply").unfit, 1);
    assert_eq!([80, 82].map(groups), [Some(0), None]);
    (0..filled).for_each(|n| assert!(maps.backends.remove(&stray(n)).expect("remove")));
    let changes = table.apply(&grown).expect("apply");
    assert_eq!((changes.written, changes.unfit, table.unfit().count()), (1, 0, 0));
    assert_eq!(groups(80), Some(40));
    assert_eq!(table.apply(&grown).expect("apply"), Changes { unchanged: 3, ..Changes::default() });

    let stray = |n| MemberKey { set: u32::MAX, port_be: 0, pad: 0, addr: Addr::from_v4(n) };
    let filled = fill(&maps.members, stray);
    let wanted = all(&[grown.clone(), sticky(81, 5), sticky(85, 3)]);
    assert_eq!(table.apply(&wanted).expect("apply").unfit, 2);
    assert_eq!(unfit(&table), [(81, map::MEMBERS), (85, map::MEMBERS)]);
    assert_eq!([81, 85].map(groups), [Some(0), Some(0)]);
    (0..filled).for_each(|n| assert!(maps.members.remove(&stray(n)).expect("remove")));
    assert_eq!(table.apply(&wanted).expect("apply").written, 2);
    assert_eq!([81, 85].map(groups), [Some(5), Some(3)]);

    let stray = |n| ServiceKey { addr: Addr::from_v4(n), ..ServiceKey::default() };
    let filled = fill(&maps.services, stray);
    let wanted = all(&[wanted, one_service(80, 5), one_service(86, 1)]);
    assert_eq!(table.apply(&wanted).expect("apply").unfit, 1);
    assert_eq!(unfit(&table), [(86, map::SERVICES)]);
    assert_eq!([80, 86].map(groups), [Some(5), None], "what is there can change");
    (0..filled).for_each(|n| assert!(maps.services.remove(&stray(n)).expect("remove")));
    assert_eq!(table.apply(&wanted).expect("apply").written, 1);
    assert_eq!(groups(86), Some(1));
}

/// What others changed is found a part at a time, and put right by the next application: damage, loss, and strays.
#[test]
fn looking_finds_in_parts_what_reading_all_finds() {
    let ground = Ground::new("look");
    loader::load(&ground.place).expect("load");
    let dir = pin_dir(&ground.place.bpffs);
    let maps = ServiceMaps::open(&dir).expect("maps");
    let mut table = ServiceTable::open(ServiceMaps::open(&dir).expect("maps")).expect("open");
    let wanted: BTreeMap<_, _> = (1..=40).flat_map(|port| one_service(port, 400)).collect();
    table.apply(&wanted).expect("apply");
    // More than one look holds.
    let round = |table: &mut ServiceTable| -> usize {
        let looks = (0..12).map(|_| {
            table.look().expect("look");
            let changes = table.apply(&wanted).expect("apply");
            changes.written + changes.removed
        });
        looks.sum()
    };
    assert_eq!(round(&mut table), 0);
    let services = maps.services.entries().expect("entries");
    maps.services.remove(&services[0].0).expect("remove");
    maps.services.set(&services[1].0, &Service { affinity_s: 9, ..services[1].1 }).expect("damage");
    maps.backends.remove(&BackendKey { set: services[2].1.set, index: 7 }).expect("remove");
    maps.services.set(&ServiceKey { proto: 17, ..services[3].0 }, &Service::default()).expect("a stray");
    maps.backends.set(&BackendKey { set: 70_000, index: 0 }, &Backend::default()).expect("a stray");
    maps.members.set(&MemberKey { set: 70_000, ..MemberKey::default() }, &1).expect("a stray");
    assert_eq!(round(&mut table), 4);
    assert_eq!(maps.services.entries().expect("entries").len(), 40);
    assert_eq!(maps.backends.entries().expect("entries").len(), 40 * 400);
    assert_eq!(maps.members.entries().expect("entries").len(), 0);
    assert_eq!(round(&mut table), 0);
    table.reread().expect("reread");
    assert_eq!(table.apply(&wanted).expect("apply").unchanged, 40);
}
