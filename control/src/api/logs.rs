//! `kubectl logs`: passes the request on to the server of the pod's node.

use std::sync::Arc;

use serde_json::Value;

use super::http::Body;
use super::kinds;
use super::nodes;
use super::registry::Registry;
use super::request::Query;
use super::status::ApiError;
use super::value::{list, name, text};

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
    nodes::pass(tls, &node, &path, &format!("the log of {pod_name}")).await
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
