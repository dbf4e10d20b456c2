//! Given a service with a backend and one without, when the kernel cannot say why a call is refused, then the call is
//! refused all the same, at once, over TCP and UDP, connected or not; and what is not refused is translated.

use crate::{
    balance::{DIALS, ask, ask_udp, endpoints, node, serve, service},
    ground::{Ground, TestPod},
};
use std::{
    fs,
    io::{self, ErrorKind},
    net::SocketAddr,
};

const NOBODY: [&str; 3] = ["10.96.0.3:80", "[::ffff:10.96.0.3]:80", "[fd00:96::3]:80"];

pub fn story(ground: &Ground) {
    let [backend, client] = ["r1", "rc"].map(|n| ground.pod(n));
    serve(&backend);
    let all = vec![
        node(),
        service("web", &["10.96.0.1", "fd00:96::1"]),
        endpoints("web", &[&backend]),
        service("nobody", &["10.96.0.3", "fd00:96::3"]),
    ];
    for (forced, refusal) in
        [(false, told_by_the_kernel()), (true, ErrorKind::PermissionDenied), (false, told_by_the_kernel())]
    {
        ground.kill_agent();
        ground.eperm.set(forced);
        ground.start_agent();
        ground.apply(all.clone());
        refused(&client, refusal);
        translated(&client, &backend.name);
        println!("no endpoint: {refusal:?}, fallback forced: {forced}");
    }
    [backend, client].into_iter().for_each(|p| ground.end_pod(p));
    ground.apply(vec![node()]);
}

/// What a refusal looks like where nothing is forced: Linux 5.18 brought bpf_set_retval.
fn told_by_the_kernel() -> ErrorKind {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split(['.', '-']).map_while(|n| n.trim().parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (5, 18) { ErrorKind::ConnectionRefused } else { ErrorKind::PermissionDenied }
}

/// Over TCP, and as connected and unconnected datagrams; from the pod and from the node.
fn every_way(client: &TestPod, to: SocketAddr) -> Vec<io::Result<String>> {
    let three = || [ask(to), ask_udp(to, true), ask_udp(to, false)];
    client.netns.run(three).expect("run").into_iter().chain(three()).collect()
}

fn refused(client: &TestPod, refusal: ErrorKind) {
    for dial in NOBODY {
        for outcome in every_way(client, dial.parse().expect(dial)) {
            assert_eq!(outcome.expect_err("nobody serves").kind(), refusal, "{dial}");
        }
    }
}

fn translated(client: &TestPod, backend: &str) {
    for dial in DIALS {
        for outcome in every_way(client, dial.parse().expect(dial)) {
            assert_eq!(outcome.unwrap_or_else(|e| panic!("{dial}: {e}")), backend);
        }
    }
}
