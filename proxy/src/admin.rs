//! The sidecar's own HTTP server: `/ready`, `/metrics`, `/config`. On the control thread, never captured.

use crate::{control::Scraper, status::Status};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 64;

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, status: watch::Receiver<Arc<Status>>, scraper: Scraper) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        // Too many: this one is closed.
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let (status, scraper) = (status.clone(), scraper.clone());
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(|request| {
                let (status, scraper) = (status.borrow().clone(), scraper.clone());
                async move { Ok::<_, Infallible>(respond(&request, &status, &scraper).await) }
            });
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(30));
            // A client that goes away is no matter of ours.
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn respond(request: &Request<Incoming>, status: &Status, scraper: &Scraper) -> Response<Full<Bytes>> {
    match request.uri().path() {
        "/ready" => {
            let missing = status.missing();
            let code = if missing.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            let text =
                if missing.is_empty() { "ready".to_owned() } else { format!("waiting for {}", missing.join(", ")) };
            answer(code, "text/plain", text + "\n")
        }
        "/metrics" => {
            let text = scraper.scrape().await.to_text();
            answer(StatusCode::OK, "text/plain; version=0.0.4", status.metrics() + &text)
        }
        "/config" => answer(StatusCode::OK, "application/json", status.to_json()),
        _ => answer(StatusCode::NOT_FOUND, "text/plain", "/ready /metrics /config\n".to_owned()),
    }
}

fn answer(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
