//! Kernel settings under /proc/sys/net of the calling thread's network namespace.

use crate::{Error, error::Result};
use std::{fs, io::Read, ops::RangeInclusive, path::PathBuf};

const RESERVED: &str = "ipv4/ip_local_reserved_ports";
const LOCAL: &str = "ipv4/ip_local_port_range";
/// Ports that the kernel must give to no socket by itself: node ports, and those that connections from outside are
/// given on their way through this node.
const OURS: [RangeInclusive<u16>; 2] = [30000..=32767, 61000..=65535];

/// More than the longest list of ports: every other one.
const SETTING_BYTES: usize = 256 * 1024;

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(name)
}

/// Reads a setting, such as `ipv4/ip_forward`.
pub fn get(name: &str) -> Result<String> {
    let path = path(name);
    let text = (|| {
        let mut bytes = vec![0; SETTING_BYTES];
        // One read: the kernel gives lists to the first one alone, cut off where its buffer ends.
        let length = fs::File::open(&path)?.read(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes[..length]).trim().to_owned())
    })();
    text.map_err(|e| Error::io("read setting", path.display(), e))
}

/// Writes a setting unless it has that value; true when it was written.
pub fn ensure(name: &str, value: &str) -> Result<bool> {
    if get(name)? == value {
        return Ok(false);
    }
    let path = path(name);
    fs::write(&path, value).map(|()| true).map_err(|e| Error::io("write setting", path.display(), e))
}

/// Keeps node ports and the data path's own ports from being given to sockets that ask for any port. What an operator
/// has reserved stays. True when something was added.
pub fn reserve_ports() -> Result<bool> {
    let present = get(RESERVED)?;
    let unreadable = || Error::Answer(format!("{present:?} as net.ipv4.ip_local_reserved_ports, not a list of ranges"));
    let before = Ports::parse(&present).ok_or_else(unreadable)?;
    let after = before.with(&OURS);
    if after == before {
        return Ok(false);
    }
    let local = get(LOCAL)?;
    // Unreadable bounds are no reason to refuse: they would be a kernel's that we do not know.
    if bounds(&local).is_some_and(|b| after.covers(&b)) {
        return Err(Error::NoPorts { reserved: after.to_string(), local: local.replace('\t', "-") });
    }
    ensure(RESERVED, &after.to_string())
}

/// Ranges in order, none touching the next: one form for one set.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ports(Vec<RangeInclusive<u16>>);

impl Ports {
    /// As the kernel writes it: `8080,30000-32767`. `None` of anything else.
    fn parse(text: &str) -> Option<Self> {
        let ranges = text.split(',').map(str::trim).filter(|r| !r.is_empty()).map(|r| {
            let (first, last) = r.split_once('-').unwrap_or((r, r));
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (first <= last).then_some(first..=last)
        });
        Some(Self(Vec::new()).with(&ranges.collect::<Option<Vec<_>>>()?))
    }

    fn with(&self, more: &[RangeInclusive<u16>]) -> Self {
        let mut all: Vec<_> = self.0.iter().chain(more).cloned().collect();
        all.sort_by_key(|r| *r.start());
        let mut merged: Vec<RangeInclusive<u16>> = Vec::with_capacity(all.len());
        for range in all {
            match merged.last_mut() {
                Some(last) if *range.start() <= last.end().saturating_add(1) => {
                    *last = *last.start()..=*last.end().max(range.end());
                }
                _ => merged.push(range),
            }
        }
        Self(merged)
    }

    /// Because no two touch, a range is covered by one or not at all.
    fn covers(&self, range: &RangeInclusive<u16>) -> bool {
        self.0.iter().any(|r| r.contains(range.start()) && r.contains(range.end()))
    }
}

impl std::fmt::Display for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, range) in self.0.iter().enumerate() {
            let comma = if n > 0 { "," } else { "" };
            match (range.start(), range.end()) {
                (first, last) if first == last => write!(f, "{comma}{first}")?,
                (first, last) => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

/// `32768\t60999`
fn bounds(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.trim().split_once(char::is_whitespace)?;
    Some(first.parse().ok()?..=last.trim().parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ns::{Unshare, unshare};

    #[test]
    fn what_was_reserved_stays_reserved() {
        for (present, expected) in [
            ("", "30000-32767,61000-65535"),
            ("8080", "8080,30000-32767,61000-65535"),
            ("1-2,9000-9005", "1-2,9000-9005,30000-32767,61000-65535"),
            ("30000-32767,61000-65535", "30000-32767,61000-65535"),
            ("29999,32768", "29999-32768,61000-65535"),
            ("31000-31010,62000", "30000-32767,61000-65535"),
            ("20000-40000", "20000-40000,61000-65535"),
            ("65535", "30000-32767,61000-65535"),
            ("1-65535", "1-65535"),
            ("61000-65535,5,30000-30001", "5,30000-32767,61000-65535"),
            ("32000-33000,40000", "30000-33000,40000,61000-65535"),
        ] {
            let once = Ports::parse(present).expect(present).with(&OURS);
            assert_eq!(once.to_string(), expected, "{present}");
            assert_eq!(once.with(&OURS), once, "doing it twice changes nothing");
            assert_eq!(Ports::parse(expected), Some(once), "reads back");
        }
        for bad in ["x", "5-", "9-5", "70000", "1-2-3"] {
            assert_eq!(Ports::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn bounds_and_covering() {
        assert_eq!(bounds("32768\t60999"), Some(32768..=60999));
        assert_eq!(bounds("junk"), None);
        let ports = Ports::parse("5,7-9").expect("list");
        for (range, covered) in [(5..=5, true), (5..=7, false), (7..=9, true), (8..=8, true), (6..=6, false)] {
            assert_eq!(ports.covers(&range), covered, "{range:?}");
        }
    }

    /// In a namespace of its own: the thread ends with the test.
    #[test]
    fn the_kernel_takes_it_once_and_keeps_the_operators() {
        unshare(Unshare { net: true, ..Unshare::default() }).expect("needs root");
        ensure(RESERVED, "8080,9000-9001").expect("an operator's");
        assert!(reserve_ports().expect("reserve") && !reserve_ports().expect("again"));
        assert_eq!(get(RESERVED).expect("read"), "8080,9000-9001,30000-32767,61000-65535");
        ensure(RESERVED, "8080").expect("an operator's");
        ensure(LOCAL, "61000\t65000").expect("narrow");
        assert!(matches!(reserve_ports(), Err(Error::NoPorts { .. })));
        assert_eq!(get(RESERVED).expect("read"), "8080", "left as it was");
    }
}
