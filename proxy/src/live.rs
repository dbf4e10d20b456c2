//! A worker's own form of a [`Config`]: splits with their state, counters resolved, endpoints with their connections.
//! Built once per config; what stayed the same is taken over from the one before.

use crate::{
    config::{Config, Target},
    metrics::{Direction, Series, SeriesKey},
    reason::Reason,
    upstream::Upstream,
    worker::Worker,
};
use sluice_traffic::{
    route::{Decision, Headers, Request, TableRule},
    split::Split,
};
use std::{cell::RefCell, rc::Rc, sync::Arc};

#[derive(Debug)]
pub struct Live {
    pub config: Arc<Config>,
    targets: Vec<LiveTarget>,
}

#[derive(Debug)]
struct LiveTarget {
    rules: Vec<LiveRule>,
    own: Choice,
}

#[derive(Debug)]
struct LiveRule {
    split: RefCell<Split>,
    backends: Vec<Choice>,
}

/// A backend with its counters for one route.
#[derive(Clone, Debug)]
pub struct Choice {
    pub cluster: Rc<LiveCluster>,
    pub series: Rc<Series>,
}

/// The endpoints of a backend.
#[derive(Debug)]
pub struct LiveCluster {
    pub known: bool,
    pub endpoints: Vec<Rc<Upstream>>,
}

impl Live {
    /// Makes `config` usable by `worker`, continuing from the worker's present tables.
    pub fn build(config: Arc<Config>, worker: &Worker, previous: &Live) -> Self {
        let clusters: Vec<Rc<LiveCluster>> = config
            .clusters
            .iter()
            .map(|c| {
                let endpoints = c.endpoints.iter().map(|e| worker.upstream(e)).collect();
                Rc::new(LiveCluster { known: c.known, endpoints })
            })
            .collect();
        let targets = config
            .targets
            .iter()
            .map(|t| {
                let before = previous.find(t);
                build_target(&config, t, before, &clusters, worker)
            })
            .collect();
        Self { config, targets }
    }

    pub fn empty() -> Self {
        Self { config: Arc::default(), targets: Vec::new() }
    }

    fn find(&self, target: &Target) -> Option<(&Target, &LiveTarget)> {
        let same = |t: &&Target| t.service == target.service && t.port == target.port;
        self.config.targets.iter().zip(&self.targets).find(|(t, _)| same(t))
    }

    /// The backend of an HTTP request to `target`.
    pub fn choose_http<H: Headers>(&self, target: usize, request: &Request<'_, H>) -> Result<Choice, Reason> {
        self.choose(target, self.config.targets[target].table.find(request))
    }

    /// The backend of a connection to `target`.
    pub fn choose_tcp(&self, target: usize) -> Result<Choice, Reason> {
        self.choose(target, self.config.targets[target].table.find_tcp())
    }

    fn choose(&self, target: usize, decision: Decision) -> Result<Choice, Reason> {
        let target = &self.targets[target];
        match decision {
            Decision::NoMatch => Err(Reason::NoRoute),
            Decision::Own => Ok(target.own.clone()),
            Decision::Rule(i) => {
                let rule = &target.rules[i];
                let backend = rule.split.borrow_mut().choose().ok_or(Reason::NoBackend)?;
                Ok(rule.backends[backend].clone())
            }
        }
    }
}

fn build_target(
    config: &Config,
    target: &Target,
    before: Option<(&Target, &LiveTarget)>,
    clusters: &[Rc<LiveCluster>],
    worker: &Worker,
) -> LiveTarget {
    let choice = |route: Option<&TableRule>, cluster: usize| {
        let c = &config.clusters[cluster];
        let key = SeriesKey {
            direction: Direction::Outbound,
            route: route.map(|r| r.route.clone()),
            backend: c.service.clone(),
            port: c.port,
        };
        Choice { cluster: clusters[cluster].clone(), series: worker.series(key) }
    };
    let rules = target.table.rules().iter().zip(&target.rules).map(|(rule, backends)| LiveRule {
        split: RefCell::new(split(rule, before, worker)),
        backends: backends.iter().map(|c| choice(Some(rule), *c)).collect(),
    });
    LiveTarget { rules: rules.collect(), own: choice(None, target.own) }
}

/// Goes on where the same rule with the same backends was.
fn split(rule: &TableRule, before: Option<(&Target, &LiveTarget)>, worker: &Worker) -> Split {
    let weights: Vec<u32> = rule.rule.backends.iter().map(|b| b.weight).collect();
    let same_backends = |old: &TableRule| {
        let names = |r: &TableRule| r.rule.backends.iter().map(|b| (b.service.clone(), b.port)).collect::<Vec<_>>();
        names(old) == names(rule)
    };
    let old = before.and_then(|(config, live)| {
        let mut rules = config.table.rules().iter().zip(&live.rules);
        let same = |r: &TableRule| r.route == rule.route && r.position == rule.position && same_backends(r);
        rules.find(|(r, _)| same(r)).map(|(_, l)| l.split.borrow().reweigh(&weights))
    });
    old.unwrap_or_else(|| Split::new(&weights, worker.random()))
}
