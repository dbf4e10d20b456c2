//! A watch as a client sees it: the state there is, if asked for, then changes as ADDED, MODIFIED and DELETED relative
//! to the selectors, bookmarks, and an ERROR 410 when history is lost. One line of JSON each.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::kinds::Kind;
use super::registry::{ListOptions, Registry, parse_version, set_version};
use super::render;
use super::request::{Form, Query};
use super::selector::Selector;
use super::status::ApiError;
use crate::store::{Event, StoreError, Watch, WatchItem};

/// How long a watch lasts if the client does not say.
const DEFAULT_LIFE: Duration = Duration::from_secs(45 * 60);
const INITIAL_END: &str = "k8s.io/initial-events-end";

/// What a client watches.
pub struct Request {
    /// Which kind.
    pub kind: &'static Kind,
    /// One namespace, or all.
    pub namespace: Option<String>,
    /// Which objects.
    pub selector: Selector,
    /// In which form.
    pub form: Form,
}

struct State {
    request: Request,
    watch: Watch,
    ready: VecDeque<Bytes>,
    first: bool,
    bookmarks: bool,
    /// Revision of the last bookmark.
    told: u64,
    deadline: Instant,
    stop: CancellationToken,
    over: bool,
}

/// Starts a watch.
pub async fn start(
    registry: &Arc<Registry>,
    request: Request,
    query: &Query,
    stop: CancellationToken,
) -> Result<impl Stream<Item = Bytes> + Send + use<>, ApiError> {
    let bookmarks = query.flag("allowWatchBookmarks");
    let version = query.get("resourceVersion").unwrap_or_default();
    let send_initial = query.flag("sendInitialEvents");
    let initial = send_initial || (query.get("sendInitialEvents").is_none() && matches!(version, "" | "0"));
    if send_initial && query.get("resourceVersionMatch") != Some("NotOlderThan") {
        return Err(ApiError::bad_request(
            "resourceVersionMatch: Forbidden: resourceVersionMatch is required when sendInitialEvents is set",
        ));
    }
    let mut lines = VecDeque::new();
    let (mut first, mut error) = (true, None);
    let after = if initial {
        let options = ListOptions { selector: request.selector.clone(), ..ListOptions::default() };
        let listed = registry.list(request.kind, request.namespace.as_deref(), &options).await?;
        for object in &listed.items {
            lines.push_back(line("ADDED", &request, object, &mut first));
        }
        if send_initial && bookmarks {
            lines.push_back(bookmark(&request, listed.revision, true));
        }
        listed.revision
    } else {
        match version {
            "" | "0" => registry.store().revision(),
            version => parse_version(version)?,
        }
    };
    let prefix = request.kind.prefix(request.namespace.as_deref());
    let watch = match registry.store().watch(&prefix, after).await {
        Ok(watch) => watch,
        // Clients expect an expired watch to start and then tell so.
        Err(compacted @ StoreError::Compacted { .. }) => {
            error = Some(ApiError::from(compacted));
            let current = registry.store().revision();
            registry.store().watch(&prefix, current).await?
        }
        Err(other) => return Err(other.into()),
    };
    if let Some(error) = &error {
        lines.push_back(error_line(error));
    }
    let life = query.number("timeoutSeconds").map_or(DEFAULT_LIFE, |s| Duration::from_secs(s.min(86_400)));
    let state = State {
        request,
        watch,
        ready: lines,
        first,
        bookmarks,
        told: after,
        deadline: Instant::now() + life,
        stop,
        over: error.is_some(),
    };
    Ok(futures::stream::unfold(state, next))
}

async fn next(mut state: State) -> Option<(Bytes, State)> {
    loop {
        if let Some(line) = state.ready.pop_front() {
            return Some((line, state));
        }
        if state.over {
            return None;
        }
        let item = tokio::select! {
            biased;
            () = state.stop.cancelled() => return None,
            item = state.watch.next() => item?,
            () = tokio::time::sleep_until(state.deadline) => return None,
        };
        match item {
            Ok(WatchItem::Event(event)) => {
                if let Some(line) = event_line(&state.request, &event, &mut state.first) {
                    state.ready.push_back(line);
                }
            }
            Ok(WatchItem::Progress(revision)) => {
                if state.bookmarks && revision > state.told {
                    state.told = revision;
                    state.ready.push_back(bookmark(&state.request, revision, false));
                }
            }
            Err(error) => {
                state.ready.push_back(error_line(&ApiError::from(error)));
                state.over = true;
            }
        }
    }
}

/// What the change is to this client, if anything.
fn event_line(request: &Request, event: &Event, first: &mut bool) -> Option<Bytes> {
    let (new, old) = (event.json(), event.previous_json());
    let decode = |stored: &Value| request.kind.decode(stored.clone());
    let converted = request.kind.stored_as.is_some();
    let matches = |object: &Option<Arc<Value>>| {
        object.as_ref().is_some_and(|object| {
            if converted { request.selector.matches(&decode(object)) } else { request.selector.matches(object) }
        })
    };
    let (kind, object) = match (matches(&new), matches(&old)) {
        (true, true) => ("MODIFIED", new),
        (true, false) => ("ADDED", new),
        (false, true) => ("DELETED", if new.is_some() { new } else { old }),
        (false, false) => return None,
    };
    let mut object = decode(object.as_deref()?);
    set_version(&mut object, event.revision);
    Some(line(kind, request, &object, first))
}

fn line(kind: &str, request: &Request, object: &Value, first: &mut bool) -> Bytes {
    let rendered = render::watched(request.kind, request.form, object, *first, Timestamp::now());
    *first = false;
    encode(&json!({"type": kind, "object": rendered}))
}

fn bookmark(request: &Request, revision: u64, initial_end: bool) -> Bytes {
    let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
    if initial_end {
        metadata["annotations"] = json!({INITIAL_END: "true"});
    }
    let object = match request.form {
        Form::Table(_) => json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
            "columnDefinitions": [], "rows": []}),
        Form::Metadata => {
            json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
        }
        Form::Object => {
            json!({"kind": request.kind.kind, "apiVersion": request.kind.api_version(), "metadata": metadata})
        }
    };
    encode(&json!({"type": "BOOKMARK", "object": object}))
}

fn error_line(error: &ApiError) -> Bytes {
    encode(&json!({"type": "ERROR", "object": error.to_status()}))
}

fn encode(value: &Value) -> Bytes {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    Bytes::from(line)
}
