//! What connections cost while nothing happens on them, and afterwards. Prints figures (`--nocapture`).

mod common;

use common::*;
use rustix::process::{Resource as Limit, getrlimit, setrlimit};
use sluice_model::{AppProtocol, Revision, Snapshot};
use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

fn many_descriptors() {
    let mut limit = getrlimit(Limit::Nofile);
    limit.current = limit.maximum;
    setrlimit(Limit::Nofile, limit).expect("as many descriptors as are allowed");
}

fn rss_kib(process: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().split(' ').next().and_then(|n| n.parse().ok()).expect("a number")
}

/// The sidecar as a process of its own: what another has freed is not its memory.
struct Process {
    child: Child,
    at: SocketAddr,
    admin: SocketAddr,
}

impl Process {
    fn start(resources: Vec<sluice_model::Resource>) -> Self {
        let config = std::env::temp_dir().join(format!("sluice-memory-{}.json", std::process::id()));
        let snapshot = Snapshot::new(Revision(1), resources);
        std::fs::write(&config, serde_json::to_vec(&snapshot).expect("encodes")).expect("write");
        let (at, admin) = (nowhere(), nowhere());
        let child = Command::new(env!("CARGO_BIN_EXE_sluice-proxy"))
            .arg("--static-config")
            .arg(&config)
            .args([
                "--outbound-to",
                "10.96.0.1:80",
                "--outbound-listen",
                &at.to_string(),
                "--admin",
                &admin.to_string(),
            ])
            .env("SLUICE_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .expect("the sidecar starts");
        let process = Self { child, at, admin };
        eventually("it listens", || std::net::TcpStream::connect(process.at).is_ok());
        std::fs::remove_file(&config).expect("remove");
        process
    }

    fn open(&self) -> u64 {
        self.gauge("sluice_open_outbound_connections")
    }

    fn gauge(&self, name: &str) -> u64 {
        let metrics = Client::connect(self.admin).get("/metrics").body;
        let line = metrics.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|n| n.parse().ok()).expect("the gauge")
    }

    fn rss_kib(&self) -> usize {
        rss_kib(&self.child.id().to_string())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_connections_took_is_given_back() {
    const IDLE: usize = 9_000;
    /// All come at once here: pages stay that hold both what is given back and what is kept. Where they come one by one, what
    /// one gives back the next one uses, and it is 5 KiB (bench/RESULTS.md).
    const IDLE_KIB: usize = 14;
    const CHURNING: usize = 1_000;
    const ROUNDS: usize = 10;
    /// For tables that have grown and do not shrink.
    const LEFT_KIB: usize = 8 * 1024;
    many_descriptors();
    let app = start("v1");
    let process = Process::start(service("web", "10.96.0.1", AppProtocol::Detect, &[app.address]));
    let used = |_| {
        let mut client = Client::connect(process.at);
        assert_eq!(client.get("/").status, 200);
        client
    };
    drop(used(0));
    eventually("nothing is open", || process.open() == 0);
    let before = process.rss_kib();
    let below = |most: usize, what: &str| {
        // It is looked at every ten seconds.
        let until = Instant::now() + Duration::from_secs(25);
        while process.rss_kib() >= most {
            assert!(Instant::now() < until, "{what}: {} KiB, {most} wanted", process.rss_kib());
            std::thread::sleep(Duration::from_millis(50));
        }
        process.rss_kib()
    };
    let mut after_first = 0;
    for round in 0..2 {
        let mut idle: Vec<Client> = (0..IDLE).map(used).collect();
        for _ in 0..ROUNDS {
            let churning: Vec<Client> = (0..CHURNING).map(used).collect();
            drop(churning);
        }
        let most = process.rss_kib();
        eventually("they are known to be idle", || process.gauge("sluice_idle_connections") == IDLE as u64);
        let resting = below(before + IDLE * IDLE_KIB, "idle connections");
        // They are served as before.
        idle.iter_mut().step_by(100).for_each(|client| assert_eq!(client.get("/").status, 200));
        drop(idle);
        eventually("nothing is open", || process.open() == 0);
        let after = below(before + LEFT_KIB, "connections that have ended");
        println!(
            "round {round}: {before} KiB before, {most} with {IDLE} connections, {resting} when they are idle, {after} after"
        );
        if round == 0 {
            after_first = after;
        }
        assert!(after < after_first + LEFT_KIB / 4, "it grows from round to round");
    }
}
