//! A worker's own form of a [`Config`]: splits with their state, counters resolved, endpoints with their connections.
//! Built once per config; what stayed the same is taken over from the one before.

use crate::{
    cluster::{LiveCluster, LivePolicy},
    config::{Cluster, Config, Target},
    metrics::{Direction, Series, SeriesKey},
    outbound::host,
    reason::Reason,
    rule::{LiveRule, Routed},
    worker::Worker,
};
use http::{HeaderMap, Request};
use sluice_traffic::{
    route::{self, Decision, Headers, TableRule},
    split::Split,
};
use std::{rc::Rc, sync::Arc};

/// A request's headers as routes look at them.
struct Values<'a>(&'a HeaderMap);

impl Headers for Values<'_> {
    fn any(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.0.get_all(name).iter().any(|v| test(v.as_bytes()))
    }
}

#[derive(Debug)]
pub struct Live {
    pub config: Arc<Config>,
    targets: Vec<LiveTarget>,
    clusters: Vec<Rc<LiveCluster>>,
}

#[derive(Debug)]
struct LiveTarget {
    rules: Vec<LiveRule>,
    own: Choice,
}

/// A backend with its counters for one route.
#[derive(Clone, Debug)]
pub struct Choice {
    pub cluster: Rc<LiveCluster>,
    pub series: Rc<Series>,
    /// Of the series.
    pub key: Rc<SeriesKey>,
}

impl Live {
    /// Makes `config` usable by `worker`, continuing from the worker's present tables.
    pub fn build(config: Arc<Config>, worker: &Worker, previous: &Live) -> Self {
        let clusters: Vec<Rc<LiveCluster>> = config.clusters.iter().map(|c| Rc::new(live_cluster(c, worker))).collect();
        let targets = config
            .targets
            .iter()
            .map(|t| {
                let before = previous.find(t);
                build_target(&config, t, before, &clusters, worker)
            })
            .collect();
        Self { config, targets, clusters }
    }

    pub fn empty() -> Self {
        Self { config: Arc::default(), targets: Vec::new(), clusters: Vec::new() }
    }

    fn find(&self, target: &Target) -> Option<(&Target, &LiveTarget)> {
        let same = |t: &&Target| t.service == target.service && t.port == target.port && t.listener == target.listener;
        self.config.targets.iter().zip(&self.targets).find(|(t, _)| same(t))
    }

    /// The backend of an HTTP request to `target`, and what is asked of it on the way.
    pub fn choose_http<B>(&self, target: usize, request: &Request<B>, worker: &Worker) -> Result<Routed, Reason> {
        let (of, target) = (&self.config.targets[target], &self.targets[target]);
        let asked = route::Request {
            host: host(request),
            path: request.uri().path(),
            query: request.uri().query().unwrap_or_default(),
            method: request.method().as_str(),
            headers: &Values(request.headers()),
        };
        match of.table.find(&asked) {
            Decision::NoMatch => Err(Reason::NoRoute),
            Decision::Own if of.listener.is_some() => Err(Reason::NoRoute),
            Decision::Own => Ok(Routed::plain(target.own.clone())),
            Decision::Rule(i) => target.rules[i].route(request.headers(), &target.own, worker),
        }
    }

    /// The backend of a connection to `target` that is not HTTP; `name` is the server that TLS of the app's own asks for.
    pub fn choose_tcp(&self, target: usize, name: Option<&str>) -> Result<Choice, Reason> {
        // A listener's place may be another's by now, where the config has changed under a client's first bytes.
        let (Some(of), Some(target)) = (self.config.targets.get(target), self.targets.get(target)) else {
            return Err(Reason::NoRoute);
        };
        match name.map_or_else(|| of.table.find_tcp(), |name| of.table.find_tls(name)) {
            Decision::NoMatch => Err(Reason::NoRoute),
            Decision::Own if of.listener.is_some() => Err(Reason::NoRoute),
            Decision::Own => Ok(target.own.clone()),
            Decision::Rule(i) => Ok(target.rules[i].choose()?.choice.clone()),
        }
    }

    pub fn clusters(&self) -> &[Rc<LiveCluster>] {
        &self.clusters
    }
}

fn live_cluster(c: &Cluster, worker: &Worker) -> LiveCluster {
    let endpoints: Vec<_> = c.endpoints.iter().map(|e| worker.upstream(e)).collect();
    let addresses: Vec<_> = c.endpoints.iter().map(|e| e.address).collect();
    if let Some(of) = &c.policy {
        endpoints.iter().for_each(|e| e.tune(of));
    }
    let state = worker.cluster_state(&c.service, c.port);
    let policy = |of| Box::new(LivePolicy::new(of, &addresses, &c.near, &state, worker.now_ms()));
    let policy = c.policy.clone().map(policy);
    if policy.is_none() {
        state.meet_anew();
    }
    LiveCluster { known: c.known, http2: c.http2, endpoints, policy, state }
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
        Choice { cluster: clusters[cluster].clone(), series: worker.series(key.clone()), key: key.into() }
    };
    let rules = target.table.rules().iter().zip(&target.rules).map(|(rule, of)| {
        let old = before.and_then(|before| same_rule(rule, before));
        let backends = of.backends.iter().map(|c| choice(Some(rule), *c)).collect();
        let mirrors = of.mirrors.iter().map(|c| clusters[*c].clone()).collect();
        let bucket = old.map(LiveRule::bucket).unwrap_or_default();
        let split = split(&weights(config, rule, &of.backends), old, worker);
        LiveRule::new(&rule.rule, split, backends, mirrors, bucket)
    });
    LiveTarget { rules: rules.collect(), own: choice(None, target.own) }
}

/// The rule's weights. A backend without endpoints keeps its share, which is answered 503, unless its policy gives it away.
fn weights(config: &Config, rule: &TableRule, clusters: &[usize]) -> Vec<u32> {
    let gives_away = |c: &Cluster| c.endpoints.is_empty() && c.policy.as_ref().is_some_and(|p| p.redistribute);
    let weight = |(b, c): (&sluice_model::Backend, &usize)| if gives_away(&config.clusters[*c]) { 0 } else { b.weight };
    rule.rule.backends.iter().zip(clusters).map(weight).collect()
}

/// The same rule with the same backends, as it was before.
fn same_rule<'a>(rule: &TableRule, (config, live): (&Target, &'a LiveTarget)) -> Option<&'a LiveRule> {
    let names = |r: &TableRule| r.rule.backends.iter().map(|b| (b.service.clone(), b.port)).collect::<Vec<_>>();
    let same = |r: &TableRule| r.route == rule.route && r.position == rule.position && names(r) == names(rule);
    config.table.rules().iter().zip(&live.rules).find(|(r, _)| same(r)).map(|(_, l)| l)
}

/// Goes on where the rule was before.
fn split(weights: &[u32], old: Option<&LiveRule>, worker: &Worker) -> Split {
    match old {
        Some(old) => old.split.borrow().reweigh(weights),
        None => Split::new(weights, worker.random()),
    }
}
