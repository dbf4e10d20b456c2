//! The CNI protocol (1.1, with results from 0.3.0 on): what comes in by environment and standard input, what goes out
//! on standard output. Parsing asks nothing of the host.

use crate::{BPFFS, Error, STATE_DIR, error::Result, store::PodRef};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sluice_netlink::plan::{Prefix, gateway};
use std::{net::IpAddr, path::PathBuf};

/// Versions of configuration and result, oldest first.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Longest name of a network interface.
const IFNAME_MAX: usize = 15;
/// Longest container id that a lease's file name has room for.
const CONTAINER_MAX: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    pub fn parse(text: &str) -> Result<Self> {
        Ok(match text {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            other => return Err(Error::Environment(format!("CNI_COMMAND is {other:?}, which is no CNI verb"))),
        })
    }
}

/// Which interface of which container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub struct Attachment {
    #[serde(rename = "containerID")]
    pub container: String,
    pub ifname: String,
}

/// `CNI_*` variables, by name.
pub struct Environment<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
}

impl<'a> Environment<'a> {
    pub fn new(get: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { get }
    }

    fn required(&self, name: &str) -> Result<String> {
        let value = (self.get)(name).filter(|v| !v.is_empty());
        value.ok_or_else(|| Error::Environment(format!("{name} is not set")))
    }

    pub fn verb(&self) -> Result<Verb> {
        Verb::parse(&self.required("CNI_COMMAND")?)
    }

    pub fn attachment(&self) -> Result<Attachment> {
        let (container, ifname) = (self.required("CNI_CONTAINERID")?, self.required("CNI_IFNAME")?);
        if !valid_container(&container) {
            return Err(Error::Environment(format!("CNI_CONTAINERID {container:?} is no valid container id")));
        }
        if !valid_ifname(&ifname) {
            return Err(Error::Environment(format!("CNI_IFNAME {ifname:?} is no valid interface name")));
        }
        Ok(Attachment { container, ifname })
    }

    pub fn netns(&self) -> Result<PathBuf> {
        self.required("CNI_NETNS").map(PathBuf::from)
    }

    /// The pod, as the runtime names it in CNI_ARGS; other callers name none.
    pub fn pod(&self) -> PodRef {
        let args = (self.get)("CNI_ARGS").unwrap_or_default();
        let value = |name: &str| {
            let found = args.split(';').filter_map(|pair| pair.split_once('=')).find(|(k, _)| *k == name);
            found.map(|(_, v)| v.to_owned()).unwrap_or_default()
        };
        PodRef { namespace: value("K8S_POD_NAMESPACE"), name: value("K8S_POD_NAME"), uid: value("K8S_POD_UID") }
    }
}

fn valid_container(id: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    id.len() <= CONTAINER_MAX && id.starts_with(|c: char| c.is_ascii_alphanumeric()) && id.chars().all(allowed)
}

fn valid_ifname(name: &str) -> bool {
    let bad = |c: char| c.is_whitespace() || c.is_control() || "/:@".contains(c);
    !name.is_empty() && name.len() <= IFNAME_MAX && name != "." && name != ".." && !name.contains(bad)
}

/// The network configuration, as the agent writes it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawConfig {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    ranges: Vec<String>,
    #[serde(default)]
    mtu: Option<u32>,
    #[serde(default)]
    state_dir: Option<PathBuf>,
    #[serde(default)]
    bpffs: Option<PathBuf>,
    #[serde(default)]
    prev_result: Option<Value>,
    #[serde(default, rename = "cni.dev/valid-attachments", alias = "cni.dev/attachments")]
    valid_attachments: Vec<Attachment>,
}

#[derive(Clone, Debug)]
pub struct Config {
    pub version: &'static str,
    pub name: String,
    pub ranges: Vec<Prefix>,
    pub mtu: Option<u32>,
    pub state_dir: PathBuf,
    pub bpffs: PathBuf,
    pub prev_result: Option<Value>,
    pub valid_attachments: Vec<Attachment>,
}

impl Config {
    /// Everything that a verb could need is checked here: nothing is made for a configuration that is wrong.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let raw: RawConfig = serde_json::from_slice(text).map_err(Error::Decode)?;
        let known = VERSIONS.into_iter().find(|v| *v == raw.cni_version);
        let version = known.ok_or_else(|| Error::Version(raw.cni_version.clone()))?;
        if raw.name.is_empty() {
            return Err(Error::Config("name is missing".into()));
        }
        let range = |r: &String| r.parse::<Prefix>().map_err(|e| Error::Config(format!("ranges: {e}")));
        let ranges = raw.ranges.iter().map(range).collect::<Result<Vec<_>>>()?;
        if ranges.is_empty() {
            return Err(Error::Config("ranges names no address range for pods".into()));
        }
        if let Some(mtu) = raw.mtu.filter(|m| !(1280..=65535).contains(m)) {
            return Err(Error::Config(format!("mtu {mtu} is not between 1280 and 65535")));
        }
        Ok(Self {
            version,
            name: raw.name,
            ranges,
            mtu: raw.mtu,
            state_dir: raw.state_dir.unwrap_or_else(|| STATE_DIR.into()),
            bpffs: raw.bpffs.unwrap_or_else(|| BPFFS.into()),
            prev_result: raw.prev_result,
            valid_attachments: raw.valid_attachments,
        })
    }

    /// The version to answer in, also to a configuration that is otherwise wrong.
    pub fn answer_version(text: &[u8]) -> String {
        let value: Value = serde_json::from_slice(text).unwrap_or(Value::Null);
        let asked = value.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
        VERSIONS.into_iter().find(|v| *v == asked).unwrap_or(VERSIONS[VERSIONS.len() - 1]).to_owned()
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Interface {
    name: String,
    mac: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox: Option<String>,
}

/// What ADD made, to be told in the words of `version`.
pub struct Made<'a> {
    pub host_link: &'a str,
    pub host_mac: [u8; 6],
    pub ifname: &'a str,
    pub mac: [u8; 6],
    pub netns: String,
    pub addresses: &'a [IpAddr],
    pub mtu: Option<u32>,
}

/// The result of ADD.
pub fn result(version: &str, made: &Made<'_>) -> Value {
    let mtu = made.mtu.filter(|_| version == "1.1.0");
    let interfaces = [
        Interface { name: made.host_link.to_owned(), mac: mac_text(made.host_mac), mtu, sandbox: None },
        Interface { name: made.ifname.to_owned(), mac: mac_text(made.mac), mtu, sandbox: Some(made.netns.clone()) },
    ];
    let ip = |a: &IpAddr| {
        let mut ip =
            json!({ "address": Prefix::host(*a).to_string(), "gateway": gateway(a.is_ipv4()), "interface": 1 });
        if version.starts_with("0.") {
            ip["version"] = json!(if a.is_ipv4() { "4" } else { "6" });
        }
        ip
    };
    let route = |a: &IpAddr| json!({ "dst": Prefix::all(a.is_ipv4()).to_string(), "gw": gateway(a.is_ipv4()) });
    json!({
        "cniVersion": version,
        "interfaces": interfaces,
        "ips": made.addresses.iter().map(ip).collect::<Vec<_>>(),
        "routes": made.addresses.iter().map(route).collect::<Vec<_>>(),
        "dns": {},
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

/// Addresses that an earlier result names: what CHECK is asked about.
pub fn result_addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result.get("ips").and_then(Value::as_array);
    let address = |ip: &Value| ip.get("address")?.as_str()?.split('/').next()?.parse().ok();
    ips.into_iter().flatten().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &'static [(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        move |name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())
    }

    #[test]
    fn environment_is_checked() {
        let get = environment(&[
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c-1_x.y"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1;odd"),
        ]);
        let env = Environment::new(&get);
        assert_eq!(env.verb().expect("verb"), Verb::Add);
        assert_eq!(env.attachment().expect("attachment").container, "c-1_x.y");
        assert_eq!(env.pod(), PodRef { namespace: "shop".into(), name: "web-0".into(), uid: "u-1".into() });
        assert_eq!(env.netns().expect_err("unset").code(), 4);
        for bad in [
            &[("CNI_CONTAINERID", "../x"), ("CNI_IFNAME", "eth0")][..],
            &[("CNI_CONTAINERID", "a@b"), ("CNI_IFNAME", "eth0")],
            &[("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "a/b")],
            &[("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "sixteen-letters-")],
            &[("CNI_IFNAME", "eth0")],
        ] {
            let get = environment(Box::leak(bad.to_vec().into_boxed_slice()));
            assert_eq!(Environment::new(&get).attachment().expect_err("bad").code(), 4);
        }
    }

    #[test]
    fn configuration_is_checked_whole() {
        let good = br#"{"cniVersion":"1.0.0","name":"sluice","type":"sluice-cni","ranges":["10.244.1.0/24"],"x":1}"#;
        let config = Config::parse(good).expect("good");
        assert_eq!((config.version, config.mtu), ("1.0.0", None));
        assert_eq!(config.state_dir, PathBuf::from(STATE_DIR));
        for (bad, code) in [
            (&b"{"[..], 6),
            (br#"{"cniVersion":"9.9.9","name":"n","ranges":["10.0.0.0/24"]}"#, 1),
            (br#"{"name":"n","ranges":["10.0.0.0/24"]}"#, 1),
            (br#"{"cniVersion":"1.0.0","ranges":["10.0.0.0/24"]}"#, 7),
            (br#"{"cniVersion":"1.0.0","name":"n"}"#, 7),
            (br#"{"cniVersion":"1.0.0","name":"n","ranges":["10.0.0.0"]}"#, 7),
            (br#"{"cniVersion":"1.0.0","name":"n","ranges":["10.0.0.0/24"],"mtu":5}"#, 7),
        ] {
            assert_eq!(Config::parse(bad).expect_err("bad").code(), code, "{}", String::from_utf8_lossy(bad));
        }
        assert_eq!(Config::answer_version(b"{"), "1.1.0");
    }

    #[test]
    fn results_speak_each_version() {
        let addresses: Vec<IpAddr> = ["10.244.1.2", "fd00::2"].map(|a| a.parse().expect(a)).to_vec();
        let made = Made {
            host_link: "slc0",
            host_mac: [1; 6],
            ifname: "eth0",
            mac: [2; 6],
            netns: "/run/netns/x".into(),
            addresses: &addresses,
            mtu: Some(1400),
        };
        for version in VERSIONS {
            let r = result(version, &made);
            assert_eq!(r["cniVersion"], version);
            assert_eq!(r["ips"][0].get("version").is_some(), version.starts_with("0."));
            assert_eq!(r["interfaces"][1].get("mtu").is_some(), version == "1.1.0");
            assert_eq!(r["ips"][1]["address"], "fd00::2/128");
            assert_eq!(r["routes"][0]["gw"], "169.254.1.1");
            assert_eq!(result_addresses(&r), addresses);
        }
    }
}
