//! What control and the log have been told of the view: nothing twice, and a refusal is taken back once the view is in
//! force after all. Latest wins: only one verdict waits for control. PURE.

use crate::uplink::Verdict;

#[derive(Debug, Default)]
pub struct Told {
    last: Option<Verdict>,
    /// Control has not been sent the last one.
    due: bool,
}

/// What the log has not said yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    pub refused: Option<String>,
    /// In force, after it was not.
    pub recovered: bool,
    /// Of a view that is in force otherwise; empty when there are none any more.
    pub problems: Option<Vec<String>>,
}

impl Told {
    /// What came of bringing a view into force that has just come. Control hears of it in any case: it may be another
    /// stream, on which nothing has been said of that revision.
    pub fn take(&mut self, verdict: Verdict) -> News {
        self.due = true;
        self.keep(verdict)
    }

    /// What came of trying the same again.
    pub fn retried(&mut self, verdict: Verdict) -> News {
        let said = |l: &Verdict| {
            let problems = verdict.result.is_err() || l.problems == verdict.problems;
            (&l.epoch, l.revision, &l.result) == (&verdict.epoch, verdict.revision, &verdict.result) && problems
        };
        self.due |= !self.last.as_ref().is_some_and(said);
        self.keep(verdict)
    }

    fn keep(&mut self, mut verdict: Verdict) -> News {
        let before = self.last.take();
        let (result, problems) = before.map_or((Ok(()), Vec::new()), |b| (b.result, b.problems));
        if verdict.result.is_err() {
            verdict.problems = problems.clone(); // what became of them is not known
        }
        let news = News {
            refused: verdict.result.as_ref().err().filter(|e| result.as_ref().err() != Some(e)).cloned(),
            recovered: verdict.result.is_ok() && result.is_err(),
            problems: (verdict.problems != problems).then(|| verdict.problems.clone()),
        };
        self.last = Some(verdict);
        news
    }

    /// The last view is not in force: to be tried again.
    pub fn refused(&self) -> bool {
        self.last.as_ref().is_some_and(|v| v.result.is_err())
    }

    pub fn due(&self) -> bool {
        self.due
    }

    /// What control must be told.
    pub fn say(&mut self) -> Option<Verdict> {
        std::mem::take(&mut self.due).then(|| self.last.clone()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(revision: u64, result: Result<(), &str>, problems: &[&str]) -> Verdict {
        Verdict {
            epoch: "e".into(),
            revision,
            result: result.map_err(str::to_owned),
            problems: problems.iter().map(|p| (*p).to_owned()).collect(),
        }
    }

    #[test]
    fn a_refusal_is_said_once_and_taken_back() {
        let mut told = Told::default();
        let news = told.take(verdict(5, Err("map full"), &[]));
        assert_eq!(news.refused.as_deref(), Some("map full"));
        assert_eq!(told.say().map(|v| v.result), Some(Err("map full".into())));
        assert_eq!(told.retried(verdict(5, Err("map full"), &[])), News::default());
        assert!(told.refused() && !told.due(), "nothing new");
        assert!(told.retried(verdict(5, Ok(()), &[])).recovered);
        assert_eq!(told.say().map(|v| (v.revision, v.result)), Some((5, Ok(()))));
        assert!(!told.refused() && told.say().is_none());
    }

    #[test]
    fn each_revision_is_acknowledged_and_the_latest_wins() {
        let mut told = Told::default();
        told.take(verdict(5, Ok(()), &[]));
        told.take(verdict(6, Ok(()), &[]));
        assert_eq!(told.say().map(|v| v.revision), Some(6));
        assert_eq!(told.take(verdict(6, Ok(()), &[])), News::default());
        assert_eq!(told.say().map(|v| v.revision), Some(6), "said again to a control that came back");
    }

    #[test]
    fn problems_are_said_when_they_change() {
        let mut told = Told::default();
        assert_eq!(told.take(verdict(5, Ok(()), &["a"])).problems, Some(vec!["a".to_owned()]));
        assert_eq!(told.take(verdict(6, Ok(()), &["a"])), News::default());
        assert_eq!(told.take(verdict(7, Err("map full"), &[])).problems, None);
        assert_eq!(told.take(verdict(7, Ok(()), &[])).problems, Some(vec![]));
    }
}
