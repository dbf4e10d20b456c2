//! Which service has which addresses of the pool: PURE. What a service has it keeps while it may; then those get theirs
//! who ask for a certain address, then the others the lowest that are free; of two, the older service first. An address
//! that another service still shows in its status is not free: it is in the next round, after that was written.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Service};

use crate::api::client::Object;
use crate::pool::{self, Family, Pool};

/// As the parts of the control service name themselves in `managedFields`; see `controllers::start`.
pub(super) const MANAGER: &str = "sluice.dev/load-balancer-controller";

/// What a service of the pool is to have.
#[derive(Debug, Clone)]
pub(super) struct Verdict {
    pub(super) service: Arc<Service>,
    /// At most one per family.
    pub(super) addresses: Vec<IpAddr>,
    /// Why it has none, or not all: what is wrong and what to do.
    pub(super) lack: Option<String>,
}

impl Verdict {
    /// Whether its status says something else.
    pub(super) fn changes(&self) -> bool {
        let shown = self.service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        let entries = shown.and_then(|balancer| balancer.ingress.as_ref()).map_or(0, Vec::len);
        entries != self.addresses.len() || !pool::ingress(&self.service).eq(self.addresses.iter().copied())
    }
}

/// What a service asks for.
struct Wish {
    verdict: Verdict,
    /// Those of `ipFamilies` that the pool has.
    families: Vec<Family>,
    /// `loadBalancerIP`.
    asked: Option<IpAddr>,
}

/// Addresses that are somebody's already, and whose: of nodes, and named by services as their `externalIPs`.
pub(super) fn taken(services: &[Arc<Service>], nodes: &[Arc<Node>]) -> HashMap<IpAddr, String> {
    let mut taken = HashMap::new();
    for node in nodes {
        let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        for ip in addresses.filter_map(|address| address.address.parse().ok()) {
            taken.insert(ip, format!("node {}", node.name()));
        }
    }
    for service in services {
        let named = service.spec.iter().flat_map(|spec| spec.external_ips.iter().flatten());
        for ip in named.filter_map(|ip| ip.parse::<IpAddr>().ok()) {
            taken.entry(ip.to_canonical()).or_insert_with(|| format!("the externalIPs of {}", title(service)));
        }
    }
    taken
}

/// A verdict for each service that asks for addresses of the pool.
pub(super) fn plan(services: &[Arc<Service>], taken: &HashMap<IpAddr, String>, pool: &Pool) -> Vec<Verdict> {
    let mut ours: Vec<Arc<Service>> = services.iter().filter(|service| pool::asks(service)).cloned().collect();
    if pool.is_empty() {
        return ours.into_iter().map(without_pool).collect();
    }
    let born = |service: &Service| service.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let place = |s: &Service| (born(s), s.namespace().to_owned(), s.name().to_owned());
    ours.sort_by_cached_key(|service| place(service));
    let mut wishes: Vec<Wish> = ours.into_iter().map(|service| wish(service, pool)).collect();
    let mut holders = HashMap::new();
    keep(&mut wishes, &mut holders, pool);
    for wish in &wishes {
        for ip in pool::ingress(&wish.verdict.service) {
            holders.entry(ip).or_insert_with(|| title(&wish.verdict.service));
        }
    }
    for (ip, whose) in taken {
        holders.entry(*ip).or_insert_with(|| whose.clone());
    }
    // Nothing is given to what goes.
    let mut staying: Vec<&mut Wish> = wishes.iter_mut().filter(|wish| !wish.verdict.service.deleting()).collect();
    staying.iter_mut().for_each(|wish| wish.take_asked(&mut holders));
    for family in Family::ALL {
        let mut addresses = pool.addresses(family);
        for wish in staying.iter_mut().filter(|wish| wish.wants(family)) {
            match addresses.find(|ip| !holders.contains_key(ip)) {
                Some(ip) => wish.take(ip, &mut holders),
                None => wish.verdict.lack = Some(exhausted(pool, family)),
            }
        }
    }
    wishes.into_iter().map(Wish::decided).collect()
}

fn title(service: &Service) -> String {
    format!("service {}/{}", service.namespace(), service.name())
}

fn exhausted(pool: &Pool, family: Family) -> String {
    format!(
        "0 of {} {} addresses of the pool {pool} are free; delete a service that has one, or add a range to {}",
        pool.size(family),
        family.name(),
        pool::FLAG
    )
}

/// Without a pool nothing is given, and what was given is taken back. What another balancer wrote is its own.
fn without_pool(service: Arc<Service>) -> Verdict {
    let classed = service.spec.as_ref().is_some_and(|spec| spec.load_balancer_class.is_some());
    let managers = service.metadata.managed_fields.iter().flatten();
    let written = managers.filter(|m| m.subresource.as_deref() == Some("status"));
    let by_us = written.filter_map(|m| m.manager.as_deref()).any(|manager| manager == MANAGER);
    let shown = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let foreign = !classed && !by_us && shown.is_some_and(|balancer| balancer.ingress.is_some());
    let addresses = if foreign { pool::ingress(&service).collect() } else { vec![] };
    let lack = format!(
        "no pool of addresses is set: start sluice-control with {} <range>[,<range>...], or set loadBalancerClass for \
         another balancer",
        pool::FLAG
    );
    Verdict { lack: (!foreign && !service.deleting()).then_some(lack), addresses, service }
}

fn wish(service: Arc<Service>, pool: &Pool) -> Wish {
    let spec = service.spec.clone().unwrap_or_default();
    let named = spec.ip_families.unwrap_or_else(|| vec![Family::V4.name().to_owned()]);
    let mut families: Vec<Family> =
        Family::ALL.into_iter().filter(|f| named.iter().any(|n| n == f.name()) && pool.size(*f) > 0).collect();
    families.sort_by_key(|family| named.iter().position(|n| n == family.name()));
    let text = spec.load_balancer_ip.filter(|text| !text.is_empty());
    let asked = text.as_ref().and_then(|text| text.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical());
    let lack = match (&text, asked) {
        (None, _) if families.is_empty() => {
            let (of, flag) = (named.join(", "), pool::FLAG);
            Some(format!("the pool {pool} has no addresses of the service's families ({of}); add a range to {flag}"))
        }
        (Some(text), None) => Some(format!("loadBalancerIP {text:?} is no IP address; correct it or leave it out")),
        (Some(_), Some(ip)) if !pool.contains(ip) => {
            Some(format!("loadBalancerIP {ip} is not in the pool {pool}; name one that is, or leave it out"))
        }
        (Some(_), Some(ip)) if !families.contains(&Family::of(ip)) => {
            let of = named.join(", ");
            Some(format!("loadBalancerIP {ip} is not of the service's families ({of}); name one that is"))
        }
        _ => None,
    };
    if lack.is_some() {
        families.clear();
    }
    Wish { verdict: Verdict { service, addresses: vec![], lack }, families, asked }
}

/// Everybody keeps what it has and may have; of what two show, the older one.
fn keep(wishes: &mut [Wish], holders: &mut HashMap<IpAddr, String>, pool: &Pool) {
    for wish in wishes {
        let shown: Vec<IpAddr> = pool::ingress(&wish.verdict.service).collect();
        for ip in shown.into_iter().filter(|ip| pool.contains(*ip)) {
            let other_asked = wish.asked_of(Family::of(ip)).is_some_and(|asked| asked != ip);
            if wish.wants(Family::of(ip)) && !other_asked && !holders.contains_key(&ip) {
                wish.take(ip, holders);
            }
        }
    }
}

impl Wish {
    fn wants(&self, family: Family) -> bool {
        let has = self.verdict.addresses.iter().any(|ip| Family::of(*ip) == family);
        self.families.contains(&family) && !has
    }

    fn asked_of(&self, family: Family) -> Option<IpAddr> {
        self.asked.filter(|ip| Family::of(*ip) == family)
    }

    fn take(&mut self, ip: IpAddr, holders: &mut HashMap<IpAddr, String>) {
        holders.insert(ip, title(&self.verdict.service));
        self.verdict.addresses.push(ip);
    }

    /// The address it asks for, or none of that family.
    fn take_asked(&mut self, holders: &mut HashMap<IpAddr, String>) {
        let Some(ip) = self.asked.filter(|ip| self.wants(Family::of(*ip))) else { return };
        match holders.get(&ip) {
            None => self.take(ip, holders),
            Some(whose) => {
                let lack = format!("loadBalancerIP {ip} is taken by {whose}; name another one, or leave it out");
                self.verdict.lack = Some(lack);
                self.families.retain(|family| *family != Family::of(ip));
            }
        }
    }

    fn decided(mut self) -> Verdict {
        let order = |ip: &IpAddr| self.families.iter().position(|family| *family == Family::of(*ip));
        self.verdict.addresses.sort_by_key(order);
        self.verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const CREATED: &str = "2026-01-01T00:00:00Z";

    fn service(name: &str, spec: Value, has: &[&str]) -> Arc<Service> {
        let mut object = json!({
            "metadata": {"name": name, "namespace": "shop", "uid": name, "creationTimestamp": CREATED},
            "spec": {"type": "LoadBalancer", "ipFamilies": ["IPv4"]}, "status": {"loadBalancer": {}}});
        object["spec"].as_object_mut().expect("a spec").extend(spec.as_object().expect("a spec").clone());
        if !has.is_empty() {
            let ingress: Vec<Value> = has.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
            object["status"]["loadBalancer"]["ingress"] = json!(ingress);
        }
        Arc::new(serde_json::from_value(object).expect("a service"))
    }

    fn decided(services: &[Arc<Service>], pool: &str) -> Vec<Verdict> {
        plan(services, &taken(services, &[]), &pool.parse().expect("a pool"))
    }

    /// `name=addresses`, and `!` for those that are told that something is missing.
    fn shown(verdicts: &[Verdict]) -> Vec<String> {
        let show = |v: &Verdict| {
            let ips: Vec<String> = v.addresses.iter().map(ToString::to_string).collect();
            format!("{}={}{}", v.service.name(), ips.join("+"), if v.lack.is_some() { "!" } else { "" })
        };
        verdicts.iter().map(show).collect()
    }

    /// What it shows, the services, the pool, and who then has what.
    type Row<'a> = (&'a str, Vec<Arc<Service>>, &'a str, &'a [&'a str]);

    #[test]
    fn who_gets_which_address() {
        let lb = |name: &str, has: &[&str]| service(name, json!({}), has);
        let asks = |name: &str, ip: &str, has: &[&str]| service(name, json!({"loadBalancerIP": ip}), has);
        let dual = |name: &str, has: &[&str]| service(name, json!({"ipFamilies": ["IPv6", "IPv4"]}), has);
        let two = "192.0.2.1-192.0.2.2";
        let both = "192.0.2.1-192.0.2.2,2001:db8::1";
        let table: Vec<Row<'_>> = vec![
            ("the lowest, by name", vec![lb("b", &[]), lb("a", &[])], two, &["a=192.0.2.1", "b=192.0.2.2"]),
            (
                "what one has it keeps",
                vec![lb("a", &[]), lb("b", &["192.0.2.1"])],
                two,
                &["a=192.0.2.2", "b=192.0.2.1"],
            ),
            ("exhausted", vec![lb("a", &[]), lb("b", &[]), lb("c", &[])], two, &["a=192.0.2.1", "b=192.0.2.2", "c=!"]),
            (
                "of two that show one",
                vec![lb("a", &["192.0.2.2"]), lb("b", &["192.0.2.2"])],
                two,
                &["a=192.0.2.2", "b=192.0.2.1"],
            ),
            ("no longer in the pool", vec![lb("a", &["198.51.100.1"])], two, &["a=192.0.2.1"]),
            (
                "asked for goes first",
                vec![lb("a", &[]), asks("b", "192.0.2.1", &[])],
                two,
                &["a=192.0.2.2", "b=192.0.2.1"],
            ),
            (
                "asked for and taken",
                vec![lb("a", &["192.0.2.1"]), asks("b", "192.0.2.1", &[])],
                two,
                &["a=192.0.2.1", "b=!"],
            ),
            (
                "asked for by two",
                vec![asks("b", "192.0.2.1", &[]), asks("a", "192.0.2.1", &[])],
                two,
                &["a=192.0.2.1", "b=!"],
            ),
            ("asked for another one now", vec![asks("a", "192.0.2.2", &["192.0.2.1"])], two, &["a=192.0.2.2"]),
            ("outside of the pool", vec![asks("a", "192.0.2.9", &["192.0.2.1"])], two, &["a=!"]),
            ("no address at all", vec![asks("a", "web", &[])], two, &["a=!"]),
            ("of another family", vec![asks("a", "2001:db8::1", &[])], both, &["a=!"]),
            // Neither is free before the other one's status shows that it is given up.
            (
                "an exchange",
                vec![asks("a", "192.0.2.2", &["192.0.2.1"]), asks("b", "192.0.2.1", &["192.0.2.2"])],
                two,
                &["a=!", "b=!"],
            ),
            ("one of each family", vec![dual("a", &[])], both, &["a=2001:db8::1+192.0.2.1"]),
            (
                "one of each family, one exhausted",
                vec![dual("a", &[]), dual("b", &[])],
                both,
                &["a=2001:db8::1+192.0.2.1", "b=192.0.2.2!"],
            ),
            ("what the pool can serve", vec![dual("a", &[])], two, &["a=192.0.2.1"]),
            ("nothing that the pool can serve", vec![lb("a", &[])], "2001:db8::/64", &["a=!"]),
            (
                "an externalIP",
                vec![service("a", json!({"type": "ClusterIP", "externalIPs": ["192.0.2.1"]}), &[]), lb("b", &[])],
                two,
                &["b=192.0.2.2"],
            ),
            (
                "classes",
                vec![
                    service("a", json!({"loadBalancerClass": "sluice.dev/pool"}), &[]),
                    service("b", json!({"loadBalancerClass": "example.com/other"}), &["198.51.100.1"]),
                ],
                two,
                &["a=192.0.2.1"],
            ),
        ];
        for (what, services, pool, want) in table {
            assert_eq!(shown(&decided(&services, pool)), want, "{what}");
        }
    }

    #[test]
    fn decisions_stand() {
        let services = [
            service("a", json!({}), &["192.0.2.1"]),
            service("b", json!({"ipFamilies": ["IPv6", "IPv4"]}), &["2001:db8::1", "192.0.2.2"]),
        ];
        let verdicts = decided(&services, "192.0.2.1-192.0.2.2,2001:db8::1");
        assert!(verdicts.iter().all(|v| !v.changes() && v.lack.is_none()), "{verdicts:?}");
    }

    #[test]
    fn what_is_missing_is_said_with_its_remedy() {
        let full = decided(&[service("a", json!({}), &[]), service("b", json!({}), &[])], "192.0.2.1");
        let lack = full[1].lack.as_deref().expect("told");
        assert!(lack.starts_with("0 of 1 IPv4 addresses of the pool 192.0.2.1 are free"), "{lack}");
        let none = decided(&[service("a", json!({}), &[])], "");
        assert!(none[0].lack.as_deref().is_some_and(|lack| lack.contains(pool::FLAG)), "{none:?}");
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "n1"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}))
        .expect("a node");
        let services = [service("a", json!({"loadBalancerIP": "192.0.2.1"}), &[])];
        let taken = taken(&services, &[Arc::new(node)]);
        let verdicts = plan(&services, &taken, &"192.0.2.0/24".parse().expect("a pool"));
        assert!(verdicts[0].lack.as_deref().is_some_and(|lack| lack.contains("taken by node n1")), "{verdicts:?}");
    }

    #[test]
    fn without_a_pool_other_balancers_are_left_alone() {
        let with = |spec: Value, manager: &str| {
            let mut service = (*service("a", spec, &["192.0.2.1"])).clone();
            let entry = json!([{"manager": manager, "subresource": "status", "operation": "Update"}]);
            service.metadata.managed_fields = serde_json::from_value(entry).expect("managed fields");
            let verdicts = decided(&[Arc::new(service)], "");
            (verdicts[0].changes(), verdicts[0].lack.is_some())
        };
        assert_eq!(with(json!({}), "cloud-controller"), (false, false));
        assert_eq!(with(json!({}), MANAGER), (true, true), "given when there was a pool");
        assert_eq!(with(json!({"loadBalancerClass": "sluice.dev/pool"}), "somebody"), (true, true));
    }

    #[test]
    fn what_goes_keeps_its_address_and_gets_none() {
        let going = |has: &[&str]| {
            let mut service = (*service("a", json!({}), has)).clone();
            service.metadata.deletion_timestamp = service.metadata.creation_timestamp.clone();
            Arc::new(service)
        };
        assert_eq!(
            shown(&decided(&[going(&["192.0.2.1"]), service("b", json!({}), &[])], "192.0.2.1")),
            ["a=192.0.2.1", "b=!",]
        );
        assert_eq!(shown(&decided(&[going(&[])], "192.0.2.1")), ["a="]);
    }
}
