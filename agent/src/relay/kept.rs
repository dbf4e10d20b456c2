//! The holders on disk. A sidecar goes on using its routes while the agent restarts: an agent that began with an empty
//! list would tell control that every sidecar has what none was asked about. As the view's file, it is replaced whole
//! and not synced: no sidecar outlives the machine.

use super::{feed::Standing, holders::Holders};
use crate::file;
use serde::{Deserialize, Serialize};
use sluice_wire::v1::WorkloadRef;
use std::{fs, io, path::PathBuf};

pub struct Kept {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    namespace: String,
    name: String,
    uid: String,
    standing: Standing,
}

impl Kept {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The holders when the agent last ran; an unreadable file counts as none, and is said.
    pub fn load(&self) -> Holders {
        let entries: Vec<Entry> = match fs::read(&self.path).map(|text| serde_json::from_slice(&text)) {
            Ok(Ok(entries)) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => self.unreadable(&error),
            Ok(Err(error)) => self.unreadable(&error),
        };
        let mut holders = Holders::default();
        for Entry { namespace, name, uid, standing } in entries {
            holders.stand(&WorkloadRef { namespace, name, uid }, standing);
        }
        holders
    }

    fn unreadable(&self, error: &dyn std::fmt::Display) -> Vec<Entry> {
        let path = self.path.display();
        tracing::warn!(%path, %error, "saved holders are not readable: until they connect, sidecars are not waited for");
        Vec::new()
    }

    /// Whole or not at all.
    pub fn save(&self, holders: &Holders) -> io::Result<()> {
        let entry = |(w, standing): &(WorkloadRef, Standing)| Entry {
            namespace: w.namespace.clone(),
            name: w.name.clone(),
            uid: w.uid.clone(),
            standing: standing.clone(),
        };
        let entries: Vec<Entry> = holders.all().map(entry).collect();
        file::replace(&self.path, &serde_json::to_vec(&entries)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{Name, Revision};

    #[test]
    fn saved_holders_are_loaded_again() {
        let dir = tempfile::tempdir().expect("a folder");
        let kept = Kept::new(dir.path().join("x/holders.json"));
        assert_eq!(kept.load(), Holders::default());
        let mut holders = Holders::default();
        let standing = Standing {
            epoch: "e".into(),
            revision: Revision(3),
            routes: vec![Name::new("shop", "r")],
            nack: "no".into(),
        };
        let workload = WorkloadRef { namespace: "shop".into(), name: "client".into(), uid: "u".into() };
        holders.stand(&workload, standing);
        kept.save(&holders).expect("saves");
        assert_eq!(kept.load(), holders);
        fs::write(dir.path().join("x/holders.json"), "[{").expect("damaged");
        assert_eq!(kept.load(), Holders::default());
    }
}
