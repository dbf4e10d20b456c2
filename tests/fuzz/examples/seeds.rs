//! Writes what the runs of the fuzz targets begin with into `seeds/`: one well-formed input of each kind, which bytes
//! that are only changed at random would take long to become. `cargo run --example seeds`, when a format has changed.

use prost::Message;
use sluice_model::{
    AppProtocol, Backend, Endpoint, EndpointPort, EndpointSet, HeaderMatch, InboundMode, Match, Mesh, Name, PathMatch,
    Policy, Protocol, QueryMatch, Resource, Retry, Revision, Route, RouteKind, Rule, Service, ServicePort, StringMatch,
};
use sluice_wire::{
    convert::{address_to_wire, key_to_wire, resource_to_wire},
    v1,
};
use std::{fs, io, path::Path};

fn main() -> io::Result<()> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let dir = seeds.join(target);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(name), bytes)
    };
    for (name, bytes) in beginnings() {
        // In one piece and in many.
        write("detect", name, &[&[0], &bytes[..]].concat())?;
        write("detect", &format!("{name}-pieces"), &[&[31], &bytes[..]].concat())?;
    }
    for (name, updates) in streams() {
        let bytes: Vec<u8> = updates.into_iter().flat_map(|u| message(u).encode_length_delimited_to_vec()).collect();
        write("discovery", name, &bytes)?;
    }
    // Any bytes make routes and requests; these make many of both.
    for n in [7u32, 31, 101, 211] {
        let bytes: Vec<u8> = (0..1500u32).map(|i| (i.wrapping_mul(n).wrapping_mul(i + n) >> 3) as u8).collect();
        write("routes", &format!("mixed-{n}"), &bytes)?;
    }
    Ok(())
}

fn beginnings() -> Vec<(&'static str, Vec<u8>)> {
    let name = [&[0, 0, 0, 11, 0, 9, 0, 0, 6][..], b"web.sh"].concat();
    let alpn = [&[0, 16, 0, 17, 0, 15, 9][..], b"sluice-h2", &[4], b"http"].concat();
    let extensions = [name, alpn].concat();
    let body =
        [&[3, 3][..], &[7; 32], &[0, 0, 2, 0x13, 1, 1, 0], &(extensions.len() as u16).to_be_bytes(), &extensions]
            .concat();
    let hello = [&[1, 0][..], &(body.len() as u16).to_be_bytes(), &body].concat();
    let record = |part: &[u8]| [&[22, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat();
    vec![
        ("get", b"GET /path?q HTTP/1.1\r\nhost: web\r\n\r\n".to_vec()),
        ("old", b"\r\nPOST / HTTP/1.0\n\n".to_vec()),
        ("connect", b"CONNECT web:443 HTTP/1.1\r\n".to_vec()),
        ("preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec()),
        ("preface-broken", b"PRI * HTTP/2.0\r\n\r\nXX".to_vec()),
        ("sip", b"OPTIONS sip:a@b SIP/2.0\r\n".to_vec()),
        ("redis", b"*1\r\n$4\r\nPING\r\n".to_vec()),
        ("postgres", vec![0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f]),
        ("hello", record(&hello)),
        ("hello-in-two", [record(&hello[..40]), record(&hello[40..])].concat()),
        ("alert", vec![21, 3, 3, 0, 2, 2, 40]),
    ]
}

fn message(update: v1::Update) -> v1::ServerMessage {
    v1::ServerMessage { kind: Some(v1::server_message::Kind::Update(update)) }
}

fn update(resources: &[Resource], full: bool, last: bool) -> v1::Update {
    v1::Update {
        epoch: "e".into(),
        revision: 3,
        full,
        changed: resources.iter().map(|r| resource_to_wire(r, Revision(3))).collect(),
        last,
        ..v1::Update::default()
    }
}

fn streams() -> Vec<(&'static str, Vec<v1::Update>)> {
    let all = resources();
    let mut resolved = update(&all, true, true);
    let vip = all.iter().find_map(|r| match r {
        Resource::Service(s) => s.virtual_ips.first().copied(),
        _ => None,
    });
    resolved.resolutions = vip
        .map(|ip| v1::Resolution {
            destination: Some(v1::Destination { address: address_to_wire(ip), port: 80 }),
            service: Some((&Name::new("shop", "web")).into()),
            identity: String::new(),
        })
        .into_iter()
        .collect();
    let removal = v1::Update {
        epoch: "e".into(),
        revision: 4,
        removed: all.iter().map(|r| key_to_wire(&r.key())).collect(),
        last: true,
        ..v1::Update::default()
    };
    vec![
        ("whole", vec![resolved.clone()]),
        ("chunks", all.chunks(1).map(|r| update(r, true, false)).chain([update(&[], false, true)]).collect()),
        ("removal", vec![resolved, removal]),
        ("empty", vec![update(&[], true, true)]),
    ]
}

fn resources() -> Vec<Resource> {
    let name = Name::new("shop", "web");
    let identity = "spiffe://cluster.local/ns/shop/sa/web".parse().expect("an identity");
    let endpoint = |address: &str, mesh| Endpoint {
        address: address.parse().expect("an address"),
        ready: true,
        draining: false,
        node: "n1".into(),
        zone: "z".into(),
        workload: Some(Name::new("shop", "web-1")),
        hostname: Some("web-1".into()),
        mesh,
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
    };
    let port = |name: &str, protocol, port, app_protocol| ServicePort {
        name: name.into(),
        protocol,
        port,
        app_protocol,
        node_port: Some(30_080),
    };
    let matching = Match {
        hosts: vec!["web.shop".into(), "*.shop".into()],
        path: PathMatch::Exact("/x".into()),
        method: Some("GET".into()),
        headers: vec![HeaderMatch { name: "x-canary".into(), value: StringMatch::Exact("yes".into()) }],
        query: vec![QueryMatch { name: "q".into(), value: StringMatch::Regex("a+".parse().expect("a pattern")) }],
    };
    let backend = |weight| Backend { service: name.clone(), port: 80, weight, ..Backend::default() };
    let rules = vec![
        Rule {
            matches: vec![matching, Match::default()],
            backends: vec![backend(9), backend(1)],
            retry: Some(Retry { codes: vec![503], attempts: Some(2), backoff_ms: Some(1) }),
            ..Rule::default()
        },
        Rule::default(),
    ];
    vec![
        Resource::Service(Service {
            name: name.clone(),
            virtual_ips: vec!["10.96.0.1".parse().expect("an address"), "fd00::1".parse().expect("an address")],
            ports: vec![
                port("http", Protocol::Tcp, 80, AppProtocol::Detect),
                port("dns", Protocol::Udp, 53, AppProtocol::Tcp),
            ],
            ..Service::default()
        }),
        Resource::EndpointSet(EndpointSet {
            name: name.clone(),
            endpoints: vec![endpoint("10.244.1.5", Mesh::Mtls(identity)), endpoint("fd00::5", Mesh::Plain)],
        }),
        Resource::Route(Route {
            name: Name::new("shop", "web-route"),
            kind: RouteKind::Http,
            parent: name.clone(),
            parent_port: Some(80),
            created_s: 1,
            generation: 2,
            rules,
        }),
        Resource::Policy(Policy {
            name,
            mode: InboundMode::Strict,
            excluded_ports: vec![1],
            opaque_ports: vec![2, 3],
            ..Policy::default()
        }),
    ]
}
