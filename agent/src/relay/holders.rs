//! The sidecars of this node and how each stands: what "every sidecar has it" is decided by. A sidecar stays on the
//! list when its stream breaks, because it goes on serving what it has; it leaves with its pod. PURE.

use super::feed::Standing;
use sluice_wire::v1::{Holder, WorkloadRef};
use std::collections::BTreeMap;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Holders {
    by_uid: BTreeMap<String, (WorkloadRef, Standing)>,
}

impl Holders {
    /// How the sidecar of `workload` stands now.
    pub fn stand(&mut self, workload: &WorkloadRef, standing: Standing) {
        self.by_uid.insert(workload.uid.clone(), (workload.clone(), standing));
    }

    pub fn forget(&mut self, uid: &str) {
        self.by_uid.remove(uid);
    }

    pub fn uids(&self) -> impl Iterator<Item = &str> {
        self.by_uid.keys().map(String::as_str)
    }

    pub fn all(&self) -> impl Iterator<Item = &(WorkloadRef, Standing)> {
        self.by_uid.values()
    }

    /// The same sidecars hold the same routes, each of the same history; revisions may differ.
    pub fn same_routes(&self, other: &Self) -> bool {
        let routes = |h: &Self| -> Vec<_> {
            h.by_uid.iter().map(|(uid, (_, s))| (uid.clone(), s.epoch.clone(), s.routes.clone())).collect()
        };
        routes(self) == routes(other)
    }

    /// The whole list, as control gets it in `epoch`: a revision of another history says nothing in this one.
    pub fn list(&self, epoch: &str) -> Vec<Holder> {
        let holder = |(workload, s): &(WorkloadRef, Standing)| Holder {
            workload: Some(workload.clone()),
            revision: if s.epoch == epoch { s.revision.0 } else { 0 },
            routes: s.routes.iter().map(Into::into).collect(),
            nack: s.nack.clone(),
        };
        self.by_uid.values().map(holder).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{Name, Revision};

    #[test]
    fn a_sidecar_stays_until_its_pod_is_gone() {
        let mut h = Holders::default();
        let w = WorkloadRef { namespace: "a".into(), name: "b".into(), uid: "u".into() };
        let standing = |revision, routes| Standing {
            epoch: "e".into(),
            revision: Revision(revision),
            routes,
            ..Standing::default()
        };
        h.stand(&w, standing(0, vec![]));
        let none = h.clone();
        h.stand(&w, standing(3, vec![Name::new("a", "r")]));
        assert!(matches!(&h.list("e")[..], [one] if one.revision == 3 && one.routes.len() == 1));
        assert_eq!(h.list("other")[0].revision, 0, "another history");
        let before = h.clone();
        h.stand(&w, standing(4, vec![Name::new("a", "r")]));
        assert!(h.same_routes(&before) && !h.same_routes(&none));
        h.forget("u");
        assert!(h.list("e").is_empty());
    }
}
