//! What apps speak, between pods with and without a sidecar, both ways.

use crate::{
    cluster::Cluster,
    load::{echo, service},
    mesh::in_force,
    network::script,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const MESHED: &str = "spoken-meshed";
const PLAIN: &str = "spoken-plain";

/// HTTP/1.1 and 2, gRPC with its trailers, an upgrade, a tunnel, bytes of either side first, and the app's own TLS by the names that it
/// asks for: each between all four pairs of pods with and without a sidecar.
pub fn protocols_pass_with_and_without_sidecars(c: &Cluster) -> Result<()> {
    let namespaces = [(MESHED, true), (PLAIN, false)];
    for (namespace, meshed) in namespaces {
        c.namespace(namespace, meshed)?;
        c.apply(&[
            echo(namespace, "echo", "v1", 1),
            service(namespace, "echo", json!({"app": "echo"})),
            greeter(namespace),
            // Nothing says what is spoken there.
            of_port(namespace, "bytes", json!({"app": "echo"}), 9000, 9000),
            sealed(namespace),
            of_port(namespace, "sealed", json!({"app": "sealed"}), 9000, 9000),
        ])?;
        c.apply(&[names_greeter(namespace)])?;
        c.apply(&secured(namespace)?.1)?;
    }
    for (namespace, _) in namespaces {
        for deployment in ["echo", "greeter", "sealed", "secure-v1", "secure-v2"] {
            c.rollout(namespace, deployment)?;
        }
    }
    for (caller, _) in namespaces {
        for (server, _) in namespaces {
            speak(c, caller, server).with_context(|| format!("from {caller} to {server}"))?;
        }
    }
    ports_are_read_as_they_say(c)?;
    tls_goes_by_name(c)?;
    for (namespace, _) in namespaces {
        c.delete_namespace(namespace)?;
    }
    Ok(())
}

fn speak(c: &Cluster, caller: &str, server: &str) -> Result<()> {
    let host = format!("echo.{server}");
    let load = format!("/load --rps=20 --duration=1 --url=http://{host}");
    let asks = [
        format!("wget -q -O - http://{host}/one"),
        // Each reports: all answered, none failed.
        format!("{load}/two --http2"),
        format!(
            "{load}/pkg.Orders/Place --http2 --method=POST --body-bytes=5 --header=content-type=application/grpc --header=te=trailers"
        ),
        // What follows the head comes with it, and comes back when the protocol has been switched.
        format!(
            "printf 'GET /up HTTP/1.1\\r\\nhost: {host}\\r\\nconnection: upgrade\\r\\nupgrade: echo\\r\\n\\r\\nafter the switch' | nc -w 5 {host} 80"
        ),
        format!(
            "printf 'CONNECT {host}:80 HTTP/1.1\\r\\nhost: {host}:80\\r\\n\\r\\nthrough the tunnel' | nc -w 5 {host} 80"
        ),
        format!("echo who | nc -w 5 {host} 9000"),
        format!("nc -w 5 greeter.{server} 7000 </dev/null"),
        format!("curl -sS -k -m 5 https://secure.{server}/"),
    ];
    let seen = script(c, caller, "speaker", &asks.map(|ask| format!("{ask}; echo")).join("; "))?;
    let lines: Vec<&str> = seen.lines().collect();
    let has = |wanted: &str| lines.iter().any(|l| l.contains(wanted));
    ensure!(has("\"path\":\"/one\""), "HTTP/1.1: {seen}");
    let reports = lines.iter().filter(|l| l.contains("\"rps\"")).map(|l| serde_json::from_str::<Value>(l));
    let reports = reports.collect::<Result<Vec<_>, _>>()?;
    ensure!(reports.len() == 2, "two reports in {seen}");
    for (what, report) in ["HTTP/2", "gRPC"].into_iter().zip(&reports) {
        ensure!(report["ok"] == 20 && report["failed"] == 0, "{what}: {report}");
    }
    ensure!(has("101 Switching Protocols") && has("after the switch"), "upgrade: {seen}");
    ensure!(has("HTTP/1.1 200 OK") && has("through the tunnel"), "CONNECT: {seen}");
    ensure!(lines.iter().any(|l| l.starts_with("v1 echo-")), "the caller's bytes first: {seen}");
    ensure!(has("greetings"), "the server's bytes first: {seen}");
    ensure!(has("secure-v"), "the app's own TLS: {seen}");
    Ok(())
}

/// What no word of a port decides, the first bytes do: HTTP is read, here and refused for what it is, and anything else passes. Of a
/// port that its pod calls opaque all bytes come back as they were sent.
fn ports_are_read_as_they_say(c: &Cluster) -> Result<()> {
    const MALFORMED: &str = "printf 'GET / HTTP/1.1\\r\\nhost : x\\r\\n\\r\\n'";
    for (caller, server) in [(MESHED, MESHED), (MESHED, PLAIN), (PLAIN, MESHED), (PLAIN, PLAIN)] {
        let to = |service: &str, bytes: &str| format!("{bytes} | nc -w 5 {service}.{server} 9000; echo; echo --");
        let asks = [to("bytes", "echo who"), to("bytes", MALFORMED), to("sealed", MALFORMED)];
        let seen = script(c, caller, "reader", &asks.join("; "))?;
        let said: Vec<&str> = seen.split("--\n").collect();
        let [bytes, read, sealed, ..] = said[..] else { anyhow::bail!("from {caller} to {server}: {seen}") };
        ensure!(bytes.starts_with("v1 echo-"), "bytes from {caller} to {server}: {seen}");
        let refused = read.contains("x-sluice-reason: malformed_request");
        // The runtime's log drops the CR of a line's end.
        let unread = |said: &str| said.starts_with("GET / HTTP/1.1\nhost : x");
        let meshed = [caller, server].contains(&MESHED);
        ensure!(refused == meshed && unread(read) != meshed, "HTTP from {caller} to {server}: {seen}");
        ensure!(unread(sealed), "opaque from {caller} to {server}: {seen}");
    }
    Ok(())
}

/// Its port is not to be read by sidecars.
fn sealed(namespace: &str) -> Value {
    let mut app = echo(namespace, "sealed", "v1", 1);
    let labels = json!({"app": "sealed"});
    app["spec"]["selector"]["matchLabels"] = labels.clone();
    app["spec"]["template"]["metadata"] = json!({"labels": labels, "annotations": {"sluice.dev/opaque-ports": "9000"}});
    app
}

/// Names that TLS asks for have backends of their own by a TLSRoute; the sidecar sees the name, and nothing else.
fn tls_goes_by_name(c: &Cluster) -> Result<()> {
    let route = |name: &str, host: &str| {
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "TLSRoute",
            "metadata": {"name": name, "namespace": MESHED},
            "spec": {
                "parentRefs": [{"group": "", "kind": "Service", "name": "secure"}], "hostnames": [host],
                "rules": [{"backendRefs": [{"name": name, "port": 443}]}]
            }
        })
    };
    let (short, long) = (format!("secure.{MESHED}"), format!("secure.{MESHED}.svc.cluster.local"));
    c.apply(&[route("secure-v1", &short), route("secure-v2", &long)])?;
    for name in ["secure-v1", "secure-v2"] {
        in_force(c, MESHED, "tlsroute", name)?;
    }
    let ask = |host: &str| format!("for n in 1 2 3 4 5; do curl -sS -k -m 5 https://{host}/; echo; done; ");
    let seen = script(c, MESHED, "names", &(ask(&short) + &ask(&long)))?;
    ensure!(seen.split_whitespace().eq([["secure-v1"; 5], ["secure-v2"; 5]].concat()), "by name: {seen}");
    Ok(())
}

/// Speaks first.
fn greeter(namespace: &str) -> Value {
    let args = ["-c", "trap 'exit 0' TERM; nc -ll -p 7000 -e /bin/echo greetings & wait"];
    deployment(
        namespace,
        "greeter",
        json!({"name": "sh", "image": "sluice.local/echo:1", "command": ["/bin/sh"], "args": args,
        "readinessProbe": {"tcpSocket": {"port": 7000}, "periodSeconds": 1}}),
        json!([]),
    )
}

fn names_greeter(namespace: &str) -> Value {
    of_port(namespace, "greeter", json!({"app": "greeter"}), 7000, 7000)
}

fn of_port(namespace: &str, name: &str, selector: Value, port: u16, target: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": selector, "ports": [{"port": port, "targetPort": target}]}
    })
}

fn deployment(namespace: &str, name: &str, container: Value, volumes: Value) -> Value {
    let labels = json!({"app": name, "secure": if name.starts_with("secure") { "yes" } else { "no" }});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": 1, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container], "volumes": volumes}}
        }
    })
}

/// Its certificate, and a server of TLS in two versions, with a service for both and one for each.
pub fn secured(namespace: &str) -> Result<(String, Vec<Value>)> {
    let pair = rcgen::generate_simple_self_signed(vec!["secure".to_owned(), "*.raw.example".to_owned()])?;
    let mut all = vec![
        json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
               "metadata": {"name": "secure", "namespace": namespace},
               "stringData": {"tls.crt": pair.cert.pem(), "tls.key": pair.signing_key.serialize_pem()}}),
        of_port(namespace, "secure", json!({"secure": "yes"}), 443, 8443),
    ];
    for name in ["secure-v1", "secure-v2"] {
        let config = format!(
            "daemon off; pid /run/nginx.pid; error_log stderr; events {{}} http {{ access_log off; server {{ listen 8443 ssl; \
             ssl_certificate /tls/tls.crt; ssl_certificate_key /tls/tls.key; return 200 {name}; }} }}"
        );
        let container = json!({
            "name": "nginx", "image": "nginx:1.14.2", "command": ["/usr/sbin/nginx", "-c", "/conf/nginx.conf"],
            "readinessProbe": {"tcpSocket": {"port": 8443}, "periodSeconds": 1},
            "volumeMounts": [{"name": "conf", "mountPath": "/conf"}, {"name": "tls", "mountPath": "/tls"}]
        });
        let volumes =
            json!([{"name": "conf", "configMap": {"name": name}}, {"name": "tls", "secret": {"secretName": "secure"}}]);
        all.extend([
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace},
                   "data": {"nginx.conf": config}}),
            deployment(namespace, name, container, volumes),
            of_port(namespace, name, json!({"app": name}), 443, 8443),
        ]);
    }
    Ok((pair.cert.pem(), all))
}
