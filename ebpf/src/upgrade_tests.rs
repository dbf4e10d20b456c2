//! The plan as a table; and that this release can take over every layout that there was.

use super::*;
use crate::loader::OBJECT;
use sluice_ebpf_common::LAYOUT;

/// The shapes of all maps in each layout, as this module writes them.
const RECORDED: [(u32, &str); 1] = [(1, include_str!("layouts/v1.txt"))];

fn text(shapes: &BTreeMap<String, Shape>) -> BTreeSet<String> {
    shapes.iter().map(|(name, shape)| format!("{name} {shape}")).collect()
}

fn read(text: &str) -> BTreeMap<String, Shape> {
    let line = |line: &str| {
        let (name, rest) = line.split_once(' ').expect(line);
        let mut numbers = rest.split(' ').skip(1).step_by(2).map(|n| n.parse().expect(line));
        let mut next = || numbers.next().expect(line);
        let (kind, key, value, entries, flags) = (next(), next(), next(), next(), next());
        (name.to_owned(), Shape { kind, key, value, entries, flags })
    };
    text.lines().map(line).collect()
}

#[test]
fn the_maps_have_the_shapes_that_their_layout_is_recorded_with() {
    let (layout, recorded) = RECORDED[RECORDED.len() - 1];
    assert_eq!(layout, LAYOUT, "record the shapes of the new layout in layouts/v{LAYOUT}.txt and name it here");
    let (recorded, now) = (text(&read(recorded)), text(&wanted(OBJECT).expect("the object")));
    let added: Vec<_> = now.difference(&recorded).collect();
    let gone: Vec<_> = recorded.difference(&now).collect();
    assert!(
        added.is_empty() && gone.is_empty(),
        "a new map is a line more in layouts/v{LAYOUT}.txt; a changed one needs a new LAYOUT: {added:#?} were {gone:#?}"
    );
}

#[test]
fn every_layout_that_was_can_be_taken_over() {
    let wanted = wanted(OBJECT).expect("the object");
    assert_eq!(wanted.len(), map::ALL.len());
    for (layout, recorded) in RECORDED {
        let ways = plan(layout, &read(recorded), &wanted, &BTreeSet::new(), CHANGES);
        assert!(ways.is_ok(), "layout {layout}: register a conversion in CHANGES: {ways:?}");
    }
    for change in CHANGES {
        assert!(RECORDED.iter().any(|(layout, _)| *layout == change.from && change.from != LAYOUT), "{change:?}");
    }
}

#[test]
fn what_becomes_of_each_map() {
    let wanted = wanted(OBJECT).expect("the object");
    let change = |name: &str, with: fn(&mut Shape)| {
        let mut old = wanted.clone();
        with(old.get_mut(name).expect(name));
        old
    };
    let none = BTreeSet::new();
    let other: Conversion = |_, _| None;
    let flows = [Change { map: map::FLOWS, from: 0, conversion: other }];
    let said =
        |old: &BTreeMap<String, Shape>, name: &str, changes: &[Change]| match plan(0, old, &wanted, &none, changes) {
            Ok(ways) => match ways[name] {
                Way::Share => "share",
                Way::Convert(_) => "convert",
                Way::Anew => "anew",
            },
            Err(lost) => {
                assert_eq!(lost.map, name);
                "lost"
            }
        };
    let value: fn(&mut Shape) = |s| s.value += 8;
    let more: fn(&mut Shape) = |s| s.entries /= 2;
    for (name, with, changes, becomes) in [
        (map::FLOWS, value, &[][..], "lost"),
        (map::FLOWS, value, &flows[..], "convert"),
        (map::FLOWS, more, &[], "convert"),
        (map::FLOWS, |_| {}, &[], "share"),
        (map::FLOWS, |_| {}, &flows, "convert"),
        (map::FLOWS, |s| s.kind = 1, &[], "convert"),
        (map::COUNTERS, more, &[], "convert"),
        (map::COUNTERS, |s| s.kind = 2, &[], "lost"),
        (map::LISTENERS, more, &[], "lost"),
        (map::SERVICES, value, &[], "anew"),
        (map::CLUSTER, value, &[], "anew"),
        (map::FRAGMENTS, value, &[], "anew"),
    ] {
        assert_eq!(said(&change(name, with), name, changes), becomes, "{name}");
    }
    assert_eq!(said(&change(map::SERVICES, value), map::BACKENDS, &[]), "anew", "they name each other's entries");
    assert_eq!(said(&change(map::SERVICES, value), map::CLUSTER, &[]), "share");
    let mut old = wanted.clone();
    old.remove(map::PODS);
    assert_eq!(said(&old, map::PODS, &[]), "anew", "there was none");
    let here = BTreeSet::from([map::FLOWS.to_owned()]);
    assert!(plan(0, &change(map::FLOWS, value), &wanted, &here, &[]).is_ok(), "there is one already");
}
