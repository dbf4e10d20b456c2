//! From an HTTP request to the registry and back: who calls, what they may, which verb, in which form the answer goes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::auth::{self, Access, Tokens, User, Verdict};
use super::extra::Extra;
use super::kinds;
use super::metrics::{self, Metrics};
use super::registry::{Context, DeleteOptions, ListOptions, Patch, Registry, Written};
use super::request::{self, Form, Query, Target};
use super::selector::Selector;
use super::status::ApiError;
use super::value::{name, text};
use super::watch;
use super::{describe, logs, nodes, render, scale};

/// Longest body accepted, as Kubernetes'.
pub const MAX_BODY_BYTES: usize = 3 * 1024 * 1024;
/// Time for a client to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Objects that one deletecollection removes at once.
const DELETE_PARALLEL: usize = 32;

/// Body of an answer.
pub type Body = BoxBody<Bytes, std::io::Error>;

/// Everything a request may need.
pub struct Api {
    /// The objects.
    pub registry: Arc<Registry>,
    /// Static tokens.
    pub tokens: Tokens,
    /// For calls to nodes.
    pub node_tls: Arc<rustls::ClientConfig>,
    /// Counters.
    pub metrics: Metrics,
    /// Documents of other parts.
    pub extra: Extra,
    /// Ends watches when the service stops.
    pub stop: CancellationToken,
}

/// Answers one request. `certificate` is the caller's, verified.
pub fn serve(
    api: Arc<Api>,
    certificate: Option<User>,
    request: Request<Incoming>,
) -> BoxFuture<'static, Response<Body>> {
    Box::pin(answer(api, certificate, request))
}

async fn answer(api: Arc<Api>, certificate: Option<User>, request: Request<Incoming>) -> Response<Body> {
    let started = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let target = request::target(&path);
    let watching = request.uri().query().is_some_and(|q| Query::parse(q).flag("watch"));
    let verb = verb(&method, target.as_ref(), watching);
    let user = identify(&api, certificate, &request);
    let result = match user {
        Ok(user) => route(&api, &user, verb, target.as_ref(), request).await,
        Err(error) => Err(error),
    };
    let response = result.unwrap_or_else(|error| error_response(&error));
    let resource = target.map_or("", |target| target.kind.plural);
    api.metrics.observe(verb, resource, response.status().as_u16(), started.elapsed());
    tracing::debug!(%method, path, code = response.status().as_u16(), took_us = started.elapsed().as_micros(), "request");
    response
}

fn identify(api: &Api, certificate: Option<User>, request: &Request<Incoming>) -> Result<User, ApiError> {
    if let Some(user) = certificate {
        return Ok(user);
    }
    let header = request::header(request.headers(), &http::header::AUTHORIZATION);
    match header.strip_prefix("Bearer ") {
        Some(token) => api.tokens.user(token.trim()).ok_or_else(ApiError::unauthorized),
        None => Ok(User::anonymous()),
    }
}

fn verb(method: &Method, target: Option<&Target>, watching: bool) -> &'static str {
    let named = target.is_none_or(|target| !target.name.is_empty());
    match *method {
        Method::GET | Method::HEAD if watching && target.is_some_and(|t| t.subresource.is_empty()) => "watch",
        Method::GET | Method::HEAD if named => "get",
        Method::GET | Method::HEAD => "list",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if named => "delete",
        Method::DELETE => "deletecollection",
        _ => "other",
    }
}

async fn route(
    api: &Arc<Api>,
    user: &User,
    verb: &'static str,
    target: Option<&Target>,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    if verb == "other" {
        return Err(ApiError::method_not_allowed());
    }
    let path = request.uri().path().trim_end_matches('/').to_owned();
    match path.as_str() {
        "/version" => return Ok(json_response(200, &describe::version())),
        "/healthz" | "/livez" => return Ok(text_response("ok")),
        "/readyz" => {
            // Ready means the store answers.
            api.registry.store().get("/ready").await?;
            return Ok(text_response("ok"));
        }
        _ => {}
    }
    if !user.authenticated() {
        return Err(ApiError::unauthorized());
    }
    match target {
        Some(target) => objects(api, user, verb, target, request).await,
        None if path == "/metrics" && verb == "get" => {
            let text = metrics::text(&api.metrics, &api.registry).await?;
            Ok(text_response(&(text + &api.extra.metrics())))
        }
        None => documents(api, &path, &request),
    }
}

/// What the server says of itself.
fn documents(api: &Api, path: &str, request: &Request<Incoming>) -> Result<Response<Body>, ApiError> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return Err(ApiError::no_such_resource());
    }
    let aggregated = request::wants_aggregated(request.headers());
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let found = match parts.as_slice() {
        ["api"] if aggregated => return Ok(aggregated_response(&describe::aggregated(true))),
        ["apis"] if aggregated => return Ok(aggregated_response(&describe::aggregated(false))),
        ["api"] => Some(describe::api_versions()),
        ["apis"] => Some(describe::group_list()),
        ["api", version] => describe::resource_list("", version),
        ["apis", group] => describe::one_group(group),
        ["apis", group, version] => describe::resource_list(group, version),
        ["openapi", "v3"] => Some(describe::openapi_index()),
        ["openapi", "v3", "api", version] => describe::openapi("", version),
        ["openapi", "v3", "apis", group, version] => describe::openapi(group, version),
        // kubectl asks these two about a kind it does not know, and says so more clearly when they answer.
        ["openapi", "v2"] => return Ok(full(200, describe::OPENAPI_V2, Bytes::new())),
        ["apis", "apiextensions.k8s.io", "v1", "customresourcedefinitions"] => Some(describe::no_custom_resources()),
        _ => api.extra.get(path),
    };
    found.map(|document| json_response(200, &document)).ok_or_else(ApiError::no_such_resource)
}

async fn objects(
    api: &Arc<Api>,
    user: &User,
    verb: &'static str,
    target: &Target,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let query = Query::parse(request.uri().query().unwrap_or_default());
    authorize(api, user, verb, target).await?;
    let (parts, body) = request.into_parts();
    let raw_query = parts.uri.query().unwrap_or_default();
    if matches!(verb, "get" | "list" | "watch") {
        let form = request::form(&parts.headers, &query)?;
        return read(api, verb, target, &query, raw_query, form).await;
    }
    let form = request::form(&parts.headers, &query).unwrap_or(Form::Object);
    let bytes = read_body(body).await?;
    let ctx = Context {
        user: user.name.clone(),
        manager: request::manager(&parts.headers, &query),
        dry_run: query.dry_run()?,
        validation: query.field_validation()?,
    };
    let change = Change { api, ctx, target, query, headers: &parts.headers, bytes, user, form };
    match verb {
        "create" => change.create().await,
        "update" => change.update().await,
        "patch" => change.patch().await,
        "delete" => change.delete().await,
        _ => change.delete_collection().await,
    }
}

async fn authorize(api: &Api, user: &User, verb: &str, target: &Target) -> Result<(), ApiError> {
    let namespace = target.namespace.as_deref().unwrap_or_default();
    let access = Access { verb, kind: target.kind, subresource: &target.subresource, namespace, name: &target.name };
    let pods = kinds::find("", "v1", "pods").expect("pods are in the table");
    let on_node = |pod: &Value| user.node().is_some_and(|node| text(pod, "spec.nodeName") == node);
    let allowed = match auth::decide(user, &access) {
        Verdict::Allow => true,
        Verdict::Deny => false,
        Verdict::IfPodIsOnNode => on_node(&api.registry.get(pods, namespace, &target.name).await?),
        Verdict::IfPodOnNodeUsesSecret => {
            let all = api.registry.list(pods, Some(namespace), &ListOptions::default()).await?;
            all.items.iter().any(|pod| on_node(pod) && auth::uses_secret(pod, &target.name))
        }
    };
    if allowed { Ok(()) } else { Err(auth::refusal(user, &access)) }
}

async fn read(
    api: &Arc<Api>,
    verb: &str,
    target: &Target,
    query: &Query,
    raw_query: &str,
    form: Form,
) -> Result<Response<Body>, ApiError> {
    let (kind, namespace) = (target.kind, target.namespace.as_deref());
    if verb == "get" {
        let ns = namespace.unwrap_or_default();
        return match target.subresource.as_str() {
            "" => {
                let object = api.registry.get(kind, ns, &target.name).await?;
                Ok(json_response(200, &render::object(kind, form, object, Timestamp::now())))
            }
            "status" if kind.status => Ok(json_response(200, &api.registry.get(kind, ns, &target.name).await?)),
            "scale" if kind.scale => {
                Ok(json_response(200, &scale::of(&api.registry.get(kind, ns, &target.name).await?)))
            }
            "log" if kind.plural == "pods" => {
                logs::proxy(&api.registry, &api.node_tls, (ns, &target.name), query, raw_query).await
            }
            other if kind.plural == "nodes" && kind.group.is_empty() => {
                let path = nodes::path(other).ok_or_else(ApiError::no_such_resource)?;
                nodes::proxy(&api.registry, &api.node_tls, (&target.name, path), raw_query).await
            }
            _ => Err(ApiError::no_such_resource()),
        };
    }
    let field_selector = match (target.name.as_str(), query.get("fieldSelector")) {
        // A watch of one object by its path.
        (name, None) if !name.is_empty() => Some(format!("metadata.name={name}")),
        (_, given) => given.map(str::to_owned),
    };
    let selector = Selector::parse(kind, query.get("labelSelector"), field_selector.as_deref())?;
    if verb == "watch" {
        let request = watch::Request { kind, namespace: namespace.map(str::to_owned), selector, form };
        let lines = watch::start(&api.registry, request, query, api.stop.clone()).await?;
        let frames = lines.map(|line| Ok::<_, std::io::Error>(Frame::data(line)));
        let mut response = Response::new(BodyExt::boxed(StreamBody::new(SyncStream::new(frames))));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        return Ok(response);
    }
    let options = ListOptions {
        selector,
        limit: query.number("limit").map_or(0, |n| usize::try_from(n).unwrap_or(usize::MAX)),
        continue_token: query.get("continue").unwrap_or_default().to_owned(),
        resource_version: query.get("resourceVersion").unwrap_or_default().to_owned(),
        exact: query.get("resourceVersionMatch") == Some("Exact"),
    };
    let listed = api.registry.list(kind, namespace, &options).await?;
    Ok(json_response(200, &render::list(kind, form, listed, Timestamp::now())))
}

/// A request that changes something.
struct Change<'a> {
    api: &'a Arc<Api>,
    ctx: Context,
    target: &'a Target,
    query: Query,
    headers: &'a http::HeaderMap,
    bytes: Bytes,
    user: &'a User,
    form: Form,
}

impl Change<'_> {
    fn at(&self) -> (&str, &str) {
        (self.target.namespace.as_deref().unwrap_or_default(), &self.target.name)
    }

    fn body(&self) -> Result<Value, ApiError> {
        request::body(self.headers, &self.bytes)
    }

    fn answer(&self, written: Written) -> Response<Body> {
        let code = if written.created { 201 } else { 200 };
        let object = render::object(self.target.kind, self.form, written.object, Timestamp::now());
        let mut response = json_response(code, &object);
        for warning in &written.warnings {
            let text = format!("299 - \"{}\"", warning.replace('\\', "\\\\").replace('"', "\\\""));
            if let Ok(value) = HeaderValue::from_str(&text) {
                response.headers_mut().append("warning", value);
            }
        }
        response
    }

    async fn create(&self) -> Result<Response<Body>, ApiError> {
        let kind = self.target.kind;
        match (self.target.name.as_str(), self.target.subresource.as_str()) {
            ("", _) => {
                if kind.namespaced && self.target.namespace.is_none() {
                    return Err(ApiError::method_not_allowed());
                }
                let body = self.body()?;
                self.check_node_name(&body)?;
                Ok(self.answer(self.api.registry.create(&self.ctx, kind, self.at().0, body).await?))
            }
            (_, "binding") if kind.plural == "pods" => self.bind().await,
            (_, "eviction") if kind.plural == "pods" => self.evict().await,
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    /// A node creates nothing but itself (and its lease), and takes no range of addresses.
    fn check_node_name(&self, body: &Value) -> Result<(), ApiError> {
        let own = matches!(self.target.kind.plural, "nodes" | "leases");
        let ranges = ["podCIDR", "podCIDRs"].iter().any(|field| !body["spec"][*field].is_null());
        match self.user.node().filter(|_| own && !self.user.is_admin()) {
            Some(node) if node != name(body) => Err(ApiError::forbidden(format!(
                "{} \"{}\" is forbidden: node \"{node}\" is not allowed to create it",
                self.target.kind.resource(),
                name(body)
            ))),
            Some(node) if ranges => Err(ApiError::forbidden(format!(
                "nodes \"{node}\" is forbidden: spec.podCIDRs are given to nodes, not taken"
            ))),
            _ => Ok(()),
        }
    }

    async fn bind(&self) -> Result<Response<Body>, ApiError> {
        let body = self.body()?;
        let node = text(&body, "target.name");
        if node.is_empty() {
            return Err(ApiError::bad_request("target.name: Required value"));
        }
        let version = match text(&body, "metadata.resourceVersion") {
            "" => None,
            version => Some(super::registry::parse_version(version)?),
        };
        self.api.registry.bind(&self.ctx, self.at(), node, (text(&body, "metadata.uid"), version)).await?;
        Ok(json_response(201, &success()))
    }

    async fn evict(&self) -> Result<Response<Body>, ApiError> {
        let body = self.body()?;
        let options = DeleteOptions {
            grace_s: body["deleteOptions"].get("gracePeriodSeconds").and_then(Value::as_i64),
            uid: text(&body, "deleteOptions.preconditions.uid").to_owned(),
            ..DeleteOptions::default()
        };
        self.api.registry.delete(&self.ctx, self.target.kind, self.at(), &options).await?;
        Ok(json_response(201, &success()))
    }

    async fn update(&self) -> Result<Response<Body>, ApiError> {
        let (kind, subresource) = (self.target.kind, self.target.subresource.as_str());
        let registry = &self.api.registry;
        match subresource {
            _ if self.target.name.is_empty() => Err(ApiError::method_not_allowed()),
            "" => Ok(self.answer(registry.update(&self.ctx, kind, self.at(), "", self.body()?).await?)),
            "status" if kind.status => {
                Ok(self.answer(registry.update(&self.ctx, kind, self.at(), "status", self.body()?).await?))
            }
            "finalize" if kind.plural == "namespaces" => {
                Ok(self.answer(registry.update(&self.ctx, kind, self.at(), "", self.body()?).await?))
            }
            "scale" if kind.scale => self.scale(&Patch::Merge(scale::difference(&self.body()?)?)).await,
            _ => Err(ApiError::no_such_resource()),
        }
    }

    async fn scale(&self, difference: &Patch) -> Result<Response<Body>, ApiError> {
        let written = self.api.registry.patch(&self.ctx, self.target.kind, self.at(), "", difference).await?;
        Ok(json_response(200, &scale::of(&written.object)))
    }

    async fn patch(&self) -> Result<Response<Body>, ApiError> {
        let (kind, subresource) = (self.target.kind, self.target.subresource.as_str());
        if self.target.name.is_empty() {
            return Err(ApiError::method_not_allowed());
        }
        let difference = request::patch(self.headers, &self.bytes, self.query.flag("force"))?;
        if matches!(difference, Patch::Apply { .. }) && self.query.get("fieldManager").is_none() {
            return Err(ApiError::bad_request(
                "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
            ));
        }
        match subresource {
            "" => {}
            "status" if kind.status => {}
            "scale" if kind.scale => {
                let mut scaled = scale::of(&self.api.registry.get(kind, self.at().0, self.at().1).await?);
                match &difference {
                    Patch::Merge(change) | Patch::Strategic(change) => super::patch::merge(&mut scaled, change),
                    Patch::Json(operations) => {
                        super::patch::json(&mut scaled, operations).map_err(ApiError::bad_request)?
                    }
                    Patch::Apply { config, .. } => super::patch::merge(&mut scaled, config),
                }
                return self.scale(&Patch::Merge(scale::difference(&scaled)?)).await;
            }
            _ => return Err(ApiError::no_such_resource()),
        }
        Ok(self.answer(self.api.registry.patch(&self.ctx, kind, self.at(), subresource, &difference).await?))
    }

    async fn delete(&self) -> Result<Response<Body>, ApiError> {
        if !self.target.subresource.is_empty() {
            return Err(ApiError::method_not_allowed());
        }
        let (kind, options) = (self.target.kind, request::delete_options(self.headers, &self.bytes, &self.query)?);
        let written = self.api.registry.delete(&self.ctx, kind, self.at(), &options).await?;
        if !written.deleted || kind.plural == "pods" {
            return Ok(self.answer(written));
        }
        let mut status = success();
        status["details"] = json!({"name": name(&written.object), "group": kind.group, "kind": kind.plural,
            "uid": written.object["metadata"]["uid"]});
        Ok(json_response(200, &status))
    }

    async fn delete_collection(&self) -> Result<Response<Body>, ApiError> {
        let (kind, namespace) = (self.target.kind, self.target.namespace.as_deref());
        if kind.namespaced && namespace.is_none() {
            return Err(ApiError::method_not_allowed());
        }
        let options = request::delete_options(self.headers, &self.bytes, &self.query)?;
        let selector = Selector::parse(kind, self.query.get("labelSelector"), self.query.get("fieldSelector"))?;
        let all = ListOptions { selector, ..ListOptions::default() };
        let listed = self.api.registry.list(kind, namespace, &all).await?;
        let mut each: Vec<BoxFuture<'_, Result<Written, ApiError>>> = Vec::with_capacity(listed.items.len());
        for object in &listed.items {
            each.push(Box::pin(self.api.registry.delete(&self.ctx, kind, (self.at().0, name(object)), &options)));
        }
        let results: Vec<_> = futures::stream::iter(each).buffer_unordered(DELETE_PARALLEL).collect().await;
        if let Some(error) = results.into_iter().filter_map(Result::err).find(|error| !error.is_not_found()) {
            return Err(error);
        }
        Ok(json_response(200, &render::list(kind, self.form, listed, Timestamp::now())))
    }
}

async fn read_body(body: Incoming) -> Result<Bytes, ApiError> {
    let collected = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY_BYTES).collect()).await;
    let collected = collected.map_err(|_| ApiError::bad_request("the body of the request did not come in time"))?;
    match collected {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::too_large(MAX_BODY_BYTES)),
        Err(error) => Err(ApiError::bad_request(format!("the body of the request could not be read: {error}"))),
    }
}

fn success() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
}

fn full(code: u16, content_type: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let body = Full::new(body.into()).map_err(|never| match never {}).boxed();
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn json_response(code: u16, value: &Value) -> Response<Body> {
    full(code, "application/json", value.to_string())
}

fn aggregated_response(value: &Value) -> Response<Body> {
    full(200, describe::AGGREGATED, value.to_string())
}

fn text_response(text: &str) -> Response<Body> {
    full(200, "text/plain; charset=utf-8", text.to_owned())
}

fn error_response(error: &ApiError) -> Response<Body> {
    if error.code >= 500 {
        tracing::warn!(code = error.code, message = %error.message, "request failed");
    }
    let mut response = json_response(error.code, &error.to_status());
    if let Some(seconds) = error.retry_after_s {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// A stream that is only ever polled by one task, made shareable as the body type wants it.
struct SyncStream<S>(std::sync::Mutex<std::pin::Pin<Box<S>>>);

impl<S> SyncStream<S> {
    fn new(stream: S) -> Self {
        SyncStream(std::sync::Mutex::new(Box::pin(stream)))
    }
}

impl<S: futures::Stream> futures::Stream for SyncStream<S> {
    type Item = S::Item;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let stream = self.get_mut().0.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        stream.as_mut().poll_next(cx)
    }
}
