//! What a client that is not kubectl meets: errors in Kubernetes' words that change nothing, watches, pages, who may what,
//! and a service that is killed at any time.

mod support;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use sluice_control::ca::Pair;
use support::{Cluster, eventually};

/// A client with or without a certificate.
struct Http {
    address: std::net::SocketAddr,
    tls: Arc<rustls::ClientConfig>,
}

impl Http {
    fn new(cluster: &Cluster, client: Option<(&str, &[&str])>) -> Self {
        let authority = &cluster.service.parts.authority;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(authority.roots().expect("roots"));
        let mut tls = match client {
            Some((user, groups)) => {
                let pair: Pair = authority.client(user, groups, Duration::from_secs(600)).expect("a certificate");
                let (chain, key) = pair.to_rustls().expect("parses");
                builder.with_client_auth_cert(chain, key).expect("a certificate")
            }
            None => builder.with_no_client_auth(),
        };
        tls.alpn_protocols = vec![b"h2".to_vec()];
        Http { address: cluster.service.address, tls: Arc::new(tls) }
    }

    fn admin(cluster: &Cluster) -> Self {
        Http::new(cluster, Some(("root", &["system:masters"])))
    }

    async fn open(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: Vec<u8>,
    ) -> http::Response<hyper::body::Incoming> {
        let stream = tokio::net::TcpStream::connect(self.address).await.expect("connects");
        let name = ServerName::try_from("localhost").expect("a name");
        let stream = tokio_rustls::TlsConnector::from(self.tls.clone()).connect(name, stream).await.expect("TLS");
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.expect("HTTP/2");
        tokio::spawn(connection);
        let request = http::Request::builder().method(method).uri(format!("https://localhost{path}"));
        let request = if content_type.is_empty() { request } else { request.header("content-type", content_type) };
        sender.send_request(request.body(Full::new(Bytes::from(body))).expect("a request")).await.expect("answers")
    }

    async fn send(&self, method: &str, path: &str, content_type: &str, body: Vec<u8>) -> (u16, Value) {
        let answer = self.open(method, path, content_type, body).await;
        let code = answer.status().as_u16();
        let bytes = answer.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        (code, serde_json::from_slice(&bytes).unwrap_or_else(|_| json!(String::from_utf8_lossy(&bytes))))
    }

    async fn json(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        self.send(method, path, "application/json", body.to_string().into_bytes()).await
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.send("GET", path, "", Vec::new()).await
    }
}

fn config_map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "b"}})
}

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";

/// Method, path, body; then the code, the reason and a part of the message that come back.
type Case = (&'static str, String, Value, u16, &'static str, &'static str);

async fn all_are_refused(http: &Http, cases: Vec<Case>) {
    for (method, path, body, code, reason, message) in cases {
        let (got, status) = http.json(method, &path, &body).await;
        assert_eq!((got, status["reason"].as_str()), (code, Some(reason)), "{method} {path}: {status}");
        assert!(status["message"].as_str().is_some_and(|text| text.contains(message)), "{method} {path}: {status}");
        assert_eq!((status["kind"].as_str(), status["code"].as_u64()), (Some("Status"), Some(u64::from(code))));
    }
}

/// A config map that is there, and the store's revision once the service's own parts have made what every namespace has.
async fn kept_and_quiet(cluster: &Cluster, http: &Http) -> (Value, u64) {
    let (code, made) = http.json("POST", MAPS, &config_map("kept")).await;
    assert_eq!(code, 201);
    eventually("accounts", || async {
        http.get("/api/v1/serviceaccounts").await.1["items"].as_array().map(Vec::len) == Some(4)
    })
    .await;
    (made, cluster.service.parts.store.revision())
}

fn deployment() -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": {"replicas": 1,
        "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}})
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_that_are_wrong_are_refused_by_field() {
    let cluster = Cluster::start().await;
    let http = Http::admin(&cluster);
    let (_, before) = kept_and_quiet(&cluster, &http).await;
    let with = |change: fn(&mut Value)| {
        let mut changed = deployment();
        change(&mut changed["spec"]);
        changed
    };
    let words = with(|spec| spec["replicas"] = json!("three"));
    let empty = with(|spec| spec["template"]["spec"]["containers"] = json!([]));
    let misspelt = with(|spec| spec["replicaz"] = json!(1));
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}});
    let path = || DEPLOYMENTS.to_owned();
    let cases: Vec<Case> = vec![
        ("POST", path(), words, 400, "BadRequest", "of type int32"),
        ("POST", path(), empty, 422, "Invalid", "spec.template.spec.containers: Required value"),
        ("POST", path() + "?fieldValidation=Strict", misspelt, 400, "BadRequest", "unknown field \"spec.replicaz\""),
        (
            "POST",
            MAPS.into(),
            config_map("Wrong_Name"),
            422,
            "Invalid",
            "ConfigMap \"Wrong_Name\" is invalid: metadata.name: Invalid value",
        ),
        ("POST", MAPS.into(), config_map(""), 422, "Invalid", "metadata.name: Required value"),
        ("POST", MAPS.into(), secret, 400, "BadRequest", "cannot be handled as a ConfigMap"),
    ];
    all_are_refused(&http, cases).await;
    assert_eq!(cluster.service.parts.store.revision(), before, "something was stored");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_do_not_fit_what_is_there_are_refused() {
    let cluster = Cluster::start().await;
    let http = Http::admin(&cluster);
    let (made, before) = kept_and_quiet(&cluster, &http).await;
    let mut stale = made;
    (stale["metadata"]["resourceVersion"], stale["data"]["a"]) = (json!("1"), json!("c"));
    let other = json!({"preconditions": {"uid": "other"}});
    let nowhere = "/api/v1/namespaces/nowhere/configmaps".to_owned();
    let widgets = "/apis/example.com/v1/widgets".to_owned();
    let kept = || format!("{MAPS}/kept");
    let cases: Vec<Case> = vec![
        ("POST", widgets, json!({}), 404, "NotFound", "the server could not find the requested resource"),
        ("POST", nowhere, config_map("a"), 404, "NotFound", "namespaces \"nowhere\" not found"),
        ("GET", format!("{MAPS}/nope"), json!({}), 404, "NotFound", "configmaps \"nope\" not found"),
        ("POST", MAPS.into(), config_map("kept"), 409, "AlreadyExists", "configmaps \"kept\" already exists"),
        ("PUT", kept(), stale, 409, "Conflict", "the object has been modified"),
        ("DELETE", kept(), other, 409, "Conflict", "Precondition failed: UID"),
        ("POST", kept(), json!({}), 405, "MethodNotAllowed", "does not allow this method"),
        (
            "GET",
            format!("{MAPS}?fieldSelector=spec.x%3D1"),
            json!({}),
            400,
            "BadRequest",
            "field label not supported: spec.x",
        ),
        ("GET", format!("{MAPS}?continue=garbage"), json!({}), 400, "BadRequest", "continue key is not valid"),
    ];
    all_are_refused(&http, cases).await;
    assert_eq!(cluster.service.parts.store.revision(), before, "something was stored");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_cannot_be_read_are_refused() {
    let cluster = Cluster::start().await;
    let http = Http::admin(&cluster);
    let (_, before) = kept_and_quiet(&cluster, &http).await;
    let big = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "big"}, "data": {"a": "x".repeat(5 << 20)}});
    let too_large = ("POST", MAPS.to_owned(), big, 413, "RequestEntityTooLarge", "Request entity too large");
    all_are_refused(&http, vec![too_large]).await;
    let kept = format!("{MAPS}/kept");
    for (method, path, content_type, body, code) in [
        ("POST", MAPS, "application/xml", "<a/>", 415),
        ("POST", MAPS, "application/json", "{", 400),
        ("PATCH", &kept, "application/json", "{}", 415),
    ] {
        let (got, status) = http.send(method, path, content_type, body.as_bytes().to_vec()).await;
        assert_eq!(got, code, "{method} {content_type}: {status}");
    }
    assert_eq!(cluster.service.parts.store.revision(), before, "something was stored");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_nothing_and_a_dry_run_store_nothing() {
    let cluster = Cluster::start().await;
    let http = Http::admin(&cluster);
    let (made, before) = kept_and_quiet(&cluster, &http).await;
    let kept = format!("{MAPS}/kept");
    let (_, same) =
        http.send("PATCH", &kept, "application/merge-patch+json", b"{\"data\":{\"a\":\"b\"}}".to_vec()).await;
    assert_eq!(same["metadata"]["resourceVersion"], made["metadata"]["resourceVersion"]);
    let (code, dry) = http.json("POST", &format!("{MAPS}?dryRun=All"), &config_map("dry")).await;
    assert_eq!((code, dry["metadata"]["name"].as_str()), (201, Some("dry")));
    assert_eq!(cluster.service.parts.store.revision(), before, "something was stored");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_those_who_may() {
    let cluster = Cluster::start().await;
    let (admin, nobody) = (Http::admin(&cluster), Http::new(&cluster, None));
    let user = Http::new(&cluster, Some(("alice", &["devs"])));
    let node = Http::new(&cluster, Some(("system:node:n1", &["system:nodes"])));
    for path in ["/version", "/healthz", "/readyz", "/livez"] {
        assert_eq!(nobody.get(path).await.0, 200, "{path}");
    }
    for path in ["/api", "/api/v1/pods", "/metrics", "/openapi/v3"] {
        assert_eq!(nobody.get(path).await.0, 401, "{path}");
    }
    let (code, status) = user.get("/api/v1/namespaces/default/pods").await;
    assert_eq!(code, 403);
    let message = status["message"].as_str().expect("a message");
    assert_eq!(
        message,
        "pods is forbidden: User \"alice\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
    );
    assert_eq!(admin.get("/metrics").await.0, 200);

    let own = |name: &str| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
    assert_eq!(node.json("POST", "/api/v1/nodes", &own("n2")).await.0, 403);
    assert_eq!(node.json("POST", "/api/v1/nodes", &own("n1")).await.0, 201);
    let pods = "/api/v1/namespaces/default/pods";
    for (name, on) in [("mine", "n1"), ("other", "n2")] {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"nodeName": on,
            "containers": [{"name": "c", "image": "i", "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": format!("secret-{name}"), "key": "k"}}}]}]}});
        assert_eq!(admin.json("POST", pods, &pod).await.0, 201);
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": format!("secret-{name}")}, "stringData": {"k": "v"}});
        assert_eq!(admin.json("POST", "/api/v1/namespaces/default/secrets", &secret).await.0, 201);
    }
    let status = json!({"status": {"phase": "Running"}}).to_string().into_bytes();
    for (name, code) in [("mine", 200), ("other", 403)] {
        let path = format!("{pods}/{name}/status");
        assert_eq!(node.send("PATCH", &path, "application/merge-patch+json", status.clone()).await.0, code, "{name}");
        assert_eq!(node.get(&format!("/api/v1/namespaces/default/secrets/secret-{name}")).await.0, code, "{name}");
    }
    assert_eq!(node.get("/api/v1/namespaces/default/secrets").await.0, 403);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_and_watches_are_consistent() {
    let cluster = Cluster::start().await;
    let http = Http::admin(&cluster);
    for index in 0..7 {
        let mut map = config_map(&format!("m{index}"));
        map["metadata"]["labels"] = json!({"even": (index % 2 == 0).to_string()});
        assert_eq!(http.json("POST", MAPS, &map).await.0, 201);
    }
    let (_, first) = http.get(&format!("{MAPS}?limit=3")).await;
    let revision = first["metadata"]["resourceVersion"].as_str().expect("a revision").to_owned();
    assert_eq!(first["metadata"]["remainingItemCount"], 4);
    http.json("DELETE", &format!("{MAPS}/m6"), &json!({})).await;
    let mut names: Vec<Value> = first["items"].as_array().expect("items").clone();
    let mut token = first["metadata"]["continue"].as_str().map(str::to_owned);
    while let Some(next) = token {
        let (_, page) = http.get(&format!("{MAPS}?limit=3&continue={next}")).await;
        assert_eq!(page["metadata"]["resourceVersion"].as_str(), Some(revision.as_str()));
        names.extend(page["items"].as_array().expect("items").clone());
        token = page["metadata"]["continue"].as_str().map(str::to_owned);
    }
    assert_eq!(names.len(), 7, "pages are of one revision");

    let path = format!("{MAPS}?watch=1&resourceVersion={revision}&labelSelector=even%3Dtrue&allowWatchBookmarks=true");
    let mut watch = Lines::new(http.open("GET", &path, "", Vec::new()).await);
    let change = json!({"metadata": {"labels": {"even": "true"}}}).to_string().into_bytes();
    http.send("PATCH", &format!("{MAPS}/m1"), "application/merge-patch+json", change).await;
    let change = json!({"metadata": {"labels": {"even": "false"}}}).to_string().into_bytes();
    http.send("PATCH", &format!("{MAPS}/m0"), "application/merge-patch+json", change).await;
    let mut seen = Vec::new();
    for _ in 0..3 {
        let event = watch.next().await;
        seen.push(format!(
            "{} {}",
            event["type"].as_str().expect("a type"),
            event["object"]["metadata"]["name"].as_str().expect("a name")
        ));
    }
    assert_eq!(seen, ["DELETED m6", "ADDED m1", "DELETED m0"]);
    cluster.service.parts.store.request_progress();
    assert_eq!(watch.next().await["type"], "BOOKMARK");

    let path = format!(
        "{MAPS}?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&labelSelector=even%3Dtrue"
    );
    let mut watch = Lines::new(http.open("GET", &path, "", Vec::new()).await);
    let mut kinds = Vec::new();
    loop {
        let event = watch.next().await;
        kinds.push(event["type"].clone());
        if event["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"] == "true" {
            break;
        }
    }
    assert_eq!(kinds, ["ADDED", "ADDED", "ADDED", "BOOKMARK"]);

    let current = cluster.service.parts.store.revision();
    cluster.service.parts.store.compact(current).await.expect("compacts");
    let mut watch = Lines::new(http.open("GET", &format!("{MAPS}?watch=1&resourceVersion=1"), "", Vec::new()).await);
    let event = watch.next().await;
    assert_eq!((event["type"].as_str(), event["object"]["code"].as_u64()), (Some("ERROR"), Some(410)));
    let (code, _) = http.get(&format!("{MAPS}?resourceVersion=1&resourceVersionMatch=Exact")).await;
    assert_eq!(code, 410);
    cluster.stop().await;
}

/// The lines of a watch.
struct Lines {
    body: hyper::body::Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    fn new(response: http::Response<hyper::body::Incoming>) -> Self {
        assert_eq!(response.status(), 200);
        Lines { body: response.into_body(), buffer: Vec::new() }
    }

    async fn next(&mut self) -> Value {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).expect("JSON");
            }
            let frame = tokio::time::timeout(Duration::from_secs(10), self.body.frame()).await;
            let frame = frame.expect("an event in time").expect("the watch goes on").expect("no error");
            self.buffer.extend_from_slice(&frame.into_data().unwrap_or_default());
        }
    }
}

/// The program itself, killed in the middle of a rollout again and again: it goes on, and no pod is there twice.
#[tokio::test(flavor = "multi_thread")]
async fn survives_being_killed() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("log");
    let passphrase = dir.path().join("passphrase");
    std::fs::write(&passphrase, "kept elsewhere\n").expect("writes");
    let run = || {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&log).expect("a log");
        std::process::Command::new(env!("CARGO_BIN_EXE_sluice-control"))
            .args(["serve", "--listen", "127.0.0.1:0", "--discovery-listen", "127.0.0.1:0", "--data-dir"])
            .arg(dir.path())
            .arg("--ca-passphrase-file")
            .arg(&passphrase)
            .stderr(log)
            .spawn()
            .expect("starts")
    };
    let kubectl = |args: &[&str], input: &str| {
        use std::io::Write;
        let mut command = std::process::Command::new("kubectl");
        command.arg("--kubeconfig").arg(dir.path().join("admin.kubeconfig")).args(args).env("HOME", dir.path());
        command
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        let mut child = command.spawn().expect("kubectl is on the PATH");
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
        let output = child.wait_with_output().expect("ends");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let deployment = |index: usize| {
        format!(
            "{{\"apiVersion\":\"apps/v1\",\"kind\":\"Deployment\",\"metadata\":{{\"name\":\"d\"}},\"spec\":{{\"replicas\":20,\
        \"selector\":{{\"matchLabels\":{{\"a\":\"b\"}}}},\"template\":{{\"metadata\":{{\"labels\":{{\"a\":\"b\"}}}},\
        \"spec\":{{\"containers\":[{{\"name\":\"c\",\"image\":\"i:{index}\"}}]}}}}}}}}"
        )
    };
    for round in 0..6 {
        // A free port each time: the kubeconfig is written before the service answers.
        let _ = std::fs::remove_file(dir.path().join("admin.kubeconfig"));
        let mut child = run();
        eventually("it answers", || async { kubectl(&["get", "--raw", "/readyz"], "").0 }).await;
        let last = round == 5;
        let image = if last { 0 } else { round % 2 };
        kubectl(&["apply", "--validate=false", "-f", "-"], &deployment(image));
        if last {
            let counts = || {
                let pods = kubectl(
                    &["get", "pods", "-o", "jsonpath={range .items[*]}{.spec.containers[0].image}{\"\\n\"}{end}"],
                    "",
                )
                .1;
                (pods.lines().filter(|image| *image == "i:0").count(), pods.lines().count())
            };
            eventually("the first version", || async { counts().0 >= 5 }).await;
            let total = counts().1;
            assert!(total <= 25, "{total} pods, of at most 20 + 25 %");
        }
        if last {
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signals");
            assert!(child.wait().expect("ends").success(), "SIGTERM ends it in order");
        } else {
            child.kill().expect("kills");
            child.wait().expect("ends");
        }
    }
}

/// A node's log server, as far as one request goes: TLS as the node, and it insists on the caller's certificate.
async fn log_server(cluster: &Cluster, node: &str) -> u16 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let authority = &cluster.service.parts.authority;
    let pair = authority.serving(&[node.to_owned()]).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = Arc::new(authority.roots().expect("roots"));
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build();
    let (chain, key) = pair.to_rustls().expect("parses");
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_client_cert_verifier(verifier.expect("a verifier"))
        .with_single_cert(chain, key)
        .expect("a certificate");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listens");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut head = vec![0; 4_096];
            let length = stream.read(&mut head).await.unwrap_or(0);
            let head = String::from_utf8_lossy(&head[..length]).into_owned();
            let line = head.lines().next().unwrap_or_default().to_owned();
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{line}\n",
                line.len() + 1
            );
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_and_flows_come_from_the_node() {
    let cluster = Cluster::start().await;
    let http = Http::admin(&cluster);
    let port = log_server(&cluster, "n1").await;
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "status": {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}], "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}});
    assert_eq!(http.json("POST", "/api/v1/nodes", &node).await.0, 201);
    let pods = "/api/v1/namespaces/default/pods";
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"nodeName": "n1",
        "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]}});
    assert_eq!(http.json("POST", pods, &pod).await.0, 201);
    let (code, log) = http.get(&format!("{pods}/p/log?container=b&follow=true&tailLines=5")).await;
    let line = "GET /containerLogs/default/p/b?container=b&follow=true&tailLines=5 HTTP/1.1\n";
    assert_eq!((code, log), (200, json!(line)));
    let (code, status) = http.get(&format!("{pods}/p/log")).await;
    let message = "a container name must be specified for pod p, choose one of: [a b]";
    assert_eq!((code, status["message"].as_str()), (400, Some(message)));
    let (code, flows) = http.get("/api/v1/nodes/n1/proxy/flows?drops=true&pod=shop/web").await;
    assert_eq!((code, flows), (200, json!("GET /flows?drops=true&pod=shop/web HTTP/1.1\n")));
    assert_eq!(http.get("/api/v1/nodes/n1/proxy/counters").await.0, 200);
    assert_eq!(http.get("/api/v1/nodes/n1/proxy/healthz").await.0, 404, "no other path of the node");
    assert_eq!(http.get("/api/v1/nodes/n2/proxy/flows").await.0, 404, "no such node");
    assert_eq!(http.json("POST", "/api/v1/nodes/n1/proxy/flows", &json!({})).await.0, 405);
    cluster.stop().await;
}
