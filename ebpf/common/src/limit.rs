//! How much may be done in a time: token buckets that a program can pay for.

/// How many of something may be done: so many a second on average, and so many at once after a while without any. The time is
/// that of who asks, in nanoseconds of a clock that goes forward. Zeroed, all may be done.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Bucket {
    /// When it is full again, if nothing more is taken.
    pub full_ns: u64,
}

impl Bucket {
    /// Takes one, if there is one.
    #[inline(always)]
    pub const fn take(&mut self, now_ns: u64, limit: &Limit) -> bool {
        let full_ns = if self.full_ns > now_ns { self.full_ns } else { now_ns };
        // Neither is divided: a program would pay for it, and the bound is a constant.
        if full_ns - now_ns > (limit.burst - 1) * limit.each_ns {
            return false;
        }
        self.full_ns = full_ns + limit.each_ns;
        true
    }
}

/// What a [`Bucket`] holds, and how long it takes for one to come into it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limit {
    pub burst: u64,
    pub each_ns: u64,
}

/// ICMP errors that the programs of one CPU send by themselves.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Reports {
    pub unreachable: Bucket,
    pub too_big: Bucket,
}

impl Reports {
    /// Of "port unreachable" as many as Linux sends errors by itself: `net.ipv4.icmp_msgs_per_sec` and `icmp_msgs_burst`
    /// (Documentation/networking/ip-sysctl.rst: 1000 and 50).
    pub const UNREACHABLE: Limit = Limit { burst: 50, each_ns: 1_000_000 };
    /// Of "too big" as many on average, and those of a second at once: when a way becomes narrower, all that go it need one, each
    /// once, and who gets none sends nothing that arrives until he tries again. Linux does not limit these at all; RFC 4443
    /// §2.4 (f) asks for a limit. One for all destinations, because a table of destinations is one that anybody fills with false
    /// ones; beside that of the other kind, so that who floods a service without endpoints takes nobody's path MTU.
    pub const TOO_BIG: Limit = Limit { burst: 1_000, each_ns: 1_000_000 };
}
