//! Puts the sidecar into pods of namespaces that ask for it: PURE. It runs when a pod is created; the sidecar is a native
//! one (an init container with `restartPolicy: Always`), first in the list, so that it is ready before anything of the
//! app runs and leaves after it.

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

/// Namespace label (and pod label, which wins) that asks for injection: `enabled` or `disabled`.
pub const LABEL_INJECT: &str = "sluice.dev/inject";
/// Set on injected pods; what the data plane goes by.
pub const ANNOTATION_SIDECAR: &str = "sluice.dev/sidecar";
pub const ANNOTATION_MTLS: &str = "sluice.dev/mtls";
pub const ANNOTATION_EXCLUDED_PORTS: &str = "sluice.dev/exclude-inbound-ports";
/// Most ports that one annotation lists: they are a node's to keep, for all its pods.
pub const MAX_PORTS: usize = 64;
pub const ANNOTATION_OPAQUE_PORTS: &str = "sluice.dev/opaque-ports";
pub const CONTAINER: &str = "sluice-proxy";
/// Pod annotation: requests that its sidecar writes to its log (`off`, `errors`, `all`).
pub const ANNOTATION_ACCESS_LOG: &str = "sluice.dev/access-log";
/// Namespace label: `enabled` lets those who tap see headers, which may hold secrets.
pub const LABEL_TAP_HEADERS: &str = "sluice.dev/tap-headers";
const INJECTED: &str = "injected";

/// What an injected sidecar is made of.
#[derive(Clone, Debug)]
pub struct Config {
    pub image: String,
    /// Ranges of services and pods, in CIDR notation with commas between.
    pub cluster_ranges: String,
    /// Collector of spans (OTLP over HTTP), and the share of traces beginning at sidecars that are sampled.
    pub tracing: Option<(String, f64)>,
}

/// The pod carries a sidecar of ours.
pub fn injected(p: &Pod) -> bool {
    p.metadata.annotations.as_ref().and_then(|a| a.get(ANNOTATION_SIDECAR)).is_some_and(|v| v == INJECTED)
}

/// Whether a pod with these labels in a namespace with those gets a sidecar.
pub fn wanted(namespace_labels: &Value, pod: &Value) -> bool {
    if pod["spec"]["hostNetwork"] == true {
        return false;
    }
    let asked = |labels: &Value| labels[LABEL_INJECT].as_str().map(|v| v == "enabled");
    asked(&pod["metadata"]["labels"]).or_else(|| asked(namespace_labels)).unwrap_or(false)
}

/// Adds the sidecar to a pod that is being created. A pod that has one is left alone; a pod that claims the annotation
/// without having one loses the claim, because it would be closed for ever.
pub fn inject(pod: &mut Value, namespace_labels: &Value, config: &Config) {
    let has = pod["spec"]["initContainers"].as_array().is_some_and(|v| v.iter().any(|c| c["name"] == CONTAINER));
    if has {
        return;
    }
    if !wanted(namespace_labels, pod) {
        if let Some(a) = pod["metadata"]["annotations"].as_object_mut() {
            a.remove(ANNOTATION_SIDECAR);
        }
        return;
    }
    if !pod["metadata"]["annotations"].is_object() {
        pod["metadata"]["annotations"] = json!({});
    }
    pod["metadata"]["annotations"][ANNOTATION_SIDECAR] = INJECTED.into();
    if !pod["spec"]["initContainers"].is_array() {
        pod["spec"]["initContainers"] = json!([]);
    }
    let mut sidecar = container(config);
    show(&mut sidecar, pod, namespace_labels, config);
    if let Some(list) = pod["spec"]["initContainers"].as_array_mut() {
        list.insert(0, sidecar);
    }
}

/// What a pod, its namespace and the cluster ask the sidecar to show of requests.
fn show(container: &mut Value, pod: &Value, namespace_labels: &Value, config: &Config) {
    let access = pod["metadata"]["annotations"][ANNOTATION_ACCESS_LOG].as_str();
    let access = access.filter(|a| ["errors", "all"].contains(a)).map(|a| ("SLUICE_ACCESS_LOG", a.to_owned()));
    let headers = (namespace_labels[LABEL_TAP_HEADERS] == "enabled").then(|| ("SLUICE_TAP_HEADERS", "true".to_owned()));
    let tracing = config.tracing.iter().flat_map(|(collector, share)| {
        [("SLUICE_OTLP_ENDPOINT", collector.clone()), ("SLUICE_TRACE_SAMPLE", share.to_string())]
    });
    if let Some(env) = container["env"].as_array_mut() {
        let asked = access.into_iter().chain(headers).chain(tracing);
        env.extend(asked.map(|(name, value)| json!({"name": name, "value": value})));
    }
}

/// The container of a pod that serves a gateway; `pod` and its namespace ask it to show of requests what they would ask
/// of a sidecar.
pub fn gateway_container(pod: &Value, namespace_labels: &Value, config: &Config) -> Value {
    let mut container = container(config);
    show(&mut container, pod, namespace_labels, config);
    if let Some(fields) = container.as_object_mut() {
        fields.remove("restartPolicy");
        fields.insert("args".into(), json!(["--role=gateway"]));
        let probe = json!({
            "httpGet": {"path": "/ready", "port": 15020, "scheme": "HTTP"},
            "periodSeconds": 2, "timeoutSeconds": 1, "failureThreshold": 3, "successThreshold": 1
        });
        fields.insert("readinessProbe".into(), probe);
        fields.insert("resources".into(), json!({"requests": {"cpu": "100m", "memory": "32Mi"}}));
    }
    container
}

fn container(config: &Config) -> Value {
    let field = |path: &str| json!({"fieldRef": {"apiVersion": "v1", "fieldPath": path}});
    json!({
        "name": CONTAINER,
        "image": config.image,
        "imagePullPolicy": "IfNotPresent",
        "restartPolicy": "Always",
        "env": [
            {"name": "POD_NAME", "valueFrom": field("metadata.name")},
            {"name": "POD_NAMESPACE", "valueFrom": field("metadata.namespace")},
            {"name": "POD_UID", "valueFrom": field("metadata.uid")},
            {"name": "POD_IP", "valueFrom": field("status.podIP")},
            {"name": "SLUICE_CLUSTER_RANGES", "value": config.cluster_ranges}
        ],
        "ports": [{"name": "sluice-admin", "containerPort": 15020, "protocol": "TCP"}],
        // Ready in well under a second; half a minute is for a node that is starting everything at once.
        "startupProbe": {
            "httpGet": {"path": "/ready", "port": 15020, "scheme": "HTTP"},
            "periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 30, "successThreshold": 1
        },
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": true,
            "runAsUser": 1337,
            "runAsGroup": 1337,
            "runAsNonRoot": true
        },
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File"
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Value {
        json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}], "initContainers": [{"name": "i"}]}})
    }

    fn config() -> Config {
        Config {
            image: "sluice.local/proxy:dev".into(),
            cluster_ranges: "10.96.0.0/16,10.244.0.0/16".into(),
            tracing: None,
        }
    }

    #[test]
    fn what_is_shown_of_requests_is_asked_for() {
        let mut p = pod();
        p["metadata"]["annotations"] = json!({ANNOTATION_ACCESS_LOG: "errors"});
        let labels = json!({LABEL_INJECT: "enabled", LABEL_TAP_HEADERS: "enabled"});
        inject(&mut p, &labels, &Config { tracing: Some(("http://c:4318/v1/traces".into(), 0.5)), ..config() });
        let env = p["spec"]["initContainers"][0]["env"].as_array().expect("a list").clone();
        for (name, value) in [
            ("SLUICE_ACCESS_LOG", "errors"),
            ("SLUICE_TAP_HEADERS", "true"),
            ("SLUICE_OTLP_ENDPOINT", "http://c:4318/v1/traces"),
            ("SLUICE_TRACE_SAMPLE", "0.5"),
        ] {
            assert!(env.contains(&json!({"name": name, "value": value})), "{name}");
        }
    }

    #[test]
    fn the_sidecar_comes_first_and_once() {
        let on = json!({LABEL_INJECT: "enabled"});
        let mut p = pod();
        inject(&mut p, &on, &config());
        inject(&mut p, &on, &config());
        let names: Vec<_> =
            p["spec"]["initContainers"].as_array().expect("a list").iter().map(|c| &c["name"]).collect();
        assert_eq!(names, [CONTAINER, "i"]);
        let typed: Pod = serde_json::from_value(p).expect("a pod");
        assert!(injected(&typed));
    }

    #[test]
    fn labels_decide_the_pods_own_first() {
        for (namespace, own, want) in [
            (json!({}), json!(null), false),
            (json!({LABEL_INJECT: "enabled"}), json!(null), true),
            (json!({LABEL_INJECT: "enabled"}), json!({LABEL_INJECT: "disabled"}), false),
            (json!(null), json!({LABEL_INJECT: "enabled"}), true),
        ] {
            let mut p = pod();
            p["metadata"]["labels"] = own;
            assert_eq!(wanted(&namespace, &p), want);
            p["spec"]["hostNetwork"] = true.into();
            assert!(!wanted(&namespace, &p));
        }
    }

    #[test]
    fn a_claim_without_a_sidecar_is_taken_away() {
        let mut p = pod();
        p["metadata"]["annotations"] = json!({ANNOTATION_SIDECAR: INJECTED});
        inject(&mut p, &json!({}), &config());
        assert!(p["metadata"]["annotations"].get(ANNOTATION_SIDECAR).is_none());
    }
}
