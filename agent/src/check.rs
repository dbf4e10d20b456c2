//! What this node tells `sluice check`: how it finds its kernel and maps, and what comes of walking paths from a probe, a
//! namespace that is wired as a pod. Routes of the node's server, which lets nobody but administrators in.

mod probe;

use crate::network::Network;
use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use futures::future::join_all;
use probe::{Probe, Site};
use sluice_wire::check::{Feature, KEPT_S, PATH, PATHS_PATH, Report, Walk, Walked};
use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};
use tokio::{sync::Mutex, time::Instant};

pub struct Checker {
    node: String,
    site: Site,
    dns: Option<SocketAddr>,
    network: Arc<Network>,
    /// The MTU of pods, as it is now.
    mtu: Box<dyn Fn() -> Option<u32> + Send + Sync>,
    held: Mutex<Option<Held>>,
}

struct Held {
    probe: Arc<Probe>,
    until: Instant,
}

impl Checker {
    /// Takes away what an agent that was killed has left.
    pub fn start(
        node: String,
        run_dir: &Path,
        dns: Option<SocketAddr>,
        network: Arc<Network>,
        mtu: Box<dyn Fn() -> Option<u32> + Send + Sync>,
    ) -> Arc<Self> {
        let site = Site::new(run_dir);
        let checker = Arc::new(Self { node, site, dns, network, mtu, held: Mutex::default() });
        let left = checker.clone();
        tokio::spawn(async move {
            let held = left.held.lock().await;
            // One that is there already has begun with the same.
            if held.is_none() {
                left.clear().await;
            }
        });
        checker
    }

    /// `GET /check`, and `GET /paths` with a [`Walk`] as its query.
    pub fn routes(self: Arc<Self>) -> Router {
        Router::new().route(PATH, get(report)).route(PATHS_PATH, get(paths)).with_state(self)
    }

    /// The probe, kept for a while longer; made when there is none.
    async fn probe(self: &Arc<Self>) -> Result<Arc<Probe>, String> {
        let mut held = self.held.lock().await;
        let until = Instant::now() + Duration::from_secs(KEPT_S);
        if let Some(held) = held.as_mut() {
            held.until = until;
            return Ok(held.probe.clone());
        }
        let probe = Arc::new(self.site.make().await?);
        *held = Some(Held { probe: probe.clone(), until });
        tokio::spawn(self.clone().end());
        Ok(probe)
    }

    /// With `held` locked and empty.
    async fn clear(&self) {
        let site = self.site.clone();
        let cleared = tokio::task::spawn_blocking(move || site.clear()).await.unwrap_or_else(|e| Err(e.to_string()));
        if let Err(error) = cleared {
            tracing::warn!(error, "probe not removed, the next check tries again");
        }
    }

    /// Takes the probe away when nobody has asked for it for a while.
    async fn end(self: Arc<Self>) {
        loop {
            let until = match &*self.held.lock().await {
                Some(held) => held.until,
                None => return,
            };
            tokio::time::sleep_until(until).await;
            let mut held = self.held.lock().await;
            if held.as_ref().is_some_and(|h| h.until > Instant::now()) {
                continue;
            }
            // Nobody makes another one meanwhile.
            *held = None;
            self.clear().await;
            return;
        }
    }
}

async fn report(State(c): State<Arc<Checker>>) -> Json<Report> {
    let verified = c.network.clone().verify().await;
    let feature =
        |(name, fallback): (&str, Option<&str>)| Feature { name: name.into(), fallback: fallback.map(Into::into) };
    let mut report = Report {
        node: c.node.clone(),
        kernel: verified.kernel.into_iter().map(feature).collect(),
        revision: verified.revision,
        differences: verified.differences,
        problems: verified.problems,
        errors: verified.errors,
        mtu: (c.mtu)(),
        probe: vec![],
        dns: c.dns,
    };
    match c.probe().await {
        Ok(probe) => report.probe = probe.answers.clone(),
        Err(why) => report.errors.push(format!("no pod can be made: {why}")),
    }
    Json(report)
}

async fn paths(State(c): State<Arc<Checker>>, Query(walk): Query<Walk>) -> Response {
    let paths = match walk.paths() {
        Ok(paths) => paths,
        Err(why) => return (StatusCode::BAD_REQUEST, why).into_response(),
    };
    let probe = match c.probe().await {
        Ok(probe) => probe,
        Err(why) => return (StatusCode::INTERNAL_SERVER_ERROR, why).into_response(),
    };
    match probe.sockets(&paths) {
        Ok(sockets) => {
            let walks = paths.into_iter().zip(sockets).map(|((way, to), socket)| async move {
                Walked { way, to, outcome: probe::walk(socket, way, to).await }
            });
            Json(join_all(walks).await).into_response()
        }
        Err(why) => (StatusCode::INTERNAL_SERVER_ERROR, why).into_response(),
    }
}
