//! How the lists of Kubernetes' types merge: per (type, field) the merge key of strategic merge patch and the list
//! type of server-side apply. The types' own schemas do not carry this; every list not named here is atomic.
//!
//! Validation, patch, apply and the OpenAPI documents all read this one table.

/// How one list (or map, for `retain_keys`) merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListRule {
    /// Strategic merge: merge by this key; empty with `merge` for a list of plain values; `None` = replace.
    pub patch_key: Option<&'static str>,
    /// Strategic merge: `$retainKeys` may name what stays of an element.
    pub retain_keys: bool,
    /// Server-side apply: what makes an element itself.
    pub list_type: ListType,
}

/// List types of server-side apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListType {
    /// Owned as one value.
    Atomic,
    /// Plain values, each owned.
    Set,
    /// Objects told apart by these fields.
    Map(&'static [&'static str]),
}

/// A list no rule names.
pub const ATOMIC: ListRule = ListRule { patch_key: None, retain_keys: false, list_type: ListType::Atomic };

const fn map(patch_key: &'static str, keys: &'static [&'static str]) -> ListRule {
    ListRule { patch_key: Some(patch_key), retain_keys: false, list_type: ListType::Map(keys) }
}

const fn retain(patch_key: &'static str, keys: &'static [&'static str]) -> ListRule {
    ListRule { patch_key: Some(patch_key), retain_keys: true, list_type: ListType::Map(keys) }
}

const fn apply_only(keys: &'static [&'static str]) -> ListRule {
    ListRule { patch_key: None, retain_keys: false, list_type: ListType::Map(keys) }
}

const SET: ListRule = ListRule { patch_key: None, retain_keys: false, list_type: ListType::Set };
const MERGED_SET: ListRule = ListRule { patch_key: Some(""), retain_keys: false, list_type: ListType::Set };
const RETAINED_OBJECT: ListRule = ListRule { patch_key: None, retain_keys: true, list_type: ListType::Atomic };

const RULES: &[(&str, &str, ListRule)] = &[
    ("ObjectMeta", "finalizers", MERGED_SET),
    ("ObjectMeta", "ownerReferences", map("uid", &["uid"])),
    ("PodSpec", "containers", map("name", &["name"])),
    ("PodSpec", "initContainers", map("name", &["name"])),
    ("PodSpec", "ephemeralContainers", map("name", &["name"])),
    ("PodSpec", "volumes", retain("name", &["name"])),
    ("PodSpec", "imagePullSecrets", map("name", &["name"])),
    ("PodSpec", "hostAliases", map("ip", &["ip"])),
    ("PodSpec", "topologySpreadConstraints", map("topologyKey", &["topologyKey", "whenUnsatisfiable"])),
    ("PodSpec", "schedulingGates", map("name", &["name"])),
    ("PodSpec", "resourceClaims", retain("name", &["name"])),
    ("Container", "ports", map("containerPort", &["containerPort", "protocol"])),
    ("Container", "env", map("name", &["name"])),
    ("Container", "volumeMounts", map("mountPath", &["mountPath"])),
    ("Container", "volumeDevices", map("devicePath", &["devicePath"])),
    ("EphemeralContainer", "ports", map("containerPort", &["containerPort", "protocol"])),
    ("EphemeralContainer", "env", map("name", &["name"])),
    ("EphemeralContainer", "volumeMounts", map("mountPath", &["mountPath"])),
    ("EphemeralContainer", "volumeDevices", map("devicePath", &["devicePath"])),
    ("PodStatus", "conditions", map("type", &["type"])),
    ("PodStatus", "podIPs", map("ip", &["ip"])),
    ("PodStatus", "hostIPs", map("ip", &["ip"])),
    ("ServiceSpec", "ports", map("port", &["port", "protocol"])),
    ("ServiceStatus", "conditions", map("type", &["type"])),
    ("NodeSpec", "podCIDRs", MERGED_SET),
    ("NodeStatus", "conditions", map("type", &["type"])),
    ("NodeStatus", "addresses", map("type", &["type"])),
    ("NamespaceStatus", "conditions", map("type", &["type"])),
    ("DeploymentSpec", "strategy", RETAINED_OBJECT),
    ("DeploymentStatus", "conditions", map("type", &["type"])),
    ("ReplicaSetStatus", "conditions", map("type", &["type"])),
    ("ServiceAccount", "secrets", map("name", &["name"])),
    ("EndpointSlice", "addresses", SET),
    ("GatewaySpec", "listeners", apply_only(&["name"])),
    ("GatewayStatus", "conditions", apply_only(&["type"])),
    ("GatewayStatus", "listeners", apply_only(&["name"])),
    ("GatewayStatusListeners", "conditions", apply_only(&["type"])),
    ("GatewayClassStatus", "conditions", apply_only(&["type"])),
    ("HttpRouteStatusParents", "conditions", apply_only(&["type"])),
    ("TcpRouteStatusParents", "conditions", apply_only(&["type"])),
];

/// The rule of `field` in the type whose full or short name is `type_name`.
pub fn rule(type_name: &str, field: &str) -> ListRule {
    let short = type_name.rsplit('.').next().unwrap_or(type_name);
    RULES.iter().find(|(ty, name, _)| *ty == short && *name == field).map_or(ATOMIC, |(_, _, rule)| *rule)
}

/// All rules, for the OpenAPI documents.
pub fn rules() -> impl Iterator<Item = (&'static str, &'static str, ListRule)> {
    RULES.iter().copied()
}
