//! What a connection costs while nothing happens on it. Prints figures (`--nocapture`); asserts only that they are of the
//! right order, since the allocator and the other connections have their part in them.

mod common;

use common::*;
use rustix::process::{Resource as Limit, getrlimit, setrlimit};
use sluice_model::AppProtocol;
use sluice_proxy::run::Running;

const CONNECTIONS: usize = 2000;
/// Far above what is aimed at (8 KiB), far below what a buffer per direction costs.
const MOST_KIB: usize = 16;

#[test]
fn idle_connections_are_cheap() {
    // Both ends of each are in this process.
    let mut limit = getrlimit(Limit::Nofile);
    limit.current = limit.maximum;
    setrlimit(Limit::Nofile, limit).expect("as many descriptors as are allowed");
    let app = start("v1");
    let running = sidecar(service("web", "10.96.0.1", AppProtocol::Detect, &[app.address]));
    // Pools and tables are there.
    assert_eq!(Client::connect(running.outbound[0]).get("/").status, 200);
    let before = rss_kib();
    // Each speaks at once: one that is silent for long is taken for a protocol in which the server begins.
    let used = |_| {
        let mut client = Client::connect(running.outbound[0]);
        assert_eq!(client.get("/").status, 200);
        client
    };
    let _clients: Vec<Client> = (0..CONNECTIONS).map(used).collect();
    assert!(open(&running) >= CONNECTIONS as u64, "they are all open");
    let cost = rss_kib() - before;
    println!("idle connection after a request: {:.1} KiB", cost as f64 / CONNECTIONS as f64);
    assert!(cost / CONNECTIONS <= MOST_KIB, "{cost} KiB for {CONNECTIONS} connections");
    running.stop();
}

fn open(running: &Running) -> u64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(running.scrape()).open_outbound
}

fn rss_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().split(' ').next().and_then(|n| n.parse().ok()).expect("a number")
}
