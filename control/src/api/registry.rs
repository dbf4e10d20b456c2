//! Objects over the store: read, list, watch, create, update, patch, apply, delete, with Kubernetes' rules for
//! revisions, finalizers and graceful deletion. Every change of an object, by anyone, goes through here.
//!
//! It speaks JSON values and errors; HTTP is in `http`, typed access in `client`.

use std::sync::Arc;

use bytes::Bytes;
use k8s_openapi::jiff::Timestamp;
use rand::Rng;
use serde_json::{Value, json};

use super::addresses;
use super::apply::{self, Writer};
use super::kinds::{self, Kind};
use super::patch;
use super::prepare::{self, FieldValidation, Fresh, Origin};
use super::selector::Selector;
use super::status::ApiError;
use super::value::{fields, list, name, namespace, number, rfc3339, text};
use crate::range::Ranges;
use crate::store::{KeyValue, ListQuery, Op, Store, Txn, TxnOutcome};

/// Tries of a change that others keep overtaking.
const RETRIES: usize = 32;
/// Objects read at once for a filtered, limited list.
const PAGE: usize = 500;
/// Characters of generated names: no vowels, no digits that look like letters.
const SUFFIX: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Who changes something, and how.
#[derive(Debug, Clone)]
pub struct Context {
    /// Name for the audit line.
    pub user: String,
    /// Field manager.
    pub manager: String,
    /// Do everything but store.
    pub dry_run: bool,
    /// What to do with unknown fields.
    pub validation: FieldValidation,
}

impl Context {
    /// A part of the control service itself.
    pub fn internal(part: &str) -> Self {
        Context {
            user: format!("system:sluice-control:{part}"),
            manager: format!("sluice.dev/{part}"),
            dry_run: false,
            validation: FieldValidation::Ignore,
        }
    }
}

/// A written (or unchanged) object.
#[derive(Debug, Clone)]
pub struct Written {
    /// As stored.
    pub object: Value,
    /// For the client.
    pub warnings: Vec<String>,
    /// It is new.
    pub created: bool,
    /// It is gone.
    pub deleted: bool,
}

/// A difference a client sent.
#[derive(Debug, Clone)]
pub enum Patch {
    /// RFC 7386.
    Merge(Value),
    /// RFC 6902.
    Json(Value),
    /// Kubernetes' own.
    Strategic(Value),
    /// Server-side apply.
    Apply {
        /// What the manager wants.
        config: Value,
        /// Take fields from other managers.
        force: bool,
    },
}

/// What a list asks for.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    /// Which objects.
    pub selector: Selector,
    /// At most this many; 0 = all.
    pub limit: usize,
    /// Where the page before ended.
    pub continue_token: String,
    /// `resourceVersion` of the request.
    pub resource_version: String,
    /// At exactly that revision.
    pub exact: bool,
}

/// A list.
#[derive(Debug, Clone)]
pub struct Listed {
    /// The objects.
    pub items: Vec<Value>,
    /// Their revision.
    pub revision: u64,
    /// For the next page; empty at the end.
    pub continue_token: String,
    /// How many more, if known.
    pub remaining: Option<usize>,
}

/// How to delete.
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    /// Seconds to stop, if the client said.
    pub grace_s: Option<i64>,
    /// `Background`, `Foreground`, `Orphan`, or empty.
    pub propagation: String,
    /// The uid it must have, or empty.
    pub uid: String,
    /// The revision it must have, or empty.
    pub resource_version: String,
}

/// Sees every new pod before it is checked, with its namespace's object; sidecars are injected here.
pub type PodHook = Box<dyn Fn(&mut Value, &Value) + Send + Sync>;

/// Makes the next state of an object from the present one.
type ChangeFn<'a> = dyn Fn(&Value) -> Result<(Value, Origin), ApiError> + Sync + 'a;

/// The objects of the cluster.
pub struct Registry {
    store: Arc<dyn Store>,
    service_ranges: Ranges,
    pod_hook: Option<PodHook>,
}

impl Registry {
    /// Over a store; services get addresses from `service_ranges`.
    pub fn new(store: Arc<dyn Store>, service_ranges: Ranges, pod_hook: Option<PodHook>) -> Self {
        Registry { store, service_ranges, pod_hook }
    }

    /// The store itself, for watching.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// One object.
    pub async fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Result<Value, ApiError> {
        let found = self.store.get(&kind.key(namespace, name)).await?;
        read(kind, &found.ok_or_else(|| ApiError::not_found(kind, name))?)
    }

    /// Objects of a kind, of one namespace or of all.
    pub async fn list(&self, kind: &Kind, namespace: Option<&str>, options: &ListOptions) -> Result<Listed, ApiError> {
        let (mut after, mut revision) = decode_continue(&options.continue_token)?;
        if after.is_none() && !matches!(options.resource_version.as_str(), "" | "0") {
            let wanted = parse_version(&options.resource_version)?;
            if options.exact {
                revision = Some(wanted);
            } else if wanted > self.store.revision() {
                let current = self.store.revision();
                return Err(crate::store::StoreError::Future { requested: wanted, current }.into());
            }
        }
        let prefix = kind.prefix(namespace);
        let filtered = !options.selector.is_empty();
        let mut items = Vec::new();
        loop {
            let limit = match (options.limit, filtered) {
                (0, _) => 0,
                (limit, false) => limit,
                (_, true) => PAGE,
            };
            let query = ListQuery { prefix: prefix.clone(), after: after.clone(), revision, limit };
            let page = self.store.list(query).await?;
            revision = Some(page.revision);
            let count = page.items.len();
            for (index, item) in page.items.iter().enumerate() {
                let object = read(kind, item)?;
                if options.selector.matches(&object) {
                    items.push(object);
                }
                after = Some(item.key.clone());
                let rest = count - index - 1 + page.remaining;
                if options.limit > 0 && items.len() >= options.limit && rest > 0 {
                    let continue_token = encode_continue(page.revision, &item.key);
                    let remaining = (!filtered).then_some(rest);
                    return Ok(Listed { items, revision: page.revision, continue_token, remaining });
                }
            }
            if !page.more {
                return Ok(Listed { items, revision: page.revision, continue_token: String::new(), remaining: None });
            }
        }
    }

    /// How many objects of a kind there are.
    pub async fn count(&self, kind: &Kind) -> Result<usize, ApiError> {
        // Values past the limit are not read.
        let query = ListQuery { prefix: kind.prefix(None), limit: 1, ..ListQuery::default() };
        let page = self.store.list(query).await?;
        Ok(page.items.len() + page.remaining)
    }

    /// A new object.
    pub async fn create(&self, ctx: &Context, kind: &Kind, namespace: &str, body: Value) -> Result<Written, ApiError> {
        let result = self.try_create(ctx, kind, namespace, body).await;
        audit(ctx, "create", kind, namespace, result.as_ref().map_or("", |w| name(&w.object)), &result);
        result
    }

    async fn try_create(&self, ctx: &Context, kind: &Kind, ns: &str, body: Value) -> Result<Written, ApiError> {
        for _ in 0..RETRIES {
            let fresh = fresh();
            let (mut txn, mut body) = (Txn::new(), body.clone());
            if kind.namespaced {
                let (namespace, revision) = self.namespace(kind, ns, name(&body)).await?;
                txn = txn.when(kinds::find("", "v1", "namespaces").expect("in the table").key("", ns), revision);
                if let Some(hook) = self.pod_hook.as_ref().filter(|_| kind.plural == "pods") {
                    hook(&mut body, &namespace);
                }
            }
            let (mut object, warnings) = prepare::create(kind, ns, body.clone(), ctx.validation, &fresh)?;
            let key = kind.key(ns, name(&object));
            txn = txn.when(key.as_str(), 0);
            if kind.plural == "services" {
                if self.store.get(&key).await?.is_some() {
                    return Err(ApiError::already_exists(kind, name(&object)));
                }
                txn =
                    addresses::reserve(&*self.store, kind, &self.service_ranges, None, Some(&mut object), txn).await?;
            }
            if ctx.dry_run {
                if self.store.get(&key).await?.is_some() {
                    return Err(ApiError::already_exists(kind, name(&object)));
                }
                return Ok(Written { object, warnings, created: true, deleted: false });
            }
            match self.store.txn(txn.then(put(kind, &key, &object)?)).await? {
                TxnOutcome::Committed { revision } => {
                    set_version(&mut object, revision);
                    return Ok(Written { object, warnings, created: true, deleted: false });
                }
                TxnOutcome::Conflict { key: which, .. } if which == key => {
                    let generated = text(&body, "metadata.name").is_empty();
                    if !generated {
                        return Err(ApiError::already_exists(kind, name(&object)));
                    }
                }
                TxnOutcome::Conflict { .. } => {}
            }
        }
        Err(ApiError::too_many_requests("the object could not be created because others changed what it depends on"))
    }

    /// The namespace, which must exist and not be ending, and its revision: a condition of the transaction, so that
    /// nothing is left behind in a namespace that goes.
    async fn namespace(&self, kind: &Kind, ns: &str, name: &str) -> Result<(Value, u64), ApiError> {
        let namespaces = kinds::find("", "v1", "namespaces").expect("namespaces are in the table");
        let found =
            self.store.get(&namespaces.key("", ns)).await?.ok_or_else(|| ApiError::not_found(namespaces, ns))?;
        let object = read(namespaces, &found)?;
        if text(&object, "status.phase") == "Terminating" {
            let resource = kind.resource();
            return Err(ApiError::forbidden(format!(
                "{resource} \"{name}\" is forbidden: unable to create new content in namespace {ns} because it is being \
                 terminated"
            )));
        }
        Ok((object, found.mod_revision))
    }

    /// Replaces an object or its status.
    pub async fn update(
        &self,
        ctx: &Context,
        kind: &Kind,
        (ns, name): (&str, &str),
        subresource: &str,
        body: Value,
    ) -> Result<Written, ApiError> {
        let fenced = !text(&body, "metadata.resourceVersion").is_empty();
        let change = |old: &Value| {
            let mut body = body.clone();
            if text(&body, "metadata.name").is_empty() {
                return Err(ApiError::bad_request("the name of the object must be set"));
            }
            body["metadata"]["resourceVersion"] = match text(&body, "metadata.resourceVersion") {
                "" => old["metadata"]["resourceVersion"].clone(),
                given => json!(given),
            };
            Ok((body, Origin::Body))
        };
        let result = self.modify(ctx, kind, (ns, name), subresource, fenced, &change).await;
        audit(ctx, "update", kind, ns, name, &result);
        result
    }

    /// Changes an object or its status by a difference.
    pub async fn patch(
        &self,
        ctx: &Context,
        kind: &Kind,
        (ns, name): (&str, &str),
        subresource: &str,
        difference: &Patch,
    ) -> Result<Written, ApiError> {
        let result = match difference {
            Patch::Apply { config, force } => self.try_apply(ctx, kind, (ns, name), subresource, config, *force).await,
            other => {
                let change = |old: &Value| Ok((patched(kind, old, other)?, Origin::Patch));
                self.modify(ctx, kind, (ns, name), subresource, false, &change).await
            }
        };
        audit(ctx, "patch", kind, ns, name, &result);
        result
    }

    async fn try_apply(
        &self,
        ctx: &Context,
        kind: &Kind,
        (ns, object_name): (&str, &str),
        subresource: &str,
        config: &Value,
        force: bool,
    ) -> Result<Written, ApiError> {
        prepare::check_type(kind, config)?;
        let (version, time) = (kind.api_version(), rfc3339(Timestamp::now()));
        let writer = Writer { manager: &ctx.manager, subresource, api_version: &version, time: &time };
        if subresource.is_empty() && self.store.get(&kind.key(ns, object_name)).await?.is_none() {
            let created = apply::apply(&kind.shape, None, config, &writer, force).unwrap_or_else(|_| config.clone());
            match self.try_create(ctx, kind, ns, with_name(created, object_name)).await {
                Err(error) if error.reason == "AlreadyExists" => {}
                other => return other,
            }
        }
        let change = |old: &Value| {
            let mut config = config.clone();
            // Unknown fields and wrong types are told before anything is owned.
            prepare::update(kind, subresource, old, overlay(old, &config), ctx.validation, Origin::Body)?;
            super::schema::decode(&kind.shape, &mut config);
            let merged = apply::apply(&kind.shape, Some(old), &config, &writer, force);
            Ok((merged.map_err(|conflicts| conflict_error(&conflicts))?, Origin::Patch))
        };
        self.modify(ctx, kind, (ns, object_name), subresource, false, &change).await
    }

    /// Reads, changes, writes if nothing came between; tries again if something did and the client did not insist on a
    /// revision.
    async fn modify(
        &self,
        ctx: &Context,
        kind: &Kind,
        (ns, object_name): (&str, &str),
        subresource: &str,
        fenced: bool,
        change: &ChangeFn<'_>,
    ) -> Result<Written, ApiError> {
        let key = kind.key(ns, object_name);
        for _ in 0..RETRIES {
            let found = self.store.get(&key).await?.ok_or_else(|| ApiError::not_found(kind, object_name))?;
            let old = read(kind, &found)?;
            let (body, origin) = change(&old)?;
            let (mut new, warnings) = prepare::update(kind, subresource, &old, body, ctx.validation, origin)?;
            track(ctx, kind, subresource, &old, &mut new);
            let txn = Txn::new().when(key.as_str(), found.mod_revision);
            let txn = self.reserve(kind, Some(&old), Some(&mut new), txn).await?;
            if apply::same_but_times(&old, &new) {
                return Ok(Written { object: old, warnings, created: false, deleted: false });
            }
            let gone = finished(kind, &new);
            if ctx.dry_run {
                return Ok(Written { object: new, warnings, created: false, deleted: gone });
            }
            let txn = if gone {
                self.reserve(kind, Some(&old), None, Txn::new().when(key.as_str(), found.mod_revision))
                    .await?
                    .then(Op::delete(key.as_str()))
            } else {
                txn.then(put(kind, &key, &new)?)
            };
            match self.store.txn(txn).await? {
                TxnOutcome::Committed { revision } => {
                    set_version(&mut new, revision);
                    return Ok(Written { object: new, warnings, created: false, deleted: gone });
                }
                TxnOutcome::Conflict { .. } if fenced => return Err(ApiError::modified(kind, object_name)),
                TxnOutcome::Conflict { .. } => {}
            }
        }
        Err(ApiError::modified(kind, object_name))
    }

    async fn reserve(
        &self,
        kind: &Kind,
        old: Option<&Value>,
        new: Option<&mut Value>,
        txn: Txn,
    ) -> Result<Txn, ApiError> {
        if kind.plural != "services" {
            return Ok(txn);
        }
        addresses::reserve(&*self.store, kind, &self.service_ranges, old, new, txn).await
    }

    /// Sets a pod's node, once. `fence` is the revision the caller decided on.
    pub async fn bind(
        &self,
        ctx: &Context,
        (ns, pod): (&str, &str),
        node: &str,
        fence: (&str, Option<u64>),
    ) -> Result<u64, ApiError> {
        let kind = kinds::find("", "v1", "pods").expect("pods are in the table");
        let key = kind.key(ns, pod);
        let mut outcome = Err(ApiError::modified(kind, pod));
        for _ in 0..RETRIES {
            let found = self.store.get(&key).await?.ok_or_else(|| ApiError::not_found(kind, pod))?;
            let mut object = read(kind, &found)?;
            if let Err(error) = may_bind(kind, &object, fence, found.mod_revision) {
                outcome = Err(error);
                break;
            }
            object["spec"]["nodeName"] = json!(node);
            set_condition(
                &mut object,
                json!({
                    "type": "PodScheduled", "status": "True", "lastProbeTime": null,
                    "lastTransitionTime": rfc3339(Timestamp::now()),
                }),
            );
            let txn = Txn::new().when(key.as_str(), found.mod_revision).then(put(kind, &key, &object)?);
            match self.store.txn(txn).await? {
                TxnOutcome::Committed { revision } => {
                    outcome = Ok(revision);
                    break;
                }
                TxnOutcome::Conflict { .. } => {}
            }
        }
        audit(ctx, "bind", kind, ns, pod, &outcome);
        outcome
    }

    /// Deletes, or marks for deletion what needs time or has finalizers.
    pub async fn delete(
        &self,
        ctx: &Context,
        kind: &Kind,
        (ns, object_name): (&str, &str),
        options: &DeleteOptions,
    ) -> Result<Written, ApiError> {
        let result = self.try_delete(ctx.dry_run, kind, &kind.key(ns, object_name), object_name, options).await;
        audit(ctx, "delete", kind, ns, object_name, &result);
        result
    }

    async fn try_delete(
        &self,
        dry_run: bool,
        kind: &Kind,
        key: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<Written, ApiError> {
        for _ in 0..RETRIES {
            let found = self.store.get(key).await?.ok_or_else(|| ApiError::not_found(kind, name))?;
            let old = read(kind, &found)?;
            check_preconditions(kind, &old, options)?;
            let mut new = old.clone();
            mark_deleted(kind, &mut new, options, Timestamp::now());
            let gone = finished(kind, &new);
            if dry_run || (!gone && new == old) {
                return Ok(Written { object: new, warnings: Vec::new(), created: false, deleted: gone });
            }
            let txn = Txn::new().when(key, found.mod_revision);
            let txn = if gone {
                self.reserve(kind, Some(&old), None, txn).await?.then(Op::delete(key))
            } else {
                txn.then(put(kind, key, &new)?)
            };
            if let TxnOutcome::Committed { revision } = self.store.txn(txn).await? {
                set_version(&mut new, revision);
                return Ok(Written { object: new, warnings: Vec::new(), created: false, deleted: gone });
            }
        }
        Err(ApiError::modified(kind, name))
    }
}

fn may_bind(kind: &Kind, pod: &Value, (uid, revision): (&str, Option<u64>), at: u64) -> Result<(), ApiError> {
    let refuse = |why: &str| Err(ApiError::conflict(kind, name(pod), why));
    if !uid.is_empty() && text(pod, "metadata.uid") != uid {
        return refuse("the pod was replaced by another of the same name");
    }
    if revision.is_some_and(|revision| revision != at) {
        return Err(ApiError::modified(kind, name(pod)));
    }
    if pod["metadata"].get("deletionTimestamp").is_some() {
        return refuse(&format!("pod {} is being deleted, cannot be assigned to a host", name(pod)));
    }
    match text(pod, "spec.nodeName") {
        "" => Ok(()),
        node => refuse(&format!("pod {} is already assigned to node \"{node}\"", name(pod))),
    }
}

/// Sets a condition of the status by its type.
pub fn set_condition(object: &mut Value, mut condition: Value) {
    super::schema::decode(&super::schema::Shape::Map(Arc::new(super::schema::Shape::Any)), &mut condition);
    super::value::default(object, "status", json!({}));
    super::value::default(&mut object["status"], "conditions", json!([]));
    let Some(conditions) = object["status"]["conditions"].as_array_mut() else { return };
    match conditions.iter_mut().find(|known| known["type"] == condition["type"]) {
        Some(known) => *known = condition,
        None => conditions.push(condition),
    }
}

fn check_preconditions(kind: &Kind, old: &Value, options: &DeleteOptions) -> Result<(), ApiError> {
    for (what, wanted, found) in [
        ("UID", &options.uid, text(old, "metadata.uid")),
        ("ResourceVersion", &options.resource_version, text(old, "metadata.resourceVersion")),
    ] {
        if !wanted.is_empty() && wanted != found {
            let lower = if what == "UID" { "UID" } else { "ResourceVersion" };
            let why = format!("Precondition failed: {what} in precondition: {wanted}, {lower} in object meta: {found}");
            return Err(ApiError::conflict(kind, name(old), &why));
        }
    }
    Ok(())
}

/// Deletion as far as it can go at once: a time, a grace period for pods that run, finalizers for dependents.
fn mark_deleted(kind: &Kind, object: &mut Value, options: &DeleteOptions, now: Timestamp) {
    let finalizer = match options.propagation.as_str() {
        "Foreground" => Some("foregroundDeletion"),
        "Orphan" => Some("orphan"),
        _ => None,
    };
    let going = object["metadata"].get("deletionTimestamp").is_some();
    if let Some(finalizer) = finalizer.filter(|_| !going) {
        super::value::default(&mut object["metadata"], "finalizers", json!([]));
        let listed = list(object, "metadata.finalizers").iter().any(|known| known == finalizer);
        if let Some(all) = object["metadata"]["finalizers"].as_array_mut().filter(|_| !listed) {
            all.push(json!(finalizer));
        }
    }
    let grace_s = if kind.plural == "pods" { pod_grace(object, options.grace_s) } else { 0 };
    let before = object["metadata"].get("deletionGracePeriodSeconds").and_then(Value::as_i64);
    // A later delete can only shorten the grace.
    if !going || before.is_some_and(|before| grace_s < before) {
        let until = now.as_second().saturating_add(grace_s.max(0));
        let until = Timestamp::from_second(until).unwrap_or(now);
        object["metadata"]["deletionTimestamp"] = json!(rfc3339(until));
        object["metadata"]["deletionGracePeriodSeconds"] = json!(grace_s);
    }
    if kind.plural == "namespaces" {
        object["status"]["phase"] = json!("Terminating");
    }
}

/// A pod that nobody runs needs no time.
fn pod_grace(pod: &Value, asked: Option<i64>) -> i64 {
    let over = matches!(text(pod, "status.phase"), "Succeeded" | "Failed");
    if text(pod, "spec.nodeName").is_empty() || over {
        return 0;
    }
    asked
        .unwrap_or_else(|| pod["spec"].get("terminationGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(30))
        .max(0)
}

/// Marked for deletion, and nothing holds it any more.
fn finished(kind: &Kind, object: &Value) -> bool {
    let metadata = &object["metadata"];
    let held = !list(object, "metadata.finalizers").is_empty()
        || (kind.plural == "namespaces" && !list(object, "spec.finalizers").is_empty());
    let waiting = kind.plural == "pods" && number(metadata, "deletionGracePeriodSeconds") > 0;
    metadata.get("deletionTimestamp").is_some() && !held && !waiting
}

fn track(ctx: &Context, kind: &Kind, subresource: &str, old: &Value, new: &mut Value) {
    // Apply has already written the managers.
    if new["metadata"]["managedFields"] == old["metadata"]["managedFields"] {
        let (version, time) = (kind.api_version(), rfc3339(Timestamp::now()));
        let writer = Writer { manager: &ctx.manager, subresource, api_version: &version, time: &time };
        apply::track(&kind.shape, old, new, &writer);
    }
}

fn patched(kind: &Kind, old: &Value, difference: &Patch) -> Result<Value, ApiError> {
    let mut new = old.clone();
    let invalid = |why: String| {
        let detail = super::status::Invalid { field: "patch".to_owned(), message: format!("Invalid value: {why}") };
        ApiError::invalid(kind, name(old), &[detail])
    };
    match difference {
        Patch::Merge(change) => {
            if !change.is_object() {
                return Err(ApiError::bad_request("a merge patch must be an object"));
            }
            patch::merge(&mut new, change);
        }
        Patch::Json(operations) => patch::json(&mut new, operations).map_err(invalid)?,
        Patch::Strategic(change) => {
            if !kind.strategic {
                return Err(ApiError::unsupported_media(
                    "the body of the request was in an unknown format - accepted media types include: \
                     application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
                ));
            }
            patch::strategic(&kind.shape, &mut new, change).map_err(ApiError::bad_request)?;
        }
        Patch::Apply { .. } => unreachable!("apply has its own path"),
    }
    Ok(new)
}

/// The configuration over the old object's identity, to be checked as a body of its own.
fn overlay(old: &Value, config: &Value) -> Value {
    let mut body = old.clone();
    patch::merge(&mut body, config);
    fields(&mut body["metadata"]).remove("managedFields");
    body
}

fn with_name(mut object: Value, name: &str) -> Value {
    if text(&object, "metadata.name").is_empty() {
        object["metadata"]["name"] = json!(name);
    }
    object
}

fn conflict_error(conflicts: &[apply::Conflict]) -> ApiError {
    let causes = conflicts.iter().map(|(who, field)| {
        json!({"reason": "FieldManagerConflict", "message": format!("conflict with {who}"), "field": field})
    });
    let message = match conflicts {
        [(who, field)] => format!("Apply failed with 1 conflict: conflict with {who}: {field}"),
        many => {
            let lines: Vec<String> = many.iter().map(|(who, field)| format!("conflict with {who}: {field}")).collect();
            format!("Apply failed with {} conflicts: {}", many.len(), lines.join("\n"))
        }
    };
    ApiError::apply_conflict(message, causes.collect())
}

/// A stored value as an object of the kind, with its revision.
pub fn read(kind: &Kind, found: &KeyValue) -> Result<Value, ApiError> {
    let stored = serde_json::from_slice(&found.value)
        .map_err(|e| ApiError::internal(format!("the stored object {} is damaged: {e}", found.key)))?;
    let mut object = kind.decode(stored);
    set_version(&mut object, found.mod_revision);
    Ok(object)
}

/// Writes the revision into the object.
pub fn set_version(object: &mut Value, revision: u64) {
    object["metadata"]["resourceVersion"] = json!(revision.to_string());
}

fn put(kind: &Kind, key: &str, object: &Value) -> Result<Op, ApiError> {
    let mut stored = kind.encode(object);
    // The revision is the store's; kept beside the value, never in it.
    fields(&mut stored["metadata"]).remove("resourceVersion");
    let value = serde_json::to_vec(&stored).map_err(ApiError::internal)?;
    Ok(Op::Put { key: key.to_owned(), value: Bytes::from(value), ttl_s: kind.ttl_s })
}

/// A `resourceVersion` as a revision.
pub fn parse_version(version: &str) -> Result<u64, ApiError> {
    version.parse().map_err(|_| ApiError::bad_request(format!("invalid resource version: {version:?}")))
}

fn encode_continue(revision: u64, key: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(json!({"rv": revision, "start": key}).to_string())
}

fn decode_continue(token: &str) -> Result<(Option<String>, Option<u64>), ApiError> {
    use base64::Engine as _;
    if token.is_empty() {
        return Ok((None, None));
    }
    let decoded = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token).ok();
    let value: Option<Value> = decoded.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let (start, revision) = value.as_ref().map_or(("", None), |v| (text(v, "start"), v["rv"].as_u64()));
    if start.is_empty() || revision.is_none() {
        return Err(ApiError::bad_request("continue key is not valid"));
    }
    Ok((Some(start.to_owned()), revision))
}

fn fresh() -> Fresh {
    let mut rng = rand::rng();
    let suffix = (0..5).map(|_| char::from(SUFFIX[rng.random_range(0..SUFFIX.len())])).collect();
    Fresh { now: Timestamp::now(), uid: uuid::Uuid::new_v4().to_string(), suffix }
}

/// One line per change: who, what, which object, how it ended.
fn audit<T>(ctx: &Context, verb: &str, kind: &Kind, ns: &str, name: &str, result: &Result<T, ApiError>) {
    if ctx.dry_run {
        return;
    }
    let (code, resource) = (result.as_ref().map_or_else(|error| error.code, |_| 200), kind.resource());
    if kind.plural == "leases" || kind.plural == "events" {
        tracing::debug!(target: "audit", user = %ctx.user, verb, %resource, namespace = ns, name, code);
    } else {
        tracing::info!(target: "audit", user = %ctx.user, verb, %resource, namespace = ns, name, code);
    }
}

/// Namespace and name of an object.
pub fn identity(object: &Value) -> (String, String) {
    (namespace(object).to_owned(), name(object).to_owned())
}
