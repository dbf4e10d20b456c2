//! What `kubectl get` shows: the columns of each kind and the cells of an object's row, as Kubernetes' own server
//! prints them.
//!
//! PURE: the present moment is an argument.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::families::addresses;
use super::value::{age, at, condition, list, name, number, seconds_since, text};

/// One column.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// Heading.
    pub name: &'static str,
    /// `string`, `integer`, `date`.
    pub kind: &'static str,
    /// Shown with `-o wide` only.
    pub wide: bool,
}

const fn text_column(name: &'static str) -> Column {
    Column { name, kind: "string", wide: false }
}
const fn wide(name: &'static str) -> Column {
    Column { name, kind: "string", wide: true }
}
const fn int(name: &'static str) -> Column {
    Column { name, kind: "integer", wide: false }
}
const NAME: Column = text_column("Name");
const AGE: Column = text_column("Age");

/// Makes an object's cells.
pub type Cells = fn(&Value, Timestamp) -> Vec<Value>;

/// Kinds without columns of their own.
pub const PLAIN: &[Column] = &[NAME, AGE];
/// Name and age.
pub fn plain(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![json!(name(object)), born(object, now)]
}

fn born(object: &Value, now: Timestamp) -> Value {
    json!(age(object, "metadata.creationTimestamp", now))
}

/// Pods.
pub const POD: &[Column] = &[
    NAME,
    text_column("Ready"),
    text_column("Status"),
    text_column("Restarts"),
    AGE,
    wide("IP"),
    wide("Node"),
    wide("Nominated Node"),
    wide("Readiness Gates"),
];
/// Pods: readiness, the reason a container does not run, restarts with the last one's age.
pub fn pod(pod: &Value, now: Timestamp) -> Vec<Value> {
    let init = list(pod, "spec.initContainers");
    let sidecar = |status: &Value| {
        let always = |c: &Value| text(c, "name") == text(status, "name") && text(c, "restartPolicy") == "Always";
        init.iter().any(always)
    };
    let statuses = list(pod, "status.containerStatuses");
    let init_statuses = list(pod, "status.initContainerStatuses");
    let sidecars = init_statuses.iter().filter(|status| sidecar(status));
    let ready = statuses.iter().chain(sidecars).filter(|status| status["ready"] == true).count();
    let total =
        list(pod, "spec.containers").len() + init.iter().filter(|c| text(c, "restartPolicy") == "Always").count();
    let restarts: i64 = statuses.iter().chain(init_statuses).map(|status| number(status, "restartCount")).sum();
    let ended = |s: &Value| seconds_since(s, "lastState.terminated.finishedAt", now);
    let last = statuses.iter().chain(init_statuses).filter_map(ended).min();
    let restarts = match last.filter(|_| restarts > 0) {
        Some(seconds) => format!("{restarts} ({} ago)", super::value::human_duration(seconds)),
        None => restarts.to_string(),
    };
    let or_none = |path: &str| json!(if text(pod, path).is_empty() { "<none>" } else { text(pod, path) });
    let ips: Vec<&str> = list(pod, "status.podIPs").iter().map(|address| text(address, "ip")).collect();
    vec![
        json!(name(pod)),
        json!(format!("{ready}/{total}")),
        json!(pod_reason(pod, &sidecar)),
        json!(restarts),
        born(pod, now),
        if ips.len() > 1 { json!(ips.join(",")) } else { or_none("status.podIP") },
        or_none("spec.nodeName"),
        or_none("status.nominatedNodeName"),
        json!("<none>"),
    ]
}

fn pod_reason(pod: &Value, sidecar: &dyn Fn(&Value) -> bool) -> String {
    let mut reason = text(pod, "status.phase").to_owned();
    if !text(pod, "status.reason").is_empty() {
        text(pod, "status.reason").clone_into(&mut reason);
    }
    let init = list(pod, "status.initContainerStatuses");
    let total = list(pod, "spec.initContainers").len();
    let mut initializing = false;
    for (index, status) in init.iter().enumerate() {
        let terminated = &status["state"]["terminated"];
        if terminated.is_object() && number(terminated, "exitCode") == 0 {
            continue;
        }
        if sidecar(status) && status["started"] == true {
            continue;
        }
        let waiting = text(status, "state.waiting.reason");
        reason = match (terminated.is_object(), text(terminated, "reason"), waiting) {
            (true, "", _) => format!("Init:ExitCode:{}", number(terminated, "exitCode")),
            (true, why, _) => format!("Init:{why}"),
            (false, _, why) if !matches!(why, "" | "PodInitializing") => format!("Init:{why}"),
            _ => format!("Init:{index}/{total}"),
        };
        initializing = true;
        break;
    }
    if !initializing {
        let mut running = false;
        for status in list(pod, "status.containerStatuses").iter().rev() {
            let terminated = &status["state"]["terminated"];
            let waiting = text(status, "state.waiting.reason");
            if !waiting.is_empty() {
                waiting.clone_into(&mut reason);
            } else if terminated.is_object() {
                reason = match (text(terminated, "reason"), number(terminated, "signal")) {
                    ("", 0) => format!("ExitCode:{}", number(terminated, "exitCode")),
                    ("", signal) => format!("Signal:{signal}"),
                    (why, _) => why.to_owned(),
                };
            } else if status["ready"] == true && status["state"]["running"].is_object() {
                running = true;
            }
        }
        if reason == "Completed" && running {
            let ready = condition(pod, "Ready").is_some_and(|c| text(c, "status") == "True");
            reason = if ready { "Running" } else { "NotReady" }.to_owned();
        }
    }
    let phase = text(pod, "status.phase");
    match text(pod, "metadata.deletionTimestamp") {
        "" => reason,
        _ if text(pod, "status.reason") == "NodeLost" => "Unknown".to_owned(),
        _ if matches!(phase, "Succeeded" | "Failed") => reason,
        _ => "Terminating".to_owned(),
    }
}

/// Deployments.
pub const DEPLOYMENT: &[Column] = &[
    NAME,
    text_column("Ready"),
    text_column("Up-to-date"),
    text_column("Available"),
    AGE,
    wide("Containers"),
    wide("Images"),
    wide("Selector"),
];
/// Deployments.
pub fn deployment(object: &Value, now: Timestamp) -> Vec<Value> {
    let ready = format!("{}/{}", number(object, "status.readyReplicas"), number(object, "spec.replicas"));
    let mut cells = vec![json!(name(object)), json!(ready)];
    cells.push(json!(number(object, "status.updatedReplicas").to_string()));
    cells.push(json!(number(object, "status.availableReplicas").to_string()));
    cells.push(born(object, now));
    cells.extend(template_cells(object));
    cells
}

fn template_cells(object: &Value) -> [Value; 3] {
    let containers = list(object, "spec.template.spec.containers");
    let join = |field: &str| containers.iter().map(|c| text(c, field)).collect::<Vec<_>>().join(",");
    [json!(join("name")), json!(join("image")), json!(selector_text(&object["spec"]["selector"]))]
}

fn selector_text(selector: &Value) -> String {
    let labels = at(selector, "matchLabels").unwrap_or(&Value::Null);
    labels_text(labels.as_object().unwrap_or(&Map::new()))
}

fn labels_text(labels: &Map<String, Value>) -> String {
    let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
    if pairs.is_empty() { "<none>".to_owned() } else { pairs.join(",") }
}

/// ReplicaSets.
pub const REPLICA_SET: &[Column] =
    &[NAME, int("Desired"), int("Current"), int("Ready"), AGE, wide("Containers"), wide("Images"), wide("Selector")];
/// ReplicaSets.
pub fn replica_set(object: &Value, now: Timestamp) -> Vec<Value> {
    let mut cells = vec![json!(name(object))];
    cells.extend(["spec.replicas", "status.replicas", "status.readyReplicas"].map(|path| json!(number(object, path))));
    cells.push(born(object, now));
    cells.extend(template_cells(object));
    cells
}

/// Services.
pub const SERVICE: &[Column] = &[
    NAME,
    text_column("Type"),
    text_column("Cluster-IP"),
    text_column("External-IP"),
    text_column("Port(s)"),
    AGE,
    wide("Selector"),
];
/// Services.
pub fn service(object: &Value, now: Timestamp) -> Vec<Value> {
    let kind = text(object, "spec.type");
    let ips = list(object, "spec.externalIPs").iter().filter_map(Value::as_str);
    let name_of = |entry| Some(text(entry, "ip")).filter(|ip| !ip.is_empty()).unwrap_or(text(entry, "hostname"));
    let ingress = list(object, "status.loadBalancer.ingress").iter().map(name_of).filter(|name| !name.is_empty());
    let (all, none): (Vec<&str>, &str) = match kind {
        "ExternalName" => (vec![text(object, "spec.externalName")], "<none>"),
        "LoadBalancer" => (ingress.chain(ips).collect(), "<pending>"),
        _ => (ips.collect(), "<none>"),
    };
    let external = if all.is_empty() { none.to_owned() } else { all.join(",") };
    let port = |port: &Value| match number(port, "nodePort") {
        0 => format!("{}/{}", number(port, "port"), text(port, "protocol")),
        node => format!("{}:{node}/{}", number(port, "port"), text(port, "protocol")),
    };
    let ports: Vec<String> = list(object, "spec.ports").iter().map(port).collect();
    let ports = if ports.is_empty() { "<none>".to_owned() } else { ports.join(",") };
    let address = if kind == "ExternalName" { String::new() } else { addresses(object).join(",") };
    let selector = labels_text(object["spec"]["selector"].as_object().unwrap_or(&Map::new()));
    let cells = [name(object), kind, if address.is_empty() { "<none>" } else { &address }, &external, &ports];
    cells.iter().map(|c| json!(c)).chain([born(object, now), json!(selector)]).collect()
}

/// Nodes.
pub const NODE: &[Column] = &[
    NAME,
    text_column("Status"),
    text_column("Roles"),
    AGE,
    text_column("Version"),
    wide("Internal-IP"),
    wide("External-IP"),
    wide("OS-Image"),
    wide("Kernel-Version"),
    wide("Container-Runtime"),
];
/// Nodes.
pub fn node(object: &Value, now: Timestamp) -> Vec<Value> {
    let ready = condition(object, "Ready")
        .map_or("Unknown", |c| if text(c, "status") == "True" { "Ready" } else { "NotReady" });
    let cordoned = if object["spec"]["unschedulable"] == true { ",SchedulingDisabled" } else { "" };
    let labels = object["metadata"]["labels"].as_object();
    let role = |label: &String| label.strip_prefix("node-role.kubernetes.io/").map(str::to_owned);
    let roles: Vec<String> = labels.into_iter().flat_map(|labels| labels.keys().filter_map(role)).collect();
    let address = |kind: &str| {
        let found = list(object, "status.addresses").iter().find(|a| text(a, "type") == kind);
        json!(found.map_or("<none>", |a| text(a, "address")))
    };
    let info = |field: &str| match text(object, &format!("status.nodeInfo.{field}")) {
        "" => json!("<unknown>"),
        known => json!(known),
    };
    vec![
        json!(name(object)),
        json!(format!("{ready}{cordoned}")),
        json!(if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") }),
        born(object, now),
        json!(text(object, "status.nodeInfo.kubeletVersion")),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage"),
        info("kernelVersion"),
        info("containerRuntimeVersion"),
    ]
}

/// Namespaces.
pub const NAMESPACE: &[Column] = &[NAME, text_column("Status"), AGE];
/// Namespaces.
pub fn namespace(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![json!(name(object)), json!(text(object, "status.phase")), born(object, now)]
}

/// ConfigMaps.
pub const CONFIG_MAP: &[Column] = &[NAME, int("Data"), AGE];
/// ConfigMaps.
pub fn config_map(object: &Value, now: Timestamp) -> Vec<Value> {
    let entries = ["data", "binaryData"].iter().filter_map(|f| object[*f].as_object()).map(Map::len).sum::<usize>();
    vec![json!(name(object)), json!(entries), born(object, now)]
}

/// Secrets.
pub const SECRET: &[Column] = &[NAME, text_column("Type"), int("Data"), AGE];
/// Secrets.
pub fn secret(object: &Value, now: Timestamp) -> Vec<Value> {
    let entries = object["data"].as_object().map_or(0, Map::len);
    vec![json!(name(object)), json!(text(object, "type")), json!(entries), born(object, now)]
}

/// ServiceAccounts.
pub const SERVICE_ACCOUNT: &[Column] = &[NAME, int("Secrets"), AGE];
/// ServiceAccounts.
pub fn service_account(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![json!(name(object)), json!(list(object, "secrets").len()), born(object, now)]
}

/// Leases.
pub const LEASE: &[Column] = &[NAME, text_column("Holder"), AGE];
/// Leases.
pub fn lease(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![json!(name(object)), json!(text(object, "spec.holderIdentity")), born(object, now)]
}

/// Events.
pub const EVENT: &[Column] = &[
    text_column("Last Seen"),
    text_column("Type"),
    text_column("Reason"),
    text_column("Object"),
    wide("Subobject"),
    wide("Source"),
    text_column("Message"),
    wide("First Seen"),
    wide("Count"),
    wide("Name"),
];
/// Events, of either API version.
pub fn event(object: &Value, now: Timestamp) -> Vec<Value> {
    let first_of =
        |paths: &[&str]| paths.iter().map(|p| text(object, p)).find(|t| !t.is_empty()).unwrap_or_default().to_owned();
    let when = |paths: &[&str]| {
        let known = paths.iter().find(|path| !text(object, path).is_empty());
        known.map_or("<unknown>".to_owned(), |path| age(object, path, now))
    };
    let about = if object.get("regarding").is_some() { "regarding" } else { "involvedObject" };
    let target = &object[about];
    let subject = format!("{}/{}", text(target, "kind").to_lowercase(), text(target, "name"));
    let count =
        number(object, "count").max(number(object, "deprecatedCount")).max(number(object, "series.count")).max(1);
    vec![
        json!(when(&["series.lastObservedTime", "lastTimestamp", "deprecatedLastTimestamp", "eventTime"])),
        json!(text(object, "type")),
        json!(text(object, "reason")),
        json!(subject),
        json!(text(target, "fieldPath")),
        json!(first_of(&[
            "source.component",
            "deprecatedSource.component",
            "reportingComponent",
            "reportingController"
        ])),
        json!(first_of(&["message", "note"]).trim()),
        json!(when(&["firstTimestamp", "deprecatedFirstTimestamp", "eventTime"])),
        json!(count.to_string()),
        json!(name(object)),
    ]
}

/// Endpoints.
pub const ENDPOINTS: &[Column] = &[NAME, text_column("Endpoints"), AGE];
/// Endpoints.
pub fn endpoints(object: &Value, now: Timestamp) -> Vec<Value> {
    let mut all = Vec::new();
    for subset in list(object, "subsets") {
        for address in list(subset, "addresses") {
            let ports = list(subset, "ports");
            all.extend(ports.iter().map(|p| format!("{}:{}", text(address, "ip"), number(p, "port"))));
        }
    }
    vec![json!(name(object)), json!(shorten(&all)), born(object, now)]
}

/// EndpointSlices.
pub const ENDPOINT_SLICE: &[Column] =
    &[NAME, text_column("AddressType"), text_column("Ports"), text_column("Endpoints"), AGE];
/// EndpointSlices.
pub fn endpoint_slice(object: &Value, now: Timestamp) -> Vec<Value> {
    let ports: Vec<String> = list(object, "ports").iter().map(|p| number(p, "port").to_string()).collect();
    let addresses = list(object, "endpoints").iter().filter_map(|e| list(e, "addresses").first()?.as_str());
    let addresses: Vec<String> = addresses.map(str::to_owned).collect();
    let ports = if ports.is_empty() { "<unset>".to_owned() } else { shorten(&ports) };
    let addresses = if addresses.is_empty() { "<unset>".to_owned() } else { shorten(&addresses) };
    vec![json!(name(object)), json!(text(object, "addressType")), json!(ports), json!(addresses), born(object, now)]
}

fn shorten(all: &[String]) -> String {
    match all.len() {
        0 => "<none>".to_owned(),
        1..=3 => all.join(","),
        more => format!("{} + {} more...", all[..3].join(","), more - 3),
    }
}

/// GatewayClasses, as Gateway API's own definition prints them.
pub const GATEWAY_CLASS: &[Column] =
    &[NAME, text_column("Controller"), text_column("Accepted"), AGE, wide("Description")];
/// GatewayClasses.
pub fn gateway_class(object: &Value, now: Timestamp) -> Vec<Value> {
    let controller = json!(text(object, "spec.controllerName"));
    let description = json!(text(object, "spec.description"));
    vec![json!(name(object)), controller, status_of(object, "Accepted"), born(object, now), description]
}

/// Gateways, as Gateway API's own definition prints them.
pub const GATEWAY: &[Column] = &[NAME, text_column("Class"), text_column("Address"), text_column("Programmed"), AGE];
/// Gateways.
pub fn gateway(object: &Value, now: Timestamp) -> Vec<Value> {
    let addresses: Vec<&str> = list(object, "status.addresses").iter().map(|a| text(a, "value")).collect();
    let class = json!(text(object, "spec.gatewayClassName"));
    vec![json!(name(object)), class, json!(addresses.join(",")), status_of(object, "Programmed"), born(object, now)]
}

fn status_of(object: &Value, kind: &str) -> Value {
    json!(condition(object, kind).map_or("Unknown", |c| text(c, "status")))
}

/// HTTPRoutes.
pub const HTTP_ROUTE: &[Column] = &[NAME, text_column("Hostnames"), AGE];
/// HTTPRoutes.
pub fn http_route(object: &Value, now: Timestamp) -> Vec<Value> {
    let hosts = at(object, "spec.hostnames").map_or(String::new(), Value::to_string);
    vec![json!(name(object)), json!(hosts), born(object, now)]
}
