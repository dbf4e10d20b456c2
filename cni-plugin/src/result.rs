//! PURE: the results of ADD (CNI specification 1.1.0, section 5), in the form of each version, and the results of
//! plugins that ran before this one in a chain.

use crate::{Error, spec::VERSIONS};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sluice_netlink::plan::{Prefix, gateway};
use std::net::IpAddr;

type Object = Map<String, Value>;

/// What results older than 1.1.0 do not know.
const NEW_IN_INTERFACES: [&str; 3] = ["mtu", "socketPath", "pciID"];
const NEW_IN_ROUTES: [&str; 5] = ["mtu", "advmss", "priority", "table", "scope"];

/// Name resolution as the configuration has it: passed on, not applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub domain: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// What ADD made.
pub struct Made<'a> {
    pub host_link: &'a str,
    pub host_mac: [u8; 6],
    pub ifname: &'a str,
    pub mac: [u8; 6],
    pub netns: String,
    pub addresses: &'a [IpAddr],
    pub mtu: Option<u32>,
    pub dns: &'a Dns,
}

/// The result of the plugins before this one, `prevResult`. What it says and we do not know is passed on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Previous {
    interfaces: Vec<Object>,
    ips: Vec<Object>,
    routes: Vec<Object>,
    dns: Object,
}

impl Previous {
    pub fn parse(value: &Value) -> Result<Self, String> {
        let object = value.as_object().ok_or("it is no object")?;
        let list = |name: &str| objects(object.get(name)).map_err(|()| format!("{name} is no list of objects"));
        let dns = match object.get("dns") {
            None | Some(Value::Null) => Object::new(),
            Some(Value::Object(dns)) => dns.clone(),
            Some(_) => return Err("dns is no object".into()),
        };
        let previous = Self { interfaces: list("interfaces")?, ips: list("ips")?, routes: list("routes")?, dns };
        if previous.interfaces.iter().any(|i| !i.get("name").is_some_and(Value::is_string)) {
            return Err("an interface has no name".into());
        }
        previous.ips.iter().try_for_each(|ip| previous.check_ip(ip)).map(|()| previous)
    }

    fn check_ip(&self, ip: &Object) -> Result<(), String> {
        let text = ip.get("address").and_then(Value::as_str).unwrap_or_default();
        text.parse::<Prefix>().map_err(|e| e.to_string())?;
        match ip.get("interface").filter(|i| !i.is_null()) {
            Some(i) if interface_of(ip).is_none_or(|n| n >= self.interfaces.len()) => {
                Err(format!("{text} is on interface {i} of {}", self.interfaces.len()))
            }
            _ => Ok(()),
        }
    }

    /// Addresses that it names on a pod's interface; `None` when it does not name the interface.
    pub fn addresses_of(&self, ifname: &str) -> Option<Vec<IpAddr>> {
        let in_pod = |i: &Object| i.get("sandbox").and_then(Value::as_str).is_some_and(|s| !s.is_empty());
        let place = self.interfaces.iter().position(|i| i["name"] == ifname && in_pod(i))?;
        let on_it = self.ips.iter().filter(|ip| interface_of(ip) == Some(place));
        Some(on_it.filter_map(address).collect())
    }
}

fn objects(value: Option<&Value>) -> Result<Vec<Object>, ()> {
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(|v| v.as_object().cloned().ok_or(())).collect(),
        Some(_) => Err(()),
    }
}

fn interface_of(ip: &Object) -> Option<usize> {
    ip.get("interface")?.as_u64().and_then(|n| usize::try_from(n).ok())
}

fn address(ip: &Object) -> Option<IpAddr> {
    ip.get("address")?.as_str()?.split('/').next()?.parse().ok()
}

/// The result of ADD: what others made before, then what we made.
pub fn result(version: &str, made: &Made<'_>, before: Option<&Previous>) -> Value {
    let mut all = before.cloned().unwrap_or_default();
    let pod_interface = all.interfaces.len() + 1;
    all.interfaces.extend(interfaces(made));
    all.ips.extend(made.addresses.iter().map(|a| ip(*a, pod_interface)));
    all.routes.extend(made.addresses.iter().map(|a| route(a.is_ipv4())));
    if let Ok(Value::Object(dns)) = serde_json::to_value(made.dns) {
        all.dns.extend(dns);
    }
    in_version(version, all)
}

fn object(value: Value) -> Object {
    match value {
        Value::Object(object) => object,
        _ => Object::new(),
    }
}

fn interfaces(made: &Made<'_>) -> [Object; 2] {
    let mut host = object(json!({ "name": made.host_link, "mac": mac_text(made.host_mac) }));
    let mut pod = object(json!({ "name": made.ifname, "mac": mac_text(made.mac), "sandbox": made.netns }));
    for interface in [&mut host, &mut pod] {
        interface.extend(made.mtu.map(|mtu| ("mtu".to_owned(), json!(mtu))));
    }
    [host, pod]
}

fn ip(a: IpAddr, interface: usize) -> Object {
    object(json!({ "address": Prefix::host(a).to_string(), "gateway": gateway(a.is_ipv4()), "interface": interface }))
}

fn route(v4: bool) -> Object {
    object(json!({ "dst": Prefix::all(v4).to_string(), "gw": gateway(v4) }))
}

/// Each version's form: results before 1.0.0 name the family of an address, those before 1.1.0 know fewer fields.
fn in_version(version: &str, mut all: Previous) -> Value {
    for ip in &mut all.ips {
        match address(ip).filter(|_| version.starts_with("0.")) {
            Some(a) => ip.insert("version".into(), json!(if a.is_ipv4() { "4" } else { "6" })),
            None => ip.remove("version"),
        };
    }
    if version != "1.1.0" {
        all.interfaces.iter_mut().for_each(|i| i.retain(|k, _| !NEW_IN_INTERFACES.contains(&k.as_str())));
        all.routes.iter_mut().for_each(|r| r.retain(|k, _| !NEW_IN_ROUTES.contains(&k.as_str())));
    }
    json!({
        "cniVersion": version, "interfaces": all.interfaces, "ips": all.ips, "routes": all.routes, "dns": all.dns,
    })
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

pub fn version_result(version: &str) -> Value {
    json!({ "cniVersion": version, "supportedVersions": VERSIONS })
}

pub fn error_result(version: &str, error: &Error) -> Value {
    json!({ "cniVersion": version, "code": error.code(), "msg": error.to_string(), "details": error.details() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made<'a>(addresses: &'a [IpAddr], dns: &'a Dns) -> Made<'a> {
        Made {
            host_link: "slc0",
            host_mac: [1; 6],
            ifname: "eth0",
            mac: [2; 6],
            netns: "/run/netns/x".into(),
            addresses,
            mtu: Some(1400),
            dns,
        }
    }

    fn addresses() -> Vec<IpAddr> {
        ["10.244.1.2", "fd00::2"].map(|a| a.parse().expect(a)).to_vec()
    }

    #[test]
    fn results_speak_each_version() {
        let (addresses, dns) = (addresses(), Dns::default());
        for version in VERSIONS {
            let got = result(version, &made(&addresses, &dns), None);
            let family = |f: &str| if version.starts_with("0.") { json!({ "version": f }) } else { json!({}) };
            let mtu = if version == "1.1.0" { json!({"mtu": 1400}) } else { json!({}) };
            let merged = |mut a: Value, b: &Value| {
                a.as_object_mut().expect("an object").extend(b.as_object().expect("an object").clone());
                a
            };
            let want = json!({
                "cniVersion": version,
                "interfaces": [
                    merged(json!({"name": "slc0", "mac": "01:01:01:01:01:01"}), &mtu),
                    merged(json!({"name": "eth0", "mac": "02:02:02:02:02:02", "sandbox": "/run/netns/x"}), &mtu),
                ],
                "ips": [
                    merged(json!({"address": "10.244.1.2/32", "gateway": "169.254.1.1", "interface": 1}), &family("4")),
                    merged(json!({"address": "fd00::2/128", "gateway": "fe80::1", "interface": 1}), &family("6")),
                ],
                "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
                "dns": {},
            });
            assert_eq!(got, want, "{version}");
        }
    }

    #[test]
    fn what_came_before_stays_and_indexes_stay_right() {
        let (addresses, dns) = (addresses(), Dns { nameservers: vec!["10.0.0.2".into()], ..Dns::default() });
        for version in VERSIONS {
            let before = json!({
                "cniVersion": version,
                "interfaces": [
                    {"name": "br0", "mac": "0a:00:00:00:00:01", "mtu": 9000},
                    {"name": "net0", "sandbox": "/run/netns/x", "pciID": "0000:00:1f.6"},
                ],
                "ips": [{"version": "4", "address": "192.0.2.5/24", "interface": 1}, {"address": "192.0.2.6/24"}],
                "routes": [{"dst": "192.0.2.0/24", "table": 7}],
                "dns": {"domain": "example.org", "nameservers": ["192.0.2.1"]},
                "other": 1,
            });
            let before = Previous::parse(&before).expect("good");
            let got = result(version, &made(&addresses, &dns), Some(&before));
            let names: Vec<_> = got["interfaces"].as_array().expect("list").iter().map(|i| &i["name"]).collect();
            assert_eq!(names, ["br0", "net0", "slc0", "eth0"]);
            let places: Vec<_> = got["ips"].as_array().expect("list").iter().map(|i| &i["interface"]).collect();
            assert_eq!(places, [&json!(1), &Value::Null, &json!(3), &json!(3)]);
            let old = version.starts_with("0.");
            assert!(got["ips"].as_array().expect("list").iter().all(|i| i.get("version").is_some() == old));
            let new = version == "1.1.0";
            assert_eq!(got["interfaces"][0].get("mtu").is_some(), new);
            assert_eq!(got["interfaces"][1].get("pciID").is_some(), new);
            assert_eq!(got["routes"][0].get("table").is_some(), new);
            assert_eq!(got["dns"], json!({"domain": "example.org", "nameservers": ["10.0.0.2"]}));
            let all = Previous::parse(&got).expect("our own result");
            assert_eq!(all.addresses_of("eth0"), Some(addresses.clone()));
            assert_eq!(all.addresses_of("net0").expect("named").len(), 1);
            assert_eq!(all.addresses_of("br0"), None, "not in the pod");
        }
    }

    #[test]
    fn results_that_cannot_be_passed_on_are_refused() {
        for bad in [
            json!(7),
            json!({"interfaces": {}}),
            json!({"interfaces": [{"mac": "x"}]}),
            json!({"ips": [{"address": "10.0.0.1"}]}),
            json!({"interfaces": [{"name": "a"}], "ips": [{"address": "10.0.0.1/24", "interface": 1}]}),
            json!({"ips": [{"address": "10.0.0.1/24", "interface": -1}]}),
            json!({"dns": []}),
        ] {
            assert!(Previous::parse(&bad).is_err(), "{bad}");
        }
        assert_eq!(Previous::parse(&json!({"ips": null})), Ok(Previous::default()));
    }
}
