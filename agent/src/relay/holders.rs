//! The sidecars of this node and how each stands: what "every sidecar has it" is decided by. A sidecar stays on the
//! list when its stream breaks, because it goes on serving what it has; it leaves with its pod. PURE.

use super::feed::Standing;
use sluice_wire::v1::{Holder, WorkloadRef};
use std::collections::BTreeMap;

#[derive(Debug, Default)]
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

    /// The whole list, as control gets it.
    pub fn list(&self) -> Vec<Holder> {
        let holder = |(workload, s): &(WorkloadRef, Standing)| Holder {
            workload: Some(workload.clone()),
            revision: s.revision.0,
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
        let standing = Standing { revision: Revision(3), routes: vec![Name::new("a", "r")], nack: String::new() };
        h.stand(&w, Standing::default());
        h.stand(&w, standing);
        assert!(matches!(&h.list()[..], [one] if one.revision == 3 && one.routes.len() == 1));
        h.forget("u");
        assert!(h.list().is_empty());
    }
}
