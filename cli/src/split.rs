//! `sluice split`: changes the weights of the route in front of a service, or of a gateway's route, and waits until they
//! are in force at every node, sidecar and gateway. What to change is decided in plain code; only `run` talks to the cluster.

use crate::client::{block_on, connect};
use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use gateway_api::httproutes::{HttpRoute, HttpRouteSpec};
use k8s_openapi::{api::core::v1::Service, apimachinery::pkg::apis::meta::v1::Condition};
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams},
    runtime::{WatchStreamExt, watcher},
};
use std::{
    collections::HashSet,
    path::Path,
    time::{Duration, Instant},
};

/// Who writes statuses of routes under services, and under gateways.
const OURS: [&str; 2] = ["sluice.dev/control", "sluice.dev/gateway"];
/// Times a change is tried against others' changes.
const TRIES: usize = 10;

/// `v1=90` → ("v1", 90).
fn parse(weights: &[String]) -> Result<Vec<(String, i32)>> {
    let one = |w: &String| {
        let (name, n) = w.split_once('=').with_context(|| format!("{w:?} is not <backend>=<weight>"))?;
        let n: i32 = n
            .parse()
            .ok()
            .filter(|n| (0..=1_000_000).contains(n))
            .with_context(|| format!("weight {n:?} of {name} is not a number between 0 and 1000000"))?;
        Ok((name.to_owned(), n))
    };
    let all = weights.iter().map(one).collect::<Result<Vec<_>>>()?;
    let mut seen = HashSet::new();
    match all.iter().find(|(name, _)| !seen.insert(name)) {
        Some((name, _)) => bail!("backend {name} is given two weights; give it one"),
        None => Ok(all),
    }
}

/// The rules with new weights: in every rule that has all the named backends. Backends not named get 0.
fn reweigh(spec: &HttpRouteSpec, service: &str, weights: &[(String, i32)]) -> Result<HttpRouteSpec> {
    let mut next = spec.clone();
    let is = |backend: &str, name: &str| backend == name || backend == format!("{service}-{name}");
    let mut changed = 0;
    if let Some((long, short)) = same(service, weights) {
        bail!("{long} and {short} are one backend; give it one weight");
    }
    for rule in next.rules.iter_mut().flatten() {
        let refs = rule.backend_refs.get_or_insert_default();
        if !weights.iter().all(|(name, _)| refs.iter().any(|b| is(&b.name, name))) {
            continue;
        }
        for b in refs.iter_mut() {
            b.weight = Some(weights.iter().find(|(name, _)| is(&b.name, name)).map_or(0, |(_, w)| *w));
        }
        changed += 1;
    }
    if changed == 0 {
        let known: Vec<_> = spec
            .rules
            .iter()
            .flatten()
            .flat_map(|r| r.backend_refs.iter().flatten())
            .map(|b| b.name.as_str())
            .collect();
        let names: Vec<_> = weights.iter().map(|(n, _)| n.as_str()).collect();
        bail!("no rule has all of the backends {}; the route's backends are {}", names.join(", "), known.join(", "));
    }
    if weights.iter().all(|(_, w)| *w == 0) {
        bail!("all weights are 0: that would refuse every request; give one of them traffic");
    }
    Ok(next)
}

/// A backend that is given by its whole name and by its short one.
fn same<'a>(service: &str, weights: &'a [(String, i32)]) -> Option<(&'a str, &'a str)> {
    let names = || weights.iter().map(|(name, _)| name.as_str());
    names().find_map(|long| Some((long, names().find(|short| format!("{service}-{short}") == long)?)))
}

fn of_service(r: &HttpRoute, service: &str) -> bool {
    r.spec.parent_refs.iter().flatten().any(|p| p.kind.as_deref() == Some("Service") && p.name == service)
}

/// A route of this name that clients reach by a gateway.
fn of_gateway(r: &HttpRoute, name: &str) -> bool {
    let gateway = |kind: Option<&str>| kind.is_none_or(|k| k == "Gateway");
    r.metadata.name.as_deref() == Some(name) && r.spec.parent_refs.iter().flatten().any(|p| gateway(p.kind.as_deref()))
}

/// What the route's status says of a generation: in force under all parents with a message, or not yet and why.
fn in_force(r: &HttpRoute, generation: i64) -> std::result::Result<String, String> {
    let ours = r.status.iter().flat_map(|s| &s.parents).filter(|p| OURS.contains(&p.controller_name.as_str()));
    let all: Vec<String> = ours.map(|p| in_force_under(&p.conditions, generation)).collect::<Result<_, _>>()?;
    all.into_iter().next_back().ok_or_else(|| "control has not looked at it yet".to_owned())
}

fn in_force_under(conditions: &[Condition], generation: i64) -> std::result::Result<String, String> {
    let conditions: Vec<&Condition> = conditions.iter().filter(|c| c.observed_generation == Some(generation)).collect();
    let of = |type_: &str| conditions.iter().find(|c| c.type_ == type_);
    if let Some(c) = of("Accepted").filter(|c| c.status == "False") {
        return Err(format!("not accepted: {} ({})", c.message, c.reason));
    }
    match of("Programmed") {
        Some(c) if c.status == "True" => Ok(c.message.clone()),
        Some(c) => Err(format!("{}: {}", c.reason, c.message)),
        None => Err("control has not looked at it yet".to_owned()),
    }
}

pub fn run(kubeconfig: &Path, namespace: &str, service: &str, weights: &[String], timeout_s: u64) -> Result<()> {
    let weights = parse(weights)?;
    block_on(async {
        let client = connect(kubeconfig).await?;
        let service_of = Api::<Service>::namespaced(client.clone(), namespace);
        let api: Api<HttpRoute> = Api::namespaced(client, namespace);
        let routes = api.list(&ListParams::default()).await.context("list HTTPRoutes")?.items;
        let mut of: Vec<_> = routes.iter().filter(|r| of_service(r, service)).cloned().collect();
        if of.is_empty() {
            of = routes.into_iter().filter(|r| of_gateway(r, service)).collect();
        }
        if of.is_empty() && service_of.get_opt(service).await.context("read the service")?.is_none() {
            bail!("there is no service {service} in namespace {namespace}; another namespace is given by -n");
        }
        let route = match of.len() {
            0 => {
                bail!("service {namespace}/{service} has no HTTPRoute; create one with its versions as backends first")
            }
            1 => of.remove(0),
            _ => of
                .into_iter()
                .find(|r| reweigh(&r.spec, service, &weights).is_ok())
                .with_context(|| format!("no HTTPRoute of service {namespace}/{service} has these backends"))?,
        };
        let name = route.metadata.name.clone().unwrap_or_default();
        let changed = change(&api, route, service, &weights).await?;
        let answered = Instant::now();
        let generation = changed.metadata.generation.unwrap_or(0);
        let message = wait(&api, &name, changed, generation, Duration::from_secs(timeout_s)).await?;
        let shown: Vec<_> = weights.iter().map(|(n, w)| format!("{n}={w}")).collect();
        println!(
            "{namespace}/{service}: {} {message}, {} ms after the API's answer",
            shown.join(" "),
            answered.elapsed().as_millis()
        );
        Ok(())
    })
}

/// Changes the weights. The version makes sure that nobody else's change in between is lost; where there was one (a
/// status, most often) the new object is taken and changed instead.
async fn change(
    api: &Api<HttpRoute>,
    mut route: HttpRoute,
    service: &str,
    weights: &[(String, i32)],
) -> Result<HttpRoute> {
    let name = route.metadata.name.clone().unwrap_or_default();
    for _ in 0..TRIES {
        let next = reweigh(&route.spec, service, weights)?;
        let patch = serde_json::json!({
            "metadata": {"resourceVersion": route.metadata.resource_version},
            "spec": {"rules": next.rules},
        });
        match api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Err(kube::Error::Api(e)) if e.code == 409 => {
                route = api.get(&name).await.context("read the route again")?
            }
            other => return other.context("change the route"),
        }
    }
    bail!("the route {name} is being changed all the time by somebody else; see its managedFields")
}

async fn wait(api: &Api<HttpRoute>, name: &str, first: HttpRoute, generation: i64, limit: Duration) -> Result<String> {
    let mut last = match in_force(&first, generation) {
        Ok(m) => return Ok(m),
        Err(why) => why,
    };
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut changes = watcher(api.clone(), config).default_backoff().applied_objects().boxed();
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        match tokio::time::timeout_at(deadline, changes.try_next()).await {
            Ok(Ok(Some(r))) => match in_force(&r, generation) {
                Ok(m) => return Ok(m),
                Err(why) => last = why,
            },
            Ok(Ok(None)) => bail!("the watch ended; {last}"),
            Ok(Err(_)) => {}
            Err(_) => bail!(
                "AckTimeout: the change is stored but not in force everywhere after {} s: {last}",
                limit.as_secs()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec() -> HttpRouteSpec {
        serde_json::from_value(json!({"rules": [
            {"backendRefs": [{"name": "echo-v2", "port": 80}]},
            {"backendRefs": [{"name": "echo-v1", "port": 80, "weight": 90}, {"name": "echo-v2", "port": 80, "weight": 10}]}
        ]}))
        .expect("a spec")
    }

    fn weights_of(s: &HttpRouteSpec) -> Vec<Vec<Option<i32>>> {
        s.rules.iter().flatten().map(|r| r.backend_refs.iter().flatten().map(|b| b.weight).collect()).collect()
    }

    #[test]
    fn weights_go_to_the_rule_that_has_the_backends() {
        let w = parse(&["v1=50".into(), "echo-v2=50".into()]).expect("parses");
        let next = reweigh(&spec(), "echo", &w).expect("fits");
        assert_eq!(weights_of(&next), [vec![None], vec![Some(50), Some(50)]]);
    }

    #[test]
    fn backends_that_are_not_named_get_nothing() {
        let next = reweigh(&spec(), "echo", &[("v1".into(), 1)]).expect("fits");
        assert_eq!(weights_of(&next)[1], [Some(1), Some(0)]);
    }

    #[test]
    fn nonsense_is_refused_with_the_names_that_exist() {
        assert!(parse(&["v1".into()]).is_err() && parse(&["v1=-1".into()]).is_err());
        let e = reweigh(&spec(), "echo", &[("v3".into(), 1)]).expect_err("no v3").to_string();
        assert!(e.contains("echo-v1"), "{e}");
        assert!(reweigh(&spec(), "echo", &[("v1".into(), 0), ("v2".into(), 0)]).is_err());
        assert!(parse(&["v1=1".into(), "v1=2".into()]).is_err(), "twice");
        assert!(reweigh(&spec(), "echo", &[("v1".into(), 1), ("echo-v1".into(), 2)]).is_err(), "twice");
    }
}
