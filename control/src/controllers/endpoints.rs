//! EndpointSlices: for each service with a selector, where its pods are and whether they can take traffic. Readiness of
//! a pod on a node that is not heard of any more is worth nothing.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::queue::{Key, Queue};
use super::{Shared, controller_of, owned_by, pod_over, pod_ready};
use crate::api::cache::Heard;
use crate::api::client::Object;
use crate::api::registry::DeleteOptions;
use crate::api::status::ApiError;
use crate::range::Family;

/// Endpoints of one slice, as Kubernetes.
const PER_SLICE: usize = 100;
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const US: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// Writes that make the slices right.
#[derive(Debug, Default)]
struct Plan {
    create: Vec<EndpointSlice>,
    update: Vec<EndpointSlice>,
    delete: Vec<Arc<EndpointSlice>>,
}

/// The ports of a slice, comparable.
type Ports = Vec<(String, String, i32, Option<String>)>;

/// What all endpoints of a slice have in common: the type of their addresses, and their ports.
type Group = (String, Ports);

/// PURE: what the slices should be, with as few changes as can be: an endpoint stays in the slice where it is.
fn plan(
    service: &Service,
    pods: &[Arc<Pod>],
    slices: &[Arc<EndpointSlice>],
    node_ready: &dyn Fn(&str) -> bool,
) -> Plan {
    let mut groups: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    for (family, pod) in families(service).into_iter().flat_map(|family| pods.iter().map(move |pod| (family, pod))) {
        if let Some(endpoint) = endpoint(service, pod, family, node_ready) {
            groups.entry((family.name().to_owned(), ports_for(service, pod))).or_default().push(endpoint);
        }
    }
    let mut plan = Plan::default();
    let mut spare: Vec<Arc<EndpointSlice>> = Vec::new();
    for slice in slices.iter().filter(|slice| !groups.contains_key(&group_of(slice))) {
        spare.push(slice.clone());
    }
    for (group, endpoints) in groups {
        let existing = slices.iter().filter(|slice| group_of(slice) == group).cloned().collect();
        arrange(service, &group, endpoints, existing, &mut plan);
    }
    plan.delete.extend(spare);
    plan
}

/// Puts the endpoints of one group into its slices.
fn arrange(
    service: &Service,
    group: &Group,
    endpoints: Vec<Endpoint>,
    existing: Vec<Arc<EndpointSlice>>,
    plan: &mut Plan,
) {
    let mut waiting: BTreeMap<String, Endpoint> = endpoints.into_iter().map(|e| (target(&e), e)).collect();
    let mut kept: Vec<(Arc<EndpointSlice>, Vec<Endpoint>)> = existing
        .into_iter()
        .map(|slice| {
            let stay = slice.endpoints.iter().filter_map(|e| waiting.remove(&target(e))).take(PER_SLICE);
            let stay = stay.collect();
            (slice, stay)
        })
        .collect();
    for (_, list) in &mut kept {
        while list.len() < PER_SLICE {
            let Some((_, endpoint)) = waiting.pop_first() else { break };
            list.push(endpoint);
        }
    }
    for (slice, list) in kept {
        if list.is_empty() {
            plan.delete.push(slice);
        } else if slice.endpoints != list {
            plan.update.push(EndpointSlice { endpoints: list, ..(*slice).clone() });
        }
    }
    let mut rest: Vec<Endpoint> = waiting.into_values().collect();
    while !rest.is_empty() {
        let more = rest.split_off(rest.len().min(PER_SLICE));
        plan.create.push(new_slice(service, group, std::mem::replace(&mut rest, more)));
    }
}

fn new_slice(service: &Service, (family, ports): &Group, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.to_owned(), service.name().to_owned());
    labels.insert(MANAGED_BY.to_owned(), US.to_owned());
    if headless(service) {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    let port = |(name, protocol, port, app): &(String, String, i32, Option<String>)| EndpointPort {
        name: Some(name.clone()),
        protocol: Some(protocol.clone()),
        port: Some(*port),
        app_protocol: app.clone(),
    };
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", service.name())),
            namespace: Some(service.namespace().to_owned()),
            labels: Some(labels),
            owner_references: Some(vec![owned_by(service)]),
            ..ObjectMeta::default()
        },
        address_type: family.clone(),
        ports: Some(ports.iter().map(port).collect()),
        endpoints,
    }
}

fn headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()) == Some("None")
}

/// Of a service that does not name any, the family of its address.
fn families(service: &Service) -> Vec<Family> {
    let spec = service.spec.as_ref();
    let named = spec.and_then(|spec| spec.ip_families.as_ref()).into_iter().flatten();
    let named: Vec<Family> = named.filter_map(|name| Family::named(name)).collect();
    let address = spec.and_then(|spec| spec.cluster_ip.as_ref()?.parse().ok());
    if named.is_empty() { vec![address.map_or(Family::V4, Family::of)] } else { named }
}

fn group_of(slice: &EndpointSlice) -> Group {
    (slice.address_type.clone(), ports_of(slice))
}

fn ports_of(slice: &EndpointSlice) -> Ports {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let port = |port: &EndpointPort| {
        (text(&port.name), text(&port.protocol), port.port.unwrap_or_default(), port.app_protocol.clone())
    };
    let mut ports: Ports = slice.ports.iter().flatten().map(port).collect();
    ports.sort();
    ports
}

/// The service's ports as this pod has them: a named target is whatever the pod calls so.
fn ports_for(service: &Service, pod: &Pod) -> Ports {
    let containers = pod.spec.iter().flat_map(|spec| {
        spec.containers.iter().chain(spec.init_containers.iter().flatten().filter(|c| c.restart_policy.is_some()))
    });
    let declared: Vec<_> = containers.flat_map(|container| container.ports.iter().flatten()).collect();
    let mut ports = Ports::new();
    for port in service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()) {
        let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
        let number = match &port.target_port {
            None => Some(port.port),
            Some(IntOrString::Int(0)) => Some(port.port),
            Some(IntOrString::Int(number)) => Some(*number),
            Some(IntOrString::String(name)) => {
                let named = declared.iter().find(|declared| {
                    declared.name.as_deref() == Some(name) && declared.protocol.as_deref().unwrap_or("TCP") == protocol
                });
                named.map(|declared| declared.container_port)
            }
        };
        // A pod that has no port of that name is reached on its other ports only.
        if let Some(number) = number {
            ports.push((port.name.clone().unwrap_or_default(), protocol, number, port.app_protocol.clone()));
        }
    }
    ports.sort();
    ports
}

/// The pod's first address of a family.
fn address(pod: &Pod, family: Family) -> Option<String> {
    let status = pod.status.as_ref()?;
    let all = status.pod_ips.iter().flatten().map(|address| &address.ip).chain(&status.pod_ip);
    let of_family = |text: &&String| text.parse().is_ok_and(|ip| Family::of(ip) == family);
    all.filter(|text| !text.is_empty()).find(of_family).cloned()
}

fn endpoint(service: &Service, pod: &Pod, family: Family, node_ready: &dyn Fn(&str) -> bool) -> Option<Endpoint> {
    let spec = pod.spec.as_ref()?;
    let address = address(pod, family).filter(|_| !pod_over(pod))?;
    let service_spec = service.spec.as_ref();
    let node = spec.node_name.clone().unwrap_or_default();
    let serving = pod_ready(pod) && node_ready(&node);
    let always = service_spec.and_then(|spec| spec.publish_not_ready_addresses) == Some(true);
    let terminating = pod.deleting();
    let hostname = spec.hostname.clone().filter(|_| spec.subdomain.as_deref() == Some(service.name()));
    Some(Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(always || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname,
        node_name: Some(node).filter(|node| !node.is_empty()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: Some(pod.namespace().to_owned()),
            name: Some(pod.name().to_owned()),
            uid: Some(pod.uid().to_owned()),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    })
}

fn target(endpoint: &Endpoint) -> String {
    endpoint.target_ref.as_ref().and_then(|target| target.uid.clone()).unwrap_or_default()
}

fn selects(service: &Service, pod: &Pod) -> bool {
    let selector =
        service.spec.as_ref().and_then(|spec| spec.selector.as_ref()).filter(|selector| !selector.is_empty());
    let labels = pod.metadata.labels.as_ref();
    selector.is_some_and(|selector| selector.iter().all(|(k, v)| labels.and_then(|labels| labels.get(k)) == Some(v)))
}

/// Runs for ever.
pub(super) async fn run(shared: Shared) {
    let queue = Queue::new();
    let feed = feed(shared.clone(), queue.clone());
    let work = queue.run("endpoints", move |key| reconcile(shared.clone(), key));
    tokio::join!(feed, work);
}

async fn feed(shared: Shared, queue: Arc<Queue>) {
    let (mut services, mut pods) = (shared.caches.services.listen(), shared.caches.pods.listen());
    let (mut slices, mut nodes) = (shared.caches.slices.listen(), shared.caches.nodes.listen());
    let all = || {
        for service in shared.caches.services.all() {
            queue.add((service.namespace().to_owned(), service.name().to_owned()));
        }
    };
    all();
    loop {
        tokio::select! {
            heard = services.next() => match heard {
                Heard::Change(change) => queue.add((change.object().namespace().to_owned(), change.object().name().to_owned())),
                Heard::Everything => all(),
            },
            heard = pods.next() => match heard {
                Heard::Change(change) => {
                    let namespace = change.object().namespace();
                    let services = shared.caches.services.in_namespace(namespace);
                    for pod in [&change.old, &change.new].into_iter().flatten() {
                        for service in services.iter().filter(|service| selects(service, pod)) {
                            queue.add((namespace.to_owned(), service.name().to_owned()));
                        }
                    }
                }
                Heard::Everything => all(),
            },
            heard = slices.next() => match heard {
                Heard::Change(change) => if let Some(owner) = controller_of(&**change.object()) {
                    queue.add((change.object().namespace().to_owned(), owner.name.clone()));
                },
                Heard::Everything => all(),
            },
            heard = nodes.next() => match heard {
                Heard::Change(change) => {
                    let ready = |node: &Option<Arc<Node>>| node.as_ref().is_some_and(|node| node_is_ready(node));
                    if ready(&change.old) != ready(&change.new) {
                        all();
                    }
                }
                Heard::Everything => all(),
            },
        }
    }
}

/// Whether the node is ready, by its condition.
fn node_is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

async fn reconcile(shared: Shared, key: Key) -> Result<(), ApiError> {
    let Some(service) = shared.caches.services.get(&key.0, &key.1) else { return Ok(()) };
    let spec = service.spec.as_ref();
    let external = spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName");
    let selecting = spec.and_then(|spec| spec.selector.as_ref()).is_some_and(|selector| !selector.is_empty());
    let slices = shared.caches.slices.controlled_by(service.uid());
    if service.deleting() || (!selecting && slices.is_empty()) {
        return Ok(());
    }
    let mut pods = shared.caches.pods.in_namespace(&key.0);
    pods.retain(|pod| !external && selects(&service, pod));
    let nodes: HashSet<String> = {
        let all = shared.caches.nodes.all();
        all.iter().filter(|node| node_is_ready(node)).map(|node| node.name().to_owned()).collect()
    };
    let plan = plan(&service, &pods, &slices, &|node| nodes.contains(node));
    let mut revision = 0;
    for slice in &plan.create {
        revision = revision.max(shared.client.create(slice).await?.revision());
    }
    for slice in &plan.update {
        revision = revision.max(shared.client.update(slice).await?.revision());
    }
    for slice in &plan.delete {
        revision = revision.max(shared.client.delete(&**slice, DeleteOptions::default()).await?);
    }
    shared.caches.slices.wait_for(revision).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(target: Value) -> Service {
        serde_json::from_value(
            json!({"metadata": {"name": "s", "namespace": "n", "uid": "s"}, "spec": {"selector": {"a": "b"},
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": target}]}}),
        )
        .expect("a service")
    }

    fn pod(index: usize, change: Value) -> Arc<Pod> {
        let mut object = json!({"metadata": {"name": format!("p{index}"), "namespace": "n", "uid": format!("u{index:04}"), "labels": {"a": "b"}},
            "spec": {"nodeName": "node", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}]},
            "status": {"podIP": format!("10.244.{}.{}", index / 250, index % 250 + 1), "phase": "Running",
                "conditions": [{"type": "Ready", "status": "True"}]}});
        crate::api::patch::merge(&mut object, &change);
        Arc::new(serde_json::from_value(object).expect("a pod"))
    }

    fn conditions(service: &Service, pod: &Pod, node: bool) -> [bool; 3] {
        let found = endpoint(service, pod, Family::V4, &|_| node).expect("an endpoint").conditions.expect("conditions");
        [found.ready, found.serving, found.terminating].map(|flag| flag.expect("set"))
    }

    #[test]
    fn readiness_table() {
        let service = service(json!(8080));
        let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
        let dying = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
        assert_eq!(conditions(&service, &pod(1, json!({})), true), [true, true, false]);
        assert_eq!(conditions(&service, &pod(1, unready.clone()), true), [false, false, false]);
        assert_eq!(conditions(&service, &pod(1, dying.clone()), true), [false, true, true]);
        assert_eq!(conditions(&service, &pod(1, json!({})), false), [false, false, false]);
        let mut always = service.clone();
        always.spec.as_mut().expect("a spec").publish_not_ready_addresses = Some(true);
        let both = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
            "status": {"conditions": [{"type": "Ready", "status": "False"}]}});
        assert_eq!(conditions(&always, &pod(1, unready.clone()), true), [true, false, false], "ready from the start");
        assert_eq!(conditions(&always, &pod(1, json!({})), false), [true, false, false]);
        assert_eq!(conditions(&always, &pod(1, dying.clone()), true), [true, true, true]);
        assert_eq!(conditions(&always, &pod(1, both.clone()), true), [true, false, true], "and to the end");
        assert_eq!(conditions(&service, &pod(1, both), true), [false, false, true]);
        let none = |change: Value| endpoint(&service, &pod(1, change), Family::V4, &|_| true).is_none();
        assert!(none(json!({"status": {"phase": "Succeeded"}})));
        assert!(none(json!({"status": {"podIP": null}})));
    }

    #[test]
    fn named_ports_resolve_per_pod() {
        let service = service(json!("web"));
        let other = json!({"spec": {"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 9090}]}]}});
        let pods = [pod(1, json!({})), pod(2, other)];
        let plan = plan(&service, &pods, &[], &|_| true);
        let mut ports: Vec<i32> = plan.create.iter().map(|slice| ports_of(slice)[0].2).collect();
        ports.sort_unstable();
        assert_eq!(ports, [8080, 9090]);
    }

    #[test]
    fn each_family_of_a_service_has_slices_of_its_own() {
        let with = |spec: Value| {
            let mut object = serde_json::to_value(service(json!(8080))).expect("JSON");
            crate::api::patch::merge(&mut object, &json!({"spec": spec}));
            serde_json::from_value::<Service>(object).expect("a service")
        };
        let dual = |index: usize| {
            let first = format!("10.244.0.{}", index + 1);
            let ips = json!([{"ip": first}, {"ip": format!("fd00::{index}")}]);
            pod(index, json!({"status": {"podIP": first, "podIPs": ips}}))
        };
        // One pod is of a node that had but one range when it was made.
        let pods = [dual(1), dual(2), pod(3, json!({}))];
        let (v4, v6) = (("IPv4", 3), ("IPv6", 2));
        for (spec, want) in [
            (json!({}), vec![v4]),
            (json!({"clusterIP": "fd00:96::5"}), vec![v6]),
            (json!({"ipFamilies": ["IPv6"]}), vec![v6]),
            (json!({"ipFamilies": ["IPv6", "IPv4"]}), vec![v4, v6]),
        ] {
            let plan = plan(&with(spec.clone()), &pods, &[], &|_| true);
            let slices: Vec<_> = plan.create.iter().map(|s| (s.address_type.as_str(), s.endpoints.len())).collect();
            assert_eq!(slices, want, "{spec}");
        }
        let both = with(json!({"ipFamilies": ["IPv4", "IPv6"]}));
        let slices: Vec<_> = plan(&both, &pods, &[], &|_| true).create.into_iter().map(Arc::new).collect();
        let same = plan(&both, &pods, &slices, &|_| true);
        assert!(same.create.is_empty() && same.update.is_empty() && same.delete.is_empty());
        let one = plan(&with(json!({"ipFamilies": ["IPv4"]})), &pods, &slices, &|_| true);
        assert!(one.create.is_empty() && one.update.is_empty());
        assert_eq!(one.delete.iter().map(|s| s.address_type.as_str()).collect::<Vec<_>>(), ["IPv6"]);
    }

    #[test]
    fn slices_hold_a_hundred_and_change_little() {
        let service = service(json!(8080));
        let pods: Vec<_> = (0..250).map(|index| pod(index, json!({}))).collect();
        let first = plan(&service, &pods, &[], &|_| true);
        let sizes: Vec<usize> = first.create.iter().map(|s| s.endpoints.len()).collect();
        assert_eq!(sizes, [100, 100, 50]);
        let slices: Vec<Arc<EndpointSlice>> = first.create.into_iter().map(Arc::new).collect();
        let same = plan(&service, &pods, &slices, &|_| true);
        assert!(same.create.is_empty() && same.update.is_empty() && same.delete.is_empty());
        let fewer = plan(&service, &pods[1..], &slices, &|_| true);
        assert_eq!((fewer.create.len(), fewer.delete.len()), (0, 0));
        assert!((1..=2).contains(&fewer.update.len()));
        let none = plan(&service, &[], &slices, &|_| true);
        assert_eq!(none.delete.len(), 3);
    }
}
