//! The one table of kinds. Routes, discovery, OpenAPI, validation, defaults, printing and storage all read it, so a new
//! kind is one entry here (and, if it has rules of its own, a function in `validate`, `defaults` and `columns`).
//!
//! PURE: the table is made once, from types and functions only.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use gateway_api::apis::experimental::grpcroutes::GrpcRoute;
use gateway_api::apis::experimental::httproutes::HttpRoute;
use gateway_api::apis::experimental::tcproutes::TcpRoute;
use gateway_api::apis::standard::gatewayclasses::GatewayClass;
use gateway_api::apis::standard::gateways::Gateway;
use gateway_api::apis::standard::referencegrants::ReferenceGrant;
use gateway_api::apis::standard::tlsroutes::TlsRoute;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::events::v1::Event as NewEvent;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ListMeta, ObjectMeta, Status};
use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

use super::columns::{self, Cells, Column};
use super::schema::{Builder, DEFINITIONS, Shape};
use super::validate::{self, Check, NameRule};
use super::{defaults, events};
use crate::own;

/// Everything the server knows of a kind.
#[derive(Debug)]
pub struct Kind {
    /// API group, empty for core.
    pub group: &'static str,
    /// API version within the group.
    pub version: &'static str,
    /// Kind, as in `kind:`.
    pub kind: &'static str,
    /// Plural, as in paths.
    pub plural: &'static str,
    /// Short names for kubectl.
    pub short: &'static [&'static str],
    /// In `kubectl get all`.
    pub in_all: bool,
    /// Lives in a namespace.
    pub namespaced: bool,
    /// Has a `status` that only `/status` writes.
    pub status: bool,
    /// Changes of the spec count in `metadata.generation`.
    pub generation: bool,
    /// Has `/scale`.
    pub scale: bool,
    /// Other subresources and the kind of their body.
    pub subresources: &'static [(&'static str, &'static str)],
    /// Fields for field selectors besides name and namespace.
    pub selectable: &'static [&'static str],
    /// Columns of tables.
    pub columns: &'static [Column],
    /// Cells of a row.
    pub cells: Cells,
    /// Fills in what was left out.
    pub default: fn(&mut Value),
    /// Checks beyond types.
    pub validate: Check,
    /// How names look.
    pub name_rule: NameRule,
    /// Strategic merge patch is understood (Kubernetes' built-in types only).
    pub strategic: bool,
    /// Objects live this long.
    pub ttl_s: Option<u64>,
    /// Stored as another version: where, and the conversions to and from it.
    pub stored_as: Option<Storage>,
    /// Name of the type in the OpenAPI documents.
    pub schema_name: String,
    /// The type's fields.
    pub shape: Arc<Shape>,
}

/// Another kind's storage.
#[derive(Debug, Clone, Copy)]
pub struct Storage {
    /// Group and plural under which it is stored.
    pub at: (&'static str, &'static str),
    /// To the stored form.
    pub to: fn(&Value) -> Value,
    /// From the stored form.
    pub from: fn(&Value) -> Value,
}

impl Kind {
    /// `group/version`, or `version` for core.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }

    /// `deployments.apps`, as in messages.
    pub fn resource(&self) -> String {
        if self.group.is_empty() { self.plural.to_owned() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// `Deployment.apps`, as in messages.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() { self.kind.to_owned() } else { format!("{}.{}", self.kind, self.group) }
    }

    /// Lower-case kind.
    pub fn singular(&self) -> String {
        self.kind.to_lowercase()
    }

    /// Kind of lists.
    pub fn list_kind(&self) -> String {
        format!("{}List", self.kind)
    }

    /// Prefix of all keys of the kind, or of one namespace of it.
    pub fn prefix(&self, namespace: Option<&str>) -> String {
        let (group, plural) = self.stored_as.map_or((self.group, self.plural), |storage| storage.at);
        let group = if group.is_empty() { "core" } else { group };
        match namespace.filter(|_| self.namespaced) {
            Some(namespace) => format!("/registry/{group}/{plural}/{namespace}/"),
            None => format!("/registry/{group}/{plural}/"),
        }
    }

    /// An object's key.
    pub fn key(&self, namespace: &str, name: &str) -> String {
        format!("{}{name}", self.prefix(Some(namespace)))
    }

    /// From the stored form to this version.
    pub fn decode(&self, stored: Value) -> Value {
        match self.stored_as {
            Some(storage) => (storage.from)(&stored),
            None => stored,
        }
    }

    /// From this version to the stored form.
    pub fn encode(&self, object: &Value) -> Value {
        match self.stored_as {
            Some(storage) => (storage.to)(object),
            None => object.clone(),
        }
    }
}

/// What an entry leaves out.
fn base<T: JsonSchema>(group: &'static str, version: &'static str, kind: &'static str, plural: &'static str) -> Entry {
    let made = Kind {
        group,
        version,
        kind,
        plural,
        short: &[],
        in_all: false,
        namespaced: true,
        status: false,
        generation: false,
        scale: false,
        subresources: &[],
        selectable: &[],
        columns: columns::PLAIN,
        cells: columns::plain,
        default: defaults::nothing,
        validate: validate::nothing,
        name_rule: NameRule::Subdomain,
        strategic: true,
        ttl_s: None,
        stored_as: None,
        schema_name: String::new(),
        shape: Arc::new(Shape::Any),
    };
    Entry { kind: made, schema: |generator| generator.subschema_for::<T>() }
}

/// A kind and the generator of its schema.
struct Entry {
    kind: Kind,
    schema: fn(&mut SchemaGenerator) -> Schema,
}

impl Entry {
    fn with(mut self, change: impl FnOnce(&mut Kind)) -> Self {
        change(&mut self.kind);
        self
    }
}

const EVENT_FIELDS: &[&str] = &[
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.apiVersion",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
];
const EVENT_TTL_S: u64 = 3_600;

fn entries() -> Vec<Entry> {
    [basic(), supporting(), controlled(), routes(), own_kinds()].into_iter().flatten().collect()
}

/// What a cluster is made of.
fn basic() -> Vec<Entry> {
    vec![
        base::<core::Namespace>("", "v1", "Namespace", "namespaces").with(|k| {
            (k.namespaced, k.status, k.short, k.name_rule) = (false, true, &["ns"], NameRule::Label);
            (k.columns, k.cells, k.default) = (columns::NAMESPACE, columns::namespace, defaults::namespace);
            (k.selectable, k.subresources) = (&["status.phase"], &[("finalize", "Namespace")]);
        }),
        base::<core::Node>("", "v1", "Node", "nodes").with(|k| {
            (k.namespaced, k.status, k.short, k.selectable) = (false, true, &["no"], &["spec.unschedulable"]);
            (k.columns, k.cells, k.default) = (columns::NODE, columns::node, defaults::node);
            (k.validate, k.subresources) = (validate::node, &[("proxy", "NodeProxyOptions")]);
        }),
        base::<core::Pod>("", "v1", "Pod", "pods").with(|k| {
            (k.status, k.short, k.in_all) = (true, &["po"], true);
            (k.columns, k.cells, k.default) = (columns::POD, columns::pod, defaults::pod);
            k.validate = validate::pod;
            k.subresources = &[("binding", "Binding"), ("eviction", "Eviction"), ("log", "Pod")];
            k.selectable = &[
                "spec.nodeName",
                "spec.restartPolicy",
                "spec.schedulerName",
                "spec.serviceAccountName",
                "spec.hostNetwork",
                "status.phase",
                "status.podIP",
                "status.nominatedNodeName",
            ];
        }),
        base::<core::Service>("", "v1", "Service", "services").with(|k| {
            (k.status, k.short, k.in_all, k.name_rule) = (true, &["svc"], true, NameRule::Label1035);
            (k.columns, k.cells, k.default) = (columns::SERVICE, columns::service, defaults::service);
            (k.validate, k.selectable) = (validate::service, &["spec.clusterIP", "spec.type"]);
        }),
    ]
}

/// What goes with it.
fn supporting() -> Vec<Entry> {
    vec![
        base::<core::ConfigMap>("", "v1", "ConfigMap", "configmaps").with(|k| {
            (k.short, k.validate) = (&["cm"], validate::sealed);
            (k.columns, k.cells) = (columns::CONFIG_MAP, columns::config_map);
        }),
        base::<core::Secret>("", "v1", "Secret", "secrets").with(|k| {
            (k.selectable, k.validate) = (&["type"], validate::secret);
            (k.columns, k.cells, k.default) = (columns::SECRET, columns::secret, defaults::secret);
        }),
        base::<core::ServiceAccount>("", "v1", "ServiceAccount", "serviceaccounts").with(|k| {
            (k.short, k.columns, k.cells) = (&["sa"], columns::SERVICE_ACCOUNT, columns::service_account);
        }),
        base::<core::Endpoints>("", "v1", "Endpoints", "endpoints").with(|k| {
            (k.short, k.columns, k.cells) = (&["ep"], columns::ENDPOINTS, columns::endpoints);
        }),
        base::<core::Event>("", "v1", "Event", "events").with(|k| {
            (k.short, k.columns, k.cells) = (&["ev"], columns::EVENT, columns::event);
            (k.selectable, k.ttl_s) = (EVENT_FIELDS, Some(EVENT_TTL_S));
        }),
        base::<NewEvent>("events.k8s.io", "v1", "Event", "events").with(|k| {
            (k.short, k.columns, k.cells) = (&["ev"], columns::EVENT, columns::event);
            (k.selectable, k.ttl_s) = (EVENT_FIELDS, Some(EVENT_TTL_S));
            k.stored_as = Some(Storage { at: ("", "events"), to: events::to_core, from: events::from_core });
        }),
        base::<Lease>("coordination.k8s.io", "v1", "Lease", "leases")
            .with(|k| (k.columns, k.cells) = (columns::LEASE, columns::lease)),
    ]
}

/// What controllers work on or make.
fn controlled() -> Vec<Entry> {
    vec![
        base::<Deployment>("apps", "v1", "Deployment", "deployments").with(|k| {
            (k.status, k.generation, k.scale, k.in_all, k.short) = (true, true, true, true, &["deploy"]);
            (k.columns, k.cells, k.default) = (columns::DEPLOYMENT, columns::deployment, defaults::deployment);
            k.validate = validate::deployment;
        }),
        base::<ReplicaSet>("apps", "v1", "ReplicaSet", "replicasets").with(|k| {
            (k.status, k.generation, k.scale, k.in_all, k.short) = (true, true, true, true, &["rs"]);
            (k.columns, k.cells, k.default) = (columns::REPLICA_SET, columns::replica_set, defaults::replica_set);
            (k.validate, k.selectable) = (validate::workload, &["status.replicas"]);
        }),
        base::<EndpointSlice>("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices").with(|k| {
            (k.columns, k.cells) = (columns::ENDPOINT_SLICE, columns::endpoint_slice);
            (k.validate, k.generation) = (validate::endpoint_slice, true);
        }),
    ]
}

/// The Gateway API.
fn routes() -> Vec<Entry> {
    vec![
        base::<GatewayClass>("gateway.networking.k8s.io", "v1", "GatewayClass", "gatewayclasses").with(|k| {
            (k.namespaced, k.status, k.generation, k.strategic, k.short) = (false, true, true, false, &["gc"]);
            (k.columns, k.cells, k.validate) =
                (columns::GATEWAY_CLASS, columns::gateway_class, validate::gateway_class);
        }),
        base::<Gateway>("gateway.networking.k8s.io", "v1", "Gateway", "gateways").with(|k| {
            (k.status, k.generation, k.strategic, k.short) = (true, true, false, &["gtw"]);
            (k.columns, k.cells, k.default) = (columns::GATEWAY, columns::gateway, defaults::gateway);
            k.validate = validate::gateway;
        }),
        base::<HttpRoute>("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes").with(|k| {
            (k.status, k.generation, k.strategic) = (true, true, false);
            (k.columns, k.cells, k.default) = (columns::HTTP_ROUTE, columns::http_route, defaults::http_route);
            k.validate = validate::route;
        }),
        base::<TcpRoute>("gateway.networking.k8s.io", "v1alpha2", "TCPRoute", "tcproutes").with(|k| {
            (k.status, k.generation, k.strategic) = (true, true, false);
            (k.default, k.validate) = (defaults::route, validate::route);
        }),
        base::<GrpcRoute>("gateway.networking.k8s.io", "v1", "GRPCRoute", "grpcroutes").with(|k| {
            (k.status, k.generation, k.strategic) = (true, true, false);
            (k.columns, k.cells, k.default) = (columns::HTTP_ROUTE, columns::http_route, defaults::route);
            k.validate = validate::route;
        }),
        base::<TlsRoute>("gateway.networking.k8s.io", "v1", "TLSRoute", "tlsroutes").with(|k| {
            (k.status, k.generation, k.strategic) = (true, true, false);
            (k.columns, k.cells, k.default) = (columns::HTTP_ROUTE, columns::http_route, defaults::route);
            k.validate = validate::route;
        }),
        base::<ReferenceGrant>("gateway.networking.k8s.io", "v1", "ReferenceGrant", "referencegrants").with(|k| {
            (k.generation, k.strategic, k.short) = (true, false, &["refgrant"]);
        }),
    ]
}

/// Those of `sluice.dev`.
fn own_kinds() -> Vec<Entry> {
    vec![
        base::<own::BackendPolicy>(own::GROUP, own::VERSION, "BackendPolicy", "backendpolicies").with(|k| {
            (k.status, k.generation, k.strategic) = (true, true, false);
            k.validate = validate::backend_policy;
        }),
        base::<own::AccessPolicy>(own::GROUP, own::VERSION, "AccessPolicy", "accesspolicies").with(|k| {
            (k.status, k.generation, k.strategic) = (true, true, false);
            k.validate = validate::access_policy;
        }),
        base::<own::RouteFilter>(own::GROUP, own::VERSION, "RouteFilter", "routefilters").with(|k| {
            (k.status, k.generation, k.strategic) = (true, true, false);
            k.validate = validate::route_filter;
        }),
    ]
}

/// The table and the definitions of all types.
pub struct Table {
    /// All kinds, in the order of the table.
    pub kinds: Vec<Kind>,
    /// `components/schemas` of all of them.
    pub definitions: Map<String, Value>,
    by_path: HashMap<(&'static str, &'static str, &'static str), usize>,
}

static TABLE: LazyLock<Table> = LazyLock::new(build);

/// The table.
pub fn table() -> &'static Table {
    &TABLE
}

/// The kind served at `group/version/plural`.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Kind> {
    let table = table();
    table.by_path.get(&(group, version, plural)).map(|index| &table.kinds[*index])
}

fn build() -> Table {
    let mut generator: SchemaGenerator = SchemaSettings::openapi3().into_generator();
    let entries = entries();
    let names: Vec<String> = entries.iter().map(|entry| reference((entry.schema)(&mut generator))).collect();
    for schema in [
        generator.subschema_for::<DeleteOptions>(),
        generator.subschema_for::<ListMeta>(),
        generator.subschema_for::<Status>(),
        generator.subschema_for::<ObjectMeta>(),
        generator.subschema_for::<k8s_openapi::api::autoscaling::v1::Scale>(),
        generator.subschema_for::<k8s_openapi::api::policy::v1::Eviction>(),
        generator.subschema_for::<core::Binding>(),
    ] {
        drop(reference(schema));
    }
    let mut definitions = generator.take_definitions(true);
    for name in &names {
        complete(&mut definitions, name);
    }
    let mut builder = Builder::new(&definitions);
    let finish = |(entry, name): (Entry, String)| {
        entry.with(|kind| {
            kind.shape = builder.named(&name);
            kind.schema_name = name;
        })
    };
    let kinds: Vec<Kind> = entries.into_iter().zip(names).map(finish).map(|entry| entry.kind).collect();
    let by_path = kinds.iter().enumerate().map(|(index, k)| ((k.group, k.version, k.plural), index)).collect();
    Table { kinds, definitions, by_path }
}

fn reference(schema: Schema) -> String {
    let text = schema.get("$ref").and_then(Value::as_str).unwrap_or_default();
    text.rsplit('/').next().unwrap_or_default().to_owned()
}

/// Types generated from custom resources leave out what every object has.
fn complete(definitions: &mut Map<String, Value>, name: &str) {
    let Some(properties) = definitions.get_mut(name).and_then(|schema| schema.get_mut("properties")) else { return };
    for field in ["apiVersion", "kind"] {
        super::value::default(properties, field, json!({"type": "string"}));
    }
    let metadata = format!("{DEFINITIONS}io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta");
    properties["metadata"] = json!({"$ref": metadata});
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_fields() {
        for kind in &table().kinds {
            let Shape::Object(object) = &*kind.shape else {
                panic!("{} has no fields: {:?}", kind.kind, kind.schema_name)
            };
            for field in ["apiVersion", "kind", "metadata"] {
                assert!(object.fields.contains_key(field), "{} lacks {field}", kind.kind);
            }
            assert!(kind.shape.field("metadata").and_then(|(meta, _)| meta.field("labels")).is_some(), "{}", kind.kind);
        }
    }

    #[test]
    fn merge_keys_are_where_the_types_are() {
        for (ty, field, _) in super::super::lists::rules() {
            let known = table()
                .definitions
                .iter()
                .any(|(name, schema)| name.rsplit('.').next() == Some(ty) && schema["properties"].get(field).is_some());
            // Types of slices hold their lists one level deeper.
            assert!(known || ty == "EndpointSlice" || ty.ends_with("StatusParents"), "{ty}.{field}");
        }
    }
}
