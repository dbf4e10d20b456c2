//! `kubectl logs`: passes the request on to the log server of the pod's node, with this service's client certificate,
//! and the answer back as it comes.

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

use super::http::Body;
use super::kinds;
use super::registry::Registry;
use super::request::Query;
use super::status::ApiError;
use super::value::{list, name, text};

/// Port of the agents' log servers.
pub const PORT: u16 = 10_250;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers a request for a container's log.
pub async fn proxy(
    registry: &Registry,
    tls: &Arc<rustls::ClientConfig>,
    (namespace, pod_name): (&str, &str),
    query: &Query,
    raw_query: &str,
) -> Result<http::Response<Body>, ApiError> {
    let pods = kinds::find("", "v1", "pods").expect("pods are in the table");
    let nodes = kinds::find("", "v1", "nodes").expect("nodes are in the table");
    let pod = registry.get(pods, namespace, pod_name).await?;
    let container = container(&pod, query.get("container"))?;
    let node = text(&pod, "spec.nodeName");
    if node.is_empty() {
        return Err(ApiError::bad_request(format!("pod {pod_name} does not have a host assigned")));
    }
    let node = registry.get(nodes, "", node).await?;
    let path = format!("/containerLogs/{namespace}/{pod_name}/{container}?{raw_query}");
    let failed = |why: String| ApiError::bad_gateway(format!("the log of {pod_name} on node {}: {why}", name(&node)));
    let request = tokio::time::timeout(CONNECT_TIMEOUT, send(tls, &node, &path)).await;
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

fn container(pod: &Value, asked: Option<&str>) -> Result<String, ApiError> {
    let groups = ["containers", "initContainers", "ephemeralContainers"];
    let all: Vec<&str> = groups.iter().flat_map(|g| list(&pod["spec"], g)).map(|c| text(c, "name")).collect();
    let names = list(pod, "spec.containers");
    let annotated = pod["metadata"]["annotations"].get("kubectl.kubernetes.io/default-container");
    let annotated = annotated.and_then(Value::as_str).unwrap_or_default();
    match asked {
        Some(asked) if all.contains(&asked) => Ok(asked.to_owned()),
        Some(asked) => Err(ApiError::bad_request(format!("container {asked} is not valid for pod {}", name(pod)))),
        None if all.contains(&annotated) => Ok(annotated.to_owned()),
        None if names.len() == 1 && all.len() == 1 => Ok(text(&names[0], "name").to_owned()),
        None => Err(ApiError::bad_request(format!(
            "a container name must be specified for pod {}, choose one of: [{}]",
            name(pod),
            all.join(" ")
        ))),
    }
}
