//! What a gateway is made of in the cluster: the pods that serve its listeners, and the service by which clients reach
//! them. PURE. The controller (`controllers::gateway`) makes these objects; what the pods listen for is `compile::gateways`.

use crate::{
    api::{
        client::Object as _,
        validate::is_label,
        value::{list, text},
    },
    inject,
};
use gateway_api::gateways::Gateway;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// The class that is there from the start, and the controller that classes name to be ours.
pub const CLASS: &str = "sluice";
pub const CONTROLLER_NAME: &str = "sluice.dev/gateway";
/// On pods: the gateway, of their namespace, whose listeners they serve.
pub const ANNOTATION: &str = "sluice.dev/gateway";
/// On gateways, as the next ones: `LoadBalancer`, `NodePort` or `ClusterIP`.
pub const ANNOTATION_TYPE: &str = "sluice.dev/service-type";
/// `Local`: pods see the clients' own addresses. `Cluster`: every node takes clients, and they come from a node's address.
pub const ANNOTATION_POLICY: &str = "sluice.dev/external-traffic-policy";
pub const ANNOTATION_REPLICAS: &str = "sluice.dev/replicas";
/// On what is made: the keys of labels and annotations that it has by its gateway's wish.
const ANNOTATION_GIVEN: &str = "sluice.dev/given";
/// Of Secrets with a certificate and its key.
pub const SECRET_TYPE: &str = "kubernetes.io/tls";
/// Gateway API's label of what belongs to a gateway.
const LABEL: &str = "gateway.networking.k8s.io/gateway-name";

/// The name of all that is made for a gateway.
pub fn made_name(gateway: &str) -> String {
    format!("{gateway}-{CLASS}")
}

/// Why nothing could be made for a gateway of this name.
pub fn unusable_name(gateway: &str) -> Option<String> {
    let made = made_name(gateway);
    let good = is_label(&made) && made.starts_with(|c: char| c.is_ascii_lowercase());
    (!good).then(|| format!("metadata.name: its service would be called {made}, which no service can be"))
}

/// What a gateway asks of its service and pods.
#[derive(Debug, PartialEq, Eq)]
pub struct Wishes {
    pub service_type: String,
    pub external_policy: String,
    /// `None`: left to whoever scales it.
    pub replicas: Option<u32>,
}

/// Reads the annotations: those of `spec.infrastructure` count before the gateway's own.
pub fn wishes(g: &Gateway) -> Result<Wishes, String> {
    let of = |key: &str| {
        let infrastructure = g.spec.infrastructure.as_ref().and_then(|i| i.annotations.as_ref());
        infrastructure.and_then(|a| a.get(key)).or_else(|| g.metadata.annotations.as_ref()?.get(key))
    };
    let one_of = |key: &str, default: &str, known: &[&str]| match of(key) {
        None => Ok(default.to_owned()),
        Some(value) if known.contains(&value.as_str()) => Ok(value.clone()),
        Some(value) => Err(format!("annotation {key}: {value:?} is none of {}", known.join(", "))),
    };
    let replicas = of(ANNOTATION_REPLICAS).map(|text| match text.parse::<u32>() {
        Ok(n) if n <= 1000 => Ok(n),
        _ => Err(format!("annotation {ANNOTATION_REPLICAS}: {text:?} is no number up to 1000")),
    });
    Ok(Wishes {
        service_type: one_of(ANNOTATION_TYPE, "LoadBalancer", &["LoadBalancer", "NodePort", "ClusterIP"])?,
        external_policy: one_of(ANNOTATION_POLICY, "Local", &["Local", "Cluster"])?,
        replicas: replicas.transpose()?,
    })
}

/// The objects that a gateway is to have, in the order in which they are made.
pub struct Made {
    pub account: Value,
    pub deployment: Value,
    /// Absent while no listener has a port.
    pub service: Option<Value>,
}

/// What `g` is to have; its namespace has these labels.
pub fn made(g: &Gateway, wishes: &Wishes, namespace_labels: &Value, config: &inject::Config) -> Made {
    let infrastructure = g.spec.infrastructure.clone().unwrap_or_default();
    let selector = BTreeMap::from([(LABEL.to_owned(), g.name().to_owned())]);
    let mut labels = infrastructure.labels.unwrap_or_default();
    labels.extend(selector.clone());
    let mut annotations = infrastructure.annotations.unwrap_or_default();
    let log = g.metadata.annotations.as_ref().and_then(|a| a.get_key_value(inject::ANNOTATION_ACCESS_LOG));
    let given = Given {
        annotations: annotations.keys().chain(log.map(|(key, _)| key)).cloned().collect(),
        labels: labels.keys().filter(|key| *key != LABEL).cloned().collect(),
    };
    annotations.insert(ANNOTATION_GIVEN.to_owned(), json!(given).to_string());
    let metadata = json!({
        "name": made_name(g.name()), "namespace": g.namespace(), "labels": labels, "annotations": annotations,
        "ownerReferences": [super::controllers::owned_by(g)],
    });
    let object = |version: &str, kind: &str, spec: Value| {
        let mut object = json!({"apiVersion": version, "kind": kind, "metadata": metadata});
        if !spec.is_null() {
            object["spec"] = spec;
        }
        object
    };
    let ports = ports(g);
    Made {
        account: object("v1", "ServiceAccount", Value::Null),
        deployment: object(
            "apps/v1",
            "Deployment",
            deployment(g, wishes, (&labels, &selector), namespace_labels, config),
        ),
        service: (!ports.is_empty()).then(|| object("v1", "Service", service(wishes, &selector, &ports))),
    }
}

/// Of listeners whose protocol is known.
fn ports(g: &Gateway) -> BTreeSet<u16> {
    let known = g.spec.listeners.iter().filter(|l| ["HTTP", "HTTPS", "TLS"].contains(&l.protocol.as_str()));
    known.filter_map(|l| u16::try_from(l.port).ok()).filter(|p| *p != 0).collect()
}

fn service(wishes: &Wishes, selector: &BTreeMap<String, String>, ports: &BTreeSet<u16>) -> Value {
    let port = |p: &u16| json!({"name": format!("port-{p}"), "port": p, "protocol": "TCP", "targetPort": p});
    let mut spec = json!({
        "type": wishes.service_type, "selector": selector, "ipFamilyPolicy": "PreferDualStack",
        "ports": ports.iter().map(port).collect::<Vec<_>>(),
    });
    if wishes.service_type != "ClusterIP" {
        spec["externalTrafficPolicy"] = json!(wishes.external_policy);
    }
    spec
}

/// A change of listeners changes nothing here, so that no pod is replaced for it.
fn deployment(
    g: &Gateway,
    wishes: &Wishes,
    (labels, selector): (&BTreeMap<String, String>, &BTreeMap<String, String>),
    namespace_labels: &Value,
    config: &inject::Config,
) -> Value {
    let mut labels = labels.clone();
    labels.insert(inject::LABEL_INJECT.to_owned(), "disabled".to_owned());
    let mut annotations: Map<String, Value> = g
        .spec
        .infrastructure
        .iter()
        .filter_map(|i| i.annotations.as_ref())
        .flatten()
        .map(|(k, v)| (k.clone(), json!(v)))
        .collect();
    annotations.insert(ANNOTATION.to_owned(), json!(g.name()));
    if let Some(log) = g.metadata.annotations.as_ref().and_then(|a| a.get(inject::ANNOTATION_ACCESS_LOG)) {
        annotations.entry(inject::ANNOTATION_ACCESS_LOG).or_insert_with(|| json!(log));
    }
    let metadata = json!({"labels": labels, "annotations": annotations});
    let container = inject::gateway_container(&json!({"metadata": metadata}), namespace_labels, config);
    let mut spec = json!({
        "selector": {"matchLabels": selector},
        // A pod that ends is replaced before it does.
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {
            "metadata": metadata,
            "spec": {
                "serviceAccountName": made_name(g.name()),
                "terminationGracePeriodSeconds": 30,
                // Ports below 1024 without any capability.
                "securityContext": {"sysctls": [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]},
                "containers": [container],
            },
        },
    });
    if let Some(replicas) = wishes.replicas {
        spec["replicas"] = json!(replicas);
    }
    spec
}

/// Whether `have` says all that `want` says, and nothing where that is null. Lists must be as long, for what is no longer wanted must go.
pub fn covers(have: &Value, want: &Value) -> bool {
    match (have, want) {
        (Value::Object(have), Value::Object(want)) => {
            let empty = |v: &Value| v.is_null() || v.as_object().is_some_and(Map::is_empty);
            want.iter().all(|(k, v)| have.get(k).map_or(empty(v), |have| covers(have, v)))
        }
        (Value::Array(have), Value::Array(want)) => {
            have.len() == want.len() && have.iter().zip(want).all(|(have, want)| covers(have, want))
        }
        _ => have == want,
    }
}

/// What a gateway has given to an object.
#[derive(Default, Serialize, Deserialize)]
struct Given {
    annotations: BTreeSet<String>,
    labels: BTreeSet<String>,
}

/// Has `want` take from `have` what the gateway gave it and gives no more. Others' labels and annotations stay.
pub fn take_back(have: &Value, want: &mut Value) {
    let given = have["metadata"]["annotations"][ANNOTATION_GIVEN].as_str();
    let Given { annotations, labels } = given.and_then(|g| serde_json::from_str(g).ok()).unwrap_or_default();
    for place in ["/metadata", "/spec/template/metadata"] {
        for (field, keys) in [("annotations", &annotations), ("labels", &labels)] {
            let Some(map) = want.pointer_mut(&format!("{place}/{field}")).and_then(Value::as_object_mut) else {
                continue;
            };
            for key in keys {
                map.entry(key).or_insert(Value::Null);
            }
        }
    }
}

/// The object is controlled by the owner of this uid.
pub fn is_owned(object: &Value, uid: &str) -> bool {
    let owners = list(object, "metadata.ownerReferences");
    owners.iter().any(|o| o["controller"] == true && text(o, "uid") == uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gateway(annotations: Value, listeners: Value) -> Gateway {
        let object = json!({
            "metadata": {"name": "edge", "namespace": "shop", "uid": "u", "annotations": annotations},
            "spec": {"gatewayClassName": CLASS, "listeners": listeners},
        });
        serde_json::from_value(object).expect("a gateway")
    }

    fn config() -> inject::Config {
        inject::Config { image: "proxy:1".into(), cluster_ranges: "10.96.0.0/16".into(), tracing: None }
    }

    #[test]
    fn a_gateway_is_pods_and_a_service_of_all_ports() {
        let listeners = json!([
            {"name": "a", "port": 80, "protocol": "HTTP"}, {"name": "b", "port": 443, "protocol": "HTTPS", "hostname": "a.example"},
            {"name": "c", "port": 443, "protocol": "TLS"}, {"name": "d", "port": 53, "protocol": "UDP"}]);
        let g = gateway(json!({}), listeners);
        let made = made(&g, &wishes(&g).expect("wishes"), &json!({}), &config());
        let service = made.service.expect("a service");
        assert_eq!((text(&service, "metadata.name"), text(&service, "spec.type")), ("edge-sluice", "LoadBalancer"));
        let ports: Vec<i64> = list(&service, "spec.ports").iter().filter_map(|p| p["port"].as_i64()).collect();
        assert_eq!(ports, [80, 443]);
        let template = &made.deployment["spec"]["template"];
        let labels = &template["metadata"]["labels"];
        assert_eq!(labels[inject::LABEL_INJECT], "disabled", "it is no app with a sidecar");
        assert_eq!(service["spec"]["selector"][LABEL], labels[LABEL]);
        assert_eq!(template["metadata"]["annotations"][ANNOTATION], "edge");
        let container = &template["spec"]["containers"][0];
        assert_eq!((text(container, "name"), &container["args"]), (inject::CONTAINER, &json!(["--role=gateway"])));
        assert!(made.deployment["spec"].get("replicas").is_none(), "left to whoever scales it");
        let owner = &made.account["metadata"]["ownerReferences"][0];
        assert_eq!((text(owner, "kind"), text(owner, "uid")), ("Gateway", "u"));
    }

    #[test]
    fn what_a_gateway_gives_no_more_is_taken_back() {
        let made = |infrastructure: Value, own: Value| {
            let mut g = gateway(own, json!([{"name": "a", "port": 80, "protocol": "HTTP"}]));
            g.spec.infrastructure = serde_json::from_value(infrastructure).expect("an infrastructure");
            made(&g, &wishes(&g).expect("wishes"), &json!({}), &config())
        };
        let log = json!({inject::ANNOTATION_ACCESS_LOG: "all"});
        let before = made(json!({"annotations": {"a": "1", "b": "2"}, "labels": {"team": "x"}}), log);
        let now = || made(json!({"annotations": {"b": "2"}}), json!({}));
        for (mut have, mut want) in [
            (before.deployment, now().deployment),
            (before.service.expect("a service"), now().service.expect("a service")),
        ] {
            for place in ["/metadata", "/spec/template/metadata"] {
                if let Some(metadata) = have.pointer_mut(place) {
                    metadata["annotations"]["others"] = "stays".into();
                    metadata["labels"]["others"] = "stays".into();
                }
            }
            assert!(!covers(&have, &want));
            take_back(&have, &mut want);
            assert!(!covers(&have, &want));
            json_patch::merge(&mut have, &want);
            for place in ["/metadata", "/spec/template/metadata"] {
                let Some(metadata) = have.pointer(place) else { continue };
                let keys = |field: &str| {
                    let all = metadata[field].as_object().into_iter().flatten();
                    all.map(|(key, _)| key.as_str()).filter(|key| !key.starts_with("sluice.dev/")).collect::<Vec<_>>()
                };
                assert_eq!(keys("annotations"), ["b", "others"], "{place}");
                assert_eq!(keys("labels"), [LABEL, "others"], "{place}");
                assert_eq!(metadata["annotations"].get(inject::ANNOTATION_ACCESS_LOG), None);
            }
            let mut again = want;
            take_back(&have, &mut again);
            assert!(covers(&have, &again), "once is enough");
        }
    }

    #[test]
    fn wishes_are_read_and_nonsense_is_refused() {
        let asked = json!({ANNOTATION_TYPE: "NodePort", ANNOTATION_REPLICAS: "2", ANNOTATION_POLICY: "Cluster"});
        let wished = wishes(&gateway(asked, json!([]))).expect("wishes");
        let want = Wishes { service_type: "NodePort".into(), external_policy: "Cluster".into(), replicas: Some(2) };
        assert_eq!(wished, want);
        for (key, value) in
            [(ANNOTATION_TYPE, "ExternalName"), (ANNOTATION_REPLICAS, "-1"), (ANNOTATION_POLICY, "Near")]
        {
            assert!(wishes(&gateway(json!({key: value}), json!([]))).is_err(), "{key} {value}");
        }
        assert!(unusable_name("edge").is_none());
        assert!(["a.b", "1a", &"x".repeat(60)].iter().all(|n| unusable_name(n).is_some()));
    }

    #[test]
    fn defaults_of_the_api_are_no_difference() {
        let want = json!({"spec": {"ports": [{"port": 80}], "labels": {}}});
        let table = [
            (json!({"spec": {"ports": [{"port": 80, "nodePort": 30_000}], "type": "ClusterIP"}}), true),
            (json!({"spec": {"ports": [{"port": 81}]}}), false),
            (json!({"spec": {"ports": [{"port": 80}, {"port": 81}]}}), false),
            (json!({}), false),
        ];
        for (have, covered) in table {
            assert_eq!(covers(&have, &want), covered, "{have}");
        }
    }
}
