//! What an object must satisfy beyond the types of its fields, in Kubernetes' words.
//!
//! PURE. Each function gets the new object and, for an update, the old one.

use std::{collections::HashSet, net::IpAddr};

use k8s_openapi::jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sluice_wire::join;

use super::status::Invalid;
use super::value::{at, list, number, text};
use crate::{compile::policies, duration, inject, quantity};
use sluice_model::Pattern;

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', \
    and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must \
    start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
    alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
    validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', \
    and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for \
    validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end \
    with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
    '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const IMMUTABLE: &str = "field is immutable";
const ANNOTATIONS_MAX: usize = 256 * 1024;

/// A check of one kind.
pub type Check = fn(&Value, Option<&Value>) -> Vec<Invalid>;

/// How a kind's names look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameRule {
    /// Dotted DNS name.
    Subdomain,
    /// One DNS label.
    Label,
    /// One DNS label beginning with a letter.
    Label1035,
}

/// One DNS label, RFC 1123.
pub fn is_label(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !name.is_empty() && name.len() <= 63 && name.bytes().all(inner) && !name.starts_with('-') && !name.ends_with('-')
}

fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_label)
}

fn is_label_value(value: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    value.is_empty()
        || (value.len() <= 63 && value.chars().all(inner) && edge(value.chars().next()) && edge(value.chars().last()))
}

/// `prefix/name` or `name`, as label and annotation keys are.
fn is_qualified(key: &str) -> bool {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    !name.is_empty() && is_label_value(name) && prefix.is_none_or(|prefix| is_subdomain(&prefix.to_ascii_lowercase()))
}

/// Name, labels and annotations.
pub fn metadata(object: &Value, rule: NameRule) -> Vec<Invalid> {
    let mut errors = Vec::new();
    let name = text(object, "metadata.name");
    let (valid, detail) = match rule {
        NameRule::Subdomain => (is_subdomain(name), SUBDOMAIN),
        NameRule::Label => (is_label(name), LABEL),
        NameRule::Label1035 => (is_label(name) && name.starts_with(|c: char| c.is_ascii_lowercase()), LABEL_1035),
    };
    if name.is_empty() {
        errors.push(Invalid::required("metadata.name", "name or generateName is required"));
    } else if !valid {
        errors.push(Invalid::value("metadata.name", &json!(name), detail));
    }
    errors.extend(labels(object, "metadata.labels"));
    let annotations = at(object, "metadata.annotations").and_then(Value::as_object);
    for key in annotations.into_iter().flat_map(|all| all.keys()).filter(|key| !is_qualified(key)) {
        errors.push(Invalid::value("metadata.annotations", &json!(key), QUALIFIED));
    }
    let size: usize =
        annotations.into_iter().flatten().map(|(key, value)| key.len() + value.as_str().map_or(0, str::len)).sum();
    if size > ANNOTATIONS_MAX {
        let message = format!("Too long: may not be more than {ANNOTATIONS_MAX} bytes");
        errors.push(Invalid { field: "metadata.annotations".to_owned(), message });
    }
    errors
}

fn labels(object: &Value, path: &str) -> Vec<Invalid> {
    let mut errors = Vec::new();
    for (key, value) in at(object, path).and_then(Value::as_object).into_iter().flatten() {
        if !is_qualified(key) {
            errors.push(Invalid::value(path, &json!(key), QUALIFIED));
        }
        if !value.as_str().is_some_and(is_label_value) {
            errors.push(Invalid::value(path, value, LABEL_VALUE));
        }
    }
    errors
}

/// Nothing beyond the metadata.
pub fn nothing(_: &Value, _: Option<&Value>) -> Vec<Invalid> {
    Vec::new()
}

/// Deployments.
pub fn deployment(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let mut errors = workload(new, old);
    let strategy = text(new, "spec.strategy.type");
    if !matches!(strategy, "Recreate" | "RollingUpdate") {
        errors.push(Invalid::unsupported("spec.strategy.type", strategy, &["Recreate", "RollingUpdate"]));
    }
    if strategy == "Recreate" && at(new, "spec.strategy.rollingUpdate").is_some() {
        let detail = "may not be specified when strategy `type` is 'Recreate'";
        errors.push(Invalid::forbidden("spec.strategy.rollingUpdate", detail));
    }
    errors.extend(rolling_update(new));
    let deadline = number(new, "spec.progressDeadlineSeconds");
    if at(new, "spec.progressDeadlineSeconds").is_some() && deadline <= number(new, "spec.minReadySeconds") {
        let detail = "must be greater than minReadySeconds";
        errors.push(Invalid::value("spec.progressDeadlineSeconds", &json!(deadline), detail));
    }
    errors
}

fn rolling_update(new: &Value) -> Vec<Invalid> {
    let mut errors = Vec::new();
    let mut zeros = 0;
    for name in ["maxUnavailable", "maxSurge"] {
        let path = format!("spec.strategy.rollingUpdate.{name}");
        match at(new, &path) {
            Some(Value::Number(n)) => {
                if n.as_i64().is_none_or(|n| n < 0) {
                    errors.push(Invalid::value(path, &json!(n), "must be greater than or equal to 0"));
                }
                zeros += i32::from(n.as_i64() == Some(0));
            }
            Some(Value::String(share)) => {
                let percent = share.strip_suffix('%').and_then(|digits| digits.parse::<u32>().ok());
                if percent.is_none() {
                    let detail = "a valid percent string must be a numeric string followed by an ending '%' \
                        (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";
                    errors.push(Invalid::value(path, &json!(share), detail));
                } else if name == "maxUnavailable" && percent > Some(100) {
                    errors.push(Invalid::value(path, &json!(share), "must not be greater than 100%"));
                }
                zeros += i32::from(percent == Some(0));
            }
            _ => {}
        }
    }
    if zeros == 2 {
        let (path, value) = ("spec.strategy.rollingUpdate.maxUnavailable", json!(0));
        errors.push(Invalid::value(path, &value, "may not be 0 when `maxSurge` is 0"));
    }
    errors
}

/// ReplicaSets, and what Deployments share with them.
pub fn workload(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let mut errors = Vec::new();
    for name in ["replicas", "minReadySeconds", "revisionHistoryLimit"] {
        let value = number(new, &format!("spec.{name}"));
        if value < 0 {
            let detail = "must be greater than or equal to 0";
            errors.push(Invalid::value(format!("spec.{name}"), &json!(value), detail));
        }
    }
    let selector = &new["spec"]["selector"];
    let empty = |path: &str| at(selector, path).is_none_or(|v| v.as_object().is_none_or(serde_json::Map::is_empty));
    if selector.is_object() && empty("matchLabels") && list(selector, "matchExpressions").is_empty() {
        errors.push(Invalid::value("spec.selector", selector, "empty selector is invalid for deployment"));
    } else if selector.is_object() && !selects(selector, &new["spec"]["template"]["metadata"]["labels"]) {
        let labels = &new["spec"]["template"]["metadata"]["labels"];
        let detail = "`selector` does not match template `labels`";
        errors.push(Invalid::value("spec.template.metadata.labels", labels, detail));
    }
    if old.is_some_and(|old| old["spec"]["selector"] != *selector) {
        errors.push(Invalid::value("spec.selector", selector, IMMUTABLE));
    }
    errors.extend(labels(new, "spec.template.metadata.labels"));
    let restart = text(new, "spec.template.spec.restartPolicy");
    if !restart.is_empty() && restart != "Always" {
        errors.push(Invalid::unsupported("spec.template.spec.restartPolicy", restart, &["Always"]));
    }
    errors.extend(pod_spec(&new["spec"]["template"]["spec"], "spec.template.spec"));
    errors
}

/// Whether a label selector (as JSON) selects the labels.
pub fn selects(selector: &Value, labels: &Value) -> bool {
    let label = |key: &str| labels.get(key).and_then(Value::as_str);
    let equal = |(key, value): (&String, &Value)| label(key).is_some() && label(key) == value.as_str();
    let expression = |requirement: &Value| {
        let found = label(text(requirement, "key"));
        let listed = || list(requirement, "values").iter().any(|value| value.as_str() == found);
        match text(requirement, "operator") {
            "In" => found.is_some() && listed(),
            "NotIn" => found.is_none() || !listed(),
            "Exists" => found.is_some(),
            "DoesNotExist" => found.is_none(),
            _ => false,
        }
    };
    at(selector, "matchLabels").and_then(Value::as_object).into_iter().flatten().all(equal)
        && list(selector, "matchExpressions").iter().all(expression)
}

/// Pods. After creation only a few fields may change.
pub fn pod(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let mut errors = pod_spec(&new["spec"], "spec");
    for annotation in [inject::ANNOTATION_EXCLUDED_PORTS, inject::ANNOTATION_OPAQUE_PORTS] {
        let ports = new["metadata"]["annotations"][annotation].as_str().map_or(0, |v| v.split(',').count());
        if ports > inject::MAX_PORTS {
            errors.push(Invalid::too_many(format!("metadata.annotations[{annotation}]"), ports, inject::MAX_PORTS));
        }
    }
    if let Some(old) = old
        && frozen(&old["spec"]) != frozen(&new["spec"])
    {
        let detail = "pod updates may not change fields other than `spec.containers[*].image`,\
            `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing \
            tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";
        errors.push(Invalid::forbidden("spec", detail));
    }
    errors
}

/// The part of a pod's spec that must stay as it is. Binding sets the node once, by a path of its own.
fn frozen(spec: &Value) -> Value {
    let mut spec = spec.clone();
    for containers in ["containers", "initContainers"] {
        for container in spec.get_mut(containers).and_then(Value::as_array_mut).into_iter().flatten() {
            container["image"] = Value::Null;
        }
    }
    if let Some(fields) = spec.as_object_mut() {
        for name in ["activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "schedulingGates"] {
            fields.remove(name);
        }
    }
    spec
}

fn pod_spec(spec: &Value, path: &str) -> Vec<Invalid> {
    let mut errors = Vec::new();
    if list(spec, "containers").is_empty() && spec.is_object() {
        errors.push(Invalid::required(format!("{path}.containers"), ""));
    }
    let volumes: HashSet<&str> = list(spec, "volumes").iter().map(|volume| text(volume, "name")).collect();
    let mut names = HashSet::new();
    for group in ["initContainers", "containers"] {
        for (index, container) in list(spec, group).iter().enumerate() {
            let path = format!("{path}.{group}[{index}]");
            let name = text(container, "name");
            if !name.is_empty() && !names.insert(name) {
                let message = format!("Duplicate value: \"{name}\"");
                errors.push(Invalid { field: format!("{path}.name"), message });
            }
            errors.extend(check_container(container, &path, &volumes));
        }
    }
    let restart = text(spec, "restartPolicy");
    if !matches!(restart, "" | "Always" | "OnFailure" | "Never") {
        errors.push(Invalid::unsupported(format!("{path}.restartPolicy"), restart, &["Always", "OnFailure", "Never"]));
    }
    errors
}

/// What agents cannot do is refused here, by its field, rather than accepted and left out.
fn check_probes(container: &Value, path: &str) -> Vec<Invalid> {
    let mut errors = Vec::new();
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let given = &container[probe];
        if !given["grpc"].is_null() {
            errors.push(Invalid::unsupported(format!("{path}.{probe}"), "grpc", &["exec", "httpGet", "tcpSocket"]));
        }
        if text(given, "httpGet.scheme") == "HTTPS" {
            errors.push(Invalid::unsupported(format!("{path}.{probe}.httpGet.scheme"), "HTTPS", &["HTTP"]));
        }
    }
    for hook in ["postStart", "preStop"] {
        let given = &container["lifecycle"][hook];
        if !given["tcpSocket"].is_null() {
            errors.push(Invalid::unsupported(
                format!("{path}.lifecycle.{hook}"),
                "tcpSocket",
                &["exec", "httpGet", "sleep"],
            ));
        }
    }
    errors
}

fn check_container(container: &Value, path: &str, volumes: &HashSet<&str>) -> Vec<Invalid> {
    let mut errors = check_probes(container, path);
    let name = text(container, "name");
    if !is_label(name) && container.get("name").is_some() {
        errors.push(Invalid::value(format!("{path}.name"), &json!(name), LABEL));
    }
    if text(container, "image").is_empty() {
        errors.push(Invalid::required(format!("{path}.image"), ""));
    }
    for (index, port) in list(container, "ports").iter().enumerate() {
        errors.extend(port_number(port, "containerPort", &format!("{path}.ports[{index}].containerPort")));
    }
    for (index, mount) in list(container, "volumeMounts").iter().enumerate() {
        let volume = text(mount, "name");
        if !volumes.contains(volume) {
            let message = format!("Not found: \"{volume}\"");
            errors.push(Invalid { field: format!("{path}.volumeMounts[{index}].name"), message });
        }
    }
    let limits = &container["resources"]["limits"];
    for (resource, request) in container["resources"]["requests"].as_object().into_iter().flatten() {
        let amount = |value: &Value| value.as_str().and_then(quantity::parse_milli);
        let path = format!("{path}.resources.requests");
        if amount(request).is_some_and(|amount| amount < 0) {
            errors.push(Invalid::value(format!("{path}[{resource}]"), request, "must be greater than or equal to 0"));
        }
        if let (Some(limit), Some(request_amount)) = (limits.get(resource).and_then(amount), amount(request))
            && request_amount > limit
        {
            let detail = format!("must be less than or equal to {resource} limit of {}", text(limits, resource));
            errors.push(Invalid::value(path, request, &detail));
        }
    }
    errors
}

fn port_number(holder: &Value, field: &str, path: &str) -> Option<Invalid> {
    let port = number(holder, field);
    let bad = holder.get(field).is_some_and(Value::is_number) && !(1..=65_535).contains(&port);
    bad.then(|| Invalid::value(path, &json!(port), "must be between 1 and 65535, inclusive"))
}

/// Services.
pub fn service(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let mut errors = Vec::new();
    let kind = text(new, "spec.type");
    if !matches!(kind, "ClusterIP" | "NodePort" | "LoadBalancer" | "ExternalName") {
        let all = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
        errors.push(Invalid::unsupported("spec.type", kind, &all));
    }
    let ports = list(new, "spec.ports");
    let headless = text(new, "spec.clusterIP") == "None";
    if ports.is_empty() && !headless && kind != "ExternalName" {
        errors.push(Invalid::required("spec.ports", ""));
    }
    if kind == "ExternalName" && text(new, "spec.externalName").is_empty() {
        errors.push(Invalid::required("spec.externalName", ""));
    }
    let (mut names, mut taken, mut on_nodes) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (index, port) in ports.iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        let name = text(port, "name");
        if name.is_empty() && ports.len() > 1 {
            errors.push(Invalid::required(format!("{path}.name"), ""));
        } else if !name.is_empty() && !is_label(name) {
            errors.push(Invalid::value(format!("{path}.name"), &json!(name), LABEL));
        } else if !name.is_empty() && !names.insert(name) {
            errors.push(Invalid { field: format!("{path}.name"), message: format!("Duplicate value: \"{name}\"") });
        }
        if !taken.insert((number(port, "port"), text(port, "protocol"))) {
            let value = json!({"port": port["port"], "protocol": port["protocol"]});
            errors.push(Invalid { field: path.clone(), message: format!("Duplicate value: {value}") });
        }
        let node_port = number(port, "nodePort");
        if node_port != 0 && !on_nodes.insert((node_port, text(port, "protocol"))) {
            let message = format!("Duplicate value: {node_port}");
            errors.push(Invalid { field: format!("{path}.nodePort"), message });
        }
        errors.extend(port_number(port, "port", &format!("{path}.port")));
        errors.extend(port_number(port, "targetPort", &format!("{path}.targetPort")));
        let protocol = text(port, "protocol");
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            errors.push(Invalid::unsupported(format!("{path}.protocol"), protocol, &["SCTP", "TCP", "UDP"]));
        }
    }
    errors.extend(reach(new));
    errors.extend(super::services::validate(new, old));
    errors.extend(super::families::validate(new, old));
    errors
}

/// By which other addresses a service is reached, from where, and for how long by the same client.
fn reach(service: &Value) -> Vec<Invalid> {
    let mut errors = Vec::new();
    let mut one_of = |field: &str, allowed: &[&str]| {
        let value = text(service, field);
        if !value.is_empty() && !allowed.contains(&value) {
            errors.push(Invalid::unsupported(field, value, allowed));
        }
    };
    one_of("spec.sessionAffinity", &["ClientIP", "None"]);
    one_of("spec.internalTrafficPolicy", &["Cluster", "Local"]);
    one_of("spec.trafficDistribution", &["PreferClose", "PreferSameNode", "PreferSameZone"]);
    let timeout = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
    if let Some(value) = at(service, timeout)
        && !value.as_i64().is_some_and(|s| (1..=86_400).contains(&s))
    {
        errors.push(Invalid::value(timeout, value, "must be greater than 0 and less than or equal to 86400"));
    }
    for (index, address) in list(service, "spec.externalIPs").iter().enumerate() {
        let ip = address.as_str().and_then(|text| text.parse::<IpAddr>().ok());
        let why = ip.map_or(Some("must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"), special);
        errors.extend(why.map(|why| Invalid::value(format!("spec.externalIPs[{index}]"), address, why)));
    }
    errors
}

/// Why an address is none that a service could have: every caller in the cluster would lose it to that service.
pub(crate) fn special(ip: IpAddr) -> Option<&'static str> {
    let ip = ip.to_canonical();
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    match ip {
        _ if ip.is_unspecified() => Some("may not be unspecified"),
        _ if ip.is_loopback() => Some("may not be in the loopback range"),
        _ if ip.is_multicast() => Some("may not be in the multicast range"),
        _ if link_local => Some("may not be in the link-local range"),
        _ => None,
    }
}

/// Secrets may be sealed, and those that are join tokens are whole.
pub fn secret(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let mut errors = sealed(new, old);
    if text(new, "type") == join::SECRET_TYPE {
        errors.extend(join_token(new));
    }
    errors
}

/// As `sluice_wire::join` says; the secret itself must not get into the store.
fn join_token(secret: &Value) -> Vec<Invalid> {
    let field = |key: &str| format!("data.{key}");
    let mut errors = Vec::new();
    if at(secret, "data.token-secret").is_some() {
        let detail = "only a hash of it is kept; make tokens with `sluice token create`";
        errors.push(Invalid::forbidden(field("token-secret"), detail));
    }
    let id = decoded(secret, join::key::ID);
    if join::object_name(&id) != text(secret, "metadata.name") || id.is_empty() {
        let detail = format!("must be the rest of the name after `{}`", join::NAME_PREFIX);
        errors.push(Invalid::value(field(join::key::ID), &json!(id), &detail));
    }
    let hash = decoded(secret, join::key::SECRET_HASH);
    if hash.len() != 64 || !hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        let detail = "must be the SHA-256 of `<id>.<secret>` in lower-case hexadecimal";
        errors.push(Invalid::value(field(join::key::SECRET_HASH), &json!(hash), detail));
    }
    let expiration = decoded(secret, join::key::EXPIRATION);
    if expiration.parse::<Timestamp>().is_err() {
        let detail = "must be a time of RFC 3339: every token expires";
        errors.push(Invalid::value(field(join::key::EXPIRATION), &json!(expiration), detail));
    }
    errors
}

/// An entry of a Secret's data, empty if it is not there or not text.
fn decoded(secret: &Value, key: &str) -> String {
    use base64::Engine as _;
    let encoded = text(secret, &format!("data.{key}"));
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).unwrap_or_default();
    String::from_utf8(bytes).unwrap_or_default()
}

/// ConfigMaps and Secrets may be sealed.
pub fn sealed(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let sealed = old.is_some_and(|old| old["immutable"] == true);
    let differs = |field: &str| old.is_some_and(|old| old.get(field) != new.get(field));
    let mut errors = Vec::new();
    for field in ["immutable", "data", "binaryData"].into_iter().filter(|field| sealed && differs(field)) {
        errors.push(Invalid::forbidden(field, "field is immutable when `immutable` is set"));
    }
    if differs("type") {
        errors.push(Invalid::value("type", &new["type"], IMMUTABLE));
    }
    errors
}

fn at_most(object: &Value, field: &str, most: usize, path: &str, errors: &mut Vec<Invalid>) {
    let count = list(object, field).len();
    if count > most {
        errors.push(Invalid::too_many(path, count, most));
    }
}

/// Routes: ports and weights in range, lists no longer than Gateway API has them (`maxItems` of its definitions; 128 matches
/// in all), because what they say together is multiplied when it is compiled.
pub fn route(new: &Value, _: Option<&Value>) -> Vec<Invalid> {
    let mut errors = Vec::new();
    for (field, most) in [("spec.parentRefs", 32), ("spec.hostnames", 16), ("spec.rules", 16)] {
        at_most(new, field, most, field, &mut errors);
    }
    let rules = list(new, "spec.rules");
    for (index, rule) in rules.iter().enumerate() {
        for (field, most) in [("matches", 64), ("filters", 16), ("backendRefs", 16)] {
            at_most(rule, field, most, &format!("spec.rules[{index}].{field}"), &mut errors);
        }
    }
    let matches: usize = rules.iter().map(|rule| list(rule, "matches").len()).sum();
    if matches > 128 {
        errors.push(Invalid::too_many("spec.rules", matches, 128));
    }
    for (rule_index, rule) in list(new, "spec.rules").iter().enumerate() {
        for (index, backend) in list(rule, "backendRefs").iter().enumerate() {
            let path = format!("spec.rules[{rule_index}].backendRefs[{index}]");
            errors.extend(port_number(backend, "port", &format!("{path}.port")));
            let weight = number(backend, "weight");
            if !(0..=1_000_000).contains(&weight) {
                let detail = "should be between 0 and 1000000";
                errors.push(Invalid::value(format!("{path}.weight"), &json!(weight), detail));
            }
        }
    }
    for (rule_index, rule) in list(new, "spec.rules").iter().enumerate() {
        errors.extend(rule_values(rule, &format!("spec.rules[{rule_index}]")));
    }
    for (index, parent) in list(new, "spec.parentRefs").iter().enumerate() {
        errors.extend(port_number(parent, "port", &format!("spec.parentRefs[{index}].port")));
    }
    errors
}

/// A class stays its controller's.
pub fn gateway_class(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let controller = text(new, "spec.controllerName");
    let mut errors = Vec::new();
    if !controller.split_once('/').is_some_and(|(domain, path)| is_subdomain(domain) && !path.is_empty()) {
        let detail = "must be a domain and a path, such as sluice.dev/gateway";
        errors.push(Invalid::value("spec.controllerName", &json!(controller), detail));
    }
    if old.is_some_and(|old| text(old, "spec.controllerName") != controller) {
        errors.push(Invalid::value("spec.controllerName", &json!(controller), IMMUTABLE));
    }
    errors
}

/// Gateways: what the Gateway API's own definitions check of listeners.
pub fn gateway(new: &Value, _: Option<&Value>) -> Vec<Invalid> {
    let mut errors = Vec::new();
    let listeners = list(new, "spec.listeners");
    if listeners.is_empty() || listeners.len() > 64 {
        let message = "must have between 1 and 64 items".to_owned();
        errors.push(Invalid { field: "spec.listeners".to_owned(), message });
    }
    let (mut names, mut places) = (HashSet::new(), HashSet::new());
    for (index, listener) in listeners.iter().enumerate() {
        let path = format!("spec.listeners[{index}]");
        let (name, protocol, hostname) =
            (text(listener, "name"), text(listener, "protocol"), text(listener, "hostname"));
        if !is_subdomain(name) {
            errors.push(Invalid::value(format!("{path}.name"), &json!(name), SUBDOMAIN));
        } else if !names.insert(name) {
            errors.push(Invalid { field: format!("{path}.name"), message: format!("Duplicate value: \"{name}\"") });
        }
        let port = number(listener, "port");
        if !(1..=65_535).contains(&port) {
            let detail = "must be between 1 and 65535, inclusive";
            errors.push(Invalid::value(format!("{path}.port"), &json!(port), detail));
        }
        if !places.insert((port, protocol, hostname)) {
            let message = "the combination of port, protocol and hostname must be unique".to_owned();
            errors.push(Invalid { field: path.clone(), message });
        }
        if !hostname.is_empty() && !is_subdomain(hostname.strip_prefix("*.").unwrap_or(hostname)) {
            let detail = "must be a name in lower case, whose first label may be `*`";
            errors.push(Invalid::value(format!("{path}.hostname"), &json!(hostname), detail));
        }
        let tls = listener.get("tls").filter(|t| t.is_object());
        if tls.is_some() && ["HTTP", "TCP", "UDP"].contains(&protocol) {
            errors.push(Invalid::forbidden(
                format!("{path}.tls"),
                "must not be specified for protocols HTTP, TCP and UDP",
            ));
        }
        if tls.is_none() && ["HTTPS", "TLS"].contains(&protocol) {
            errors.push(Invalid::required(format!("{path}.tls"), "must be set for protocols HTTPS and TLS"));
        }
    }
    errors
}

/// Durations and expressions of a rule.
fn rule_values(rule: &Value, path: &str) -> Vec<Invalid> {
    let mut errors = Vec::new();
    let mut check = |value: &Value, field: String, right: &dyn Fn(&str) -> bool, detail: &str| {
        if value.as_str().is_some_and(|text| !right(text)) {
            errors.push(Invalid::value(field, value, detail));
        }
    };
    let duration = |text: &str| duration::parse_ms(text).is_some();
    for field in ["timeouts.request", "timeouts.backendRequest", "retry.backoff"] {
        check(
            at(rule, field).unwrap_or(&Value::Null),
            format!("{path}.{field}"),
            &duration,
            "must be a duration such as 10s or 500ms",
        );
    }
    let pattern = |text: &str| text.parse::<Pattern>().is_ok();
    for (i, one) in list(rule, "matches").iter().enumerate() {
        let mut values = vec![(&one["path"], format!("matches[{i}].path"))];
        for group in ["headers", "queryParams"] {
            let all = list(one, group).iter().enumerate();
            values.extend(all.map(|(j, value)| (value, format!("matches[{i}].{group}[{j}]"))));
        }
        for (value, field) in values.into_iter().filter(|(v, _)| v["type"] == "RegularExpression") {
            let detail = "must be a regular expression (RE2 syntax) of bounded size";
            check(&value["value"], format!("{path}.{field}.value"), &pattern, detail);
        }
    }
    errors
}

/// What the compiler says of an object of a kind of our own.
fn compiles<T: DeserializeOwned>(new: &Value, check: fn(&T) -> Option<(String, String)>) -> Vec<Invalid> {
    match T::deserialize(new) {
        Ok(object) => check(&object).map(|(field, message)| Invalid { field, message }).into_iter().collect(),
        // Types were checked before.
        Err(_) => vec![],
    }
}

pub fn backend_policy(new: &Value, _: Option<&Value>) -> Vec<Invalid> {
    compiles(new, policies::check_backend_policy)
}

pub fn access_policy(new: &Value, _: Option<&Value>) -> Vec<Invalid> {
    compiles(new, policies::check_access_policy)
}

pub fn route_filter(new: &Value, _: Option<&Value>) -> Vec<Invalid> {
    compiles(new, policies::check_route_filter)
}

/// Slices keep their address type.
pub fn endpoint_slice(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let mut errors = Vec::new();
    let kind = text(new, "addressType");
    if !matches!(kind, "IPv4" | "IPv6" | "FQDN") {
        errors.push(Invalid::unsupported("addressType", kind, &["FQDN", "IPv4", "IPv6"]));
    }
    if old.is_some_and(|old| old["addressType"] != new["addressType"]) {
        errors.push(Invalid::value("addressType", &new["addressType"], IMMUTABLE));
    }
    if list(new, "endpoints").len() > 1_000 {
        let message = "Too many: must have at most 1000 items".to_owned();
        errors.push(Invalid { field: "endpoints".to_owned(), message });
    }
    errors
}

/// A node's pod ranges stay once given, and `podCIDR` is the first of them.
pub fn node(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    let (range, ranges) = (
        |object: &Value| text(object, "spec.podCIDR").to_owned(),
        |object: &Value| list(object, "spec.podCIDRs").to_vec(),
    );
    let mut errors = vec![];
    let given = |old: &&Value| !range(old).is_empty() || !ranges(old).is_empty();
    if old.filter(given).is_some_and(|old| range(old) != range(new) || ranges(old) != ranges(new)) {
        let detail = "node updates may not change podCIDR except from \"\" to valid";
        errors.push(Invalid::forbidden("spec.podCIDRs", detail));
    }
    if ranges(new).first().is_some_and(|first| *first != range(new)) {
        errors.push(Invalid::value("spec.podCIDRs", &new["spec"]["podCIDRs"], "must begin with podCIDR"));
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, subdomain, label) in [
            ("web", true, true),
            ("web.example", true, false),
            ("Web", false, false),
            ("-web", false, false),
            ("web-", false, false),
            ("", false, false),
            ("a..b", false, false),
            ("10-a", true, true),
        ] {
            assert_eq!((is_subdomain(name), is_label(name)), (subdomain, label), "{name}");
        }
    }

    #[test]
    fn what_is_multiplied_or_kept_for_all_is_bounded() {
        let said = |errors: Vec<Invalid>| {
            errors.into_iter().map(|e| format!("{}: {}", e.field, e.message)).collect::<Vec<_>>()
        };
        let route_of = |hosts: usize, rules: &[usize]| {
            let rules: Vec<_> = rules.iter().map(|n| json!({"matches": vec![json!({}); *n]})).collect();
            said(route(&json!({"spec": {"hostnames": vec!["a.example"; hosts], "rules": rules}}), None))
        };
        assert_eq!(route_of(16, &[64, 64]), [""; 0]);
        assert_eq!(route_of(17, &[1]), ["spec.hostnames: Too many: 17: must have at most 16 items"]);
        assert_eq!(route_of(1, &[65]), ["spec.rules[0].matches: Too many: 65: must have at most 64 items"]);
        assert_eq!(route_of(1, &[64, 64, 1]), ["spec.rules: Too many: 129: must have at most 128 items"]);
        assert_eq!(route_of(1, &[0; 17]), ["spec.rules: Too many: 17: must have at most 16 items"]);
        let pod_with = |ports: &str| {
            let annotations = json!({(inject::ANNOTATION_EXCLUDED_PORTS): ports});
            said(pod(&json!({"metadata": {"annotations": annotations}, "spec": {"containers": [{"name": "a"}]}}), None))
        };
        assert!(!pod_with(&["1"; 64].join(",")).iter().any(|e| e.contains("Too many")));
        assert!(pod_with(&["1"; 65].join(",")).iter().any(|e| e.contains("Too many: 65")));
    }

    #[test]
    fn a_selector_must_select_its_template() {
        let object = json!({"spec": {"selector": {"matchLabels": {"app": "a"}}, "strategy": {"type": "RollingUpdate"},
            "template": {"metadata": {"labels": {"app": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        let errors = deployment(&object, None);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert_eq!(errors[0].field, "spec.template.metadata.labels");
    }

    #[test]
    fn probes_that_nobody_asks_are_refused() {
        let with = |probe: Value| {
            let container = json!({"name": "a", "image": "i", "readinessProbe": probe});
            pod(&json!({"spec": {"containers": [container]}}), None).into_iter().map(|e| e.field).collect::<Vec<_>>()
        };
        assert!(with(json!({"httpGet": {"port": 80, "scheme": "HTTP"}})).is_empty());
        assert_eq!(with(json!({"grpc": {"port": 80}})), ["spec.containers[0].readinessProbe"]);
        let https = json!({"httpGet": {"port": 80, "scheme": "HTTPS"}});
        assert_eq!(with(https), ["spec.containers[0].readinessProbe.httpGet.scheme"]);
    }

    #[test]
    fn listeners_of_a_gateway_are_told_apart() {
        let errors = |listeners: Value| {
            let wrong = gateway(&json!({"spec": {"listeners": listeners}}), None);
            wrong.into_iter().map(|e| e.field).collect::<Vec<_>>()
        };
        let http = |name: &str, port: i64| json!({"name": name, "port": port, "protocol": "HTTP"});
        let with = |mut listener: Value, key: &str, value: Value| {
            listener[key] = value;
            listener
        };
        assert!(errors(json!([http("a", 80), with(http("b", 80), "hostname", json!("*.example"))])).is_empty());
        for (listeners, field) in [
            (json!([]), "spec.listeners"),
            (json!([http("a", 80), http("a", 81)]), "spec.listeners[1].name"),
            (json!([http("a", 80), http("b", 80)]), "spec.listeners[1]"),
            (json!([http("a", 0)]), "spec.listeners[0].port"),
            (json!([http("A", 80)]), "spec.listeners[0].name"),
            (json!([with(http("a", 80), "hostname", json!("a.*"))]), "spec.listeners[0].hostname"),
            (json!([with(http("a", 80), "tls", json!({}))]), "spec.listeners[0].tls"),
            (json!([with(http("a", 443), "protocol", json!("HTTPS"))]), "spec.listeners[0].tls"),
        ] {
            assert_eq!(errors(listeners.clone()), [field], "{listeners}");
        }
    }

    #[test]
    fn a_node_keeps_its_ranges() {
        let with = |range: &str, ranges: &[&str]| json!({"spec": {"podCIDR": range, "podCIDRs": ranges}});
        let (none, own) = (json!({"spec": {}}), with("10.244.1.0/24", &["10.244.1.0/24"]));
        assert!(node(&own, Some(&none)).is_empty() && node(&own, Some(&own)).is_empty() && node(&own, None).is_empty());
        for bad in [none, with("10.244.2.0/24", &["10.244.2.0/24"]), with("10.244.1.0/24", &["10.244.2.0/25"])] {
            assert!(!node(&bad, Some(&own)).is_empty(), "{bad}");
        }
        let more = with("10.244.1.0/24", &["10.244.1.0/24", "10.244.2.0/24"]);
        assert!(!node(&more, Some(&own)).is_empty(), "another node's range");
    }

    #[test]
    fn how_a_service_is_reached_is_checked() {
        let errors = |change: Value| {
            let mut spec =
                json!({"type": "ClusterIP", "clusterIP": "10.96.0.5", "ports": [{"port": 80, "protocol": "TCP"}]});
            spec.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
            service(&json!({"spec": spec}), None).into_iter().map(|e| e.field).collect::<Vec<_>>()
        };
        let timeout = |s: i64| json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": s}}});
        for fine in [
            json!({"internalTrafficPolicy": "Local", "trafficDistribution": "PreferClose"}),
            json!({"externalIPs": ["192.0.2.1", "2001:db8::1"]}),
            timeout(86_400),
        ] {
            assert!(errors(fine.clone()).is_empty(), "{fine}");
        }
        for (wrong, field) in [
            (json!({"internalTrafficPolicy": "Node"}), "spec.internalTrafficPolicy"),
            (json!({"type": "NodePort", "externalTrafficPolicy": "None"}), "spec.externalTrafficPolicy"),
            (json!({"externalTrafficPolicy": "Cluster"}), "spec.externalTrafficPolicy"),
            (json!({"trafficDistribution": "Near"}), "spec.trafficDistribution"),
            (json!({"sessionAffinity": "Cookie"}), "spec.sessionAffinity"),
            (timeout(0), "spec.sessionAffinityConfig.clientIP.timeoutSeconds"),
            (timeout(86_401), "spec.sessionAffinityConfig.clientIP.timeoutSeconds"),
            (json!({"externalIPs": ["192.0.2.1", "web"]}), "spec.externalIPs[1]"),
            (json!({"externalIPs": ["127.0.0.1"]}), "spec.externalIPs[0]"),
            (json!({"externalIPs": ["fe80::1"]}), "spec.externalIPs[0]"),
            (json!({"externalIPs": ["224.0.0.1"]}), "spec.externalIPs[0]"),
            (json!({"externalIPs": ["0.0.0.0"]}), "spec.externalIPs[0]"),
            (json!({"externalIPs": ["::ffff:127.0.0.1"]}), "spec.externalIPs[0]"),
            (json!({"externalIPs": [""]}), "spec.externalIPs[0]"),
            (json!({"externalIPs": [7]}), "spec.externalIPs[0]"),
        ] {
            assert_eq!(errors(wrong.clone()), [field], "{wrong}");
        }
    }

    #[test]
    fn a_service_keeps_its_address() {
        let with = |ip: &str| json!({"spec": {"type": "ClusterIP", "clusterIP": ip, "ports": [{"port": 80, "protocol": "TCP"}]}});
        assert!(service(&with("10.96.0.5"), Some(&with("10.96.0.5"))).is_empty());
        assert_eq!(service(&with("10.96.0.6"), Some(&with("10.96.0.5"))).len(), 1);
    }
}
