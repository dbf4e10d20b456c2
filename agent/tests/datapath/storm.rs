//! Given callers that connect as fast as the machine lets them, from a pod at the socket and from outside by node ports, when
//! the agent is killed and started again, then no connection fails and none takes a second.

use crate::{
    around::{Around, NODE4, NODE6, ip, remove_eth0},
    balance::{endpoints, node, serve},
    ground::{ACK, Ground, said, until},
    outside::shop,
};
use sluice_model::{Node, Resource};
use std::{
    fs,
    io::{self, Read},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::Child,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

const TO: &str = "SLUICE_TEST_STORM";
const NAME: &str = "SLUICE_TEST_STORM_NAME";
/// Callers at a time, each with one connection.
const THREADS: usize = 2;
const LATE: Duration = Duration::from_secs(1);
/// Connections between two changes: enough for a second of them.
const BETWEEN: u64 = 10_000;
const RESTARTS: usize = 4;

/// What callers tell: connections made, and the longest time of one in microseconds.
#[derive(Default)]
struct Told {
    made: AtomicU64,
    longest_us: AtomicU64,
}

/// The part: dials without end, and ends itself with the first connection that fails or is late.
pub fn callers() {
    let var = |name: &str| std::env::var(name).expect(name);
    let (to, name) = (var(TO).parse().expect(TO), var(NAME));
    let told = Told::default();
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    if let Err(why) = one(to, &told) {
                        eprintln!("{name}: connection {} to {to}: {why}", told.made.load(Relaxed));
                        std::process::exit(1);
                    }
                }
            });
        }
        loop {
            let text = format!("{} {}", told.made.load(Relaxed), told.longest_us.load(Relaxed));
            let next = said(&format!("{name}.next"));
            fs::write(&next, text).expect("write");
            fs::rename(next, said(&name)).expect("rename");
            thread::sleep(Duration::from_millis(10));
        }
    });
}

fn one(to: SocketAddr, told: &Told) -> io::Result<()> {
    let begun = Instant::now();
    let mut answer = String::new();
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(LATE))?;
    stream.read_to_string(&mut answer)?;
    let took = begun.elapsed();
    if !matches!(answer.as_str(), "s1" | "s2") || took > LATE {
        return Err(io::Error::other(format!("answered {answer:?} after {took:?}")));
    }
    told.longest_us.fetch_max(took.as_micros() as u64, Relaxed);
    told.made.fetch_add(1, Relaxed);
    Ok(())
}

struct Callers {
    name: &'static str,
    child: Child,
}

impl Callers {
    fn told(&self) -> (u64, Duration) {
        let text = fs::read_to_string(said(self.name)).unwrap_or_default();
        let mut numbers = text.split(' ').map(|n| n.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        (next(), Duration::from_micros(next()))
    }

    fn ended(&mut self) -> bool {
        self.child.try_wait().expect("status").is_some()
    }
}

impl Drop for Callers {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn story(ground: &Ground) {
    let around = Around::new(ground);
    let [s1, s2, pod] = ["s1", "s2", "storm"].map(|n| ground.pod(n));
    [&s1, &s2].into_iter().for_each(serve);
    let Resource::Node(own) = node() else { unreachable!("a node") };
    let own = Resource::Node(Node { addresses: vec![ip(NODE4), ip(NODE6)], ..own });
    ground.apply(vec![own, shop("storm", 1, |_| {}), endpoints("storm", &[&s1, &s2])]);
    let start = |name: &'static str, to: &str| {
        let _ = fs::remove_file(said(name));
        ground.child("storm", &[(TO, to), (NAME, name)])
    };
    let (mut inside, mut outside) = (start("inside", "10.96.1.1:80"), start("outside", "192.168.50.1:30001"));
    let inside = pod.netns.run(move || inside.spawn()).expect("run").expect("callers");
    let outside = around.call(move || outside.spawn()).expect("callers");
    let mut all = [Callers { name: "inside", child: inside }, Callers { name: "outside", child: outside }];
    let more = |all: &mut [Callers; 2], what: &str| {
        let before: Vec<u64> = all.iter().map(|c| c.told().0).collect();
        until(what, || {
            assert!(!all.iter_mut().any(Callers::ended), "a connection failed: {what}");
            all.iter().map(|c| c.told().0).sum::<u64>() >= before.iter().sum::<u64>() + BETWEEN
        });
    };
    more(&mut all, "connections with an agent");
    let (begun, before) = (Instant::now(), all.each_ref().map(|c| c.told().0));
    for _ in 0..RESTARTS {
        ground.kill_agent();
        more(&mut all, "connections without an agent");
        ground.start_agent();
        until("the agent is back", || PathBuf::from(ACK).exists());
        more(&mut all, "connections with an agent again");
    }
    let took = begun.elapsed();
    for (callers, before) in all.iter().zip(before) {
        let (made, longest) = callers.told();
        let each_s = (made - before) as f64 / took.as_secs_f64();
        println!(
            "agent restarted {RESTARTS} times: {made} connections {}, {each_s:.0}/s, longest {longest:?}",
            callers.name
        );
    }
    drop(all);
    [s1, s2, pod].into_iter().for_each(|p| ground.end_pod(p));
    ground.apply(vec![node()]);
    remove_eth0();
}
