//! Clients outside the cluster, by a Gateway: in the machine that has the nodes' network and no program of the data path.

use crate::{
    cluster::Cluster,
    load::{echo, service},
    mesh::in_force,
    protocols::secured,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const GROUP: &str = "gateway.networking.k8s.io";
const HOST: &str = "shop.example";

fn of_gateways(kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": format!("{GROUP}/v1"), "kind": kind, "metadata": {"name": name, "namespace": "edge"}, "spec": spec})
}

fn gateway(listeners: Value) -> Value {
    let mut gateway = of_gateways("Gateway", "edge", json!({"gatewayClassName": "sluice", "listeners": listeners}));
    gateway["metadata"]["annotations"] = json!({"sluice.dev/access-log": "all"});
    gateway
}

fn http() -> Value {
    json!({"name": "http", "port": 80, "protocol": "HTTP"})
}

fn https() -> Value {
    json!({"name": "https", "port": 443, "protocol": "HTTPS", "hostname": HOST,
           "tls": {"certificateRefs": [{"name": "shop"}]}})
}

fn route(v1: u32, v2: u32) -> Value {
    let backends =
        json!([{"name": "echo-v1", "port": 80, "weight": v1}, {"name": "echo-v2", "port": 80, "weight": v2}]);
    of_gateways("HTTPRoute", "echo", json!({"parentRefs": [{"name": "edge"}], "rules": [{"backendRefs": backends}]}))
}

/// Status and reason of a condition, if it is of the object's generation.
fn condition(object: &Value, conditions: &Value, kind: &str) -> (String, String) {
    let all = conditions.as_array().cloned().unwrap_or_default();
    let found = all.into_iter().find(|c| c["type"] == kind).unwrap_or_default();
    if found["observedGeneration"] != object["metadata"]["generation"] {
        return Default::default();
    }
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    (text("status"), text("reason"))
}

fn is_true(object: &Value, conditions: &Value, kind: &str) -> bool {
    condition(object, conditions, kind).0 == "True"
}

fn versions(answers: &str) -> (usize, usize) {
    (answers.matches("\"version\":\"v1\"").count(), answers.matches("\"version\":\"v2\"").count())
}

/// From kubectl to a client outside: the class, the statuses, a split that is exact per request and shifts at once, TLS
/// with a Secret's certificate, a listener added while it serves, and nothing left when the Gateway goes.
pub fn gateway_serves_clients_outside(c: &Cluster) -> Result<()> {
    c.namespace("edge", true)?;
    let version = |v: &str| service("edge", &format!("echo-{v}"), json!({"app": "echo", "version": v}));
    c.apply(&[
        echo("edge", "echo-v1", "v1", 2),
        echo("edge", "echo-v2", "v2", 1),
        version("v1"),
        version("v2"),
        gateway(json!([http()])),
        route(90, 10),
    ])?;
    c.rollout("edge", "echo-v1")?;
    c.rollout("edge", "echo-v2")?;
    c.kubectl(&["wait", "--for=condition=Accepted", "gatewayclass/sluice", "--timeout=10s"])?;
    c.kubectl(&["-n", "edge", "wait", "--for=condition=Programmed", "gateway/edge", "--timeout=60s"])
        .with_context(|| c.try_kubectl(&["-n", "edge", "describe", "gateway,pods"]).unwrap_or_default())?;
    let object = c.json(&["-n", "edge", "get", "gateway", "edge"])?;
    let status = &object["status"];
    ensure!(is_true(&object, &status["conditions"], "Accepted"), "{status}");
    let address = status["addresses"][0]["value"].as_str().context("an address")?.to_owned();
    let listener = &status["listeners"][0];
    ensure!(listener["attachedRoutes"] == 1 && listener["supportedKinds"][0]["kind"] == "HTTPRoute", "{status}");
    for (kind, want) in
        [("Accepted", "True"), ("Programmed", "True"), ("ResolvedRefs", "True"), ("Conflicted", "False")]
    {
        ensure!(condition(&object, &listener["conditions"], kind).0 == want, "{kind} in {listener}");
    }
    let listed = c.kubectl(&["-n", "edge", "get", "gateway"])?;
    ensure!(listed.contains(&address) && listed.contains("PROGRAMMED") && listed.contains("sluice"), "{listed}");
    c.wait("the route is in force at the gateway", 20, || {
        let route = c.json(&["-n", "edge", "get", "httproute", "echo"])?;
        let parent = &route["status"]["parents"][0];
        let of = |kind: &str| is_true(&route, &parent["conditions"], kind);
        Ok(parent["controllerName"] == "sluice.dev/gateway" && of("Accepted") && of("ResolvedRefs") && of("Programmed"))
    })?;

    // A tenth of a thousand requests of one connection: one gateway, one worker, so at most two off.
    let ask = |n: u32| c.inside("control", &format!("curl -sS -m 30 'http://{address}/?n=[1-{n}]'"));
    c.wait("a client outside is served", 30, || Ok(ask(1).is_ok()))?;
    let (v1, v2) = versions(&ask(1000)?);
    eprintln!("of 1000 requests from outside {v2} went to v2");
    ensure!(v1 + v2 == 1000 && v2.abs_diff(100) <= 2, "{v1} and {v2} of 1000 at 10 %");
    // In force at the gateway, too, when the command has returned.
    c.sluice_ok(&["split", "echo", "-n", "edge", "v1=0", "v2=100"])?;
    ensure!(versions(&ask(200)?) == (0, 200), "some went to v1 after everybody had acknowledged");
    c.wait("the gateway's counters are the route's", 20, || {
        let status = c.sluice_ok(&["status"])?;
        let of_route = status.split("ROUTE edge/echo").nth(1).unwrap_or_default();
        let rows = of_route.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
        let counted = rows.filter(|row| row.first().is_some_and(|b| b.starts_with("echo-v")));
        Ok(counted.filter_map(|row| row.get(2)?.parse::<u64>().ok()).sum::<u64>() >= 1201)
    })?;
    // The client's own address, where it is known to be kept.
    let log = c.kubectl(&["-n", "edge", "logs", "deployment/edge-sluice"])?;
    let line = log.lines().rev().find(|l| l.contains("\"client\"")).context("a line of the access log")?;
    let line: Value = serde_json::from_str(line)?;
    ensure!(line["peer"] == "spiffe://cluster.local/ns/edge/sa/default", "mTLS with the app's sidecar: {line}");
    let nodes = c.json(&["get", "nodes"])?;
    let of_node = nodes["items"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|n| n["status"]["addresses"][0]["address"] == line["client"]);
    ensure!(!of_node, "the client's address is lost: {line}");

    let pod = || -> Result<Value> {
        let pods = c.pods("edge", &format!("{GROUP}/gateway-name=edge"))?;
        Ok(json!([pods[0]["metadata"]["uid"], pods[0]["status"]["containerStatuses"][0]["restartCount"]]))
    };
    let before = pod()?;
    tls(c, &address)?;
    calls_and_bytes(c, &address)?;
    ensure!(pod()? == before, "listeners were added to a gateway that runs on");
    c.kubectl(&["-n", "edge", "delete", "gateway", "edge", "--timeout=30s"])?;
    c.wait("what was made for it goes with it", 60, || {
        let left = c.try_kubectl(&["-n", "edge", "get", "deployment,service,serviceaccount", "-o", "name"])?;
        Ok(!left.contains("edge-sluice"))
    })?;
    c.delete_namespace("edge")
}

/// Calls of gRPC by a GRPCRoute, and the app's own TLS by a TLSRoute, which nobody on the way opens.
fn calls_and_bytes(c: &Cluster, address: &str) -> Result<()> {
    let raw = json!({"name": "raw", "port": 8443, "protocol": "TLS", "hostname": "*.raw.example", "tls": {"mode": "Passthrough"}});
    let calls = json!({"name": "calls", "port": 8080, "protocol": "HTTP"});
    let (certificate, servers) = secured("edge")?;
    c.apply(&servers)?;
    let parent = |listener: &str| json!([{"name": "edge", "sectionName": listener}]);
    let to = |name: &str, port: u16| json!([{"name": name, "port": port}]);
    let of = |method: &str| json!([{"method": {"service": "pkg.Orders", "method": method}}]);
    c.apply(&[
        gateway(json!([http(), https(), calls, raw])),
        of_gateways(
            "GRPCRoute",
            "calls",
            json!({"parentRefs": parent("calls"), "rules": [
            {"matches": of("Place"), "backendRefs": to("echo-v2", 80)}, {"matches": of("Cancel"), "backendRefs": to("echo-v1", 80)}]}),
        ),
        of_gateways(
            "TLSRoute",
            "raw",
            json!({"parentRefs": parent("raw"), "hostnames": ["two.raw.example"],
            "rules": [{"backendRefs": to("secure-v2", 443)}]}),
        ),
    ])?;
    c.rollout("edge", "secure-v2")?;
    for (kind, name) in [("grpcroute", "calls"), ("tlsroute", "raw")] {
        in_force(c, "edge", kind, name)?;
    }
    for (method, version) in [("Place", "v2"), ("Cancel", "v1")] {
        let url = format!("http://{address}:8080/pkg.Orders/{method}");
        c.wait(&format!("calls of {method} come to {version}"), 30, || {
            let seen = c.load_from(
                "control",
                &format!(
                    "--url={url} --http2 --method=POST --body-bytes=5 --rps=20 --duration=1 \
                 --header=content-type=application/grpc --header=te=trailers"
                ),
            )?;
            Ok(seen["failed"] == 0 && seen["versions"] == json!({version: 20}))
        })?;
    }
    let ask = |host: &str| {
        format!(
            "printf '%s' '{certificate}' >/tmp/secure.pem; curl -sS -m 10 --cacert /tmp/secure.pem \
             --resolve {host}:8443:{address} https://{host}:8443/"
        )
    };
    c.wait("the app's own certificate is seen", 30, || {
        Ok(c.inside("control", &ask("two.raw.example")).is_ok_and(|said| said.contains("secure-v2")))
    })?;
    ensure!(c.inside("control", &ask("one.raw.example")).is_err(), "no route has that name");
    Ok(())
}

/// A listener with a certificate that is not there, then with it.
fn tls(c: &Cluster, address: &str) -> Result<()> {
    c.apply(&[gateway(json!([http(), https()]))])?;
    let listener = || -> Result<(Value, Value)> {
        let object = c.json(&["-n", "edge", "get", "gateway", "edge"])?;
        let all = object["status"]["listeners"].as_array().cloned().unwrap_or_default();
        let listener = all.into_iter().find(|l| l["name"] == "https").context("its status")?;
        Ok((object, listener))
    };
    c.wait("the missing certificate is said", 20, || {
        let (object, l) = listener()?;
        let resolved = condition(&object, &l["conditions"], "ResolvedRefs");
        Ok(resolved == ("False".to_owned(), "InvalidCertificateRef".to_owned()))
    })?;
    let pair = rcgen::generate_simple_self_signed(vec![HOST.to_owned()])?;
    let (chain, key) = (pair.cert.pem(), pair.signing_key.serialize_pem());
    c.apply(&[json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": "shop", "namespace": "edge"}, "stringData": {"tls.crt": chain, "tls.key": key}})])?;
    c.wait("the listener is programmed", 20, || {
        let (object, l) = listener()?;
        Ok(is_true(&object, &l["conditions"], "Programmed") && is_true(&object, &l["conditions"], "ResolvedRefs"))
    })?;
    let ask = format!(
        "printf '%s' '{chain}' >/tmp/shop.pem; curl -sS -m 10 --cacert /tmp/shop.pem --resolve {HOST}:443:{address} https://{HOST}/"
    );
    c.wait("a client outside is served over TLS", 30, || Ok(versions(&c.inside("control", &ask)?) == (0, 1)))?;
    let pod = c.pods("edge", &format!("{GROUP}/gateway-name=edge"))?[0]["metadata"]["name"]
        .as_str()
        .context("a name")?
        .to_owned();
    for subject in ["config", "compiled"] {
        let shown = c.sluice_out(&["tap", &format!("edge/{pod}"), &format!("--show={subject}")])?;
        ensure!(shown.contains("https") && !shown.contains("PRIVATE KEY"), "{subject} shows the key");
    }
    Ok(())
}
