//! Forwarded answers, for as long as their shortest record allows: PURE, `now` comes in. Bounded; when full, what is
//! over goes first, then anything.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Longest an answer is kept, whatever its records say.
const MAX_TTL: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Cache {
    capacity: usize,
    entries: HashMap<(String, u16), Entry>,
}

#[derive(Debug)]
struct Entry {
    answer: Vec<u8>,
    until: Instant,
}

impl Cache {
    pub fn new(capacity: usize) -> Self {
        Self { capacity, entries: HashMap::new() }
    }

    /// The kept answer, carrying the id of the query at hand.
    pub fn get(&self, name: &str, qtype: u16, id: u16, now: Instant) -> Option<Vec<u8>> {
        let e = self.entries.get(&(name.to_owned(), qtype)).filter(|e| e.until > now)?;
        let mut answer = e.answer.clone();
        answer.get_mut(..2)?.copy_from_slice(&id.to_be_bytes());
        Some(answer)
    }

    pub fn put(&mut self, name: String, qtype: u16, answer: Vec<u8>, ttl_s: u32, now: Instant) {
        let ttl = Duration::from_secs(ttl_s.into()).min(MAX_TTL);
        if ttl.is_zero() || self.capacity == 0 {
            return;
        }
        if self.entries.len() >= self.capacity {
            self.entries.retain(|_, e| e.until > now);
        }
        if self.entries.len() >= self.capacity
            && let Some(any) = self.entries.keys().next().cloned()
        {
            self.entries.remove(&any);
        }
        self.entries.insert((name, qtype), Entry { answer, until: now + ttl });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_kept_for_their_time_under_the_bound() {
        let mut c = Cache::new(2);
        let t = Instant::now();
        c.put("a".into(), 1, vec![0, 0, 9], 5, t);
        assert_eq!(c.get("a", 1, 0x0102, t), Some(vec![1, 2, 9]));
        assert_eq!(c.get("a", 28, 1, t), None);
        assert_eq!(c.get("a", 1, 1, t + Duration::from_secs(5)), None);
        for n in ["b", "c", "d"] {
            c.put(n.into(), 1, vec![0, 0], 5, t);
        }
        assert!(c.entries.len() <= 2);
    }
}
