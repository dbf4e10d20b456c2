use super::*;
use serde_json::{Value, json};

fn put<T: serde::de::DeserializeOwned>(map: &mut BTreeMap<m::Name, Arc<T>>, name: &str, mut object: Value) {
    object["metadata"]["name"] = name.into();
    object["metadata"]["namespace"] = "shop".into();
    map.insert(m::Name::new("shop", name), Arc::new(serde_json::from_value(object).expect(name)));
}

fn objects() -> Objects {
    let mut o = Objects::default();
    for (name, ip) in [("web", "10.96.0.5"), ("web-v1", "10.96.0.6"), ("web-v2", "10.96.0.7")] {
        let spec = json!({"spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}});
        put(&mut o.services, name, spec);
    }
    let pod = json!({
        "metadata": {"uid": "u", "annotations": {"sluice.dev/sidecar": "injected", "sluice.dev/mtls": "strict"}},
        "spec": {"nodeName": "n1", "containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.244.0.5"}]}
    });
    put(&mut o.pods, "p1", pod);
    o
}

fn slice(conditions: &[Value]) -> Value {
    let endpoints: Vec<_> = conditions
        .iter()
        .enumerate()
        .map(|(i, c)| {
            json!({"addresses": [format!("10.244.0.{}", 5 + i)], "conditions": c, "nodeName": "n1",
                   "targetRef": {"kind": "Pod", "name": format!("p{}", i + 1)}})
        })
        .collect();
    json!({"metadata": {"labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
           "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]})
}

fn snapshot(o: &Objects) -> (m::Snapshot, Vec<RouteStatus>) {
    let c = compile(o, "cluster.local", &"192.0.2.0/29".parse().expect("a pool"));
    (m::Snapshot::new(m::Revision(1), c.resources), c.routes)
}

#[test]
fn services_endpoints_and_workloads_carry_their_identity() {
    let mut o = objects();
    put(&mut o.slices, "web-abc", slice(&[json!({"ready": true}), json!({"ready": false})]));
    let (s, _) = snapshot(&o);
    let set = s.endpoint_set(&m::Name::new("shop", "web")).expect("a set");
    let id: m::Identity = "spiffe://cluster.local/ns/shop/sa/default".parse().expect("an identity");
    assert_eq!(set.endpoints[0].mesh, m::Mesh::Mtls(id.clone()));
    assert_eq!(set.endpoints[1].mesh, m::Mesh::Plain, "a pod nobody knows takes no mTLS");
    let ready: Vec<_> = set.ready_on("http", m::Protocol::Tcp).map(|(e, p)| (e.address.to_string(), p)).collect();
    assert_eq!(ready, [("10.244.0.5".to_owned(), 8080)]);
    let w = s.workload(&m::Name::new("shop", "p1")).expect("a workload");
    assert!(w.meshed && w.identity == id);
    assert_eq!(s.policy(&w.name).expect("a policy").mode, m::InboundMode::Strict);
}

#[test]
fn a_port_that_one_of_its_pods_calls_opaque_is_not_read_by_callers() {
    for (name, annotated, read) in [
        ("", "9000", m::AppProtocol::Detect),
        ("", "9000, 8080", m::AppProtocol::Tcp),
        ("web", "8080", m::AppProtocol::Tcp),
        ("http", "8080", m::AppProtocol::Http),
        ("grpc", "8080", m::AppProtocol::Http2),
    ] {
        let mut o = objects();
        let ports = json!([{"name": name, "port": 80}, {"name": "other", "port": 81}]);
        put(&mut o.services, "web", json!({"spec": {"clusterIP": "10.96.0.5", "ports": ports}}));
        let mut slice = slice(&[json!({"ready": true}), json!({"ready": true})]);
        slice["ports"] = json!([{"name": name, "port": 8080}, {"name": "other", "port": 8081}]);
        put(&mut o.slices, "web-abc", slice);
        let mut pod = json!({"spec": {"containers": []}});
        pod["metadata"]["annotations"][inject::ANNOTATION_OPAQUE_PORTS] = annotated.into();
        put(&mut o.pods, "p2", pod);
        let (s, _) = snapshot(&o);
        let seen: Vec<_> =
            s.service(&m::Name::new("shop", "web")).expect("it").ports.iter().map(|p| p.app_protocol).collect();
        assert_eq!(seen, [read, m::AppProtocol::Detect], "{name:?} {annotated:?}");
    }
}

#[test]
fn with_no_ready_endpoint_those_still_serving_take_the_traffic() {
    let stopping = json!({"ready": false, "serving": true, "terminating": true});
    for (conditions, ready) in [
        (vec![stopping.clone(), json!({"ready": false, "serving": false})], vec![true, false]),
        (vec![stopping, json!({"ready": true})], vec![false, true]),
    ] {
        let mut o = objects();
        put(&mut o.slices, "web-abc", slice(&conditions));
        let (s, _) = snapshot(&o);
        let set = s.endpoint_set(&m::Name::new("shop", "web")).expect("a set");
        assert_eq!(set.endpoints.iter().map(|e| e.ready).collect::<Vec<_>>(), ready);
    }
}

#[test]
fn each_family_has_its_own_endpoints_and_its_own_fallback() {
    let stopping = json!({"ready": false, "serving": true, "terminating": true});
    let mut o = objects();
    let mut web = (*o.services[&m::Name::new("shop", "web")]).clone();
    web.spec.as_mut().expect("a spec").cluster_ips = Some(vec!["10.96.0.5".into(), "fd00:96::5".into()]);
    o.services.insert(m::Name::new("shop", "web"), Arc::new(web));
    put(&mut o.slices, "web-v4", slice(&[json!({"ready": true}), stopping.clone()]));
    let mut v6 = slice(&[stopping]);
    v6["addressType"] = json!("IPv6");
    v6["endpoints"][0]["addresses"] = json!(["fd00:244::5"]);
    put(&mut o.slices, "web-v6", v6);
    let (s, _) = snapshot(&o);
    let name = m::Name::new("shop", "web");
    let addresses: Vec<String> = s.service(&name).expect("web").addresses().map(|ip| ip.to_string()).collect();
    assert_eq!(addresses, ["10.96.0.5", "fd00:96::5"]);
    let set = s.endpoint_set(&name).expect("a set");
    let seen: Vec<_> = set.endpoints.iter().map(|e| (e.address.to_string(), e.ready)).collect();
    let want = [("10.244.0.5", true), ("10.244.0.6", false), ("fd00:244::5", true)];
    assert_eq!(seen, want.map(|(ip, ready)| (ip.to_owned(), ready)), "IPv6 has no other than what terminates");
}

#[test]
fn how_callers_from_outside_reach_a_service() {
    let mut o = objects();
    let node = json!({"metadata": {"name": "n1"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    o.nodes.insert(m::Name::cluster("n1"), Arc::new(serde_json::from_value(node).expect("a node")));
    put(&mut o.slices, "web-abc", slice(&[json!({"ready": true})]));
    for (spec, policy, node_port, health_check) in [
        (json!({"type": "ClusterIP"}), m::ExternalPolicy::Cluster, None, None),
        (
            json!({"type": "NodePort", "externalTrafficPolicy": "Cluster"}),
            m::ExternalPolicy::Cluster,
            Some(30_080),
            None,
        ),
        (
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_100}),
            m::ExternalPolicy::Local,
            Some(30_080),
            Some(30_100),
        ),
    ] {
        let mut object = json!({"spec": spec, "status": {"loadBalancer": {"ingress": [
            {"ip": "192.0.2.1", "ipMode": "VIP"}, {"ip": "192.0.2.9"}, {"ip": "192.0.2.2", "ipMode": "Proxy"}]}}});
        object["spec"]["clusterIP"] = json!("10.96.0.5");
        object["spec"]["externalIPs"] = json!(["192.0.2.3"]);
        object["spec"]["ports"] = json!([{"name": "http", "port": 80, "nodePort": node_port}]);
        put(&mut o.services, "web", object);
        let (s, _) = snapshot(&o);
        let web = s.service(&m::Name::new("shop", "web")).expect("a service");
        let seen = (web.external_policy, web.ports[0].node_port, web.health_check_node_port);
        assert_eq!(seen, (policy, node_port, health_check), "{spec}");
        let announced: Vec<_> = web.announcements.iter().map(|a| (a.address.to_string(), a.node.as_str())).collect();
        let of_the_pool = vec![("192.0.2.1".to_owned(), "n1")];
        assert_eq!(announced, if spec["type"] == "LoadBalancer" { of_the_pool } else { vec![] }, "{spec}");
    }
}

#[test]
fn who_may_use_the_load_balancers_addresses() {
    const OLD: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
    let table = [
        ("LoadBalancer", json!(null), None, None),
        ("LoadBalancer", json!([]), Some(" "), None),
        (
            "LoadBalancer",
            json!(["2001:db8::/32", " 10.1.2.3/8 ", "10.0.0.0/8"]),
            None,
            Some(vec!["10.0.0.0/8", "2001:db8::/32"]),
        ),
        ("LoadBalancer", json!(["10.0.0.0/8"]), Some("192.0.2.0/24"), Some(vec!["10.0.0.0/8"])),
        ("LoadBalancer", json!([]), Some("192.0.2.0/24, 10.0.0.0/8"), Some(vec!["10.0.0.0/8", "192.0.2.0/24"])),
        ("LoadBalancer", json!(["010.0.0.0/8"]), None, Some(vec![])),
        ("ClusterIP", json!(["10.0.0.0/8"]), None, None),
    ];
    for (kind, ranges, annotation, want) in table {
        let mut object = json!({
            "spec": {"type": kind, "clusterIP": "10.96.0.5", "ports": [{"name": "http", "port": 80}],
                "externalIPs": ["192.0.2.7"], "loadBalancerSourceRanges": ranges},
            "status": {"loadBalancer": {"ingress": [
                {"ip": "192.0.2.8"}, {"ip": "2001:db8::8"}, {"ip": "192.0.2.9", "ipMode": "Proxy"}, {"ip": "127.0.0.1"}]}}});
        if let Some(text) = annotation {
            object["metadata"]["annotations"][OLD] = json!(text);
        }
        let mut o = objects();
        put(&mut o.services, "web", object);
        let (s, _) = snapshot(&o);
        let web = s.service(&m::Name::new("shop", "web")).expect("a service");
        let restricted: Vec<String> = web.restricted_ips.iter().map(ToString::to_string).collect();
        let of_the_balancer: &[&str] = if want.is_some() { &["192.0.2.8", "2001:db8::8"] } else { &[] };
        assert_eq!(restricted, of_the_balancer, "{kind} {ranges} {annotation:?}");
        let found: Vec<String> = web.source_ranges.iter().map(ToString::to_string).collect();
        assert_eq!(found, want.unwrap_or_default(), "{kind} {ranges} {annotation:?}");
    }
}

#[test]
fn an_external_name_is_an_alias_and_nothing_else() {
    let mut o = objects();
    let spec = json!({"type": "ExternalName", "externalName": "DB.Example.org.", "ports": [{"port": 80}],
                      "externalIPs": ["192.0.2.3"]});
    put(&mut o.services, "db", json!({"spec": spec}));
    let (s, _) = snapshot(&o);
    let name = m::Name::new("shop", "db");
    let alias =
        m::Service { name: name.clone(), external_name: Some("db.example.org".into()), ..m::Service::default() };
    assert_eq!(s.service(&name), Some(&alias));
    let web = s.service(&m::Name::new("shop", "web")).expect("a service");
    assert_eq!(web.external_name, None);
}

#[test]
fn how_a_service_may_be_reached() {
    let mut o = objects();
    put(
        &mut o.services,
        "web",
        json!({"spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.5", "ports": [{"name": "http", "port": 80}],
            "externalIPs": ["192.0.2.7"], "sessionAffinity": "ClientIP", "internalTrafficPolicy": "Local",
            "trafficDistribution": "PreferSameNode"},
          "status": {"loadBalancer": {"ingress": [
            {"ip": "192.0.2.8"}, {"ip": "192.0.2.9", "ipMode": "Proxy"}, {"hostname": "lb.example.org"},
            {"ip": "127.0.0.1"}, {"ip": "::ffff:169.254.1.1"}, {"ip": "::ffff:192.0.2.8"}, {"ip": ""}, {"ip": "x"}]}}}),
    );
    let node = json!({"metadata": {"labels": {"topology.kubernetes.io/zone": "a"}}});
    o.nodes.insert(m::Name::cluster("n1"), Arc::new(serde_json::from_value(node).expect("a node")));
    let draining = json!({"ready": false, "serving": true, "terminating": true});
    put(&mut o.slices, "web-abc", slice(&[json!({"ready": true}), draining]));
    let (s, _) = snapshot(&o);
    let web = s.service(&m::Name::new("shop", "web")).expect("a service");
    let external: Vec<String> = web.external_ips.iter().map(ToString::to_string).collect();
    assert_eq!(external, ["192.0.2.7", "192.0.2.8"], "what is reached through the balancer itself is left to it");
    assert_eq!(web.affinity_s, Some(10_800));
    assert_eq!((web.internal_policy, web.distribution), (m::InternalPolicy::Local, m::Distribution::SameNode));
    let set = s.endpoint_set(&web.name).expect("a set");
    let seen: Vec<_> = set.endpoints.iter().map(|e| (e.ready, e.draining, e.zone.as_str())).collect();
    assert_eq!(seen, [(true, false, "a"), (false, true, "a")]);
    // Published before they are ready, and until they are gone: they take traffic, whatever the service serves meanwhile.
    let early = json!({"ready": true, "serving": false, "terminating": false});
    let late = json!({"ready": true, "serving": true, "terminating": true});
    put(
        &mut o.slices,
        "web-abc",
        slice(&[early, late, json!({"ready": false, "serving": false, "terminating": true})]),
    );
    let (s, _) = snapshot(&o);
    let set = s.endpoint_set(&m::Name::new("shop", "web")).expect("a set");
    assert_eq!(set.endpoints.iter().map(|e| e.ready).collect::<Vec<_>>(), [true, true, false]);
    let plain = s.service(&m::Name::new("shop", "web-v1")).expect("a service");
    assert_eq!((plain.affinity_s, plain.internal_policy), (None, m::InternalPolicy::Cluster));
}

fn route(rules: Value) -> Value {
    json!({"metadata": {"generation": 3, "creationTimestamp": "2026-01-01T00:00:00Z"},
           "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "web", "port": 80}], "rules": rules}})
}

fn split(v2: &str) -> Value {
    json!([{"matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
            "backendRefs": [{"name": "web-v1", "port": 80, "weight": 90}, {"name": v2, "port": 80, "weight": 10}]}])
}

#[test]
fn a_split_compiles_to_weights() {
    let mut o = objects();
    put(&mut o.http_routes, "canary", route(split("web-v2")));
    let (s, statuses) = snapshot(&o);
    let r = s.route(&m::Name::new("shop", "canary")).expect("a route");
    assert_eq!((r.parent.name.as_str(), r.parent_port, r.generation), ("web", Some(80), 3));
    let weights: Vec<_> = r.rules[0].backends.iter().map(|b| (b.service.name.as_str(), b.weight)).collect();
    assert_eq!(weights, [("web-v1", 90), ("web-v2", 10)]);
    assert!(r.rules[0].catch_all());
    let p = &statuses[0].parents[0];
    assert_eq!((p.accepted.clone(), p.resolved.clone()), (Ok(()), Ok(())));
    assert_eq!(p.unmeshed, Unmeshed::Rule(0));
}

#[test]
fn routes_of_one_name_and_one_service_do_not_hide_each_other() {
    let mut o = objects();
    let mut old = route(split("web-v2"));
    old["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
    let mut young = route(split("web-v2"));
    young["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z".into();
    let tcp = json!({"spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "web-v1"}],
                     "rules": [{"backendRefs": [{"name": "web-v2", "port": 80}]}]}});
    put(&mut o.http_routes, "canary", old);
    put(&mut o.http_routes, "later", young);
    put(&mut o.tcp_routes, "canary", tcp);
    let (s, statuses) = snapshot(&o);
    assert_eq!(s.routes().map(|r| r.kind).collect::<Vec<_>>().len(), 3, "an HTTPRoute and a TCPRoute of one name");
    let unmeshed: Vec<_> = statuses.iter().map(|r| r.parents[0].unmeshed.clone()).collect();
    let older = Unmeshed::Older(m::Name::new("shop", "canary"));
    assert_eq!(unmeshed, [Unmeshed::Rule(0), older, Unmeshed::Rule(0)]);
}

#[test]
fn a_missing_backend_keeps_its_share_and_is_reported() {
    let mut o = objects();
    put(&mut o.http_routes, "canary", route(split("nope")));
    let (s, statuses) = snapshot(&o);
    let r = s.route(&m::Name::new("shop", "canary")).expect("a route");
    assert_eq!(r.rules[0].backends.iter().map(|b| b.weight).sum::<u32>(), 100);
    assert!(matches!(&statuses[0].parents[0].resolved, Err(("BackendNotFound", _))));
}

#[test]
fn what_sluice_does_not_do_is_refused_whole() {
    for rules in [
        json!([{"filters": [{"type": "URLRewrite"}]}]),
        json!([{"filters": [{"type": "CORS", "cors": {}}]}]),
        json!([{"matches": [{"path": {"type": "RegularExpression", "value": "("}}]}]),
        json!([{"backendRefs": [{"name": "web-v1", "port": 80, "filters": [{"type": "RequestMirror"}]}]}]),
        json!([{"filters": [{"type": "ExtensionRef", "extensionRef": {"group": "x", "kind": "Y", "name": "z"}}]}]),
        json!([{"timeouts": {"request": "1.5s"}}]),
    ] {
        let mut o = objects();
        put(&mut o.http_routes, "canary", route(rules.clone()));
        let (s, statuses) = snapshot(&o);
        assert!(s.routes().next().is_none(), "{rules}");
        assert!(matches!(&statuses[0].parents[0].accepted, Err(("UnsupportedValue", _))), "{rules}");
    }
}

#[test]
fn parents_that_do_not_fit_are_not_accepted_and_gateways_left_alone() {
    for (parent, reason) in [
        (json!({"group": "", "kind": "Service", "name": "nope"}), Some("NoMatchingParent")),
        (json!({"group": "", "kind": "Service", "name": "web", "port": 81}), Some("NoMatchingParent")),
        (json!({"group": "", "kind": "Service", "name": "web", "namespace": "other"}), Some("NoMatchingParent")),
        (json!({"name": "gw"}), None),
    ] {
        let mut o = objects();
        let mut r = route(split("web-v2"));
        r["spec"]["parentRefs"] = json!([parent]);
        put(&mut o.http_routes, "canary", r);
        let (s, statuses) = snapshot(&o);
        assert!(s.routes().next().is_none());
        let got = statuses[0].parents.first().map(|p| p.accepted.clone().expect_err("refused").0);
        assert_eq!(got, reason);
    }
}

#[test]
fn routes_of_consumers_are_for_callers_of_their_namespace() {
    let mut o = objects();
    let parent = json!({"group": "", "kind": "Service", "name": "web", "namespace": "shop"});
    let spec = json!({"parentRefs": [parent], "rules": [{"timeouts": {"request": "1s"},
                      "backendRefs": [{"name": "web", "namespace": "shop", "port": 80}]}]});
    let own = json!({"metadata": {"name": "mine", "namespace": "team"}, "spec": spec});
    o.http_routes.insert(m::Name::new("team", "mine"), Arc::new(serde_json::from_value(own).expect("a route")));
    put(&mut o.http_routes, "canary", route(split("web-v2")));
    let of = |statuses: &[RouteStatus], name: &str| {
        let status = statuses.iter().find(|s| s.name.name == name).expect("a status");
        status.parents[0].clone()
    };
    let (_, statuses) = snapshot(&o);
    let mine = of(&statuses, "mine");
    assert_eq!((&mine.accepted, &mine.unmeshed), (&Ok(()), &Unmeshed::Producer));
    assert!(matches!(&mine.resolved, Err(("RefNotPermitted", _))), "backends there ask for a grant as ever");
    assert_eq!(of(&statuses, "canary").unmeshed, Unmeshed::Rule(0), "it does not count as the older one");
    let grant = json!({"spec": {"from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "team"}],
                                "to": [{"group": "", "kind": "Service"}]}});
    put(&mut o.grants, "team", grant);
    let (s, statuses) = snapshot(&o);
    assert_eq!(of(&statuses, "mine").resolved, Ok(()));
    let web = m::Name::new("shop", "web");
    let followed =
        |namespace: &str| s.routes_from(namespace, &web, 80).iter().map(|r| r.name.to_string()).collect::<Vec<_>>();
    assert_eq!(followed("team"), ["team/mine"]);
    assert_eq!(followed("shop"), ["shop/canary"]);
    assert_eq!(followed("third"), ["shop/canary"]);
}

#[test]
fn rules_carry_all_that_a_route_asks() {
    let mut o = objects();
    let spec = json!({"rateLimit": {"requests": 5}, "maxRequestBytes": 10,
                      "fault": {"delay": {"duration": "100ms", "percent": 50}, "abort": {"status": 503}}});
    put(&mut o.route_filters, "limits", json!({"spec": spec}));
    let rules = json!([{
        "matches": [{"path": {"type": "RegularExpression", "value": "/a[0-9]"},
                     "queryParams": [{"name": "q", "value": "1"}],
                     "headers": [{"name": "X-Team", "type": "RegularExpression", "value": "a|b"}]}],
        "filters": [
            {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "X-A", "value": "1"}]}},
            {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"remove": ["X-B"]}},
            {"type": "URLRewrite", "urlRewrite": {"hostname": "h", "path": {"type": "ReplacePrefixMatch",
                                                                            "replacePrefixMatch": "/x"}}},
            {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "web-v2", "port": 80}, "percent": 5}},
            {"type": "ExtensionRef", "extensionRef": {"group": "sluice.dev", "kind": "RouteFilter", "name": "limits"}}
        ],
        "timeouts": {"request": "10s", "backendRequest": "0s"},
        "retry": {"codes": [503], "attempts": 2, "backoff": "100ms"},
        "sessionPersistence": {"sessionName": "version"},
        "backendRefs": [{"name": "web-v1", "port": 80, "filters": [
            {"type": "RequestHeaderModifier", "requestHeaderModifier": {"add": [{"name": "y", "value": "2"}]}}]}]
    }]);
    put(&mut o.http_routes, "canary", route(rules));
    let (s, statuses) = snapshot(&o);
    assert_eq!(statuses[0].parents[0].accepted, Ok(()));
    let rule = &s.route(&m::Name::new("shop", "canary")).expect("a route").rules[0];
    assert!(matches!(&rule.matches[0].path, m::PathMatch::Regex(p) if p.as_str() == "/a[0-9]"));
    assert_eq!((rule.matches[0].query.len(), rule.matches[0].headers[0].name.as_str()), (1, "x-team"));
    assert_eq!(rule.filters.request_headers.set, [("x-a".to_owned(), "1".to_owned())]);
    assert_eq!(rule.filters.response_headers.remove, ["x-b"]);
    assert_eq!(rule.filters.mirrors[0].share, m::Fraction { numerator: 5, denominator: 100 });
    assert_eq!(rule.timeouts, m::Timeouts { request_ms: Some(10_000), backend_request_ms: None });
    assert_eq!(rule.retry, Some(m::Retry { codes: vec![503], attempts: Some(2), backoff_ms: Some(100) }));
    assert_eq!(rule.sticky, Some(m::Sticky::Cookie("version".into())));
    assert_eq!(rule.rate_limit, Some(m::RateLimit { requests: 5, per_ms: 1000, burst: 5 }));
    assert_eq!(rule.max_body_bytes, Some(10));
    assert_eq!(rule.fault.delay, Some((100, m::Fraction { numerator: 50, denominator: 100 })));
    assert_eq!(rule.backends[0].filters.request_headers.add.len(), 1);
    assert!(!rule.catch_all());
}

#[test]
fn a_filter_that_is_not_there_keeps_its_route_out() {
    let mut o = objects();
    let reference = json!({"group": "sluice.dev", "kind": "RouteFilter", "name": "gone"});
    put(
        &mut o.http_routes,
        "canary",
        route(json!([{"filters": [{"type": "ExtensionRef", "extensionRef": reference}]}])),
    );
    let (s, statuses) = snapshot(&o);
    assert!(s.routes().next().is_none());
    assert!(matches!(&statuses[0].parents[0].accepted, Err(("FilterNotFound", _))));
}

#[test]
fn grpc_methods_become_paths_and_tls_routes_go_by_name() {
    let mut o = objects();
    let parent = json!([{"group": "", "kind": "Service", "name": "web"}]);
    let method = |service: Value, method: Value, kind: &str| json!({"method": {"type": kind, "service": service, "method": method}});
    let grpc = json!({"spec": {"parentRefs": parent, "rules": [{"matches": [
        method("a.B".into(), "Get".into(), "Exact"),
        method("a.B".into(), Value::Null, "Exact"),
        method(Value::Null, "Get".into(), "Exact"),
        method("a\\..*".into(), Value::Null, "RegularExpression"),
    ], "backendRefs": [{"name": "web-v1", "port": 80}]}]}});
    put(&mut o.grpc_routes, "g", grpc);
    let tls = json!({"spec": {"parentRefs": parent, "hostnames": ["A.example"],
                              "rules": [{"backendRefs": [{"name": "web-v2", "port": 80}]}]}});
    put(&mut o.tls_routes, "t", tls);
    let (s, statuses) = snapshot(&o);
    assert!(statuses.iter().all(|r| r.parents[0].accepted.is_ok()), "{statuses:?}");
    let grpc = s.routes().find(|r| r.kind == m::RouteKind::Grpc).expect("a route");
    let paths: Vec<String> = grpc.rules[0].matches.iter().map(|x| format!("{:?}", x.path)).collect();
    assert_eq!(
        paths,
        ["Exact(\"/a.B/Get\")", "Prefix(\"/a.B\")", "Regex(//[^/]+/Get/)", "Regex(//(?:a\\..*)/(?:[^/]+)/)"]
    );
    let tls = s.routes().find(|r| r.kind == m::RouteKind::Tls).expect("a route");
    assert_eq!(tls.rules[0].matches[0].hosts, ["a.example"]);
    assert!(!tls.rules[0].catch_all(), "callers without a sidecar do not follow it");
}

#[test]
fn another_namespaces_service_needs_its_leave() {
    let mut o = objects();
    let web = o.services[&m::Name::new("shop", "web-v2")].as_ref().clone();
    o.services.insert(m::Name::new("other", "web-v2"), Arc::new(web));
    let rules = json!([{"backendRefs": [{"name": "web-v2", "namespace": "other", "port": 80}]}]);
    put(&mut o.http_routes, "canary", route(rules));
    let resolved = |o: &Objects| snapshot(o).1[0].parents[0].resolved.clone();
    assert!(matches!(resolved(&o), Err(("RefNotPermitted", _))));
    let grant = |kind: &str, name: &str| {
        let from = json!([{"group": "gateway.networking.k8s.io", "kind": kind, "namespace": "shop"}]);
        let to = json!([{"group": "", "kind": "Service", "name": name}]);
        Arc::new(serde_json::from_value(json!({"metadata": {}, "spec": {"from": from, "to": to}})).expect("a grant"))
    };
    for (kind, name, allowed) in
        [("TCPRoute", "web-v2", false), ("HTTPRoute", "web", false), ("HTTPRoute", "web-v2", true)]
    {
        o.grants.insert(m::Name::new("other", "g"), grant(kind, name));
        assert_eq!(resolved(&o).is_ok(), allowed, "{kind} {name}");
    }
}

#[test]
fn policies_reach_their_services_and_pods() {
    let mut o = objects();
    let policy = |at: &str, spec: Value| json!({"metadata": {"creationTimestamp": at}, "spec": spec});
    let to_web = json!([{"kind": "Service", "name": "web"}]);
    let young = json!({"targetRefs": to_web, "balancing": {"policy": "RoundRobin"}});
    let old = json!({"targetRefs": to_web, "balancing": {"policy": "Maglev", "hashOn": {"header": "X-User"}},
                     "outlierDetection": {"consecutiveFailures": 3}, "slowStart": "30s", "whenEmpty": "Redistribute"});
    put(&mut o.backend_policies, "a-young", policy("2026-01-02T00:00:00Z", young));
    put(&mut o.backend_policies, "b-old", policy("2026-01-01T00:00:00Z", old));
    let (s, _) = snapshot(&o);
    let got = s.service(&m::Name::new("shop", "web")).expect("a service").backend_policy.clone().expect("a policy");
    assert_eq!(got.balance, m::Balance::Maglev(m::HashKey::Header("x-user".into())));
    assert_eq!(got.outlier.map(|o| (o.consecutive, o.interval_ms)), Some((3, 10_000)));
    assert_eq!((got.slow_start_ms, got.redistribute), (30_000, true));
    assert_eq!(s.service(&m::Name::new("shop", "web-v1")).expect("a service").backend_policy, None);
}

#[test]
fn specs_that_make_no_sense_are_told_with_their_field() {
    use crate::compile::policies::{access, backend_policy, route_filter};
    let backend = |spec: Value| backend_policy(&serde_json::from_value(spec).expect("a spec")).expect_err("wrong").0;
    let to = json!([{"kind": "Service", "name": "web"}]);
    assert_eq!(backend(json!({"targetRefs": []})), "spec.targetRefs");
    assert_eq!(backend(json!({"targetRefs": [{"kind": "Pod", "name": "x"}]})), "spec.targetRefs[0].kind");
    assert_eq!(backend(json!({"targetRefs": to, "balancing": {"policy": "Maglev"}})), "spec.balancing.hashOn");
    assert_eq!(backend(json!({"targetRefs": to, "slowStart": "soon"})), "spec.slowStart");
    assert_eq!(
        backend(json!({"targetRefs": to, "outlierDetection": {"maxEjectedPercent": 101}})),
        "spec.outlierDetection.maxEjectedPercent"
    );
    let access = |spec: Value| {
        access(&serde_json::from_value(spec).expect("a spec"), &m::Name::new("shop", "p"), "cluster.local")
    };
    let field = |spec: Value| access(spec).expect_err("wrong").0;
    assert_eq!(field(json!({})), "spec.action");
    assert_eq!(field(json!({"action": "Maybe"})), "spec.action");
    assert_eq!(field(json!({"action": "Allow", "rules": [{"from": [{}]}]})), "spec.rules[0].from[0]");
    assert_eq!(field(json!({"action": "Allow", "rules": [{"to": [{"ports": [0]}]}]})), "spec.rules[0].to[0].ports[0]");
    assert_eq!(field(json!({"rateLimits": [{"requests": 1, "per": "0s"}]})), "spec.rateLimits[0].per");
    let allowed = access(json!({"action": "Allow", "rules": [{"from": [{"serviceAccount": "web"}]}]})).expect("right");
    let identity = allowed.rules[0].from[0].identity.as_ref().expect("an identity").to_string();
    assert_eq!(identity, "spiffe://cluster.local/ns/shop/sa/web", "of the policy's own namespace");
    let filter = json!({"fault": {"abort": {"status": 99}}});
    let filter = serde_json::from_value(filter).expect("a spec");
    assert_eq!(route_filter(&filter, &mut m::Rule::default()).expect_err("wrong").0, "spec.fault.abort.status");
}

#[test]
fn policies_say_what_became_of_them() {
    let mut o = objects();
    let backend = |at: &str, service: &str, more: Value| {
        let mut spec = json!({"targetRefs": [{"kind": "Service", "name": service}]});
        spec.as_object_mut().expect("a map").extend(more.as_object().cloned().unwrap_or_default());
        json!({"metadata": {"creationTimestamp": at, "generation": 3}, "spec": spec})
    };
    put(&mut o.backend_policies, "old", backend("2026-01-01T00:00:00Z", "web", json!({})));
    put(&mut o.backend_policies, "young", backend("2026-01-02T00:00:00Z", "web", json!({})));
    put(&mut o.backend_policies, "astray", backend("2026-01-01T00:00:00Z", "wbe", json!({})));
    put(&mut o.backend_policies, "wrong", backend("2026-01-01T00:00:00Z", "web-v1", json!({"slowStart": "soon"})));
    let access = |label: &str| json!({"spec": {"selector": {"matchLabels": {"app": label}}, "action": "Allow"}});
    for (pod, app, meshed) in [("a1", "a", true), ("b1", "b", true), ("b2", "b", false)] {
        let injected = if meshed { json!({"sluice.dev/sidecar": "injected"}) } else { json!({}) };
        put(
            &mut o.pods,
            pod,
            json!({"metadata": {"uid": pod, "labels": {"app": app}, "annotations": injected},
                   "spec": {"nodeName": "n1", "containers": []}, "status": {"phase": "Running"}}),
        );
    }
    ["a", "b", "c"].into_iter().for_each(|app| put(&mut o.access_policies, app, access(app)));
    let statuses = compile(&o, "cluster.local", &"192.0.2.0/29".parse().expect("a pool")).policies;
    let of = |name: &str, condition: &str| {
        let status = statuses.iter().find(|s| s.name.name == name).expect(name);
        let found = status.conditions.iter().find(|(c, _)| *c == condition).expect(condition);
        found.1.as_ref().map_or_else(|(reason, text)| format!("{reason}: {text}"), |()| String::new())
    };
    assert_eq!(of("old", "Accepted"), "");
    assert_eq!(of("young", "Accepted"), "Conflicted: service shop/web follows the older policy shop/old");
    assert_eq!(of("astray", "Accepted"), "");
    assert_eq!(of("astray", "ResolvedRefs"), "TargetNotFound: service shop/wbe does not exist");
    assert!(of("wrong", "Accepted").starts_with("Invalid: spec.slowStart: "));
    assert_eq!(["a", "b", "c"].map(|n| of(n, "Accepted")), ["", "", ""]);
    assert_eq!(
        ["a", "b", "c"].map(|n| of(n, "Enforced")),
        [
            "",
            "NoSidecar: 1 of the 2 pods it selects have no sidecar and ask nobody",
            "NoPods: it selects no pod that runs"
        ]
    );
    assert_eq!(statuses.iter().find(|s| s.name.name == "old").expect("old").generation, 3);
}
