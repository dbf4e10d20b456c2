//! The objects every cluster has: namespaces, the API's own service and the cluster DNS service. Made at every start if
//! they are not there; what is there is left alone.

use serde_json::{Value, json};

use crate::api::client::Client;
use crate::api::kinds;
use crate::api::registry::Context;
use crate::api::status::ApiError;
use crate::service::Config;

const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Makes what is missing.
pub async fn run(client: &Client, config: &Config) -> Result<(), ApiError> {
    for name in NAMESPACES {
        ensure(client, "namespaces", "", json!({"metadata": {"name": name}})).await?;
    }
    let api = json!({
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {
            "type": "ClusterIP", "clusterIP": config.service_cidr.nth(1).to_string(),
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": config.listen.port().max(1)}],
        },
    });
    ensure(client, "services", "default", api).await?;
    let dns = json!({
        "metadata": {"name": "kube-dns", "namespace": "kube-system",
            "labels": {"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"}},
        "spec": {
            "type": "ClusterIP", "clusterIP": config.service_cidr.nth(10).to_string(),
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
            ],
        },
    });
    ensure(client, "services", "kube-system", dns).await
}

async fn ensure(client: &Client, plural: &str, namespace: &str, body: Value) -> Result<(), ApiError> {
    let kind = kinds::find("", "v1", plural).expect("core kinds are in the table");
    match client.registry().create(&Context::internal("bootstrap"), kind, namespace, body).await {
        Err(error) if error.reason != "AlreadyExists" => Err(error),
        _ => Ok(()),
    }
}
