//! The unmodified kubectl against a real service.

mod support;

use support::{Cluster, eventually};

const DEPLOYMENT: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: nginx-deployment, labels: {app: nginx}}
spec:
  replicas: 3
  selector: {matchLabels: {app: nginx}}
  template:
    metadata: {labels: {app: nginx}}
    spec:
      containers:
      - name: nginx
        image: nginx:1.14.2
        ports: [{containerPort: 80, name: http}]
        resources: {requests: {cpu: 100m}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: nginx}
  ports: [{port: 80, targetPort: http}]
";

async fn three_nodes() -> Cluster {
    let mut cluster = Cluster::start().await;
    for name in ["n1", "n2", "n3"] {
        cluster.add_node(name, "4").await;
    }
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn deploys_changes_and_undoes() {
    let cluster = three_nodes().await;
    let applied = cluster.apply(DEPLOYMENT).await;
    assert!(applied.contains("deployment.apps/nginx-deployment created"), "{applied}");
    cluster.kubectl(&["rollout", "status", "deploy/nginx-deployment", "--timeout=20s"]).await;
    let nodes =
        cluster.kubectl(&["get", "pods", "-o", "jsonpath={range .items[*]}{.spec.nodeName}{\"\\n\"}{end}"]).await;
    let distinct: std::collections::HashSet<&str> = nodes.lines().collect();
    assert_eq!((nodes.lines().count(), distinct.len()), (3, 3), "{nodes}");

    let version = ["get", "deploy,svc", "-o", "jsonpath={.items[*].metadata.resourceVersion}"];
    let before = cluster.kubectl(&version).await;
    let again = cluster.apply(DEPLOYMENT).await;
    assert!(again.lines().all(|line| line.ends_with("unchanged")), "{again}");
    assert_eq!(cluster.kubectl(&version).await, before);

    let wide = cluster.kubectl(&["get", "pods", "-o", "wide"]).await;
    for want in ["READY", "RESTARTS", "1/1", "Running", "10.244.", "n1"] {
        assert!(wide.contains(want), "{wide}");
    }
    let sorted = cluster.kubectl(&["get", "pods", "-o", "wide", "--sort-by=.spec.nodeName"]).await;
    let order: Vec<&str> = sorted.split_whitespace().filter(|word| ["n1", "n2", "n3"].contains(word)).collect();
    assert_eq!(order, ["n1", "n2", "n3"], "{sorted}");
    eventually("endpoints", || async {
        let slices = cluster
            .kubectl(&[
                "get",
                "endpointslices",
                "-l",
                "kubernetes.io/service-name=web",
                "-o",
                "jsonpath={.items[*].endpoints[*].addresses[0]}",
            ])
            .await;
        slices.split_whitespace().count() == 3
    })
    .await;
    let described = cluster.kubectl(&["describe", "deploy", "nginx-deployment"]).await;
    for want in
        ["3 desired | 3 updated | 3 total | 3 available | 0 unavailable", "ScalingReplicaSet", "NewReplicaSetAvailable"]
    {
        assert!(described.contains(want), "{described}");
    }
    assert!(cluster.kubectl(&["describe", "svc", "web"]).await.contains("TargetPort:"));
    assert!(cluster.kubectl(&["describe", "node", "n1"]).await.contains("PodCIDR:"));
    let pod = cluster.kubectl(&["get", "pods", "-o", "name"]).await;
    let described = cluster.kubectl(&["describe", pod.lines().next().expect("a pod")]).await;
    assert!(described.contains("Successfully assigned default/"), "{described}");

    cluster.kubectl(&["scale", "deploy/nginx-deployment", "--replicas=5"]).await;
    cluster
        .kubectl(&["wait", "deploy/nginx-deployment", "--for=jsonpath={.status.availableReplicas}=5", "--timeout=20s"])
        .await;
    cluster.kubectl(&["set", "image", "deploy/nginx-deployment", "nginx=nginx:1.16.1"]).await;
    cluster.kubectl(&["rollout", "status", "deploy/nginx-deployment", "--timeout=20s"]).await;
    let history = cluster.kubectl(&["rollout", "history", "deploy/nginx-deployment"]).await;
    assert!(history.contains("\n1 ") && history.contains("\n2 "), "{history}");
    cluster.kubectl(&["rollout", "undo", "deploy/nginx-deployment"]).await;
    cluster.kubectl(&["rollout", "status", "deploy/nginx-deployment", "--timeout=20s"]).await;
    let image = cluster
        .kubectl(&["get", "deploy", "nginx-deployment", "-o", "jsonpath={.spec.template.spec.containers[0].image}"])
        .await;
    assert_eq!(image, "nginx:1.14.2");

    cluster.kubectl(&["label", "deploy", "nginx-deployment", "tier=front"]).await;
    cluster.kubectl(&["patch", "deploy", "nginx-deployment", "-p", "{\"spec\":{\"replicas\":2}}"]).await;
    cluster.kubectl(&["wait", "deploy/nginx-deployment", "--for=condition=Available", "--timeout=20s"]).await;
    assert!(cluster.kubectl(&["get", "deploy", "-l", "tier=front", "-o", "name"]).await.contains("nginx-deployment"));
    cluster.kubectl(&["delete", "deploy,svc", "-l", "app=nginx", "--timeout=20s"]).await;
    eventually("pods are collected", || async { cluster.kubectl(&["get", "pods", "-o", "name"]).await.is_empty() })
        .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tells_what_is_wrong() {
    let cluster = Cluster::start().await;
    cluster.apply(DEPLOYMENT).await;
    for wrong in ["replicas: \"three\"", "replicaz: 3"] {
        let ran = cluster.kubectl_with(&["apply", "-f", "-"], &DEPLOYMENT.replace("replicas: 3", wrong)).await;
        let field = wrong.split(':').next().expect("a field");
        assert!(!ran.ok && ran.err.contains(&format!("spec.{field}")), "{}", ran.err);
        let fresh = DEPLOYMENT.replace("replicas: 3", wrong).replace("nginx-deployment", "other");
        let ran = cluster.kubectl_with(&["apply", "-f", "-"], &fresh).await;
        assert!(!ran.ok && ran.err.contains(&format!("spec.{field}")), "{}", ran.err);
    }
    let unknown = "apiVersion: example.com/v1\nkind: Widget\nmetadata: {name: w}\n";
    let ran = cluster.kubectl_with(&["apply", "-f", "-"], unknown).await;
    assert!(ran.err.contains("no matches for kind \"Widget\""), "{}", ran.err);
    let ran = cluster.kubectl_with(&["get", "widgets"], "").await;
    assert!(ran.err.contains("the server doesn't have a resource type \"widgets\""), "{}", ran.err);
    let ran = cluster.kubectl_with(&["get", "pod", "nope"], "").await;
    assert!(ran.err.contains("pods \"nope\" not found"), "{}", ran.err);
    let resources = cluster.kubectl(&["api-resources", "-o", "name"]).await;
    for want in ["pods", "deployments.apps", "httproutes.gateway.networking.k8s.io", "endpointslices.discovery.k8s.io"]
    {
        assert!(resources.lines().any(|line| line == want), "{resources}");
    }
    assert!(cluster.kubectl(&["explain", "deployment.spec.strategy"]).await.contains("rollingUpdate"));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fills_nodes_and_says_what_is_missing() {
    let mut cluster = three_nodes().await;
    let one_cpu = DEPLOYMENT.replace("100m", "\"1\"").replace("replicas: 3", "replicas: 13");
    cluster.apply(&one_cpu).await;
    eventually("12 run", || async {
        let running = cluster.kubectl(&["get", "pods", "--field-selector=status.phase=Running", "-o", "name"]).await;
        running.lines().count() == 12
    })
    .await;
    let waiting = [
        "get",
        "pods",
        "--field-selector=status.phase=Pending",
        "-o",
        "jsonpath={.items[*].status.conditions[0].message}",
    ];
    eventually("the 13th says why", || async {
        cluster.kubectl(&waiting).await == "0/3 nodes are available: 3 Insufficient cpu."
    })
    .await;
    let events = cluster.kubectl(&["get", "events", "--field-selector=reason=FailedScheduling"]).await;
    assert!(events.contains("3 Insufficient cpu"), "{events}");
    for node in ["n1", "n2", "n3"] {
        let pods = cluster
            .kubectl(&["get", "pods", "-A", &format!("--field-selector=spec.nodeName={node}"), "-o", "name"])
            .await;
        assert_eq!(pods.lines().count(), 4, "{node}: {pods}");
    }
    cluster.add_node("n4", "4").await;
    eventually("13 run", || async { cluster.kubectl(&waiting).await.is_empty() }).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_node_loses_its_pods() {
    let cluster = three_nodes().await;
    cluster.apply(DEPLOYMENT).await;
    cluster.kubectl(&["rollout", "status", "deploy/nginx-deployment", "--timeout=20s"]).await;
    cluster.silence(0);
    cluster.kubectl(&["wait", "node/n1", "--for=condition=Ready=Unknown", "--timeout=20s"]).await;
    let endpoints = [
        "get",
        "endpointslices",
        "-o",
        "jsonpath={range .items[*].endpoints[?(@.conditions.ready==true)]}{.nodeName}{\" \"}{end}",
    ];
    eventually("its endpoints are withdrawn", || async { !cluster.kubectl(&endpoints).await.contains("n1") }).await;
    eventually("its pods run elsewhere", || async {
        let nodes = cluster.kubectl(&endpoints).await;
        nodes.split_whitespace().count() == 3 && !nodes.contains("n1")
    })
    .await;
    assert!(cluster.kubectl(&["get", "nodes"]).await.contains("NotReady"));
    cluster.kubectl(&["delete", "node", "n1"]).await;
    eventually("its pods are gone", || async {
        !cluster.kubectl(&["get", "pods", "-o", "jsonpath={.items[*].spec.nodeName}"]).await.contains("n1")
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn creates_and_deletes_a_namespace_with_what_is_in_it() {
    let cluster = three_nodes().await;
    let made = cluster.kubectl(&["create", "namespace", "shop"]).await;
    assert!(made.contains("namespace/shop created"), "{made}");
    cluster.kubectl(&["-n", "shop", "create", "configmap", "settings", "--from-literal=a=b"]).await;
    cluster.kubectl(&["-n", "shop", "create", "secret", "generic", "password", "--from-literal=a=b"]).await;
    cluster.kubectl(&["-n", "shop", "create", "deployment", "web", "--image=web:1", "--replicas=2"]).await;
    cluster.kubectl(&["-n", "shop", "rollout", "status", "deploy/web", "--timeout=20s"]).await;
    eventually("an account", || async {
        cluster.kubectl_with(&["-n", "shop", "get", "serviceaccount", "default"], "").await.ok
    })
    .await;
    cluster.kubectl(&["delete", "namespace", "shop", "--timeout=20s"]).await;
    assert!(cluster.kubectl(&["get", "pods", "-A", "-o", "name"]).await.is_empty());
    cluster.kubectl(&["drain", "n1", "--force", "--timeout=20s"]).await;
    assert!(cluster.kubectl(&["get", "nodes"]).await.contains("Ready,SchedulingDisabled"));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn applies_server_side() {
    let cluster = Cluster::start().await;
    let ssa = ["apply", "--server-side", "-f", "-"];
    let ran = cluster.kubectl_with(&ssa, DEPLOYMENT).await;
    assert!(ran.ok, "{}", ran.err);
    cluster.kubectl(&["scale", "deploy/nginx-deployment", "--replicas=4"]).await;
    let ran = cluster.kubectl_with(&ssa, DEPLOYMENT).await;
    assert!(!ran.ok && ran.err.contains(".spec.replicas"), "{}", ran.err);
    let ran = cluster.kubectl_with(&["apply", "--server-side", "--force-conflicts", "-f", "-"], DEPLOYMENT).await;
    assert!(ran.ok, "{}", ran.err);
    let replicas = cluster.kubectl(&["get", "deploy", "nginx-deployment", "-o", "jsonpath={.spec.replicas}"]).await;
    assert_eq!(replicas, "3");
    // From client-side to server-side apply without a conflict.
    let other = DEPLOYMENT.replace("nginx-deployment", "other").replace("name: web", "name: other");
    cluster.apply(&other).await;
    let ran = cluster.kubectl_with(&ssa, &other.replace("1.14.2", "1.16.1")).await;
    assert!(ran.ok, "{}", ran.err);
    cluster.stop().await;
}

const BALANCED: &str = "
apiVersion: v1
kind: Service
metadata: {name: NAME}
spec: {type: LoadBalancer, selector: {app: nginx}, ports: [{port: 80}]}
";

/// `EXTERNAL-IP` of a service, as kubectl shows it.
async fn external_ip(cluster: &Cluster, name: &str) -> String {
    let shown = cluster.kubectl(&["get", "svc", name, "--no-headers"]).await;
    shown.split_whitespace().nth(3).expect("a column").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn load_balancers_get_addresses_of_the_pool() {
    let pool = "192.0.2.1-192.0.2.2";
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start_with_pool(dir, pool).await;
    let apply = async |cluster: &Cluster, name: &str| cluster.apply(&BALANCED.replace("NAME", name)).await;
    for (name, ip) in [("a", "192.0.2.1"), ("b", "192.0.2.2"), ("c", "<pending>")] {
        apply(&cluster, name).await;
        eventually(ip, || async { external_ip(&cluster, name).await == ip }).await;
    }
    let told = ["get", "events", "--field-selector=reason=SyncLoadBalancerFailed,involvedObject.name=c"];
    eventually("c says why it waits", || async {
        cluster.kubectl(&told).await.contains("0 of 2 IPv4 addresses of the pool 192.0.2.1-192.0.2.2 are free")
    })
    .await;
    let ingress = cluster.kubectl(&["get", "svc", "a", "-o", "jsonpath={.status.loadBalancer.ingress}"]).await;
    assert_eq!(ingress, r#"[{"ip":"192.0.2.1","ipMode":"VIP"}]"#);

    // Addresses outlive control; what is given up goes to who waits.
    let cluster = Cluster::start_with_pool(cluster.stop().await, pool).await;
    cluster.kubectl(&["delete", "svc", "b"]).await;
    eventually("c has what b had", || async { external_ip(&cluster, "c").await == "192.0.2.2" }).await;
    assert_eq!(external_ip(&cluster, "a").await, "192.0.2.1");
    cluster.kubectl(&["patch", "svc", "a", "-p", r#"{"spec":{"type":"ClusterIP"}}"#]).await;
    assert_eq!(external_ip(&cluster, "a").await, "<none>");
    let left = cluster.kubectl(&["get", "svc", "a", "-o", "jsonpath={.status} {.spec.externalTrafficPolicy}"]).await;
    assert_eq!(left, r#"{"loadBalancer":{}} "#);

    let asking = |name: &str, ip: &str| {
        BALANCED.replace("NAME", name).replace("LoadBalancer,", &format!("LoadBalancer, loadBalancerIP: {ip},"))
    };
    cluster.apply(&asking("d", "192.0.2.2")).await;
    let told = ["get", "events", "--field-selector=reason=SyncLoadBalancerFailed,involvedObject.name=d"];
    eventually("d is told whose it is", || async {
        cluster.kubectl(&told).await.contains("loadBalancerIP 192.0.2.2 is taken by service default/c")
    })
    .await;
    assert_eq!(external_ip(&cluster, "d").await, "<pending>");
    cluster.apply(&asking("d", "192.0.2.1")).await;
    eventually("d has what it asks for now", || async { external_ip(&cluster, "d").await == "192.0.2.1" }).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn load_balancers_wait_where_there_is_no_pool() {
    let cluster = Cluster::start().await;
    cluster.apply(&BALANCED.replace("NAME", "a")).await;
    let told = ["get", "events", "--field-selector=reason=SyncLoadBalancerFailed"];
    eventually("it says what is missing", || async {
        cluster.kubectl(&told).await.contains("start sluice-control with --load-balancer-pool <range>")
    })
    .await;
    assert_eq!(external_ip(&cluster, "a").await, "<pending>");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_check_ports_are_node_ports_of_their_own() {
    let cluster = Cluster::start().await;
    let local = |name: &str, more: &str| {
        BALANCED.replace("NAME", name).replace("LoadBalancer,", &format!("LoadBalancer, {more}"))
    };
    let port = async |name: &str| {
        let ports = "jsonpath={.spec.healthCheckNodePort} {.spec.ports[*].nodePort}";
        cluster.kubectl(&["get", "svc", name, "-o", ports]).await
    };
    cluster.apply(&local("a", "externalTrafficPolicy: Local, healthCheckNodePort: 30100,")).await;
    assert!(port("a").await.starts_with("30100 3"), "{}", port("a").await);
    cluster.apply(&local("b", "externalTrafficPolicy: Local, allocateLoadBalancerNodePorts: false,")).await;
    let of_b = port("b").await;
    assert_eq!(of_b.split_whitespace().count(), 1, "a port for the check, none for the service: {of_b}");
    assert!((30_000..=32_767).contains(&of_b.trim().parse::<u16>().expect("a port")) && of_b.trim() != "30100");
    for (manifest, want) in [
        (
            local("c", "externalTrafficPolicy: Local, healthCheckNodePort: 30100,"),
            "failed to allocate requested HealthCheck NodePort 30100: provided port is already allocated",
        ),
        (
            local("c", "externalTrafficPolicy: Local, healthCheckNodePort: 80,"),
            "The range of valid ports is 30000-32767",
        ),
        (local("c", "").replace("port: 80", "port: 80, nodePort: 30100"), "provided port is already allocated"),
        (
            local("c", "externalTrafficPolicy: Local, healthCheckNodePort: 30101,")
                .replace("port: 80", "port: 80, nodePort: 30101"),
            "failed to allocate requested HealthCheck NodePort 30101",
        ),
        (local("c", "healthCheckNodePort: 30101,"), "may only be set when `type` is 'LoadBalancer'"),
        (local("a", "externalTrafficPolicy: Local, healthCheckNodePort: 30102,"), "field is immutable"),
    ] {
        let ran = cluster.kubectl_with(&["apply", "-f", "-"], &manifest).await;
        assert!(!ran.ok && ran.err.contains(want), "{want}: {}", ran.err);
    }
    // It goes with the policy, and its number is free again.
    cluster.kubectl(&["patch", "svc", "a", "-p", r#"{"spec":{"externalTrafficPolicy":"Cluster"}}"#]).await;
    assert!(port("a").await.starts_with(" 3"), "{}", port("a").await);
    cluster.apply(&local("c", "externalTrafficPolicy: Local, healthCheckNodePort: 30100,")).await;
    assert!(port("c").await.starts_with("30100 "));
    cluster.stop().await;
}

const GATEWAY: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge}
spec:
  gatewayClassName: sluice
  listeners:
  - {name: http, port: 80, protocol: HTTP}
";

/// What a Gateway is made of is made, is put right when somebody changes it, and goes with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_is_a_deployment_and_a_service() {
    let cluster = three_nodes().await;
    cluster.apply(GATEWAY).await;
    let get = |what: &'static str, path: &'static str| {
        let cluster = &cluster;
        async move { cluster.kubectl_with(&["get", what, "-o", path], "").await.out }
    };
    eventually("it has a service", || async { !get("svc/edge-sluice", "name").await.is_empty() }).await;
    cluster.kubectl(&["rollout", "status", "deploy/edge-sluice", "--timeout=20s"]).await;
    let class = cluster.kubectl(&["get", "gatewayclass"]).await;
    assert!(class.contains("sluice.dev/gateway"), "{class}");
    let listed = cluster.kubectl(&["get", "gateway"]).await;
    for want in ["NAME", "CLASS", "ADDRESS", "PROGRAMMED", "edge", "sluice"] {
        assert!(listed.contains(want), "{listed}");
    }
    let (ports, kind) = ("jsonpath={.spec.ports[*].port}", "jsonpath={.spec.type}/{.spec.externalTrafficPolicy}");
    assert_eq!(get("svc/edge-sluice", ports).await, "80");
    assert_eq!(get("svc/edge-sluice", kind).await, "LoadBalancer/Local");
    let revision = get("deploy/edge-sluice", "jsonpath={.metadata.generation}").await;
    // A listener more changes the service and replaces no pod.
    let more = GATEWAY.replace("HTTP}\n", "HTTP}\n  - {name: more, port: 8080, protocol: HTTP, hostname: a.example}\n");
    cluster.apply(&more).await;
    eventually("the service has its port", || async { get("svc/edge-sluice", ports).await == "80 8080" }).await;
    assert_eq!(get("deploy/edge-sluice", "jsonpath={.metadata.generation}").await, revision);
    cluster.kubectl(&["scale", "deploy/edge-sluice", "--replicas=2"]).await;
    cluster.kubectl(&["patch", "svc/edge-sluice", "-p", "{\"spec\":{\"selector\":{\"app\":\"x\"}}}"]).await;
    let selector = "jsonpath={.spec.selector.gateway\\.networking\\.k8s\\.io/gateway-name}";
    cluster.kubectl(&["annotate", "gateway/edge", "sluice.dev/service-type=NodePort"]).await;
    eventually("the service is of another type", || async { get("svc/edge-sluice", kind).await == "NodePort/Local" })
        .await;
    assert_eq!(get("svc/edge-sluice", selector).await, "edge");
    assert_eq!(get("deploy/edge-sluice", "jsonpath={.spec.replicas}").await, "2", "that is whoever scales it");
    cluster.kubectl(&["delete", "gateway", "edge"]).await;
    eventually("all of it goes", || async {
        let left = cluster.kubectl(&["get", "deploy,svc,sa", "-o", "name"]).await;
        !left.contains("edge-sluice")
    })
    .await;
    let wrong = cluster.kubectl_with(&["apply", "-f", "-"], &GATEWAY.replace("port: 80,", "port: 0,")).await;
    assert!(!wrong.ok && wrong.err.contains("spec.listeners[0].port"), "{}", wrong.err);
    cluster.stop().await;
}
