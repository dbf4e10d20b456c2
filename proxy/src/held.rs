//! What the sidecar holds of the cluster: the resources of its view, and what each dialled address means. Built from
//! the chunks of the discovery stream; an Update takes effect whole or, when it is malformed, not at all. PURE.

use sluice_model::{Delta, Name, Resource, ResourceKey, Revision, Snapshot};
use sluice_traffic::resolve::Resolved;
use sluice_wire::{
    Malformed,
    convert::{address_from_wire, address_to_wire, key_from_wire, resource_from_wire},
    v1,
};
use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

/// Most resources of one Update: many times what a view holds. More is refused as malformed.
const MAX_PENDING: usize = 100_000;

/// The view at one revision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Held {
    pub epoch: String,
    pub snapshot: Snapshot,
    pub resolutions: BTreeMap<SocketAddr, Resolved>,
}

/// The chunks of an Update whose last one has not come.
#[derive(Debug, Default)]
pub struct Assembly {
    full: bool,
    changed: Vec<Resource>,
    removed: Vec<ResourceKey>,
    resolutions: Vec<(SocketAddr, Resolved)>,
    /// Why the whole Update will be refused.
    broken: Option<Malformed>,
}

/// A complete Update.
#[derive(Debug)]
pub struct Complete {
    pub epoch: String,
    pub revision: Revision,
    pub full: bool,
    changed: Vec<Resource>,
    removed: Vec<ResourceKey>,
    resolutions: Vec<(SocketAddr, Resolved)>,
}

/// An Update that must be nacked.
#[derive(Debug)]
pub struct Refused {
    pub epoch: String,
    pub revision: Revision,
    pub reason: Malformed,
}

impl Assembly {
    /// Takes one chunk; answers when it was the last.
    pub fn chunk(&mut self, update: v1::Update) -> Option<Result<Complete, Refused>> {
        let (epoch, revision, last) = (update.epoch.clone(), Revision(update.revision), update.last);
        self.full |= update.full;
        if self.broken.is_none() {
            self.broken = self.collect(update).err();
        }
        if !last {
            return None;
        }
        let done = std::mem::take(self);
        Some(match done.broken {
            Some(reason) => Err(Refused { epoch, revision, reason }),
            None => Ok(Complete {
                epoch,
                revision,
                full: done.full,
                changed: done.changed,
                removed: done.removed,
                resolutions: done.resolutions,
            }),
        })
    }

    fn collect(&mut self, update: v1::Update) -> Result<(), Malformed> {
        let pending = self.changed.len() + self.removed.len() + self.resolutions.len();
        if pending + update.changed.len() + update.removed.len() + update.resolutions.len() > MAX_PENDING {
            return Err(Malformed::Invalid { field: "update", value: format!("more than {MAX_PENDING} resources") });
        }
        for resource in update.changed {
            self.changed.push(resource_from_wire(resource)?);
        }
        for key in update.removed {
            self.removed.push(key_from_wire(key)?);
        }
        for resolution in update.resolutions {
            self.resolutions.push(resolution_from_wire(resolution)?);
        }
        Ok(())
    }
}

impl Held {
    /// The view after `update`. A full one starts from nothing.
    pub fn apply(&self, update: Complete) -> Held {
        let fresh = Held::default();
        let base = if update.full || update.epoch != self.epoch { &fresh } else { self };
        let delta = Delta { changed: update.changed.into_iter().map(Arc::new).collect(), removed: update.removed };
        let mut resolutions = base.resolutions.clone();
        resolutions.extend(update.resolutions);
        Held { epoch: update.epoch, snapshot: base.snapshot.apply(&delta, update.revision), resolutions }
    }

    /// Forgets a destination nobody dials any more.
    pub fn forget(&mut self, destination: &SocketAddr) {
        self.resolutions.remove(destination);
    }
}

fn resolution_from_wire(r: v1::Resolution) -> Result<(SocketAddr, Resolved), Malformed> {
    let destination = destination_from_wire(&r.destination.ok_or(Malformed::Missing("destination"))?)?;
    let service: Option<Name> = r.service.filter(|n| !n.name.is_empty()).map(Into::into);
    let identity = match r.identity.as_str() {
        "" => None,
        i => Some(i.parse().map_err(|_| Malformed::Invalid { field: "identity", value: i.to_owned() })?),
    };
    Ok((destination, Resolved { service, identity }))
}

pub fn destination_from_wire(d: &v1::Destination) -> Result<SocketAddr, Malformed> {
    let port = u16::try_from(d.port).map_err(|_| Malformed::Invalid { field: "port", value: d.port.to_string() })?;
    Ok(SocketAddr::new(address_from_wire(&d.address)?, port))
}

pub fn destination_to_wire(d: SocketAddr) -> v1::Destination {
    v1::Destination { address: address_to_wire(d.ip()), port: d.port().into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{EndpointSet, Kind};
    use sluice_wire::convert::{key_to_wire, resource_to_wire};

    fn set(name: &str) -> Resource {
        Resource::EndpointSet(EndpointSet { name: Name::new("a", name), endpoints: vec![] })
    }

    fn update(revision: u64, full: bool, changed: &[Resource], last: bool) -> v1::Update {
        let changed = changed.iter().map(|r| resource_to_wire(r, Revision(revision))).collect();
        v1::Update { epoch: "e".into(), revision, full, changed, last, ..Default::default() }
    }

    #[test]
    fn chunks_take_effect_at_the_last() {
        let mut a = Assembly::default();
        assert!(a.chunk(update(2, true, &[set("x")], false)).is_none());
        let complete = a.chunk(update(2, false, &[set("y")], true)).expect("last").expect("valid");
        let held = Held::default().apply(complete);
        assert_eq!((held.snapshot.len(), held.snapshot.revision), (2, Revision(2)));
        let mut next = update(3, false, &[], true);
        next.removed = vec![key_to_wire(&ResourceKey { kind: Kind::EndpointSet, name: Name::new("a", "x") })];
        let held = held.apply(a.chunk(next).expect("last").expect("valid"));
        assert_eq!(held.snapshot.len(), 1);
    }

    #[test]
    fn a_malformed_chunk_refuses_the_whole_update() {
        let mut a = Assembly::default();
        let mut broken = update(2, false, &[], false);
        broken.changed.push(v1::Resource { version: 1, kind: None });
        assert!(a.chunk(broken).is_none());
        let refused = a.chunk(update(2, false, &[set("x")], true)).expect("last").expect_err("refused");
        assert_eq!(refused.revision, Revision(2));
        assert!(a.chunk(update(3, false, &[set("x")], true)).expect("last").is_ok(), "the next one starts anew");
    }

    #[test]
    fn resolutions_are_kept_until_a_full_update() {
        let mut one = update(1, false, &[], true);
        let destination = "10.96.0.1:80".parse().expect("address");
        one.resolutions = vec![v1::Resolution {
            destination: Some(destination_to_wire(destination)),
            service: Some(v1::Name { namespace: "a".into(), name: "x".into() }),
            identity: String::new(),
        }];
        let mut a = Assembly::default();
        let held = Held::default().apply(a.chunk(one).expect("last").expect("valid"));
        let held = held.apply(a.chunk(update(2, false, &[], true)).expect("last").expect("valid"));
        assert_eq!(held.resolutions[&destination].service, Some(Name::new("a", "x")));
        let held = held.apply(a.chunk(update(3, true, &[], true)).expect("last").expect("valid"));
        assert!(held.resolutions.is_empty());
    }
}
