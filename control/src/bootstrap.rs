//! The objects every cluster has: namespaces, the API's own service, the cluster DNS service and the class of gateways. Made at every start if
//! they are not there; what is there is left alone.

use std::net::SocketAddr;

use gateway_api::gatewayclasses::GatewayClass;
use serde_json::{Value, json};

use crate::api::client::{Client, Object as _};
use crate::api::kinds::{self, Kind};
use crate::api::registry::Context;
use crate::api::status::ApiError;
use crate::gateway;
use crate::service::Config;

const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Makes what is missing.
pub async fn run(client: &Client, config: &Config) -> Result<(), ApiError> {
    for name in NAMESPACES {
        ensure(client, "namespaces", "", json!({"metadata": {"name": name}})).await?;
    }
    let ranges = &config.service_cidr;
    let policy = if ranges.dual() { "PreferDualStack" } else { "SingleStack" };
    let [api, dns] = [1, 10].map(|n| ranges.iter().map(|range| range.nth(n).to_string()).collect::<Vec<_>>());
    let api = json!({
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {
            "type": "ClusterIP", "clusterIP": api[0], "clusterIPs": api, "ipFamilyPolicy": policy,
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": config.listen.port().max(1)}],
        },
    });
    ensure(client, "services", "default", api).await?;
    publish_api(client, config).await?;
    let dns = json!({
        "metadata": {"name": "kube-dns", "namespace": "kube-system",
            "labels": {"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"}},
        "spec": {
            "type": "ClusterIP", "clusterIP": dns[0], "clusterIPs": dns, "ipFamilyPolicy": policy,
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
            ],
        },
    });
    ensure(client, "services", "kube-system", dns).await?;
    let class = json!({
        "metadata": {"name": gateway::CLASS},
        "spec": {"controllerName": gateway::CONTROLLER_NAME, "description": "Gateways served by sluice-proxy"},
    });
    ensure_kind(client, GatewayClass::kind(), "", class).await
}

/// Where the API's own service leads: the advertised address, if pods can reach it.
async fn publish_api(client: &Client, config: &Config) -> Result<(), ApiError> {
    let url = config.advertise_url.as_deref().and_then(|url| url.strip_prefix("https://"));
    let address: Option<SocketAddr> = url.and_then(|rest| rest.split('/').next()).and_then(|host| host.parse().ok());
    let Some(address) = address.filter(|address| !address.ip().is_loopback()) else { return Ok(()) };
    let kind = kinds::find("discovery.k8s.io", "v1", "endpointslices").expect("slices are in the table");
    let mut body = json!({
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": if address.is_ipv4() { "IPv4" } else { "IPv6" },
        "endpoints": [{"addresses": [address.ip().to_string()], "conditions": {"ready": true, "serving": true, "terminating": false}}],
        "ports": [{"name": "https", "port": address.port(), "protocol": "TCP"}],
    });
    let (ctx, registry) = (Context::internal("bootstrap"), client.registry());
    match registry.create(&ctx, kind, "default", body.clone()).await {
        Err(error) if error.reason == "AlreadyExists" => {
            body["metadata"]["resourceVersion"] = json!("");
            registry.update(&ctx, kind, ("default", "kubernetes"), "", body).await.map(drop)
        }
        other => other.map(drop),
    }
}

async fn ensure(client: &Client, plural: &str, namespace: &str, body: Value) -> Result<(), ApiError> {
    ensure_kind(client, kinds::find("", "v1", plural).expect("core kinds are in the table"), namespace, body).await
}

async fn ensure_kind(client: &Client, kind: &'static Kind, namespace: &str, body: Value) -> Result<(), ApiError> {
    match client.registry().create(&Context::internal("bootstrap"), kind, namespace, body).await {
        Err(error) if error.reason != "AlreadyExists" => Err(error),
        _ => Ok(()),
    }
}
