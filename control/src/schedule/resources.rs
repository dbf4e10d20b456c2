//! Amounts that pods request and nodes have. PURE.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::quantity::{parse_milli, parse_units};

/// An amount of everything that is counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// Thousandths of a CPU.
    pub cpu_milli: i64,
    /// Bytes of memory.
    pub memory: i64,
    /// Bytes of local disk.
    pub ephemeral: i64,
    /// Pods.
    pub pods: i64,
    /// Anything else, by name.
    pub other: BTreeMap<String, i64>,
}

impl Resources {
    /// From a list such as `requests` or `allocatable`. What does not parse counts as nothing.
    pub fn from_quantities(quantities: Option<&BTreeMap<String, Quantity>>) -> Self {
        let mut all = Resources::default();
        for (name, quantity) in quantities.into_iter().flatten() {
            let units = parse_units(&quantity.0).unwrap_or_default();
            match name.as_str() {
                "cpu" => {
                    all.cpu_milli = parse_milli(&quantity.0).and_then(|m| i64::try_from(m).ok()).unwrap_or_default()
                }
                "memory" => all.memory = units,
                "ephemeral-storage" => all.ephemeral = units,
                "pods" => all.pods = units,
                other => drop(all.other.insert(other.to_owned(), units)),
            }
        }
        all
    }

    /// Adds.
    pub fn add(&mut self, more: &Resources) {
        self.combine(more, i64::saturating_add);
    }

    /// Subtracts.
    pub fn subtract(&mut self, less: &Resources) {
        self.combine(less, i64::saturating_sub);
    }

    fn max(&mut self, other: &Resources) {
        self.combine(other, i64::max);
    }

    fn combine(&mut self, with: &Resources, f: fn(i64, i64) -> i64) {
        self.cpu_milli = f(self.cpu_milli, with.cpu_milli);
        self.memory = f(self.memory, with.memory);
        self.ephemeral = f(self.ephemeral, with.ephemeral);
        self.pods = f(self.pods, with.pods);
        for (name, amount) in &with.other {
            let entry = self.other.entry(name.clone()).or_default();
            *entry = f(*entry, *amount);
        }
    }

    /// Names of what `request` needs more of than `self` has free, in kube-scheduler's words.
    pub fn missing(&self, used: &Resources, request: &Resources) -> Vec<String> {
        let mut missing = Vec::new();
        let lacks = |have: i64, used: i64, want: i64| want > 0 && want > have.saturating_sub(used);
        if lacks(self.pods, used.pods, request.pods) {
            missing.push("Too many pods".to_owned());
        }
        for (name, have, used, want) in [
            ("cpu", self.cpu_milli, used.cpu_milli, request.cpu_milli),
            ("memory", self.memory, used.memory, request.memory),
            ("ephemeral-storage", self.ephemeral, used.ephemeral, request.ephemeral),
        ] {
            if lacks(have, used, want) {
                missing.push(format!("Insufficient {name}"));
            }
        }
        for (name, want) in &request.other {
            let of = |resources: &Resources| resources.other.get(name).copied().unwrap_or_default();
            if lacks(of(self), of(used), *want) {
                missing.push(format!("Insufficient {name}"));
            }
        }
        missing
    }
}

/// What a pod needs at its greediest moment: all containers with all sidecars, or an init container with the sidecars
/// started before it, whichever is more; and its overhead; and one pod.
pub fn pod_requests(spec: &PodSpec) -> Resources {
    let requests = |container: &Container| {
        Resources::from_quantities(container.resources.as_ref().and_then(|resources| resources.requests.as_ref()))
    };
    let mut running = Resources::default();
    for container in &spec.containers {
        running.add(&requests(container));
    }
    let (mut sidecars, mut starting) = (Resources::default(), Resources::default());
    for container in spec.init_containers.iter().flatten() {
        let own = requests(container);
        if container.restart_policy.as_deref() == Some("Always") {
            running.add(&own);
            sidecars.add(&own);
            starting.max(&sidecars);
        } else {
            let mut moment = sidecars.clone();
            moment.add(&own);
            starting.max(&moment);
        }
    }
    running.max(&starting);
    running.add(&Resources::from_quantities(spec.overhead.as_ref()));
    running.pods = 1;
    running
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cpu(spec: serde_json::Value) -> i64 {
        pod_requests(&serde_json::from_value(spec).expect("a pod spec")).cpu_milli
    }

    #[test]
    fn init_containers_and_sidecars_count_as_kubernetes_counts() {
        let with = |name: &str, amount: &str| json!({"name": name, "resources": {"requests": {"cpu": amount}}});
        let sidecar = |name: &str, amount: &str| json!({"name": name, "restartPolicy": "Always", "resources": {"requests": {"cpu": amount}}});
        assert_eq!(cpu(json!({"containers": [with("a", "100m"), with("b", "0.2")]})), 300);
        assert_eq!(cpu(json!({"containers": [with("a", "100m")], "initContainers": [with("i", "1")]})), 1_000);
        let first = json!({"containers": [with("a", "100m")], "initContainers": [sidecar("s", "50m"), with("i", "1")]});
        assert_eq!(cpu(first), 1_050);
        let last = json!({"containers": [with("a", "100m")], "initContainers": [with("i", "1"), sidecar("s", "50m")]});
        assert_eq!(cpu(last), 1_000);
        let overhead = json!({"containers": [with("a", "100m")], "overhead": {"cpu": "10m"}});
        assert_eq!(cpu(overhead), 110);
    }
}
