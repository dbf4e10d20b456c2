//! The node's flows and counters over HTTP, for operators: routes of the node's server, which lets nobody else in.

use super::{Error, Follower, Hub};
use axum::{
    Json, Router,
    body::Body,
    extract::{Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use futures::{future::BoxFuture, stream};
use sluice_wire::flows::{COUNTERS_PATH, Counters, Filter, PATH};
use std::{convert::Infallible, sync::Arc};

/// Reads the programs' counters with their labels; else says why not.
pub type Count = Arc<dyn Fn() -> BoxFuture<'static, Result<Vec<(&'static str, u64)>, String>> + Send + Sync>;

#[derive(Clone)]
struct Served {
    hub: Arc<Hub>,
    count: Count,
}

/// `GET /flows` with a [`Filter`] as its query, and `GET /counters`.
pub fn routes(hub: Arc<Hub>, count: Count) -> Router {
    Router::new().route(PATH, get(flows)).route(COUNTERS_PATH, get(counters)).with_state(Served { hub, count })
}

async fn flows(State(s): State<Served>, Query(filter): Query<Filter>) -> Response {
    let filter = match filter.checked() {
        Ok(filter) => filter,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    match s.hub.follow(filter).await {
        Ok(follower) => {
            let body = Body::from_stream(stream::unfold(follower, next));
            ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
        }
        Err(error @ (Error::TooMany(_) | Error::Ended(_))) => {
            (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response()
        }
        Err(error @ Error::Kernel { .. }) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn next(mut follower: Follower) -> Option<(Result<Bytes, Infallible>, Follower)> {
    let line = follower.next_line().await?;
    Some((Ok(line), follower))
}

async fn counters(State(s): State<Served>) -> Response {
    let node = s.hub.node.clone();
    match (s.count)().await {
        Ok(all) => {
            let counters = all.into_iter().map(|(label, count)| (label.to_owned(), count)).collect();
            Json(Counters { node, counters }).into_response()
        }
        Err(cause) => {
            let text = format!("read the counters of node {node}: {cause}");
            (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
        }
    }
}
