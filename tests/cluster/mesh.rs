//! What routes and policies ask of sidecars, from `kubectl apply` to what apps see.

use crate::{
    cluster::Cluster,
    load::{Load, echo, service, split_service},
    network::script,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const OWN: &str = "sluice.dev/v1alpha1";

fn own(kind: &str, name: &str, spec: Value) -> Value {
    own_in("mesh", kind, name, spec)
}

pub fn own_in(namespace: &str, kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": OWN, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec})
}

/// In place of what the service's policy was.
pub fn backend_policy(c: &Cluster, namespace: &str, service: &str, mut spec: Value) -> Result<()> {
    spec["targetRefs"] = json!([{"kind": "Service", "name": service}]);
    c.apply(&[own_in(namespace, "BackendPolicy", service, spec)]).map(drop)
}

/// A rule of a path, with filters.
fn rule(path: &str, filters: Value) -> Value {
    json!({
        "matches": [{"path": {"type": "PathPrefix", "value": path}}],
        "filters": filters, "backendRefs": [{"name": "echo-v1", "port": 80}]
    })
}

/// The sidecars that use a route have acknowledged it as it is.
pub fn in_force(c: &Cluster, namespace: &str, kind: &str, name: &str) -> Result<()> {
    c.wait(&format!("{kind} {name} is in force"), 20, || {
        let route = c.json(&["-n", namespace, "get", kind, name])?;
        let generation = &route["metadata"]["generation"];
        let conditions = route["status"]["parents"][0]["conditions"].as_array().cloned().unwrap_or_default();
        let programmed = conditions.iter().find(|x| x["type"] == "Programmed").cloned().unwrap_or_default();
        Ok(programmed["status"] == "True" && programmed["observedGeneration"] == *generation)
    })
    .map(drop)
    .with_context(|| c.try_kubectl(&["-n", namespace, "get", kind, name, "-o", "yaml"]).unwrap_or_default())
}

/// HTTPRoute's filters, a RouteFilter and a BackendPolicy, as an app behind a sidecar sees them.
pub fn routes_do_what_they_ask(c: &Cluster) -> Result<()> {
    c.namespace("mesh", true)?;
    c.apply(&[echo("mesh", "echo-v1", "v1", 2), echo("mesh", "echo-v2", "v2", 1)])?;
    c.apply(&split_service("mesh", 100, 0))?;
    let extension = |name: &str| json!([{"type": "ExtensionRef", "extensionRef": {"group": "sluice.dev", "kind": "RouteFilter", "name": name}}]);
    // As a user writes it, not as it is stored: the status writer may be at it.
    let mut route = split_service("mesh", 100, 0).remove(3);
    let rules = route["spec"]["rules"].as_array_mut().context("rules")?;
    rules.extend([
        rule("/old", json!([
            {"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}}},
            {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-seen", "value": "yes"}]}}
        ])),
        rule("/moved", json!([{"type": "RequestRedirect", "requestRedirect": {"scheme": "https", "statusCode": 301}}])),
        rule("/broken", extension("teapot")),
        rule("/rare", extension("once")),
    ]);
    c.apply(&[
        own("RouteFilter", "teapot", json!({"fault": {"abort": {"status": 418}}})),
        own("RouteFilter", "once", json!({"rateLimit": {"requests": 1, "per": "60s"}})),
        own(
            "BackendPolicy",
            "echo",
            json!({"targetRefs": [{"kind": "Service", "name": "echo-v1"}],
                                            "balancing": {"policy": "RoundRobin"}}),
        ),
        route,
    ])?;
    c.rollout("mesh", "echo-v1")?;
    c.rollout("mesh", "echo-v2")?;
    in_force(c, "mesh", "httproute", "echo")?;
    let asks = ["/old/x", "/moved", "/broken", "/rare", "/rare"];
    let asks =
        asks.map(|path| format!("wget -S -q -T 5 -O - http://echo{path} 2>&1; echo")).join("; ").replace("-T 5 ", "");
    let seen = script(c, "mesh", "asks", &asks)?;
    for wanted in ["\"path\":\"/new/x\"", "x-seen: yes", "301 Moved", "ocation: https://echo/moved", "418"] {
        ensure!(seen.contains(wanted), "{wanted} not in {seen}");
    }
    ensure!(seen.matches("\"path\":\"/rare\"").count() == 1 && seen.contains("429"), "once a minute: {seen}");

    // The tables of a sidecar that dialled it, and its requests as they happen.
    let load = Load { rps: 50, seconds: 12, fresh: false, headers: vec![] };
    load.start(c, "mesh", "tapped", "http://echo/old/tap")?;
    c.wait("the client runs", 30, || {
        Ok(c.json(&["-n", "mesh", "get", "pod", "tapped"])?["status"]["phase"] == "Running")
    })?;
    let compiled = c.wait_for("the sidecar has the policy", 20, || {
        let all: Value = serde_json::from_str(&c.sluice_out(&["tap", "mesh/tapped", "--show=compiled"])?)?;
        let backends = all["backends"].as_array().cloned().unwrap_or_default();
        Ok(backends.into_iter().find(|b| b["service"] == "mesh/echo-v1" && !b["policy"].is_null()))
    })?;
    ensure!(compiled["policy"]["balance"] == "roundRobin", "{compiled}");
    let lines = c.sluice_out(&["tap", "mesh/tapped", "--direction=outbound", "--path=/old", "--count=20", "--json"])?;
    let mut endpoints = std::collections::BTreeMap::new();
    for line in lines.lines() {
        let e: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(e["status"] == 200 && e["route"] == "mesh/echo" && e["backend"] == "mesh/echo-v1", "{e}");
        ensure!(e["peer"] == "spiffe://cluster.local/ns/mesh/sa/default" && e.get("headers").is_none(), "{e}");
        *endpoints.entry(e["endpoint"].to_string()).or_insert(0) += 1;
    }
    ensure!(endpoints.values().copied().eq([10, 10]), "in turn: {endpoints:?}");
    let report = load.finish(c, "mesh", "tapped")?;
    ensure!(report["failed"] == 0, "{report}");

    policies_say_what_became_of_them(c)?;
    consumers_have_routes_of_their_own(c)?;

    // What makes no sense is refused with its field, and nothing changes.
    for (object, field) in [
        (
            own("BackendPolicy", "bad", json!({"targetRefs": [{"kind": "Service", "name": "x"}], "slowStart": "soon"})),
            "spec.slowStart",
        ),
        (own("AccessPolicy", "bad", json!({"action": "Maybe"})), "spec.action"),
        (own("RouteFilter", "bad", json!({"fault": {"abort": {"status": 7}}})), "spec.fault.abort.status"),
    ] {
        let said = c.apply(&[object]).expect_err("refused").to_string();
        ensure!(said.contains(field), "{said}");
    }
    c.delete_namespace("mesh")
}

fn policies_say_what_became_of_them(c: &Cluster) -> Result<()> {
    let to = |service: &str| json!({"targetRefs": [{"kind": "Service", "name": service}]});
    let pods = |app: &str| json!({"selector": {"matchLabels": {"app": app}}, "action": "Allow"});
    c.apply(&[
        own("BackendPolicy", "second", to("echo-v1")),
        own("BackendPolicy", "astray", to("nobody")),
        own("AccessPolicy", "all", pods("echo")),
        own("AccessPolicy", "none", pods("nobody")),
    ])?;
    for (kind, name, condition, status, reason) in [
        ("backendpolicy", "echo", "Accepted", "True", "Accepted"),
        ("backendpolicy", "second", "Accepted", "False", "Conflicted"),
        ("backendpolicy", "astray", "ResolvedRefs", "False", "TargetNotFound"),
        ("accesspolicy", "all", "Enforced", "True", "Enforced"),
        ("accesspolicy", "none", "Enforced", "False", "NoPods"),
    ] {
        c.wait(&format!("{kind} {name} says {condition} {status}"), 20, || {
            let object = c.json(&["-n", "mesh", "get", kind, name])?;
            let all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
            Ok(all.iter().any(|x| x["type"] == condition && x["status"] == status && x["reason"] == reason))
        })?;
    }
    c.kubectl(&[
        "-n",
        "mesh",
        "delete",
        "backendpolicy/second",
        "backendpolicy/astray",
        "accesspolicy/all",
        "accesspolicy/none",
    ])
    .map(drop)
}

/// A route in the callers' namespace, with the leave of the backend's, is for those callers and for nobody else.
fn consumers_have_routes_of_their_own(c: &Cluster) -> Result<()> {
    c.namespace("consumers", true)?;
    let grant = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "ReferenceGrant",
        "metadata": {"name": "consumers", "namespace": "mesh"},
        "spec": {"from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "consumers"}],
                 "to": [{"group": "", "kind": "Service"}]}
    });
    let parent = json!({"group": "", "kind": "Service", "name": "echo", "namespace": "mesh"});
    let route = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"name": "ours", "namespace": "consumers"},
        "spec": {"parentRefs": [parent], "rules": [{"backendRefs": [{"name": "echo-v2", "namespace": "mesh", "port": 80}]}]}
    });
    c.apply(&[grant, route])?;
    let version = |namespace: &str| script(c, namespace, "whose", "wget -q -O - http://echo.mesh/");
    c.wait("callers of that namespace follow their route", 20, || {
        Ok(version("consumers")?.contains("\"version\":\"v2\""))
    })?;
    let others = version("mesh")?;
    ensure!(others.contains("\"version\":\"v1\""), "others follow the service's own: {others}");
    c.delete_namespace("consumers")
}

/// Callers are told apart by the identity that mTLS proves; who is not allowed gets an answer that says so.
pub fn access_is_by_identity(c: &Cluster) -> Result<()> {
    const GUARDED: &str = "guarded";
    c.namespace(GUARDED, true)?;
    c.namespace("guests", true)?;
    c.namespace("plain", false)?;
    c.apply(&[echo(GUARDED, "echo-v1", "v1", 1), service(GUARDED, "echo", json!({"app": "echo"}))])?;
    c.rollout(GUARDED, "echo-v1")?;
    let allow = |from: Value| json!({"selector": {"matchLabels": {"app": "echo"}}, "action": "Allow", "rules": [{"from": from}]});
    c.apply(&[
        own_in(GUARDED, "AccessPolicy", "callers", allow(json!([{"serviceAccount": "default"}]))),
        own_in(
            GUARDED,
            "AccessPolicy",
            "no-admin",
            json!({"selector": {"matchLabels": {"app": "echo"}}, "action": "Deny",
            "rules": [{"to": [{"paths": [{"value": "/admin"}]}, {"methods": ["DELETE"]}, {"ports": [9000]}]}]}),
        ),
    ])?;
    let pod = c.pods(GUARDED, "app=echo")?[0]["metadata"]["name"].as_str().context("a name")?.to_owned();
    c.wait("the app's sidecar has the policies", 20, || {
        let all: Value =
            serde_json::from_str(&c.sluice_out(&["tap", &format!("{GUARDED}/{pod}"), "--show=compiled"])?)?;
        Ok(all["inbound"]["access"].as_array().is_some_and(|rules| rules.len() == 2))
    })?;
    let ask = |namespace: &str, path: &str| {
        script(c, namespace, "ask", &format!("wget -S -q -O - http://echo.{GUARDED}{path} 2>&1; true"))
    };
    let own_namespace = ask(GUARDED, "/")?;
    ensure!(own_namespace.contains("\"version\":\"v1\""), "{own_namespace}");
    for (namespace, path) in [(GUARDED, "/admin"), ("guests", "/"), ("plain", "/")] {
        let said = ask(namespace, path)?;
        ensure!(said.contains("403 Forbidden"), "{namespace} {path}: {said}");
    }
    let more = format!(
        "curl -sS -m 5 -o /dev/null -w '%{{http_code}} %header{{x-sluice-reason}}' -X DELETE http://echo.{GUARDED}/; echo; \
         echo who | nc -w 5 echo.{GUARDED} 9000; echo through"
    );
    let said = script(c, GUARDED, "ask", &more)?;
    ensure!(said.lines().eq(["403 denied", "through"]), "by method and by port: {said}");
    c.apply(&[own_in(
        GUARDED,
        "AccessPolicy",
        "callers",
        allow(json!([{"serviceAccount": "default"}, {"namespace": "guests"}])),
    )])?;
    c.wait("guests are allowed", 20, || Ok(ask("guests", "/")?.contains("\"version\":\"v1\"")))?;
    for namespace in ["plain", "guests", GUARDED] {
        c.delete_namespace(namespace)?;
    }
    Ok(())
}
