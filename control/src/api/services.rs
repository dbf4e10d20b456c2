//! What of a service goes with its type, and with where it may be reached from, in Kubernetes' words: which fields apply,
//! which go away by themselves when the type changes, what is refused.
//!
//! PURE. The addresses and ports themselves are in `addresses`.

use std::net::IpAddr;

use serde_json::{Value, json};
use sluice_model::SourceRange;

use super::status::Invalid;
use super::value::{at, fields, list, number, text};

pub(super) const NO_ADDRESS: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
const NO_RANGE: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
/// Where source ranges were before they had a field: a list with commas, which counts only without the field.
pub(crate) const SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
const BALANCER_ONLY: &str = "may only be used when `spec.type` is 'LoadBalancer'";

fn is_balancer(service: &Value) -> bool {
    text(service, "spec.type") == "LoadBalancer"
}

/// Whether callers from outside have a way to it.
pub fn reached_from_outside(service: &Value) -> bool {
    match text(service, "spec.type") {
        "NodePort" | "LoadBalancer" => true,
        "" | "ClusterIP" => !list(service, "spec.externalIPs").is_empty(),
        _ => false,
    }
}

/// Whether each of its ports gets a node port without asking.
pub fn wants_node_ports(service: &Value) -> bool {
    match text(service, "spec.type") {
        "NodePort" => true,
        "LoadBalancer" => at(service, "spec.allocateLoadBalancerNodePorts") != Some(&Value::Bool(false)),
        _ => false,
    }
}

/// Whether nodes say on a port of theirs whether they have an endpoint of it.
pub fn wants_health_check(service: &Value) -> bool {
    is_balancer(service) && text(service, "spec.externalTrafficPolicy") == "Local"
}

/// Fields that apply to some services only.
const DEPENDENT: [(&str, Applies); 4] = [
    ("externalTrafficPolicy", reached_from_outside),
    ("healthCheckNodePort", wants_health_check),
    ("allocateLoadBalancerNodePorts", is_balancer),
    ("loadBalancerClass", is_balancer),
];

type Applies = fn(&Value) -> bool;

/// On an update: what no longer applies and was left as it was goes away; what was set on purpose stays and is refused.
/// The address of the load balancer goes in the same write as the type.
pub fn drop_dependent(new: &mut Value, old: &Value) {
    // Each is looked at as the service came: one that goes must not take another's reason away.
    for (field, ends) in DEPENDENT.map(|(field, applies)| (field, applies(old) && !applies(new))) {
        if ends && old["spec"].get(field) == new["spec"].get(field) {
            fields(&mut new["spec"]).remove(field);
        }
    }
    if is_balancer(old) && !is_balancer(new) {
        new["status"]["loadBalancer"] = json!({});
    }
}

/// Checks of what callers from outside need.
pub fn validate(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let mut errors = external_policy(new, old);
    let class = |service: &Value| at(service, "spec.loadBalancerClass").cloned();
    if !is_balancer(new) {
        for field in ["spec.allocateLoadBalancerNodePorts", "spec.loadBalancerClass"] {
            errors.extend(at(new, field).map(|_| Invalid::forbidden(field, BALANCER_ONLY)));
        }
    } else if old.is_some_and(|old| is_balancer(old) && class(old) != class(new)) {
        let value = class(new).unwrap_or_default();
        errors.push(Invalid::value("spec.loadBalancerClass", &value, "may not change once set"));
    }
    errors.extend(source_ranges(new));
    let kind = text(new, "spec.type");
    if matches!(kind, "NodePort" | "LoadBalancer") && text(new, "spec.clusterIP") == "None" {
        let detail = format!("may not be set to 'None' for {kind} services");
        errors.push(Invalid::value("spec.clusterIPs[0]", &json!("None"), &detail));
    }
    errors
}

fn external_policy(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let mut errors = Vec::new();
    let (policy, path) = (text(new, "spec.externalTrafficPolicy"), "spec.externalTrafficPolicy");
    if !policy.is_empty() && !reached_from_outside(new) {
        errors.push(Invalid::value(path, &json!(policy), "may only be set for externally-accessible services"));
    } else if !matches!(policy, "" | "Cluster" | "Local") {
        errors.push(Invalid::unsupported(path, policy, &["Cluster", "Local"]));
    }
    let (port, path) = (number(new, "spec.healthCheckNodePort"), "spec.healthCheckNodePort");
    if port != 0 && !wants_health_check(new) {
        let detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        errors.push(Invalid::value(path, &json!(port), detail));
    }
    let fixed = |old: &&Value| wants_health_check(old) && wants_health_check(new);
    if old.filter(fixed).is_some_and(|old| number(old, path) != port) {
        errors.push(Invalid::forbidden(path, "field is immutable"));
    }
    errors
}

/// Spaces around a range are left out.
fn source_ranges(service: &Value) -> Vec<Invalid> {
    let path = "spec.loadBalancerSourceRanges";
    let ranges = list(service, path);
    let annotation = at(service, "metadata.annotations").and_then(|all| all.get(SOURCE_RANGES)).and_then(Value::as_str);
    let is_none = |text: &str| text.trim().parse::<SourceRange>().is_err();
    match annotation.filter(|_| ranges.is_empty()) {
        None if ranges.is_empty() => vec![],
        None if !is_balancer(service) => vec![Invalid::forbidden(path, BALANCER_ONLY)],
        None => {
            let wrong = ranges.iter().enumerate().filter(|(_, range)| range.as_str().is_none_or(is_none));
            wrong.map(|(index, range)| Invalid::value(format!("{path}[{index}]"), range, NO_RANGE)).collect()
        }
        Some(_) if !is_balancer(service) => vec![Invalid::forbidden(annotated(), BALANCER_ONLY)],
        Some(text) if text.trim().is_empty() => vec![],
        Some(text) => {
            let wrong = text.split(',').filter(|range| is_none(range));
            wrong.map(|range| Invalid::value(annotated(), &json!(range.trim()), NO_RANGE)).collect()
        }
    }
}

fn annotated() -> String {
    format!("metadata.annotations[{SOURCE_RANGES}]")
}

/// Checks of a status that somebody writes.
pub fn validate_status(service: &Value) -> Vec<Invalid> {
    let mut errors = Vec::new();
    let ingress = list(service, "status.loadBalancer.ingress");
    if !ingress.is_empty() && !is_balancer(service) {
        errors.push(Invalid::forbidden("status.loadBalancer.ingress", BALANCER_ONLY));
    }
    for (index, entry) in ingress.iter().enumerate() {
        let path = format!("status.loadBalancer.ingress[{index}]");
        let (ip, mode) = (text(entry, "ip"), text(entry, "ipMode"));
        if !ip.is_empty() && ip.parse::<IpAddr>().is_err() {
            errors.push(Invalid::value(format!("{path}.ip"), &json!(ip), NO_ADDRESS));
        }
        if ip.is_empty() && !mode.is_empty() {
            errors.push(Invalid::forbidden(format!("{path}.ipMode"), "may not be specified when `ip` is not set"));
        } else if !matches!(mode, "" | "VIP" | "Proxy") {
            errors.push(Invalid::unsupported(format!("{path}.ipMode"), mode, &["Proxy", "VIP"]));
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(spec: Value) -> Value {
        json!({"spec": spec, "status": {"loadBalancer": {}}})
    }

    fn told(new: Value, old: Option<Value>) -> Vec<String> {
        validate(&with(new), old.map(with).as_ref())
            .into_iter()
            .map(|e| format!("{}: {}", e.field, e.message))
            .collect()
    }

    #[test]
    fn what_goes_with_which_type() {
        let local =
            |port: i64| json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port});
        for fine in [
            json!({"type": "ClusterIP"}),
            json!({"type": "ClusterIP", "externalIPs": ["192.0.2.1"], "externalTrafficPolicy": "Local"}),
            json!({"type": "NodePort", "externalTrafficPolicy": "Local"}),
            json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "loadBalancerClass": "a/b"}),
            local(30_100),
        ] {
            assert_eq!(told(fine.clone(), None), [""; 0], "{fine}");
        }
        for (wrong, old, want) in [
            (
                json!({"type": "ClusterIP", "externalTrafficPolicy": "Local"}),
                None,
                "spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for externally-accessible services",
            ),
            (
                json!({"type": "NodePort", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_100}),
                None,
                "spec.healthCheckNodePort: Invalid value: 30100: may only be set when `type` is 'LoadBalancer' and \
                 `externalTrafficPolicy` is 'Local'",
            ),
            (local(30_101), Some(local(30_100)), "spec.healthCheckNodePort: Forbidden: field is immutable"),
            (
                json!({"type": "ClusterIP", "loadBalancerClass": "a/b"}),
                None,
                "spec.loadBalancerClass: Forbidden: may only be used when `spec.type` is 'LoadBalancer'",
            ),
            (
                json!({"type": "LoadBalancer", "loadBalancerClass": "a/b"}),
                Some(json!({"type": "LoadBalancer"})),
                "spec.loadBalancerClass: Invalid value: \"a/b\": may not change once set",
            ),
            (
                json!({"type": "LoadBalancer", "clusterIP": "None"}),
                None,
                "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for LoadBalancer services",
            ),
        ] {
            assert_eq!(told(wrong.clone(), old), [want], "{wrong}");
        }
    }

    #[test]
    fn what_no_longer_applies_goes_and_what_was_set_on_purpose_stays() {
        let old = json!({"spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_100,
            "allocateLoadBalancerNodePorts": true, "loadBalancerClass": "a/b"},
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}});
        let changed = |change: Value| {
            let mut new = old.clone();
            new["spec"].as_object_mut().expect("a spec").extend(change.as_object().expect("a change").clone());
            drop_dependent(&mut new, &old);
            new
        };
        let plain = changed(json!({"type": "ClusterIP"}));
        assert_eq!(plain, json!({"spec": {"type": "ClusterIP"}, "status": {"loadBalancer": {}}}));
        let cluster = changed(json!({"externalTrafficPolicy": "Cluster"}));
        assert_eq!(cluster["spec"].get("healthCheckNodePort"), None);
        assert_eq!(cluster["status"], old["status"], "it is a load balancer still");
        let on_purpose = changed(json!({"type": "ClusterIP", "loadBalancerClass": "c/d"}));
        assert_eq!(on_purpose["spec"]["loadBalancerClass"], "c/d");
        assert_eq!(changed(json!({})), old);
    }

    #[test]
    fn source_ranges() {
        let told = |kind: &str, ranges: Value, annotation: Option<&str>| {
            let mut service = json!({"spec": {"type": kind, "loadBalancerSourceRanges": ranges}});
            if let Some(text) = annotation {
                service["metadata"]["annotations"][SOURCE_RANGES] = json!(text);
            }
            validate(&service, None).into_iter().map(|e| format!("{}: {}", e.field, e.message)).collect::<Vec<_>>()
        };
        for (ranges, annotation) in [
            (json!(["10.0.0.0/8", "2001:db8::/32", " 192.0.2.7/32 ", "10.1.2.3/8", "0.0.0.0/0"]), None),
            (json!([]), Some("10.0.0.0/8, 2001:db8::/32")),
            (json!(null), Some(" ")),
            (json!(["10.0.0.0/8"]), Some("the field counts")),
        ] {
            assert_eq!(told("LoadBalancer", ranges.clone(), annotation), [""; 0], "{ranges} {annotation:?}");
        }
        let invalid = |path: &str, value: &str| {
            format!(
                "{path}: Invalid value: \"{value}\": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
            )
        };
        let annotated = "metadata.annotations[service.beta.kubernetes.io/load-balancer-source-ranges]";
        let wrong = told("LoadBalancer", json!(["10.0.0.0", "10.0.0.0/8", "10.0.0.0/33", "", "web/8"]), None);
        let fields = [(0, "10.0.0.0"), (2, "10.0.0.0/33"), (3, ""), (4, "web/8")];
        assert_eq!(wrong, fields.map(|(n, value)| invalid(&format!("spec.loadBalancerSourceRanges[{n}]"), value)));
        assert_eq!(
            told("LoadBalancer", json!([]), Some("10.0.0.0/8,x, ")),
            [invalid(annotated, "x"), invalid(annotated, "")]
        );
        for kind in ["ClusterIP", "NodePort"] {
            let forbidden =
                |path: &str| [format!("{path}: Forbidden: may only be used when `spec.type` is 'LoadBalancer'")];
            assert_eq!(told(kind, json!(["10.0.0.0/8"]), None), forbidden("spec.loadBalancerSourceRanges"));
            assert_eq!(told(kind, json!([]), Some("10.0.0.0/8")), forbidden(annotated));
            assert_eq!(told(kind, json!([]), None), [""; 0]);
        }
    }

    #[test]
    fn statuses() {
        let told = |kind: &str, ingress: Value| {
            let service = json!({"spec": {"type": kind}, "status": {"loadBalancer": {"ingress": ingress}}});
            validate_status(&service).into_iter().map(|e| e.field).collect::<Vec<_>>()
        };
        let own = json!([{"ip": "192.0.2.1", "ipMode": "VIP"}, {"hostname": "lb.example.org"}]);
        assert_eq!(told("LoadBalancer", own.clone()), [""; 0]);
        assert_eq!(told("ClusterIP", own), ["status.loadBalancer.ingress"]);
        assert_eq!(told("LoadBalancer", json!([{"ip": "web"}])), ["status.loadBalancer.ingress[0].ip"]);
        assert_eq!(told("LoadBalancer", json!([{"ipMode": "VIP"}])), ["status.loadBalancer.ingress[0].ipMode"]);
        assert_eq!(
            told("LoadBalancer", json!([{"ip": "192.0.2.1", "ipMode": "x"}])),
            ["status.loadBalancer.ingress[0].ipMode"]
        );
    }
}
