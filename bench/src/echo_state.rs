//! What the echo server remembers and decides: request ids seen (bounded), and which requests shall fail. PURE.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Most ids kept; older ones are forgotten and counted.
const MAX_IDS: usize = 1_000_000;
/// Longest id kept.
const MAX_ID_BYTES: usize = 64;
/// Most ids in one answer of `/log`.
const MAX_ANSWER: usize = 100_000;

/// How the server misbehaves; changed at run time by `POST /faults`. Absent fields stay as they are.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FaultChange {
    pub delay_ms: Option<u64>,
    pub fail_percent: Option<u32>,
    pub fail_status: Option<u16>,
    /// `/healthz` answers 503.
    pub unready: Option<bool>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Faults {
    pub delay_ms: u64,
    pub fail_percent: u32,
    pub fail_status: u16,
    pub unready: bool,
}

impl Faults {
    pub fn change(&mut self, c: FaultChange) {
        self.delay_ms = c.delay_ms.unwrap_or(self.delay_ms);
        self.fail_percent = c.fail_percent.unwrap_or(self.fail_percent).min(100);
        self.fail_status = c.fail_status.unwrap_or(self.fail_status);
        self.unready = c.unready.unwrap_or(self.unready);
    }
}

#[derive(Debug)]
pub struct State {
    pub faults: Faults,
    /// Number of the next request.
    next: u64,
    ids: VecDeque<Box<str>>,
    /// Percent points owed to failures: makes 10 % every tenth request, exactly.
    owed: u32,
}

/// What `/log` answers: ids in the order they came.
#[derive(Debug, Serialize)]
pub struct Log<'a> {
    /// Ask again from here.
    pub next: u64,
    /// Requests before `since` of this answer that are forgotten.
    pub forgotten: u64,
    pub ids: Vec<&'a str>,
}

impl State {
    pub fn new(faults: Faults) -> Self {
        Self { faults, next: 0, ids: VecDeque::new(), owed: 0 }
    }

    /// Remembers a request and returns its number.
    pub fn record(&mut self, id: &str) -> u64 {
        if self.ids.len() == MAX_IDS {
            self.ids.pop_front();
        }
        let end = (0..=MAX_ID_BYTES.min(id.len())).rev().find(|n| id.is_char_boundary(*n)).unwrap_or(0);
        self.ids.push_back(id[..end].into());
        self.next += 1;
        self.next - 1
    }

    /// Whether this request shall fail.
    pub fn fails(&mut self) -> bool {
        self.owed += self.faults.fail_percent;
        let fails = self.owed >= 100;
        if fails {
            self.owed -= 100;
        }
        fails
    }

    pub fn log(&self, since: u64) -> Log<'_> {
        let first = self.next - self.ids.len() as u64;
        let from = since.clamp(first, self.next);
        let ids: Vec<&str> = self.ids.iter().skip((from - first) as usize).take(MAX_ANSWER).map(|i| &**i).collect();
        Log { next: from + ids.len() as u64, forgotten: first.saturating_sub(since), ids }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(fail_percent: u32) -> State {
        State::new(Faults { delay_ms: 0, fail_percent, fail_status: 500, unready: false })
    }

    #[test]
    fn ids_are_kept_in_order() {
        let mut s = state(0);
        for id in ["a", "b", "c"] {
            s.record(id);
        }
        assert_eq!(s.log(1).ids, ["b", "c"]);
        assert_eq!(s.log(3).ids.len(), 0);
        assert_eq!(s.log(99).next, 3);
    }

    #[test]
    fn failures_are_exact() {
        let mut s = state(30);
        assert_eq!((0..1000).filter(|_| s.fails()).count(), 300);
    }
}
