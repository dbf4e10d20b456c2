use super::*;
use serde_json::{Value, json};

fn put<T: serde::de::DeserializeOwned>(
    map: &mut BTreeMap<m::Name, Arc<T>>,
    (namespace, name): (&str, &str),
    mut object: Value,
) {
    object["metadata"]["name"] = name.into();
    object["metadata"]["namespace"] = namespace.into();
    object["metadata"]["generation"] = 1.into();
    map.insert(m::Name::new(namespace, name), Arc::new(serde_json::from_value(object).expect(name)));
}

fn listener(name: &str, port: i32, protocol: &str, hostname: Option<&str>) -> Value {
    json!({"name": name, "port": port, "protocol": protocol, "hostname": hostname,
           "allowedRoutes": {"namespaces": {"from": "Same"}}})
}

fn passthrough(name: &str, port: i32, hostname: Option<&str>) -> Value {
    let mut l = listener(name, port, "TLS", hostname);
    l["tls"] = json!({"mode": "Passthrough"});
    l
}

fn https(name: &str, port: i32, hostname: Option<&str>, refs: Value) -> Value {
    let mut l = listener(name, port, "HTTPS", hostname);
    l["tls"] = json!({"mode": "Terminate", "certificateRefs": refs});
    l
}

/// A cluster with our class, another one's, two namespaces and one backend service.
fn objects(listeners: Value) -> Objects {
    let mut o = Objects::default();
    for (name, controller) in [("sluice", gateway::CONTROLLER_NAME), ("other", "example.com/other")] {
        let class = json!({"metadata": {"name": name}, "spec": {"controllerName": controller}});
        o.gateway_classes.insert(m::Name::cluster(name), Arc::new(serde_json::from_value(class).expect("a class")));
    }
    for (name, labels) in [("infra", json!({})), ("shop", json!({"team": "shop"}))] {
        let namespace = json!({"metadata": {"name": name, "labels": labels}});
        o.namespaces.insert(m::Name::cluster(name), Arc::new(serde_json::from_value(namespace).expect("a namespace")));
    }
    let service = json!({"spec": {"clusterIP": "10.96.0.6", "ports": [{"name": "http", "port": 80}]}});
    put(&mut o.services, ("shop", "web"), service.clone());
    put(&mut o.services, ("infra", "web"), service);
    let spec = json!({"gatewayClassName": "sluice", "listeners": listeners});
    put(&mut o.gateways, ("infra", "edge"), json!({"metadata": {"uid": "edge"}, "spec": spec}));
    o
}

fn http_route(o: &mut Objects, namespace: &str, parent: Value, hosts: &[&str]) {
    let mut parent = parent;
    parent["name"] = "edge".into();
    parent["namespace"] = "infra".into();
    let spec = json!({"parentRefs": [parent], "hostnames": hosts,
        "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]});
    put(&mut o.http_routes, (namespace, "r"), json!({"spec": spec}));
}

fn compiled(o: &Objects) -> Compiled {
    compile(o, "cluster.local", &Pool::default())
}

fn reason(v: &Verdict) -> &'static str {
    v.as_ref().err().map_or("", |(reason, _)| reason)
}

/// The gateway's listeners with a route, or why there are none.
fn attached(o: &Objects) -> Result<Vec<String>, &'static str> {
    let c = compiled(o);
    let parent = &c.routes[0].parents[0];
    if parent.accepted.is_err() {
        return Err(reason(&parent.accepted));
    }
    let all = &c.gateways[0].listeners;
    Ok(all.iter().filter(|l| l.attached == 1).map(|l| l.name.clone()).collect())
}

#[test]
fn routes_are_attached_where_they_are_let_in() {
    let from = |mut l: Value, from: Value| {
        l["allowedRoutes"]["namespaces"] = from;
        l
    };
    let all = json!({"from": "All"});
    let selected = |team: &str| json!({"from": "Selector", "selector": {"matchLabels": {"team": team}}});
    let only = |mut l: Value, kind: &str| {
        l["allowedRoutes"]["kinds"] = json!([{"kind": kind}]);
        l
    };
    let http = || listener("http", 80, "HTTP", None);
    let wild = || from(listener("wild", 80, "HTTP", Some("*.example")), all.clone());
    let exact = || from(listener("exact", 81, "HTTP", Some("a.example")), all.clone());
    type Row<'a> = (Value, &'a str, Value, &'a [&'a str], Result<&'a [&'a str], &'static str>);
    let table: Vec<Row<'_>> = vec![
        (json!([http()]), "infra", json!({}), &[], Ok(&["http"])),
        (json!([http()]), "shop", json!({}), &[], Err("NotAllowedByListeners")),
        (json!([from(http(), all.clone())]), "shop", json!({}), &[], Ok(&["http"])),
        (json!([from(http(), selected("shop"))]), "shop", json!({}), &[], Ok(&["http"])),
        (json!([from(http(), selected("shop"))]), "infra", json!({}), &[], Err("NotAllowedByListeners")),
        (json!([from(http(), json!({"from": "Selector"}))]), "shop", json!({}), &[], Err("NotAllowedByListeners")),
        (json!([only(http(), "HTTPRoute")]), "infra", json!({}), &[], Ok(&["http"])),
        (json!([only(http(), "GRPCRoute")]), "infra", json!({}), &[], Err("NotAllowedByListeners")),
        (json!([passthrough("tls", 443, None)]), "infra", json!({}), &[], Err("NotAllowedByListeners")),
        (json!([wild(), exact()]), "shop", json!({}), &[], Ok(&["wild", "exact"])),
        (json!([wild(), exact()]), "shop", json!({}), &["a.example"], Ok(&["wild", "exact"])),
        (json!([wild(), exact()]), "shop", json!({}), &["b.example"], Ok(&["wild"])),
        (json!([wild(), exact()]), "shop", json!({}), &["*.example"], Ok(&["wild", "exact"])),
        (json!([wild(), exact()]), "shop", json!({}), &["A.Example"], Ok(&["wild", "exact"])),
        (json!([wild(), exact()]), "shop", json!({}), &["example"], Err("NoMatchingListenerHostname")),
        (json!([wild(), exact()]), "shop", json!({"sectionName": "exact"}), &[], Ok(&["exact"])),
        (json!([wild(), exact()]), "shop", json!({"port": 80}), &[], Ok(&["wild"])),
        (json!([wild(), exact()]), "shop", json!({"port": 80, "sectionName": "exact"}), &[], Err("NoMatchingParent")),
        (json!([wild()]), "shop", json!({"sectionName": "none"}), &[], Err("NoMatchingParent")),
    ];
    for (row, (listeners, namespace, parent, hosts, want)) in table.into_iter().enumerate() {
        let mut o = objects(listeners);
        http_route(&mut o, namespace, parent, hosts);
        let want = want.map(|all| all.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert_eq!(attached(&o), want, "row {row}");
    }
}

#[test]
fn what_is_attached_is_in_the_snapshot_and_is_no_services() {
    let mut o = objects(json!([listener("http", 80, "HTTP", None)]));
    // A service of the gateway's name: its callers are not the gateway's.
    let service = json!({"spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80}]}});
    put(&mut o.services, ("infra", "edge"), service);
    http_route(&mut o, "infra", json!({}), &[]);
    let pod = json!({"metadata": {"uid": "u", "annotations": {(gateway::ANNOTATION): "edge"}},
        "spec": {"nodeName": "n1", "containers": []}});
    put(&mut o.pods, ("infra", "edge-1"), pod);
    let s = m::Snapshot::new(m::Revision(1), compiled(&o).resources);
    let route = s.route(&m::Name::new("infra", "r")).expect("a route");
    assert_eq!(route.parent, m::Gateway::parent(&m::Name::new("infra", "edge")));
    let listeners = &s.gateway(&m::Name::new("infra", "edge")).expect("a gateway").listeners;
    assert_eq!((listeners.len(), &listeners[0].routes), (1, &vec![route.name.clone()]));
    let pod = s.workload(&m::Name::new("infra", "edge-1")).expect("a workload");
    assert_eq!((pod.meshed, pod.gateway.as_deref()), (false, Some("edge")));
    assert!(s.policy(&pod.name).is_some(), "what access policies say holds there too");
}

/// It is attached, as the API has it, and nobody can come by it.
#[test]
fn a_route_whose_listeners_are_not_listened_for_says_so() {
    let unserved = |listeners: Value| {
        let mut o = objects(listeners);
        http_route(&mut o, "infra", json!({}), &[]);
        let status = compiled(&o).routes.remove(0).parents.remove(0);
        assert_eq!(status.accepted, Ok(()));
        status.unserved
    };
    let (good, bad) = (|| listener("good", 80, "HTTP", None), || https("bad", 443, None, json!([])));
    assert_eq!(unserved(json!([good()])), None);
    assert_eq!(unserved(json!([good(), bad()])), None, "by one of them");
    let said = unserved(json!([bad()])).expect("nothing listens");
    assert!(said.contains("infra/edge") && said.ends_with(": bad"), "{said}");
}

/// Else its pods would keep endpoints that are long gone, for they are sent nothing without their gateway.
#[test]
fn a_class_that_is_withdrawn_cuts_off_no_pod() {
    let withdrawals: [fn(&mut Objects); 2] = [
        |o| drop(o.gateway_classes.remove(&m::Name::cluster("sluice"))),
        |o| {
            let class = json!({"metadata": {"name": "sluice"}, "spec": {"controllerName": gateway::CONTROLLER_NAME,
                "parametersRef": {"group": "g", "kind": "K", "name": "n"}}});
            let class = serde_json::from_value(class).expect("a class");
            o.gateway_classes.insert(m::Name::cluster("sluice"), Arc::new(class));
        },
    ];
    for withdraw in withdrawals {
        let mut o = objects(json!([listener("http", 80, "HTTP", None)]));
        http_route(&mut o, "infra", json!({}), &[]);
        withdraw(&mut o);
        let name = m::Name::new("infra", "edge");
        let of = |o: &Objects| {
            let c = compiled(o);
            let s = m::Snapshot::new(m::Revision(1), c.resources);
            (c.gateways.len(), s.gateway(&name).map(|g| g.listeners.iter().map(|l| l.routes.len()).sum::<usize>()))
        };
        assert_eq!(of(&o), (0, None), "without pods nobody is served");
        let pod = json!({"metadata": {"uid": "u", "annotations": {(gateway::ANNOTATION): "edge"}},
            "spec": {"nodeName": "n1", "containers": []}});
        put(&mut o.pods, ("infra", "edge-1"), pod);
        assert_eq!(of(&o), (0, Some(1)), "what it listens for and its route; no status");
    }
}

#[test]
fn other_controllers_parents_are_left_alone() {
    let mut o = objects(json!([listener("http", 80, "HTTP", None)]));
    put(
        &mut o.gateways,
        ("infra", "edge"),
        json!({"spec": {"gatewayClassName": "other",
        "listeners": [listener("http", 80, "HTTP", None)]}}),
    );
    http_route(&mut o, "infra", json!({}), &[]);
    let c = compiled(&o);
    assert!(c.gateways.is_empty() && c.routes[0].parents.is_empty());
    assert_eq!(c.classes.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["sluice"]);
}

#[test]
fn routes_of_each_kind_go_where_their_kind_is_taken() {
    let mut o = objects(json!([listener("http", 80, "HTTP", None), passthrough("tls", 443, Some("*.example"))]));
    let parents = json!([{"name": "edge"}]);
    let backend = json!([{"backendRefs": [{"name": "web", "port": 80}]}]);
    put(&mut o.grpc_routes, ("infra", "g"), json!({"spec": {"parentRefs": parents, "rules": backend}}));
    put(
        &mut o.tls_routes,
        ("infra", "t"),
        json!({"spec": {"parentRefs": parents, "hostnames": ["a.example"], "rules": backend}}),
    );
    put(&mut o.tcp_routes, ("infra", "c"), json!({"spec": {"parentRefs": parents, "rules": backend}}));
    let c = compiled(&o);
    let verdict = |kind| c.routes.iter().find(|r| r.kind == kind).map(|r| reason(&r.parents[0].accepted));
    assert_eq!(verdict(m::RouteKind::Grpc), Some(""));
    assert_eq!(verdict(m::RouteKind::Tls), Some(""));
    assert_eq!(verdict(m::RouteKind::Tcp), Some("NotAllowedByListeners"));
    let seen: Vec<_> = c.gateways[0].listeners.iter().map(|l| (l.attached, l.kinds.clone())).collect();
    assert_eq!(seen, [(1, vec!["HTTPRoute", "GRPCRoute"]), (1, vec!["TLSRoute"])]);
}

#[test]
fn a_route_that_is_refused_is_attached_to_nothing() {
    let mut o = objects(json!([listener("http", 80, "HTTP", None)]));
    let spec = json!({"parentRefs": [{"name": "edge"}], "rules": [{"filters": [{"type": "CORS", "cors": {}}]}]});
    put(&mut o.http_routes, ("infra", "r"), json!({"spec": spec}));
    let c = compiled(&o);
    assert_eq!(reason(&c.routes[0].parents[0].accepted), "UnsupportedValue");
    assert_eq!(c.gateways[0].listeners[0].attached, 0);
}

#[test]
fn backends_elsewhere_need_a_grant_and_kinds_that_are_services() {
    let route = |o: &mut Objects, backend: Value| {
        let spec = json!({"parentRefs": [{"name": "edge"}], "rules": [{"backendRefs": [backend]}]});
        put(&mut o.http_routes, ("infra", "r"), json!({"spec": spec}));
    };
    for (backend, want) in [
        (json!({"name": "web", "port": 80}), ""),
        (json!({"name": "web", "port": 81}), "BackendNotFound"),
        (json!({"name": "nope", "port": 80}), "BackendNotFound"),
        (json!({"name": "web", "kind": "Secret", "port": 80}), "InvalidKind"),
        (json!({"name": "web", "namespace": "shop", "port": 80}), "RefNotPermitted"),
    ] {
        let mut o = objects(json!([listener("http", 80, "HTTP", None)]));
        route(&mut o, backend.clone());
        let parent = compiled(&o).routes[0].parents[0].clone();
        assert_eq!((reason(&parent.accepted), reason(&parent.resolved)), ("", want), "{backend}");
    }
}

fn secret(o: &mut Objects, at: (&str, &str), names: &[&str]) {
    let pair = rcgen::generate_simple_self_signed(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
    let pair = pair.expect("a certificate");
    secret_of(o, at, &pair.cert.pem(), &pair.signing_key.serialize_pem());
}

fn secret_of(o: &mut Objects, at: (&str, &str), chain: &str, key: &str) {
    use base64::Engine as _;
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let data = json!({"tls.crt": encode(chain), "tls.key": encode(key)});
    put(&mut o.secrets, at, json!({"type": gateway::SECRET_TYPE, "data": data}));
}

#[test]
fn certificates_are_of_secrets_that_may_be_named() {
    let own = json!([{"name": "cert"}]);
    let others = json!([{"name": "cert", "namespace": "shop"}]);
    let grant = |to: Value| json!({"spec": {"from": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "namespace": "infra"}], "to": [to]}});
    let cases: Vec<(&str, Value, Value, &str)> = vec![
        ("its own", own.clone(), Value::Null, ""),
        ("none", json!([]), Value::Null, "InvalidCertificateRef"),
        ("missing", json!([{"name": "nope"}]), Value::Null, "InvalidCertificateRef"),
        ("no secret", json!([{"name": "cert", "kind": "ConfigMap"}]), Value::Null, "InvalidCertificateRef"),
        ("another's", others.clone(), Value::Null, "RefNotPermitted"),
        ("granted", others.clone(), grant(json!({"group": "", "kind": "Secret"})), ""),
        ("granted by name", others.clone(), grant(json!({"group": "", "kind": "Secret", "name": "cert"})), ""),
        (
            "another granted",
            others.clone(),
            grant(json!({"group": "", "kind": "Secret", "name": "x"})),
            "RefNotPermitted",
        ),
        ("a service granted", others, grant(json!({"group": "", "kind": "Service"})), "RefNotPermitted"),
    ];
    for (case, refs, granted, want) in cases {
        let mut o = objects(json!([https("https", 443, Some("a.example"), refs)]));
        secret(&mut o, ("infra", "cert"), &["a.example"]);
        secret(&mut o, ("shop", "cert"), &["a.example"]);
        if granted.is_object() {
            put(&mut o.grants, ("shop", "g"), granted);
        }
        let c = compiled(&o);
        let status = &c.gateways[0].listeners[0];
        assert_eq!((reason(&status.accepted), reason(&status.resolved)), ("", want), "{case}");
        let s = m::Snapshot::new(m::Revision(1), c.resources);
        let listened = s.gateways().next().expect("a gateway").listeners.len();
        assert_eq!(listened, usize::from(want.is_empty()), "{case}");
        assert_eq!(reason(&c.gateways[0].accepted), if want.is_empty() { "" } else { "ListenersNotValid" }, "{case}");
    }
}

#[test]
fn a_secret_that_no_server_could_show_is_refused() {
    let pair = || rcgen::generate_simple_self_signed(vec!["a.example".to_owned()]).expect("a certificate");
    let (one, other) = (pair(), pair());
    let (chain, key) = (one.cert.pem(), one.signing_key.serialize_pem());
    for (chain, key, why) in [
        ("no PEM", key.as_str(), "tls.crt has no certificate"),
        (&chain, "no PEM", "tls.key is no private key"),
        (&chain, &other.signing_key.serialize_pem(), "does not belong"),
        (&chain, &chain, "tls.key is no private key"),
    ] {
        let mut o = objects(json!([https("https", 443, None, json!([{"name": "cert"}]))]));
        secret_of(&mut o, ("infra", "cert"), chain, key);
        let c = compiled(&o);
        let Err((reason, text)) = &c.gateways[0].listeners[0].resolved else { panic!("taken: {why}") };
        assert!(*reason == "InvalidCertificateRef" && text.contains(why), "{text}");
    }
}

#[test]
fn what_cannot_be_listened_for_says_why_and_the_rest_is() {
    let good = listener("good", 80, "HTTP", None);
    let terminated = {
        let mut l = passthrough("bad", 9443, None);
        l["tls"]["mode"] = json!("Terminate");
        l
    };
    let options = {
        let mut l = https("bad", 443, None, json!([]));
        l["tls"]["options"] = json!({"example.com/x": "y"});
        l
    };
    for (bad, want) in [
        (listener("bad", 53, "UDP", None), "UnsupportedProtocol"),
        (listener("bad", 53, "TCP", None), "UnsupportedProtocol"),
        (terminated, "UnsupportedProtocol"),
        (options, "UnsupportedValue"),
        (listener("bad", i32::from(sluice_wire::SIDECAR_ADMIN_PORT), "HTTP", None), "PortUnavailable"),
    ] {
        let c = compiled(&objects(json!([good, bad.clone()])));
        let g = &c.gateways[0];
        assert_eq!(reason(&g.listeners[1].accepted), want, "{bad}");
        assert_eq!(reason(&g.listeners[1].programmed), "Invalid", "{bad}");
        assert!(g.accepted.is_ok() && g.partly.is_some(), "{bad}");
        let s = m::Snapshot::new(m::Revision(1), c.resources);
        let names: Vec<_> = s.gateways().flat_map(|g| &g.listeners).map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["good"], "{bad}");
    }
}

#[test]
fn listeners_that_cannot_be_told_apart_conflict() {
    let cert = || json!([{"name": "cert"}]);
    type Row = (Value, [Option<&'static str>; 2]);
    let table: Vec<Row> = vec![
        (json!([listener("a", 80, "HTTP", None), listener("b", 80, "HTTP", Some("x.example"))]), [None, None]),
        (
            json!([listener("a", 80, "HTTP", None), https("b", 80, None, cert())]),
            [Some("ProtocolConflict"), Some("ProtocolConflict")],
        ),
        (json!([https("a", 443, Some("a.example"), cert()), passthrough("b", 443, Some("b.example"))]), [None, None]),
        (
            json!([https("a", 443, Some("a.example"), cert()), passthrough("b", 443, Some("a.example"))]),
            [Some("HostnameConflict"), Some("HostnameConflict")],
        ),
    ];
    for (listeners, want) in table {
        let mut o = objects(listeners.clone());
        secret(&mut o, ("infra", "cert"), &["a.example"]);
        let c = compiled(&o);
        let seen: Vec<_> =
            c.gateways[0].listeners.iter().map(|l| l.conflicted.as_ref().map(|(reason, _)| *reason)).collect();
        assert_eq!(seen, want, "{listeners}");
    }
}

#[test]
fn what_a_gateway_asks_for_and_does_not_get_is_said() {
    for (spec, want, listens) in [
        (json!({"addresses": [{"type": "IPAddress", "value": "192.0.2.1"}]}), "UnsupportedAddress", false),
        (
            json!({"infrastructure": {"parametersRef": {"group": "g", "kind": "K", "name": "n"}}}),
            "InvalidParameters",
            false,
        ),
        // What its pods and its service are to be like says nothing of what it listens for: pods that are there serve on.
        (json!({"infrastructure": {"annotations": {(gateway::ANNOTATION_REPLICAS): "many"}}}), "Invalid", true),
        (json!({"tls": {"backend": {}}}), "Invalid", false),
    ] {
        let mut o = objects(json!([]));
        let mut object =
            json!({"spec": {"gatewayClassName": "sluice", "listeners": [listener("a", 80, "HTTP", None)]}});
        object["spec"].as_object_mut().expect("a spec").extend(spec.as_object().expect("fields").clone());
        put(&mut o.gateways, ("infra", "edge"), object);
        let c = compiled(&o);
        assert_eq!(reason(&c.gateways[0].accepted), want, "{spec}");
        assert_eq!(reason(&c.gateways[0].programmed), "Invalid", "{spec}");
        let s = m::Snapshot::new(m::Revision(1), c.resources);
        assert!(s.gateways().all(|g| g.listeners.is_empty() != listens), "{spec}");
    }
}

#[test]
fn a_gateway_is_programmed_when_it_has_an_address_and_a_pod() {
    let mut o = objects(json!([listener("a", 80, "HTTP", None)]));
    let programmed = |o: &Objects| {
        let g = &compiled(o).gateways[0];
        (reason(&g.programmed), reason(&g.listeners[0].programmed), g.addresses.clone())
    };
    assert_eq!(programmed(&o), ("AddressNotAssigned", "Pending", vec![]));
    let service = |owner: &str| {
        let owner = json!({"apiVersion": "v1", "kind": "Gateway", "name": "edge", "uid": owner, "controller": true});
        json!({"metadata": {"ownerReferences": [owner]},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.8", "ports": [{"port": 80}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1", "ipMode": "VIP"}]}}})
    };
    put(&mut o.services, ("infra", "edge-sluice"), service("another"));
    assert_eq!(programmed(&o), ("AddressNotAssigned", "Pending", vec![]), "somebody else's of that name");
    put(&mut o.services, ("infra", "edge-sluice"), service("edge"));
    assert_eq!(programmed(&o), ("NoResources", "Pending", vec!["192.0.2.1".to_owned()]));
    let slice = |ready: bool| {
        json!({"metadata": {"labels": {"kubernetes.io/service-name": "edge-sluice"}}, "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.244.0.5"], "conditions": {"ready": ready}}], "ports": []})
    };
    put(&mut o.slices, ("infra", "s"), slice(false));
    assert_eq!(programmed(&o).0, "NoResources");
    put(&mut o.slices, ("infra", "s"), slice(true));
    assert_eq!(programmed(&o), ("", "", vec!["192.0.2.1".to_owned()]));
}
