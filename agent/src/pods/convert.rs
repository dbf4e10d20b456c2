//! From a pod's object to the runtime's requests: PURE. Names, labels, environment, mounts, limits and security as the
//! Kubernetes API defines them; what needs the outside (config maps, addresses) is passed in.

use k8s_cri::v1 as cri;
use k8s_openapi::{
    api::core::v1::{Container, Pod, PodSecurityContext, PodSpec, SecurityContext, VolumeMount},
    apimachinery::pkg::api::resource::Quantity,
};
use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

pub const LABEL_NAME: &str = "io.kubernetes.pod.name";
pub const LABEL_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const LABEL_UID: &str = "io.kubernetes.pod.uid";
pub const LABEL_CONTAINER: &str = "io.kubernetes.container.name";

/// What this node gives to every pod.
#[derive(Clone, Debug)]
pub struct Node {
    pub name: String,
    /// At most one per family, the preferred one first.
    pub host_ips: Vec<IpAddr>,
    pub cluster_dns: Option<String>,
    pub cluster_domain: String,
    /// Folder of the pods' logs.
    pub log_dir: String,
    /// CPU and memory of the node, for `resourceFieldRef` without a limit.
    pub cpu_milli: u64,
    pub memory_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    #[error(
        "{object} {name:?} not found: container {container:?} refers to it; create it or mark the reference optional"
    )]
    NotFound { object: &'static str, name: String, container: String },
    #[error("key {key:?} not found in {object} {name:?}: container {container:?} refers to it")]
    NoKey { object: &'static str, name: String, key: String, container: String },
    #[error(
        "container {container:?}: environment variable {variable:?}: field {field:?} is not one that can be referred to"
    )]
    Field { container: String, variable: String, field: String },
    #[error("container {container:?} mounts volume {volume:?}, which the pod does not have")]
    NoVolume { container: String, volume: String },
    #[error("container {container:?} mounts a part of volume {volume:?}: {why}")]
    SubPath { container: String, volume: String, why: String },
    #[error("container {container:?} has runAsNonRoot, and {why}")]
    Root { container: String, why: String },
    #[error("{field}: {value:?} is not a quantity")]
    Quantity { field: &'static str, value: String },
}

/// The config maps and secrets a pod refers to, by name; absent ones are not in the map.
#[derive(Clone, Debug, Default)]
pub struct Refs {
    pub config_maps: HashMap<String, BTreeMap<String, Vec<u8>>>,
    pub secrets: HashMap<String, BTreeMap<String, Vec<u8>>>,
}

pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

pub fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

pub fn log_dir(pod: &Pod, node: &Node) -> String {
    format!("{}/{}_{}_{}", node.log_dir, namespace(pod), name(pod), uid(pod))
}

fn pod_labels(pod: &Pod) -> HashMap<String, String> {
    let own = [(LABEL_NAME, name(pod)), (LABEL_NAMESPACE, namespace(pod)), (LABEL_UID, uid(pod))];
    let given = pod.metadata.labels.iter().flatten().map(|(k, v)| (k.clone(), v.clone()));
    given.chain(own.map(|(k, v)| (k.to_owned(), v.to_owned()))).collect()
}

fn host_network(spec: &PodSpec) -> bool {
    spec.host_network == Some(true)
}

pub fn sandbox(pod: &Pod, spec: &PodSpec, attempt: u32, node: &Node) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name(pod).to_owned(),
            uid: uid(pod).to_owned(),
            namespace: namespace(pod).to_owned(),
            attempt,
        }),
        hostname: if host_network(spec) {
            String::new()
        } else {
            spec.hostname.clone().unwrap_or_else(|| name(pod).chars().take(63).collect())
        },
        log_directory: log_dir(pod, node),
        dns_config: dns(pod, spec, node),
        labels: pod_labels(pod),
        annotations: pod.metadata.annotations.clone().unwrap_or_default().into_iter().collect(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: format!("/pods/{}", uid(pod)),
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(spec)),
                run_as_user: int(spec.security_context.as_ref().and_then(|s| s.run_as_user)),
                run_as_group: int(spec.security_context.as_ref().and_then(|s| s.run_as_group)),
                supplemental_groups: groups(spec.security_context.as_ref()),
                ..Default::default()
            }),
            sysctls: spec
                .security_context
                .iter()
                .flat_map(|s| s.sysctls.iter().flatten())
                .map(|s| (s.name.clone(), s.value.clone()))
                .collect(),
            ..Default::default()
        }),
        port_mappings: port_mappings(spec),
        ..Default::default()
    }
}

/// Host ports, which the runtime hands to the network plugin. A pod in the node's own network has its ports there.
fn port_mappings(spec: &PodSpec) -> Vec<cri::PortMapping> {
    if host_network(spec) {
        return vec![];
    }
    let ports = spec.containers.iter().flat_map(|c| c.ports.iter().flatten());
    let mapping = |p: &k8s_openapi::api::core::v1::ContainerPort| {
        let protocol = match p.protocol.as_deref() {
            Some("UDP") => cri::Protocol::Udp,
            Some("SCTP") => cri::Protocol::Sctp,
            _ => cri::Protocol::Tcp,
        };
        Some(cri::PortMapping {
            protocol: protocol.into(),
            container_port: p.container_port,
            host_port: p.host_port.filter(|n| *n > 0)?,
            host_ip: p.host_ip.clone().unwrap_or_default(),
        })
    };
    ports.filter_map(mapping).collect()
}

fn namespaces(spec: &PodSpec) -> cri::NamespaceOption {
    let mode = |host: Option<bool>, otherwise: cri::NamespaceMode| {
        if host == Some(true) { cri::NamespaceMode::Node } else { otherwise }.into()
    };
    let pid = if spec.share_process_namespace == Some(true) {
        cri::NamespaceMode::Pod
    } else {
        cri::NamespaceMode::Container
    };
    cri::NamespaceOption {
        network: mode(spec.host_network, cri::NamespaceMode::Pod),
        pid: mode(spec.host_pid, pid),
        ipc: mode(spec.host_ipc, cri::NamespaceMode::Pod),
        ..Default::default()
    }
}

fn int(v: Option<i64>) -> Option<cri::Int64Value> {
    v.map(|value| cri::Int64Value { value })
}

fn groups(s: Option<&PodSecurityContext>) -> Vec<i64> {
    let Some(s) = s else { return vec![] };
    s.supplemental_groups.iter().flatten().copied().chain(s.fs_group).collect()
}

/// Cluster DNS with the pod's search path (ndots:5, as Kubernetes), or the node's own for `Default` and host network.
fn dns(pod: &Pod, spec: &PodSpec, node: &Node) -> Option<cri::DnsConfig> {
    let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    let cluster = match policy {
        "ClusterFirstWithHostNet" => true,
        "ClusterFirst" => !host_network(spec),
        _ => false,
    };
    let mut config = match (&node.cluster_dns, cluster) {
        (Some(server), true) => cri::DnsConfig {
            servers: vec![server.clone()],
            searches: [format!("{}.svc.", namespace(pod)), "svc.".to_owned(), String::new()]
                .iter()
                .map(|prefix| format!("{prefix}{}", node.cluster_domain))
                .collect(),
            options: vec!["ndots:5".to_owned()],
        },
        _ if policy == "None" => cri::DnsConfig::default(),
        _ => return None,
    };
    if let Some(extra) = &spec.dns_config {
        config.servers.extend(extra.nameservers.iter().flatten().cloned());
        config.searches.extend(extra.searches.iter().flatten().cloned());
        let option = |o: &k8s_openapi::api::core::v1::PodDNSConfigOption| match (&o.name, &o.value) {
            (Some(n), Some(v)) => Some(format!("{n}:{v}")),
            (Some(n), None) => Some(n.clone()),
            _ => None,
        };
        config.options.extend(extra.options.iter().flatten().filter_map(option));
    }
    Some(config)
}

/// One container's request, but for its mounts' host side, which `host_paths` gives by volume name.
pub fn container(
    pod: &Pod,
    spec: &PodSpec,
    c: &Container,
    attempt: u32,
    ctx: &ContainerContext<'_>,
) -> Result<cri::ContainerConfig, ConvertError> {
    let envs = environment(pod, spec, c, ctx)?;
    let expand = |v: &Option<Vec<String>>| v.iter().flatten().map(|s| expand(s, &envs)).collect::<Vec<_>>();
    let mut labels = pod_labels(pod);
    labels.insert(LABEL_CONTAINER.to_owned(), c.name.clone());
    Ok(cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: c.name.clone(), attempt }),
        image: Some(cri::ImageSpec { image: ctx.image_ref.to_owned(), ..Default::default() }),
        command: expand(&c.command),
        args: expand(&c.args),
        working_dir: c.working_dir.clone().unwrap_or_default(),
        mounts: mounts(c, &envs, ctx)?,
        labels,
        log_path: format!("{}/{attempt}.log", c.name),
        stdin: c.stdin == Some(true),
        stdin_once: c.stdin_once == Some(true),
        tty: c.tty == Some(true),
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(resources(c)?),
            security_context: Some(security(spec, c)),
        }),
        envs: envs.into_iter().map(|(key, value)| cri::KeyValue { key, value }).collect(),
        ..Default::default()
    })
}

/// Gives the host path of a part of a volume: which mount of the container, and the part's path.
pub type SubPath<'f> = dyn Fn(usize, &VolumeMount, &str) -> Result<String, String> + Sync + 'f;

pub struct ContainerContext<'a> {
    pub node: &'a Node,
    pub refs: &'a Refs,
    pub image_ref: &'a str,
    /// Host folder or file of each volume of the pod.
    pub host_paths: &'a HashMap<String, String>,
    pub sub_path: &'a SubPath<'a>,
    /// The pod's addresses, as `status.podIP(s)`.
    pub pod_ips: &'a [String],
}

fn mounts(
    c: &Container,
    envs: &[(String, String)],
    ctx: &ContainerContext<'_>,
) -> Result<Vec<cri::Mount>, ConvertError> {
    c.volume_mounts
        .iter()
        .flatten()
        .enumerate()
        .map(|(i, m)| {
            let base = ctx
                .host_paths
                .get(&m.name)
                .ok_or_else(|| ConvertError::NoVolume { container: c.name.clone(), volume: m.name.clone() })?;
            let sub = m.sub_path_expr.as_ref().map(|e| expand(e, envs)).or_else(|| m.sub_path.clone());
            let refused = |why| ConvertError::SubPath { container: c.name.clone(), volume: m.name.clone(), why };
            let host_path = match sub.filter(|s| !s.is_empty()) {
                Some(sub) => (ctx.sub_path)(i, m, &sub).map_err(refused)?,
                None => base.clone(),
            };
            Ok(cri::Mount {
                container_path: m.mount_path.clone(),
                host_path,
                readonly: m.read_only == Some(true),
                propagation: match m.mount_propagation.as_deref() {
                    Some("HostToContainer") => cri::MountPropagation::PropagationHostToContainer,
                    Some("Bidirectional") => cri::MountPropagation::PropagationBidirectional,
                    _ => cri::MountPropagation::PropagationPrivate,
                }
                .into(),
                ..Default::default()
            })
        })
        .collect()
}

/// In the order of the API: `envFrom`, then `env`, later ones win; `$(NAME)` refers to what came before.
fn environment(
    pod: &Pod,
    spec: &PodSpec,
    c: &Container,
    ctx: &ContainerContext<'_>,
) -> Result<Vec<(String, String)>, ConvertError> {
    let mut envs: Vec<(String, String)> = vec![];
    let mut set = |k: String, v: String| {
        envs.retain(|(x, _)| *x != k);
        envs.push((k, v));
    };
    for from in c.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let (object, name, optional, map) = match (&from.config_map_ref, &from.secret_ref) {
            (Some(r), _) => ("configmap", &r.name, r.optional, &ctx.refs.config_maps),
            (_, Some(r)) => ("secret", &r.name, r.optional, &ctx.refs.secrets),
            _ => continue,
        };
        match map.get(name) {
            Some(data) => data.iter().for_each(|(k, v)| set(format!("{prefix}{k}"), text(v))),
            None if optional == Some(true) => {}
            None => return Err(ConvertError::NotFound { object, name: name.clone(), container: c.name.clone() }),
        }
    }
    for e in c.env.iter().flatten() {
        if let Some(value) = variable(pod, spec, c, e, ctx)? {
            let value = expand(&value, &envs);
            envs.retain(|(x, _)| *x != e.name);
            envs.push((e.name.clone(), value));
        }
    }
    Ok(envs)
}

fn text(v: &[u8]) -> String {
    String::from_utf8_lossy(v).into_owned()
}

fn variable(
    pod: &Pod,
    spec: &PodSpec,
    c: &Container,
    e: &k8s_openapi::api::core::v1::EnvVar,
    ctx: &ContainerContext<'_>,
) -> Result<Option<String>, ConvertError> {
    let Some(from) = &e.value_from else { return Ok(Some(e.value.clone().unwrap_or_default())) };
    let lookup =
        |object, name: &str, key: &str, optional: Option<bool>, map: &HashMap<String, BTreeMap<String, Vec<u8>>>| {
            match map.get(name).map(|data| data.get(key)) {
                Some(Some(v)) => Ok(Some(text(v))),
                _ if optional == Some(true) => Ok(None),
                Some(None) => Err(ConvertError::NoKey {
                    object,
                    name: name.to_owned(),
                    key: key.to_owned(),
                    container: c.name.clone(),
                }),
                None => Err(ConvertError::NotFound { object, name: name.to_owned(), container: c.name.clone() }),
            }
        };
    if let Some(r) = &from.config_map_key_ref {
        return lookup("configmap", &r.name, &r.key, r.optional, &ctx.refs.config_maps);
    }
    if let Some(r) = &from.secret_key_ref {
        return lookup("secret", &r.name, &r.key, r.optional, &ctx.refs.secrets);
    }
    let unknown = |field: &str| ConvertError::Field {
        container: c.name.clone(),
        variable: e.name.clone(),
        field: field.to_owned(),
    };
    if let Some(r) = &from.field_ref {
        return field(pod, spec, &r.field_path, ctx).map(Some).ok_or_else(|| unknown(&r.field_path));
    }
    if let Some(r) = &from.resource_field_ref {
        return resource_field(c, &r.resource, ctx.node).map(Some).ok_or_else(|| unknown(&r.resource));
    }
    Ok(None)
}

/// The downward API's fields.
fn field(pod: &Pod, spec: &PodSpec, path: &str, ctx: &ContainerContext<'_>) -> Option<String> {
    let keyed = |map: &Option<BTreeMap<String, String>>, key: &str| {
        map.as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default()
    };
    if let Some(key) = path.strip_prefix("metadata.labels['").and_then(|r| r.strip_suffix("']")) {
        return Some(keyed(&pod.metadata.labels, key));
    }
    if let Some(key) = path.strip_prefix("metadata.annotations['").and_then(|r| r.strip_suffix("']")) {
        return Some(keyed(&pod.metadata.annotations, key));
    }
    Some(match path {
        "metadata.name" => name(pod).to_owned(),
        "metadata.namespace" => namespace(pod).to_owned(),
        "metadata.uid" => uid(pod).to_owned(),
        "spec.nodeName" => ctx.node.name.clone(),
        "spec.serviceAccountName" => spec.service_account_name.clone().unwrap_or_else(|| "default".to_owned()),
        "status.podIP" => ctx.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => ctx.pod_ips.join(","),
        "status.hostIP" => ctx.node.host_ips.first().map(ToString::to_string).unwrap_or_default(),
        "status.hostIPs" => ctx.node.host_ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
        _ => return None,
    })
}

fn resource_field(c: &Container, resource: &str, node: &Node) -> Option<String> {
    let (kind, what) = resource.split_once('.')?;
    let r = c.resources.as_ref();
    let given = match kind {
        "limits" => r.and_then(|r| r.limits.as_ref()),
        "requests" => r.and_then(|r| r.requests.as_ref()),
        _ => return None,
    }
    .and_then(|m| m.get(what));
    match (what, given) {
        ("cpu", Some(q)) => Some(milli(q)?.div_ceil(1000).to_string()),
        ("cpu", None) => Some(node.cpu_milli.div_ceil(1000).to_string()),
        ("memory", Some(q)) => bytes(q).map(|b| b.to_string()),
        ("memory", None) => Some(node.memory_bytes.to_string()),
        _ => None,
    }
}

/// `$(NAME)` → value, `$$(NAME)` → `$(NAME)`, unknown names stay as they are.
fn expand(s: &str, envs: &[(String, String)]) -> String {
    let mut out = String::with_capacity(s.len());
    let mut rest = s;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(tail) = rest.strip_prefix("$$") {
            out.push('$');
            rest = tail;
            continue;
        }
        let name = rest.strip_prefix("$(").and_then(|r| r.split_once(')'));
        match name.and_then(|(n, tail)| Some((envs.iter().find(|(k, _)| k == n)?, tail))) {
            Some(((_, value), tail)) => {
                out.push_str(value);
                rest = tail;
            }
            None => {
                out.push('$');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

fn resources(c: &Container) -> Result<cri::LinuxContainerResources, ConvertError> {
    let r = c.resources.clone().unwrap_or_default();
    let limit = |k: &str| r.limits.as_ref().and_then(|m| m.get(k));
    let request = |k: &str| r.requests.as_ref().and_then(|m| m.get(k)).or_else(|| limit(k));
    let cpu = |q: Option<&Quantity>| q.map(|q| milli(q).ok_or_else(|| bad("cpu", q))).transpose();
    let (request_milli, limit_milli) = (cpu(request("cpu"))?, cpu(limit("cpu"))?);
    let memory = limit("memory").map(|q| bytes(q).ok_or_else(|| bad("memory", q))).transpose()?;
    Ok(cri::LinuxContainerResources {
        cpu_shares: signed(request_milli.map_or(2, |m| (m * 1024 / 1000).max(2))),
        cpu_period: if limit_milli.is_some() { 100_000 } else { 0 },
        cpu_quota: limit_milli.map_or(0, |m| signed((m * 100).max(1000))),
        memory_limit_in_bytes: memory.map_or(0, signed),
        ..Default::default()
    })
}

fn signed(v: u64) -> i64 {
    i64::try_from(v).unwrap_or(i64::MAX)
}

fn bad(field: &'static str, q: &Quantity) -> ConvertError {
    ConvertError::Quantity { field, value: q.0.clone() }
}

/// Thousandths of a CPU.
pub fn milli(q: &Quantity) -> Option<u64> {
    scaled(q).map(|v| (v * 1000.0).ceil()).and_then(whole)
}

pub fn bytes(q: &Quantity) -> Option<u64> {
    scaled(q).map(f64::ceil).and_then(whole)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole(v: f64) -> Option<u64> {
    (0.0..9.0e18).contains(&v).then_some(v as u64)
}

/// A Kubernetes quantity as a number: decimal and binary suffixes, and the exponent form.
fn scaled(q: &Quantity) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
        ("", 1.0),
    ];
    let s = q.0.trim();
    SUFFIXES
        .iter()
        .filter_map(|(suffix, f)| Some((s.strip_suffix(suffix)?, f)))
        .find_map(|(n, f)| n.parse::<f64>().ok().filter(|v| v.is_finite()).map(|v| v * f))
}

/// Refuses a container that must not run as root and would. `image_user`: as whom the image runs, a number or a name.
pub fn may_run(spec: &PodSpec, c: &Container, image_user: Result<i64, &str>) -> Result<(), ConvertError> {
    let own = c.security_context.as_ref();
    let pod = spec.security_context.as_ref();
    if own.and_then(|s| s.run_as_non_root).or(pod.and_then(|s| s.run_as_non_root)) != Some(true) {
        return Ok(());
    }
    let refuse = |why: String| Err(ConvertError::Root { container: c.name.clone(), why });
    match (own.and_then(|s| s.run_as_user).or(pod.and_then(|s| s.run_as_user)), image_user) {
        (Some(0), _) => refuse("runAsUser is 0".to_owned()),
        (Some(_), _) => Ok(()),
        (None, Ok(0)) => refuse("the image runs as root; set runAsUser".to_owned()),
        (None, Ok(_)) => Ok(()),
        (None, Err(name)) => refuse(format!("the image's user {name:?} is not a number; set runAsUser")),
    }
}

fn security(spec: &PodSpec, c: &Container) -> cri::LinuxContainerSecurityContext {
    let own = c.security_context.clone().unwrap_or_default();
    let pod = spec.security_context.clone().unwrap_or_default();
    let privileged = own.privileged == Some(true);
    cri::LinuxContainerSecurityContext {
        privileged,
        namespace_options: Some(namespaces(spec)),
        run_as_user: int(own.run_as_user.or(pod.run_as_user)),
        run_as_group: int(own.run_as_group.or(pod.run_as_group)),
        readonly_rootfs: own.read_only_root_filesystem == Some(true),
        supplemental_groups: groups(spec.security_context.as_ref()),
        no_new_privs: own.allow_privilege_escalation == Some(false),
        capabilities: Some(capabilities(&own)),
        masked_paths: if privileged { vec![] } else { MASKED.map(str::to_owned).to_vec() },
        readonly_paths: if privileged { vec![] } else { READONLY.map(str::to_owned).to_vec() },
        ..Default::default()
    }
}

/// Kubernetes' default `procMount`.
const MASKED: [&str; 9] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
];
const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn capabilities(s: &SecurityContext) -> cri::Capability {
    let c = s.capabilities.clone().unwrap_or_default();
    cri::Capability {
        add_capabilities: c.add.unwrap_or_default(),
        drop_capabilities: c.drop.unwrap_or_default(),
        add_ambient_capabilities: vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node() -> Node {
        Node {
            name: "n1".into(),
            host_ips: vec!["172.30.0.2".parse().expect("an address"), "fd00::2".parse().expect("an address")],
            cluster_dns: Some("10.96.0.10".into()),
            cluster_domain: "cluster.local".into(),
            log_dir: "/logs".into(),
            cpu_milli: 4000,
            memory_bytes: 1 << 30,
        }
    }

    fn convert(container_json: serde_json::Value, refs: &Refs) -> Result<cri::ContainerConfig, ConvertError> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"app": "x"}},
            "spec": {"containers": [container_json], "volumes": [{"name": "v"}]}
        }))
        .expect("a pod");
        let spec = pod.spec.clone().expect("a spec");
        let ctx = ContainerContext {
            node: &node(),
            refs,
            image_ref: "img",
            host_paths: &HashMap::from([("v".to_owned(), "/vol/v".to_owned())]),
            sub_path: &|_, m, sub| match sub {
                "bad" => Err("no".to_owned()),
                _ => Ok(format!("/held/{}/{sub}", m.name)),
            },
            pod_ips: &["10.244.0.7".to_owned()],
        };
        container(&pod, &spec, &spec.containers[0], 0, &ctx)
    }

    #[test]
    fn root_is_refused_where_it_must_not_be() {
        let rows: [(Value, Value, Result<i64, &str>, bool); 7] = [
            (json!({}), json!({}), Ok(0), true),
            (json!({"runAsNonRoot": true}), json!({}), Ok(0), false),
            (json!({"runAsNonRoot": true}), json!({}), Ok(7), true),
            (json!({"runAsNonRoot": true}), json!({}), Err("app"), false),
            (json!({"runAsNonRoot": true}), json!({"runAsUser": 7}), Err("app"), true),
            (json!({"runAsNonRoot": true, "runAsUser": 7}), json!({"runAsUser": 0}), Ok(7), false),
            (json!({"runAsNonRoot": true}), json!({"runAsNonRoot": false}), Ok(0), true),
        ];
        for (pod, own, image, allowed) in rows {
            let spec: PodSpec = serde_json::from_value(json!({
                "securityContext": pod, "containers": [{"name": "a", "securityContext": own}]
            }))
            .expect("a spec");
            assert_eq!(may_run(&spec, &spec.containers[0], image).is_ok(), allowed, "{pod} {own} {image:?}");
        }
    }

    #[test]
    fn parts_of_volumes_are_asked_for_by_their_expanded_path() {
        let mount = |sub: Value| {
            let mut m = json!({"name": "v", "mountPath": "/m"});
            m.as_object_mut().expect("an object").extend(sub.as_object().expect("an object").clone());
            let env = json!([{"name": "WHO", "value": "me"}]);
            convert(json!({"name": "a", "env": env, "volumeMounts": [m]}), &Refs::default())
        };
        let path = |sub: Value| mount(sub).expect("converts").mounts[0].host_path.clone();
        assert_eq!(path(json!({})), "/vol/v");
        assert_eq!(path(json!({"subPath": "x/y"})), "/held/v/x/y");
        assert_eq!(path(json!({"subPathExpr": "of-$(WHO)"})), "/held/v/of-me");
        assert!(matches!(mount(json!({"subPath": "bad"})), Err(ConvertError::SubPath { .. })));
    }

    #[test]
    fn the_environment_is_built_in_order_and_expanded() {
        let data = BTreeMap::from([("K".to_owned(), b"v".to_vec())]);
        let refs = Refs { config_maps: HashMap::from([("cm".to_owned(), data)]), ..Refs::default() };
        let c = convert(
            json!({
                "name": "a",
                "args": ["--x=$(B)", "$$(B)", "$(NOPE)"],
                "envFrom": [{"prefix": "P_", "configMapRef": {"name": "cm"}}],
                "env": [
                    {"name": "A", "value": "1"},
                    {"name": "B", "value": "$(A)-$(P_K)"},
                    {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "L", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                    {"name": "C", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "K"}}},
                    {"name": "O", "valueFrom": {"secretKeyRef": {"name": "none", "key": "K", "optional": true}}}
                ]
            }),
            &refs,
        )
        .expect("converts");
        let env: Vec<_> = c.envs.iter().map(|e| (e.key.as_str(), e.value.as_str())).collect();
        assert_eq!(env, [("P_K", "v"), ("A", "1"), ("B", "1-v"), ("IP", "10.244.0.7"), ("L", "x"), ("C", "v")]);
        assert_eq!(c.args, ["--x=1-v", "$(B)", "$(NOPE)"]);
    }

    #[test]
    fn missing_references_are_named() {
        let e = convert(json!({"name": "a", "envFrom": [{"secretRef": {"name": "s"}}]}), &Refs::default());
        assert!(matches!(e, Err(ConvertError::NotFound { object: "secret", .. })));
        let e = convert(json!({"name": "a", "volumeMounts": [{"name": "w", "mountPath": "/w"}]}), &Refs::default());
        assert!(matches!(e, Err(ConvertError::NoVolume { .. })));
    }

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        let q = |s: &str| Quantity(s.to_owned());
        for (text, want) in [("1", 1000), ("250m", 250), ("0.1", 100), ("2.5", 2500)] {
            assert_eq!(milli(&q(text)), Some(want), "{text}");
        }
        for (text, want) in [("128Mi", 128 << 20), ("1G", 1_000_000_000), ("1e3", 1000), ("12", 12)] {
            assert_eq!(bytes(&q(text)), Some(want), "{text}");
        }
        for text in ["", "x", "1Q", "-1", "NaN", "inf"] {
            assert_eq!(bytes(&q(text)), None, "{text}");
        }
    }

    #[test]
    fn limits_become_shares_and_quota() {
        let c = convert(
            json!({"name": "a", "resources": {"limits": {"cpu": "500m", "memory": "64Mi"}, "requests": {"cpu": "250m"}}}),
            &Refs::default(),
        )
        .expect("converts");
        let r = c.linux.and_then(|l| l.resources).expect("resources");
        assert_eq!((r.cpu_shares, r.cpu_period, r.cpu_quota), (256, 100_000, 50_000));
        assert_eq!(r.memory_limit_in_bytes, 64 << 20);
    }
}
