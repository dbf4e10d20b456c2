//! What the machine under the cluster did meanwhile: whether it ran at all.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

const STEP: Duration = Duration::from_millis(20);

/// Watches until asked.
pub struct Watch {
    over: Arc<AtomicBool>,
    late_us: Arc<AtomicU64>,
    thread: JoinHandle<()>,
    times: [u64; 8],
}

/// What was seen.
pub struct Seen {
    /// How late the latest start was of a thread that does nothing but sleep.
    pub late: Duration,
    /// Of all CPUs' time, percent: spent, and taken by the host for others.
    pub busy: u64,
    pub stolen: u64,
}

impl Watch {
    pub fn start() -> Self {
        let (over, late_us) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stop, late) = (over.clone(), late_us.clone());
        let thread = thread::spawn(move || {
            while !stop.load(Relaxed) {
                let began = Instant::now();
                thread::sleep(STEP);
                late.fetch_max((began.elapsed() - STEP).as_micros() as u64, Relaxed);
            }
        });
        Self { over, late_us, thread, times: times() }
    }

    pub fn end(self) -> Seen {
        self.over.store(true, Relaxed);
        let _ = self.thread.join();
        let now = times();
        let spent: Vec<u64> = now.iter().zip(self.times).map(|(now, before)| now.saturating_sub(before)).collect();
        let percent = |n: u64| n * 100 / spent.iter().sum::<u64>().max(1);
        let [.., idle, iowait, _, _, stolen] = spent[..] else { unreachable!("eight times") };
        let busy = 100 - percent(idle + iowait + stolen);
        Seen { late: Duration::from_micros(self.late_us.load(Relaxed)), busy, stolen: percent(stolen) }
    }
}

/// Of all CPUs since boot: user, nice, system, idle, iowait, irq, softirq, steal (proc_stat(5)).
fn times() -> [u64; 8] {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let all = text.lines().next().unwrap_or_default();
    let mut numbers = all.split_whitespace().skip(1).map(|n| n.parse().unwrap_or(0));
    std::array::from_fn(|_| numbers.next().unwrap_or(0))
}
