//! What the sidecar says about itself: whether it is ready, which state it holds. PURE.

use crate::held::Held;
use serde_json::json;

/// Published by the control thread whenever it changes.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// A view is in force in all workers.
    pub in_force: bool,
    /// The agent sends the pod's connections here; true where no agent is asked.
    pub registered: bool,
    /// There is a certificate, or the cluster offers none.
    pub certified: bool,
    pub connected: bool,
    pub identity: Option<String>,
    pub certificate_expires_s: Option<i64>,
    pub generation: u64,
    pub held: Held,
}

impl Status {
    /// All is there with which the pod's connections can be served.
    pub fn can_serve(&self) -> bool {
        self.in_force && self.certified
    }

    /// What is not there yet; empty means ready.
    pub fn missing(&self) -> Vec<&'static str> {
        [
            (self.in_force, "the first snapshot"),
            (self.registered, "the agent to register the listeners"),
            (self.certified, "a certificate"),
        ]
        .into_iter()
        .filter_map(|(there, what)| (!there).then_some(what))
        .collect()
    }

    pub fn to_json(&self) -> String {
        let resolutions: Vec<_> = self
            .held
            .resolutions
            .iter()
            .map(|(d, r)| {
                json!({"destination": d.to_string(), "service": r.service.as_ref().map(ToString::to_string),
                       "identity": r.identity.as_ref().map(ToString::to_string)})
            })
            .collect();
        let all = json!({
            "ready": self.missing().is_empty(),
            "waitingFor": self.missing(),
            "connected": self.connected,
            "identity": self.identity,
            "certificateExpiresSeconds": self.certificate_expires_s,
            "generation": self.generation,
            "epoch": self.held.epoch,
            "revision": self.held.snapshot.revision,
            "destinations": resolutions,
            "snapshot": self.held.snapshot,
        });
        all.to_string() + "\n"
    }

    /// Gauges beside the workers' counters.
    pub fn metrics(&self) -> String {
        let ready = u8::from(self.missing().is_empty());
        format!(
            "# TYPE sluice_ready gauge\nsluice_ready {ready}\n\
             # TYPE sluice_discovery_connected gauge\nsluice_discovery_connected {}\n\
             # TYPE sluice_config_revision gauge\nsluice_config_revision {}\n\
             # TYPE sluice_certificate_expires_seconds gauge\nsluice_certificate_expires_seconds {}\n",
            u8::from(self.connected),
            self.held.snapshot.revision,
            self.certificate_expires_s.unwrap_or(0),
        )
    }
}
