//! Which endpoints are taken out for a while because they do badly. An endpoint's record takes answers and times and says
//! when it is to be ejected; how many may be out at a time is the caller's to see to, by [`may_eject`].

use sluice_model::Outlier;

/// How an endpoint has done, as one worker saw it. Times are milliseconds of the caller's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Failures since the last success.
    failures: u32,
    /// Of the present interval.
    answers: u32,
    successes: u32,
    interval_ends_ms: u64,
    out_until_ms: u64,
    /// Ejections that still count for the length of the next.
    ejections: u32,
}

impl Record {
    /// An answer, or its failure to come, at `now_ms`. True: the endpoint deserves to be ejected.
    pub fn answered(&mut self, now_ms: u64, success: bool, of: &Outlier) -> bool {
        let bad = self.close_interval(now_ms, of);
        self.answers += 1;
        self.successes += u32::from(success);
        self.failures = if success { 0 } else { self.failures.saturating_add(1) };
        // What was under way when it was ejected says nothing new.
        !self.is_out(now_ms) && (bad || (of.consecutive > 0 && self.failures >= of.consecutive))
    }

    /// It is out from `now_ms`, longer each time.
    pub fn eject(&mut self, now_ms: u64, of: &Outlier) {
        self.ejections = self.ejections.saturating_add(1);
        let length = u64::from(of.ejection_ms).saturating_mul(self.ejections.into());
        self.out_until_ms = now_ms + length.min(of.max_ejection_ms.max(of.ejection_ms).into());
        (self.failures, self.answers, self.successes) = (0, 0, 0);
    }

    pub fn is_out(&self, now_ms: u64) -> bool {
        now_ms < self.out_until_ms
    }

    /// When it may take requests again.
    pub fn out_until_ms(&self) -> u64 {
        self.out_until_ms
    }

    /// True when an interval has ended with too low a share of successes. One that ended well takes an ejection off.
    fn close_interval(&mut self, now_ms: u64, of: &Outlier) -> bool {
        if now_ms < self.interval_ends_ms {
            return false;
        }
        let judged = of.success_percent > 0 && self.answers >= of.min_requests.max(1);
        let enough = u64::from(self.successes) * 100 >= u64::from(self.answers) * u64::from(of.success_percent);
        if self.answers > 0 && (!judged || enough) && !self.is_out(now_ms) {
            self.ejections = self.ejections.saturating_sub(1);
        }
        (self.answers, self.successes) = (0, 0);
        self.interval_ends_ms = now_ms + u64::from(of.interval_ms);
        judged && !enough
    }
}

/// Whether one more of `endpoints`, of which `out` are ejected, may be: never the last one, and within the percentage, of
/// which one endpoint is always allowed where there are two.
pub fn may_eject(out: usize, endpoints: usize, of: &Outlier) -> bool {
    let most = (endpoints * usize::from(of.max_ejected_percent) / 100).max(1);
    out < most && out + 1 < endpoints
}

#[cfg(test)]
mod tests {
    use super::*;

    fn five() -> Outlier {
        Outlier { consecutive: 5, interval_ms: 1000, ejection_ms: 3000, max_ejection_ms: 7000, ..Outlier::default() }
    }

    #[test]
    fn failures_in_a_row_eject_and_a_success_forgives() {
        let (mut r, of) = (Record::default(), five());
        for now in 0..4 {
            assert!(!r.answered(now, false, &of));
        }
        assert!(!r.answered(4, true, &of));
        let deserved: Vec<bool> = (5..10).map(|now| r.answered(now, false, &of)).collect();
        assert_eq!(deserved, [false, false, false, false, true]);
    }

    #[test]
    fn each_ejection_is_longer_up_to_the_bound_and_good_times_shorten_it() {
        let (mut r, of) = (Record::default(), five());
        let mut lengths = vec![];
        let mut now = 0;
        for _ in 0..4 {
            r.eject(now, &of);
            lengths.push(r.out_until_ms() - now);
            assert!(r.is_out(now) && !r.is_out(r.out_until_ms()));
            now = r.out_until_ms();
        }
        assert_eq!(lengths, [3000, 6000, 7000, 7000]);
        for second in 1..=4 {
            r.answered(now + second * 1000, true, &of);
        }
        r.eject(now + 9000, &of);
        assert!(r.out_until_ms() - (now + 9000) < 7000);
    }

    #[test]
    fn late_answers_of_what_was_sent_before_do_not_eject_again() {
        let (mut r, of) = (Record::default(), five());
        r.eject(0, &of);
        assert!((1..100).all(|now| !r.answered(now, false, &of)));
    }

    #[test]
    fn too_few_successes_in_an_interval_eject() {
        let of = Outlier { consecutive: 0, success_percent: 90, min_requests: 10, ..five() };
        let interval = |answers: &[bool]| {
            let mut r = Record::default();
            answers.iter().for_each(|ok| assert!(!r.answered(1, *ok, &of)));
            r.answered(1500, true, &of)
        };
        assert!(interval(&[true, false, true, true, false, true, true, true, true, true]));
        assert!(!interval(&[true, false, true, true, true, true, true, true, true, true]));
        assert!(!interval(&[false; 9]), "too few to judge");
    }

    #[test]
    fn the_last_endpoint_stays() {
        let of = Outlier { max_ejected_percent: 50, ..five() };
        let table = [
            (0, 1, false),
            (0, 2, true),
            (1, 2, false),
            (0, 3, true),
            (1, 3, false),
            (1, 4, true),
            (4, 10, true),
            (5, 10, false),
        ];
        for (out, endpoints, wanted) in table {
            assert_eq!(may_eject(out, endpoints, &of), wanted, "{out} of {endpoints}");
        }
        assert!(!may_eject(1, 2, &Outlier { max_ejected_percent: 100, ..of }));
    }
}
