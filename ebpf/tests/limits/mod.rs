//! How many ICMP errors the programs send by themselves: the bucket by itself, in a loop with a clock of the test's, and the
//! programs with it, whose clock is the kernel's. Time is moved there by moving the bucket's own: what it says is when it is
//! full again.

use crate::{
    FAMILIES, Family,
    frames::Frame,
    ip, lab,
    lab::Lab,
    request,
    size::{self, Node},
};
use rustix::thread::{CpuSet, sched_setaffinity};
use sluice_ebpf::{
    common::{Bucket, Limit, Reason, Reports, TCP, UDP},
    dry_run::Verdict,
    sweep::since_start,
};

const FEW: Limit = Limit { burst: 3, each_ns: 1_000 };

#[test]
fn a_bucket_gives_a_burst_and_then_by_the_clock() {
    // Since when it is full; when it is asked; what it says.
    let cases: [(u64, &[(u64, bool)]); 5] = [
        (0, &[(5, true), (5, true), (5, true), (5, false), (1_004, false), (1_005, true), (1_005, false)]),
        (0, &[(0, true), (0, true), (0, true), (999, false), (1_000, true), (2_000, true), (2_000, false)]),
        // After a while without any there is a burst again, and no more than that.
        (
            0,
            &[(0, true), (0, true), (0, true), (0, false), (9_999, true), (9_999, true), (9_999, true), (9_999, false)],
        ),
        // Full in two: one is there.
        (7_000, &[(5_000, true), (5_000, false), (5_999, false), (6_000, true)]),
        // A clock that another CPU saw ahead.
        (50_000, &[(5_000, false), (47_999, false), (48_000, true), (48_000, false)]),
    ];
    for (full_ns, asked) in cases {
        let mut bucket = Bucket { full_ns };
        let said: Vec<bool> = asked.iter().map(|(now, _)| bucket.take(*now, &FEW)).collect();
        assert_eq!(said, asked.iter().map(|(_, want)| *want).collect::<Vec<_>>(), "{full_ns} {asked:?}");
    }
    let mut bucket = Bucket::default();
    let given = (0..10_000_000).step_by(10).filter(|now| bucket.take(*now, &FEW)).count();
    assert_eq!(given, 10_000 + 2, "by the clock, and what was there at first");
    let linux = (Reports::UNREACHABLE.burst, 1_000_000_000 / Reports::UNREACHABLE.each_ns);
    assert_eq!(linux, (50, 1_000), "as the node's own stack");
}

/// The buckets are each CPU's own: all runs are on one.
fn on_one_cpu() {
    let mut set = CpuSet::new();
    set.set(0);
    sched_setaffinity(None, &set).expect("stay on a CPU");
}

fn now_ns() -> u64 {
    since_start().expect("clock").as_nanos() as u64
}

/// The programs' clock is late by so much, at most.
const INTERRUPT_NS: u64 = 10_000_000;

/// How many of so many are answered, and how many came by the clock meanwhile, at most.
fn told(lab: &Lab, link: u32, program: &str, frame: &Frame, count: u64) -> (u64, u64) {
    let (bytes, before) = (frame.bytes(), now_ns());
    let verdicts: Vec<Verdict> = (0..count).map(|_| lab.run_at(program, link, &bytes).verdict).collect();
    let came = (now_ns() - before + INTERRUPT_NS) / Reports::UNREACHABLE.each_ns + 1;
    let told = verdicts.iter().filter(|v| **v == Verdict::Redirect).count() as u64;
    assert_eq!(verdicts.iter().filter(|v| **v == Verdict::Drop).count() as u64, count - told);
    (told, came)
}

/// To a service that nobody serves.
fn refused(f: Family, proto: u8) -> Frame {
    Frame { dst: ip(f.empty), ..request(f, proto) }
}

const HOUR_NS: u64 = 3_600_000_000_000;
const LO: u32 = 1;

#[test]
fn errors_of_its_own_are_limited() {
    on_one_cpu();
    let lab = lab("packets-limit");
    let limit = Reports::UNREACHABLE;
    for f in FAMILIES {
        for proto in [TCP, UDP] {
            let frame = refused(f, proto);
            let counted = || [Reason::DroppedNoBackend, Reason::DroppedErrorLimit].map(|r| lab.counter(r));
            let all = 20 * limit.burst;
            lab.set_reports(Reports::default());
            let before = counted();
            let (told, came) = self::told(&lab, LO, "from_wire", &frame, all);
            assert!((limit.burst..=limit.burst + came).contains(&told), "{told} of {all}, {came} by the clock");
            let after = counted();
            assert_eq!((after[0] - before[0], after[1] - before[1]), (told, all - told), "each has one reason");
            // Nothing comes for an hour; then nothing but what has come since.
            let empty = |full_ns| Reports { unreachable: Bucket { full_ns }, ..Reports::default() };
            lab.set_reports(empty(now_ns() + HOUR_NS));
            assert_eq!(self::told(&lab, LO, "from_wire", &frame, all).0, 0);
            const COME: u64 = 40;
            lab.set_reports(empty(now_ns() + (limit.burst - COME) * limit.each_ns));
            let (told, came) = self::told(&lab, LO, "from_wire", &frame, all);
            let late = INTERRUPT_NS / limit.each_ns + 1;
            assert!((COME - late..=COME + came).contains(&told), "{COME} have come: {told}, {came} by the clock");
        }
    }
}

/// Who must not divide his packets is told so, whoever floods what nobody serves; and the other way round.
#[test]
fn a_flood_of_the_one_kind_takes_none_of_the_other() {
    on_one_cpu();
    let node = Node::new("packets-limit-kinds");
    let full = Bucket { full_ns: now_ns() + HOUR_NS };
    for f in FAMILIES {
        let large = Frame { whole: true, ..size::large(f, UDP) };
        let limit = Reports::TOO_BIG;
        node.lab.set_reports(Reports { unreachable: full, ..Reports::default() });
        let (told, came) = self::told(&node.lab, node.link, "from_wire", &large, 2 * limit.burst);
        assert!((limit.burst..=limit.burst + came).contains(&told), "{told}, {came} by the clock");
        node.lab.set_reports(Reports { unreachable: full, ..Reports::default() });
        size::reported(&node, "from_wire", &large);
        node.lab.set_reports(Reports { too_big: full, ..Reports::default() });
        let before = node.lab.counter(Reason::DroppedErrorLimit);
        assert_eq!(self::told(&node.lab, node.link, "from_wire", &large, 100).0, 0);
        assert_eq!(node.lab.counter(Reason::DroppedErrorLimit), before + 100);
    }
}
