//! Values of fields that a user left out, as Kubernetes sets them: clients compare what they read with what they
//! expect, and every later reader is spared the absent case.
//!
//! PURE.

use serde_json::{Value, json};

use super::value::{default, list, text};

/// No defaults.
pub fn nothing(_: &mut Value) {}

/// Deployments.
pub fn deployment(object: &mut Value) {
    let spec = &mut object["spec"];
    default(spec, "replicas", 1);
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "progressDeadlineSeconds", 600);
    default(spec, "strategy", json!({}));
    let strategy = &mut spec["strategy"];
    default(strategy, "type", "RollingUpdate");
    if text(strategy, "type") == "RollingUpdate" {
        default(strategy, "rollingUpdate", json!({}));
        default(&mut strategy["rollingUpdate"], "maxSurge", "25%");
        default(&mut strategy["rollingUpdate"], "maxUnavailable", "25%");
    }
    template(&mut spec["template"]);
}

/// ReplicaSets. Labels default to the template's.
pub fn replica_set(object: &mut Value) {
    default(&mut object["spec"], "replicas", 1);
    template(&mut object["spec"]["template"]);
}

fn template(template: &mut Value) {
    default(template, "metadata", json!({}));
    if let Some(metadata) = template["metadata"].as_object_mut() {
        metadata.remove("creationTimestamp");
    }
    if template.get("spec").is_some_and(Value::is_object) {
        pod_spec(&mut template["spec"]);
    }
}

/// Pods.
pub fn pod(object: &mut Value) {
    let spec = &mut object["spec"];
    pod_spec(spec);
    default(spec, "enableServiceLinks", true);
    default(spec, "preemptionPolicy", "PreemptLowerPriority");
    default(spec, "priority", 0);
    if text(spec, "serviceAccountName").is_empty() {
        spec["serviceAccountName"] = json!("default");
    }
    spec["serviceAccount"] = spec["serviceAccountName"].clone();
    evict_tolerations(spec);
    let class = qos_class(&object["spec"]);
    default(object, "status", json!({}));
    default(&mut object["status"], "phase", "Pending");
    default(&mut object["status"], "qosClass", class);
}

/// Every pod stays five minutes on a node that is not ready or not reachable, unless it says otherwise.
fn evict_tolerations(spec: &mut Value) {
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = list(spec, "tolerations").iter().any(|toleration| {
            let effect = text(toleration, "effect");
            matches!(text(toleration, "key"), "" if text(toleration, "operator") == "Exists")
                && matches!(effect, "" | "NoExecute")
                || text(toleration, "key") == key && matches!(effect, "" | "NoExecute")
        });
        if !tolerated {
            let toleration = json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300});
            default(spec, "tolerations", json!([]));
            if let Some(all) = spec["tolerations"].as_array_mut() {
                all.push(toleration);
            }
        }
    }
}

fn pod_spec(spec: &mut Value) {
    default(spec, "restartPolicy", "Always");
    default(spec, "terminationGracePeriodSeconds", 30);
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "securityContext", json!({}));
    default(spec, "schedulerName", "default-scheduler");
    if let (Some(_), account) = (spec.get("serviceAccountName"), spec["serviceAccountName"].clone()) {
        default(spec, "serviceAccount", account);
    }
    let host_network = spec["hostNetwork"] == true;
    for group in ["initContainers", "containers"] {
        for one in spec.get_mut(group).and_then(Value::as_array_mut).into_iter().flatten() {
            container(one, host_network);
        }
    }
    for one in spec.get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten() {
        volume(one);
    }
}

fn container(container: &mut Value, host_network: bool) {
    let image = text(container, "image");
    let last = image.rsplit('/').next().unwrap_or_default();
    let latest = !image.contains('@') && (!last.contains(':') || last.ends_with(":latest"));
    default(container, "imagePullPolicy", if latest { "Always" } else { "IfNotPresent" });
    default(container, "terminationMessagePath", "/dev/termination-log");
    default(container, "terminationMessagePolicy", "File");
    default(container, "resources", json!({}));
    let limits = container["resources"]["limits"].clone();
    for (resource, limit) in limits.as_object().into_iter().flatten() {
        default(&mut container["resources"], "requests", json!({}));
        default(&mut container["resources"]["requests"], resource, limit.clone());
    }
    for port in container.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        default(port, "protocol", "TCP");
        if host_network {
            let number = port["containerPort"].clone();
            default(port, "hostPort", number);
        }
    }
    for variable in container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(reference) = variable.pointer_mut("/valueFrom/fieldRef") {
            default(reference, "apiVersion", "v1");
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(probe) {
            self::probe(probe);
        }
    }
    for hook in ["/lifecycle/postStart/httpGet", "/lifecycle/preStop/httpGet"] {
        if let Some(get) = container.pointer_mut(hook) {
            default(get, "path", "/");
            default(get, "scheme", "HTTP");
        }
    }
}

fn probe(probe: &mut Value) {
    default(probe, "timeoutSeconds", 1);
    default(probe, "periodSeconds", 10);
    default(probe, "successThreshold", 1);
    default(probe, "failureThreshold", 3);
    if let Some(get) = probe.get_mut("httpGet") {
        default(get, "path", "/");
        default(get, "scheme", "HTTP");
    }
    if let Some(grpc) = probe.get_mut("grpc") {
        default(grpc, "service", "");
    }
}

fn volume(volume: &mut Value) {
    if volume.as_object().is_some_and(|fields| fields.len() == 1) {
        volume["emptyDir"] = json!({});
    }
    for source in ["secret", "configMap", "projected", "downwardAPI"] {
        if let Some(source) = volume.get_mut(source) {
            default(source, "defaultMode", 0o644);
        }
    }
    if let Some(path) = volume.get_mut("hostPath") {
        default(path, "type", "");
    }
}

/// Guaranteed, Burstable or BestEffort, from requests and limits of cpu and memory.
fn qos_class(spec: &Value) -> &'static str {
    let containers = list(spec, "containers").iter().chain(list(spec, "initContainers"));
    let (mut guaranteed, mut any) = (true, false);
    for container in containers {
        for resource in ["cpu", "memory"] {
            let request = container["resources"]["requests"].get(resource);
            let limit = container["resources"]["limits"].get(resource);
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request.is_none_or(|request| Some(request) == limit);
        }
    }
    match (guaranteed, any) {
        (true, true) => "Guaranteed",
        (false, true) => "Burstable",
        _ => "BestEffort",
    }
}

/// Services. Families and addresses are given elsewhere.
pub fn service(object: &mut Value) {
    let spec = &mut object["spec"];
    default(spec, "type", "ClusterIP");
    default(spec, "sessionAffinity", "None");
    if text(spec, "sessionAffinity") == "ClientIP" {
        default(spec, "sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 10_800}}));
    }
    let kind = text(spec, "type").to_owned();
    let outside = super::services::reached_from_outside(object);
    let spec = &mut object["spec"];
    if kind != "ExternalName" {
        default(spec, "internalTrafficPolicy", "Cluster");
    }
    if outside {
        default(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        default(spec, "allocateLoadBalancerNodePorts", true);
    }
    for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        default(port, "protocol", "TCP");
        let number = port["port"].clone();
        if kind != "ExternalName" {
            default(port, "targetPort", number);
        }
    }
    default(object, "status", json!({"loadBalancer": {}}));
}

/// Secrets: `stringData` becomes `data`.
pub fn secret(object: &mut Value) {
    use base64::Engine as _;
    default(object, "type", "Opaque");
    let plain = object.as_object_mut().and_then(|fields| fields.remove("stringData"));
    for (key, value) in plain.as_ref().and_then(Value::as_object).into_iter().flatten() {
        let encoded = base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or_default());
        default(object, "data", json!({}));
        object["data"][key] = json!(encoded);
    }
}

/// Namespaces carry their name as a label and are finished by a controller.
pub fn namespace(object: &mut Value) {
    let name = super::value::name(object).to_owned();
    if !name.is_empty() {
        default(&mut object["metadata"], "labels", json!({}));
        object["metadata"]["labels"]["kubernetes.io/metadata.name"] = json!(name);
    }
    if text(object, "metadata.deletionTimestamp").is_empty() {
        default(object, "spec", json!({}));
        default(&mut object["spec"], "finalizers", json!(["kubernetes"]));
        default(object, "status", json!({}));
        default(&mut object["status"], "phase", "Active");
    }
}

/// Nodes.
pub fn node(object: &mut Value) {
    default(object, "spec", json!({}));
    default(object, "status", json!({}));
    let capacity = object["status"]["capacity"].clone();
    if capacity.is_object() {
        default(&mut object["status"], "allocatable", capacity);
    }
}

/// Gateways: what the Gateway API's own definitions declare as defaults.
pub fn gateway(object: &mut Value) {
    for listener in object["spec"].get_mut("listeners").and_then(Value::as_array_mut).into_iter().flatten() {
        default(listener, "allowedRoutes", json!({}));
        default(&mut listener["allowedRoutes"], "namespaces", json!({}));
        default(&mut listener["allowedRoutes"]["namespaces"], "from", "Same");
        for kind in listener["allowedRoutes"].get_mut("kinds").and_then(Value::as_array_mut).into_iter().flatten() {
            default(kind, "group", "gateway.networking.k8s.io");
        }
        let Some(tls) = listener.get_mut("tls") else { continue };
        default(tls, "mode", "Terminate");
        for certificate in tls.get_mut("certificateRefs").and_then(Value::as_array_mut).into_iter().flatten() {
            default(certificate, "group", "");
            default(certificate, "kind", "Secret");
        }
    }
}

/// Routes of the Gateway API: what its own definitions declare as defaults.
pub fn route(object: &mut Value) {
    for parent in object["spec"].get_mut("parentRefs").and_then(Value::as_array_mut).into_iter().flatten() {
        default(parent, "group", "gateway.networking.k8s.io");
        default(parent, "kind", "Gateway");
    }
    for rule in object["spec"].get_mut("rules").and_then(Value::as_array_mut).into_iter().flatten() {
        for backend in rule.get_mut("backendRefs").and_then(Value::as_array_mut).into_iter().flatten() {
            default(backend, "group", "");
            default(backend, "kind", "Service");
            default(backend, "weight", 1);
        }
    }
}

/// HTTP routes have a rule that matches everything if they name none.
pub fn http_route(object: &mut Value) {
    route(object);
    let everything = json!([{"path": {"type": "PathPrefix", "value": "/"}}]);
    default(&mut object["spec"], "rules", json!([{"matches": everything}]));
    for rule in object["spec"]["rules"].as_array_mut().into_iter().flatten() {
        default(rule, "matches", everything.clone());
        for one in rule["matches"].as_array_mut().into_iter().flatten() {
            default(one, "path", json!({}));
            default(&mut one["path"], "type", "PathPrefix");
            default(&mut one["path"], "value", "/");
            for group in ["headers", "queryParams"] {
                for header in one.get_mut(group).and_then(Value::as_array_mut).into_iter().flatten() {
                    default(header, "type", "Exact");
                }
            }
        }
    }
}
