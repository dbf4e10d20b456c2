//! Addresses and ports that services hold: chosen once, reserved in the same transaction that writes the service, so
//! that no two services ever have the same one, whatever crashes when.

use std::net::IpAddr;

use rand::Rng;
use serde_json::{Value, json};

use super::families;
use super::kinds::Kind;
use super::services::{wants_health_check, wants_node_ports};
use super::status::{ApiError, Invalid};
use super::value::{list, name, number, text};
use crate::range::{Cidr, Family, Ranges};
use crate::store::{Op, Store, Txn};

/// Ports of nodes that services are given.
pub const NODE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;
/// Tries to find a free one before giving up; with half the range taken, the chance to fail is 2^-64.
const TRIES: usize = 64;
const OUT_OF_RANGE: &str = "provided port is not in the valid range. The range of valid ports is 30000-32767";
const ALLOCATED: &str = "provided port is already allocated";

/// However the address is written, it is one.
fn address_key(address: &str) -> String {
    let one = address.parse::<IpAddr>().map_or_else(|_| address.to_owned(), |ip| ip.to_string());
    format!("/allocations/cluster-ips/{one}")
}

fn port_key(port: i64, protocol: &str) -> String {
    format!("/allocations/node-ports/{protocol}/{port}")
}

/// Keys that a service as it is must hold.
fn held(service: &Value) -> Vec<String> {
    let given = families::addresses(service).into_iter().filter(|address| !matches!(*address, "" | "None"));
    let mut keys: Vec<String> = given.map(address_key).collect();
    for port in list(service, "spec.ports").iter().filter(|port| number(port, "nodePort") != 0) {
        let key = port_key(number(port, "nodePort"), text(port, "protocol"));
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    if number(service, "spec.healthCheckNodePort") != 0 {
        keys.push(health_check_key(service));
    }
    keys
}

/// Nodes answer on it by HTTP.
fn health_check_key(service: &Value) -> String {
    port_key(number(service, "spec.healthCheckNodePort"), "TCP")
}

/// Fills in what the service lacks, and adds to the transaction what it takes and gives back. `None` = not there.
pub async fn reserve(
    store: &dyn Store,
    kind: &Kind,
    ranges: &Ranges,
    old: Option<&Value>,
    new: Option<&mut Value>,
    mut txn: Txn,
) -> Result<Txn, ApiError> {
    // What nobody changes holds what it holds, whatever ranges the cluster has by now.
    if old.zip(new.as_deref()).is_some_and(|(old, new)| old["spec"] == new["spec"]) {
        return Ok(txn);
    }
    let before = old.map(held).unwrap_or_default();
    let mut after = Vec::new();
    if let Some(service) = new {
        normalize(service);
        let errors = families::settle(service, old, ranges);
        if !errors.is_empty() {
            return Err(ApiError::invalid(kind, name(service), &errors));
        }
        fill(store, ranges, &before, service).await?;
        check_range(kind, ranges, service)?;
        after = held(service);
        for key in after.iter().filter(|key| !before.contains(key)) {
            if store.get(key).await?.is_some() {
                return Err(taken(kind, service, key));
            }
            let owner = format!("{}/{}", super::value::namespace(service), name(service));
            txn = txn.when(key.as_str(), 0).then(Op::put(key.as_str(), owner.into_bytes()));
        }
    }
    for key in before.into_iter().filter(|key| !after.contains(key)) {
        txn = txn.then(Op::delete(key));
    }
    Ok(txn)
}

/// What does not go with the type goes away.
fn normalize(service: &mut Value) {
    let kind = text(service, "spec.type").to_owned();
    if kind == "ExternalName" {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            super::value::fields(&mut service["spec"]).remove(field);
        }
    }
    if !matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        for port in service["spec"].get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            super::value::fields(port).remove("nodePort");
        }
    }
}

async fn fill(store: &dyn Store, ranges: &Ranges, before: &[String], service: &mut Value) -> Result<(), ApiError> {
    if text(service, "spec.type") != "ExternalName" && text(service, "spec.clusterIP") != "None" {
        let mut given: Vec<String> = families::addresses(service).into_iter().map(str::to_owned).collect();
        for range in families::families(service).into_iter().skip(given.len()).filter_map(|family| ranges.of(family)) {
            given.push(free_address(store, range).await?);
        }
        service["spec"]["clusterIP"] = json!(given.first());
        service["spec"]["clusterIPs"] = json!(given);
    }
    if wants_node_ports(service) {
        let count = list(service, "spec.ports").len();
        for index in 0..count {
            let port = &service["spec"]["ports"][index];
            if number(port, "nodePort") == 0 {
                let protocol = text(port, "protocol").to_owned();
                let port = free_port(store, before, &used(service), &protocol).await?;
                service["spec"]["ports"][index]["nodePort"] = json!(port);
            }
        }
    }
    if wants_health_check(service) && number(service, "spec.healthCheckNodePort") == 0 {
        let port = free_port(store, before, &used(service), "TCP").await?;
        service["spec"]["healthCheckNodePort"] = json!(port);
    }
    Ok(())
}

/// Node ports that the service has so far, of any protocol.
fn used(service: &Value) -> Vec<i64> {
    let ports = list(service, "spec.ports").iter().map(|port| number(port, "nodePort"));
    ports.chain([number(service, "spec.healthCheckNodePort")]).collect()
}

async fn free_address(store: &dyn Store, range: Cidr) -> Result<String, ApiError> {
    for _ in 0..TRIES {
        // The low end is left to those who ask for an address by name, as Kubernetes does.
        let low = (range.size() / 16).clamp(1, 256);
        let candidate = range.nth(rand::rng().random_range(low..range.size() - 1)).to_string();
        if store.get(&address_key(&candidate)).await?.is_none() {
            return Ok(candidate);
        }
    }
    Err(ApiError::internal(format!("failed to allocate a serviceIP: range {range} is full")))
}

async fn free_port(store: &dyn Store, before: &[String], used: &[i64], protocol: &str) -> Result<u16, ApiError> {
    for _ in 0..TRIES {
        let candidate = rand::rng().random_range(NODE_PORTS);
        let key = port_key(i64::from(candidate), protocol);
        if !used.contains(&i64::from(candidate)) && !before.contains(&key) && store.get(&key).await?.is_none() {
            return Ok(candidate);
        }
    }
    Err(ApiError::internal("failed to allocate a nodePort: range is full"))
}

fn check_range(kind: &Kind, ranges: &Ranges, service: &Value) -> Result<(), ApiError> {
    let mut errors = Vec::new();
    let given = families::addresses(service);
    for address in given.iter().filter(|address| !matches!(**address, "" | "None")) {
        let ip = address.parse::<IpAddr>().ok();
        let range = ip.and_then(|ip| ranges.of(Family::of(ip)));
        if !range.is_some_and(|range| ip.is_some_and(|ip| range.contains(ip))) {
            let valid = range.map_or_else(|| ranges.to_string(), |range| range.to_string());
            let detail = format!(
                "failed to allocate IP {address}: the provided IP ({address}) is not in the valid range. The range of \
                 valid IPs is {valid}"
            );
            errors.push(Invalid::value("spec.clusterIPs", &json!(given), &detail));
        }
    }
    let outside = |port: i64| port != 0 && !u16::try_from(port).is_ok_and(|p| NODE_PORTS.contains(&p));
    for (index, port) in list(service, "spec.ports").iter().enumerate() {
        let node_port = number(port, "nodePort");
        if outside(node_port) {
            errors.push(Invalid::value(format!("spec.ports[{index}].nodePort"), &json!(node_port), OUT_OF_RANGE));
        }
    }
    let health_check = number(service, "spec.healthCheckNodePort");
    let of_a_port = |port: &Value| number(port, "nodePort") == health_check && text(port, "protocol") == "TCP";
    if outside(health_check) {
        errors.push(health_check_refused(health_check, OUT_OF_RANGE));
    } else if health_check != 0 && list(service, "spec.ports").iter().any(of_a_port) {
        errors.push(health_check_refused(health_check, ALLOCATED));
    }
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid(kind, name(service), &errors)) }
}

fn health_check_refused(port: i64, why: &str) -> Invalid {
    let detail = format!("failed to allocate requested HealthCheck NodePort {port}: {why}");
    Invalid::value("spec.healthCheckNodePort", &json!(port), &detail)
}

fn taken(kind: &Kind, service: &Value, key: &str) -> ApiError {
    let what = key.rsplit('/').next().unwrap_or_default();
    let error = if key.starts_with("/allocations/cluster-ips/") {
        let detail = format!("failed to allocate IP {what}: provided IP is already allocated");
        Invalid::value("spec.clusterIPs", &json!([what]), &detail)
    } else {
        let number_of = |port: &Value| port_key(number(port, "nodePort"), text(port, "protocol"));
        let port = what.parse::<i64>().unwrap_or_default();
        match list(service, "spec.ports").iter().position(|port| number_of(port) == key) {
            Some(index) => Invalid::value(format!("spec.ports[{index}].nodePort"), &json!(port), ALLOCATED),
            None => health_check_refused(port, ALLOCATED),
        }
    };
    ApiError::invalid(kind, name(service), &[error])
}
