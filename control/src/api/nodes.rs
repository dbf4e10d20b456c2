//! What nodes' own servers answer, through the API: requests are passed on with this service's client certificate, and
//! answers back as they come. Operators' programs reach no node themselves. `nodes/proxy` leads to the paths named here and
//! to no other: whoever calls is an administrator, and what is passed on is an administrator's request.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use sluice_wire::{
    check::{PATH as CHECK_PATH, PATHS_PATH},
    flows::{COUNTERS_PATH, PATH as FLOWS_PATH},
    sidecar::PATH as SIDECAR_PATH,
};

use super::http::Body;
use super::kinds;
use super::registry::Registry;
use super::status::ApiError;
use super::value::{list, name, text};

/// Port of the agents' servers.
pub const PORT: u16 = 10_250;
/// For the connection and the head of the answer; its body may take for ever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The subresource of nodes, and what stands before the path in its own paths.
pub const PROXY: &str = "proxy";

/// The node's path behind `proxy/…`, if it is one of those that are passed on.
pub fn path(subresource: &str) -> Option<&'static str> {
    let asked = subresource.strip_prefix(PROXY)?;
    [FLOWS_PATH, COUNTERS_PATH, CHECK_PATH, PATHS_PATH, SIDECAR_PATH].into_iter().find(|path| *path == asked)
}

/// Answers `GET /api/v1/nodes/<node>/proxy/<path>`.
pub async fn proxy(
    registry: &Registry,
    tls: &Arc<rustls::ClientConfig>,
    (node, path): (&str, &str),
    raw_query: &str,
) -> Result<http::Response<Body>, ApiError> {
    let nodes = kinds::find("", "v1", "nodes").expect("nodes are in the table");
    let node = registry.get(nodes, "", node).await?;
    pass(tls, &node, &format!("{path}?{raw_query}"), path.trim_start_matches('/')).await
}

/// The answer of the node's server to `GET path`. `what` names it in errors.
pub async fn pass(
    tls: &Arc<rustls::ClientConfig>,
    node: &Value,
    path: &str,
    what: &str,
) -> Result<http::Response<Body>, ApiError> {
    let failed = |why: String| ApiError::bad_gateway(format!("{what} on node {}: {why}", name(node)));
    let request = tokio::time::timeout(ANSWER_TIMEOUT, send(tls, node, path)).await;
    let answer = request.map_err(|_| failed("the node does not answer".to_owned()))?.map_err(failed)?;
    let (head, body) = answer.into_parts();
    let mut response = http::Response::builder().status(head.status);
    if let Some(kind) = head.headers.get(http::header::CONTENT_TYPE) {
        response = response.header(http::header::CONTENT_TYPE, kind);
    }
    response.body(body.map_err(std::io::Error::other).boxed()).map_err(ApiError::internal)
}

async fn send(
    tls: &Arc<rustls::ClientConfig>,
    node: &Value,
    path: &str,
) -> Result<http::Response<hyper::body::Incoming>, String> {
    let internal = list(node, "status.addresses").iter().find(|a| text(a, "type") == "InternalIP");
    let address = internal.ok_or("it has no InternalIP")?;
    let address: std::net::IpAddr = text(address, "address").parse().map_err(|_| "its InternalIP is malformed")?;
    let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64();
    let port = port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0).unwrap_or(PORT);
    let stream = TcpStream::connect(SocketAddr::new(address, port)).await.map_err(|e| e.to_string())?;
    // Nodes are known by name; an address may have been another node's before.
    let server = ServerName::try_from(name(node).to_owned()).map_err(|e| e.to_string())?;
    let stream = TlsConnector::from(tls.clone()).connect(server, stream).await.map_err(|e| e.to_string())?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|e| e.to_string())?;
    // It ends with the response's body or with the client that reads it.
    tokio::spawn(connection);
    let request = http::Request::get(path).header(http::header::HOST, name(node));
    let request = request.body(Empty::<Bytes>::new()).map_err(|e| e.to_string())?;
    sender.send_request(request).await.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_other_path_of_a_node_is_reached() {
        assert_eq!((path("proxy/flows"), path("proxy/counters")), (Some("/flows"), Some("/counters")));
        assert_eq!((path("proxy/check"), path("proxy/paths")), (Some("/check"), Some("/paths")));
        assert_eq!(path("proxy/sidecar"), Some("/sidecar"));
        for other in
            ["", "proxy", "proxy/", "flows", "proxy/containerLogs", "proxy/flows/", "proxy//flows", "proxyflows"]
        {
            assert_eq!(path(other), None, "{other}");
        }
    }
}
