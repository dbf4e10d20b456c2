//! Addresses and ports that services hold: chosen once, reserved in the same transaction that writes the service, so
//! that no two services ever have the same one, whatever crashes when.

use std::net::Ipv4Addr;

use rand::Rng;
use serde_json::{Value, json};

use super::kinds::Kind;
use super::services::{wants_health_check, wants_node_ports};
use super::status::{ApiError, Invalid};
use super::value::{list, name, number, text};
use crate::store::{Op, Store, Txn};

/// Ports of nodes that services are given.
pub const NODE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;
/// Tries to find a free one before giving up; with half the range taken, the chance to fail is 2^-64.
const TRIES: usize = 64;
const OUT_OF_RANGE: &str = "provided port is not in the valid range. The range of valid ports is 30000-32767";
const ALLOCATED: &str = "provided port is already allocated";

/// An IPv4 range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    base: u32,
    prefix: u8,
}

impl Cidr {
    /// Number of addresses.
    pub fn size(&self) -> u32 {
        1_u32.checked_shl(32 - u32::from(self.prefix)).unwrap_or(u32::MAX)
    }

    /// The n-th address.
    pub fn nth(&self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from(self.base.wrapping_add(n))
    }

    /// Whether the address is in the range.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        u32::from(address).wrapping_sub(self.base) < self.size()
    }
}

impl std::str::FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no IPv4 range such as 10.96.0.0/16");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().ok().filter(|p| (8..=30).contains(p)).ok_or_else(wrong)?;
        let base = u32::from(address) & (u32::MAX << (32 - u32::from(prefix)));
        Ok(Cidr { base, prefix })
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }
}

fn address_key(address: &str) -> String {
    format!("/allocations/cluster-ips/{address}")
}

fn port_key(port: i64, protocol: &str) -> String {
    format!("/allocations/node-ports/{protocol}/{port}")
}

/// Keys that a service as it is must hold.
fn held(service: &Value) -> Vec<String> {
    let mut keys = Vec::new();
    let address = text(service, "spec.clusterIP");
    if !matches!(address, "" | "None") {
        keys.push(address_key(address));
    }
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
    range: Cidr,
    old: Option<&Value>,
    new: Option<&mut Value>,
    mut txn: Txn,
) -> Result<Txn, ApiError> {
    let before = old.map(held).unwrap_or_default();
    let mut after = Vec::new();
    if let Some(service) = new {
        normalize(service);
        fill(store, range, &before, service).await?;
        check_range(kind, range, service)?;
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

async fn fill(store: &dyn Store, range: Cidr, before: &[String], service: &mut Value) -> Result<(), ApiError> {
    let kind = text(service, "spec.type").to_owned();
    if kind != "ExternalName" {
        if text(service, "spec.clusterIP").is_empty() {
            service["spec"]["clusterIP"] = json!(free_address(store, range).await?);
        }
        service["spec"]["clusterIPs"] = json!([service["spec"]["clusterIP"]]);
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
    Err(ApiError::internal("failed to allocate a serviceIP: range is full"))
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

fn check_range(kind: &Kind, range: Cidr, service: &Value) -> Result<(), ApiError> {
    let address = text(service, "spec.clusterIP");
    let mut errors = Vec::new();
    if !matches!(address, "" | "None") {
        match address.parse::<Ipv4Addr>() {
            Ok(parsed) if range.contains(parsed) => {}
            Ok(_) => {
                let detail = format!(
                    "failed to allocate IP {address}: the provided IP ({address}) is not in the valid range. The range \
                     of valid IPs is {range}"
                );
                errors.push(Invalid::value("spec.clusterIPs", &json!([address]), &detail));
            }
            Err(_) => {
                let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
                errors.push(Invalid::value("spec.clusterIPs[0]", &json!(address), detail));
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let range: Cidr = "10.96.0.0/16".parse().expect("a range");
        assert_eq!(range.nth(10), Ipv4Addr::new(10, 96, 0, 10));
        assert!(range.contains(Ipv4Addr::new(10, 96, 255, 255)));
        assert!(!range.contains(Ipv4Addr::new(10, 97, 0, 0)));
        for text in ["10.96.0.0", "x/16", "10.0.0.0/31", "10.0.0.0/0"] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }
}
