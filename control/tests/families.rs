//! Clusters of one family and of both, by the unmodified kubectl: who has which addresses, across restarts of control.

mod support;

use support::{Cluster, eventually};

const SERVICES: &str = "10.96.0.0/16,fd00:96::/112";
const PODS: &str = "10.244.0.0/16,fd00:244::/56";

const WEB: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ipFamilyPolicy: PreferDualStack, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: six}
spec: {ipFamilies: [IPv6], selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: pods}
spec: {clusterIP: None, ipFamilyPolicy: RequireDualStack, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: web}]}
"#;

async fn field(cluster: &Cluster, object: &str, path: &str) -> String {
    cluster.kubectl(&["get", object, "-o", &format!("jsonpath={{{path}}}")]).await
}

async fn refused(cluster: &Cluster, patch: &str, object: &str) -> String {
    let ran = cluster.kubectl_with(&["patch", object, "-p", patch], "").await;
    assert!(!ran.ok, "{}", ran.out);
    ran.err
}

/// Families and numbers of endpoints of a service's slices.
async fn slices(cluster: &Cluster, service: &str) -> Vec<String> {
    let label = format!("kubernetes.io/service-name={service}");
    let path = "jsonpath={range .items[*]}{.addressType} {.endpoints[*].addresses[*]}{\"\\n\"}{end}";
    let text = cluster.kubectl(&["get", "endpointslices", "-l", &label, "-o", path]).await;
    let count = |line: &str| {
        let mut words = line.split_whitespace();
        format!("{} {}", words.next().unwrap_or_default(), words.count())
    };
    let mut all: Vec<String> = text.lines().map(count).collect();
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn both_families_are_given_shown_and_kept() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut cluster = Cluster::start_with_ranges(dir, SERVICES, PODS).await;
    cluster.add_node("n1", "4").await;
    cluster.apply(WEB).await;
    cluster.kubectl(&["rollout", "status", "deploy/web", "--timeout=20s"]).await;
    eventually("the node has a range of each family", || async {
        field(&cluster, "node/n1", ".spec.podCIDRs").await == r#"["10.244.1.0/24","fd00:244:0:1::/64"]"#
    })
    .await;
    let (path, families) = (".spec.clusterIPs", ".spec.ipFamilies");
    assert_eq!(field(&cluster, "svc/kubernetes", path).await, r#"["10.96.0.1","fd00:96::1"]"#);
    let dns =
        cluster.kubectl(&["-n", "kube-system", "get", "svc", "kube-dns", "-o", "jsonpath={.spec.clusterIPs}"]).await;
    assert_eq!(dns, r#"["10.96.0.10","fd00:96::a"]"#);
    let given = field(&cluster, "svc/web", path).await;
    let both: Vec<String> = serde_json::from_str(&given).expect("addresses");
    assert!(both[0].starts_with("10.96.") && both[1].starts_with("fd00:96::"), "{given}");
    assert_eq!(field(&cluster, "svc/six", families).await, r#"["IPv6"]"#);
    assert!(field(&cluster, "svc/six", ".spec.clusterIP").await.starts_with("fd00:96::"));
    assert_eq!(field(&cluster, "svc/pods", families).await, r#"["IPv4","IPv6"]"#);
    for (service, want) in [("web", &["IPv4 2", "IPv6 2"][..]), ("six", &["IPv6 2"]), ("pods", &["IPv4 2", "IPv6 2"])] {
        eventually(service, || async { slices(&cluster, service).await == want }).await;
    }
    let shown = cluster.kubectl(&["get", "svc", "web", "-o", "wide"]).await;
    assert!(shown.contains(&both.join(",")), "{shown}");
    let described = cluster.kubectl(&["describe", "svc", "web"]).await;
    assert!(described.contains("PreferDualStack") && described.contains(&both[1]), "{described}");
    let shown = cluster.kubectl(&["get", "pods", "-o", "wide"]).await;
    assert!(shown.contains(",fd00:244:0:1::"), "{shown}");

    // What nobody changes stays, whoever writes; and across a restart of control.
    cluster.kubectl(&["patch", "svc", "web", "-p", r#"{"spec":{"sessionAffinity":"ClientIP"}}"#]).await;
    let cluster = Cluster::start_with_ranges(cluster.stop().await, SERVICES, PODS).await;
    cluster.apply(WEB).await;
    assert_eq!(field(&cluster, "svc/web", path).await, given);
    let taken = WEB.replace("{name: web}", "{name: thief}").replace(
        "ipFamilyPolicy: PreferDualStack",
        &format!("clusterIP: '{0}', clusterIPs: ['{0}'], ipFamilyPolicy: SingleStack", both[1].replace("fd00", "FD00")),
    );
    let thief = taken.split("---").next().expect("a first object");
    let ran = cluster.kubectl_with(&["create", "-f", "-"], thief).await;
    assert!(!ran.ok && ran.err.contains("provided IP is already allocated"), "{}{}", ran.out, ran.err);

    // Back to one family: the second address is free at once.
    let error = refused(&cluster, r#"{"spec":{"clusterIPs":["10.96.9.9"],"clusterIP":"10.96.9.9"}}"#, "svc/web").await;
    assert!(error.contains("may not change once set"), "{error}");
    cluster.kubectl(&["patch", "svc", "web", "-p", r#"{"spec":{"ipFamilyPolicy":"SingleStack"}}"#]).await;
    assert_eq!(field(&cluster, "svc/web", path).await, format!("[\"{}\"]", both[0]));
    let ran = cluster.kubectl_with(&["create", "-f", "-"], thief).await;
    assert!(ran.ok, "{}", ran.err);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clusters_of_one_family_refuse_the_other_until_they_have_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start_with_ranges(dir, "fd00:96::/112", "fd00:244::/56").await;
    let prefer = WEB.split("---").next().expect("a first object");
    cluster.apply(prefer).await;
    assert_eq!(field(&cluster, "svc/web", ".spec.ipFamilies").await, r#"["IPv6"]"#);
    let ran = cluster.kubectl_with(&["apply", "-f", "-"], &WEB.replace("[IPv6]", "[IPv4]")).await;
    assert!(
        ran.err.contains("spec.ipFamilies[0]: Invalid value: \"IPv4\": not configured on this cluster"),
        "{}",
        ran.err
    );
    let error = refused(&cluster, r#"{"spec":{"ipFamilyPolicy":"RequireDualStack"}}"#, "svc/web").await;
    assert!(error.contains("this cluster is not configured for dual-stack services"), "{error}");

    let cluster = Cluster::start_with_ranges(cluster.stop().await, "fd00:96::/112,10.96.0.0/16", PODS).await;
    cluster.kubectl(&["label", "svc", "web", "a=b"]).await;
    assert_eq!(field(&cluster, "svc/web", ".spec.ipFamilies").await, r#"["IPv6"]"#, "nobody asked for more");
    cluster.kubectl(&["patch", "svc", "web", "-p", r#"{"spec":{"ipFamilyPolicy":"RequireDualStack"}}"#]).await;
    assert_eq!(field(&cluster, "svc/web", ".spec.ipFamilies").await, r#"["IPv6","IPv4"]"#);
    assert!(field(&cluster, "svc/web", ".spec.clusterIPs[1]").await.starts_with("10.96."));
    cluster.stop().await;
}
