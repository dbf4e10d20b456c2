//! The CNI protocol (1.1, with results from 0.3.0 on): its verbs, and what comes in by environment variables
//! (specification 1.1.0, section 2). What comes by standard input is in [`crate::config`], what goes out in
//! [`crate::result`]. Parsing asks nothing of the host.

use crate::{Error, config, error::Result, store::PodRef};
use serde::Deserialize;
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

    /// A value of CNI_ARGS: `NAME=value` pairs, separated by semicolons.
    fn argument(&self, name: &str) -> Option<String> {
        let args = (self.get)("CNI_ARGS")?;
        let found = args.split(';').filter_map(|pair| pair.split_once('=')).find(|(k, _)| *k == name);
        found.map(|(_, v)| v.to_owned()).filter(|v| !v.is_empty())
    }

    /// The pod, as the runtime names it in CNI_ARGS; other callers name none.
    pub fn pod(&self) -> PodRef {
        let value = |name: &str| self.argument(name).unwrap_or_default();
        PodRef { namespace: value("K8S_POD_NAMESPACE"), name: value("K8S_POD_NAME"), uid: value("K8S_POD_UID") }
    }

    /// Addresses that CNI_ARGS asks for, in the manner of host-local: `IP=10.244.1.7` or several with commas.
    pub fn asked(&self) -> Result<Vec<IpAddr>> {
        let text = self.argument("IP").unwrap_or_default();
        text.split(',').filter(|t| !t.is_empty()).map(config::asked_address).collect()
    }

    /// The hardware address that CNI_ARGS asks for.
    pub fn mac(&self) -> Result<Option<[u8; 6]>> {
        let wrong = |e| Error::Environment(format!("CNI_ARGS MAC: {e}"));
        self.argument("MAC").map(|m| parse_mac(&m).map_err(wrong)).transpose()
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

/// A hardware address that an interface can have: of one station, and not all zeros (IEEE 802, 8.2).
pub fn parse_mac(text: &str) -> std::result::Result<[u8; 6], String> {
    let bytes = text.split(':').map(|b| u8::from_str_radix(b, 16).ok().filter(|_| b.len() == 2));
    let mac: Option<[u8; 6]> = bytes.collect::<Option<Vec<u8>>>().and_then(|b| b.try_into().ok());
    let usable = mac.filter(|m| m[0] & 1 == 0 && *m != [0; 6]);
    usable.ok_or_else(|| format!("{text:?} is no hardware address for an interface, such as 02:00:00:00:00:07"))
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
            (
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1;odd;IP=10.0.0.7,fd00::7/64",
            ),
        ]);
        let env = Environment::new(&get);
        assert_eq!(env.verb().expect("verb"), Verb::Add);
        assert_eq!(env.attachment().expect("attachment").container, "c-1_x.y");
        assert_eq!(env.pod(), PodRef { namespace: "shop".into(), name: "web-0".into(), uid: "u-1".into() });
        assert_eq!(env.asked().expect("addresses").len(), 2);
        assert_eq!(env.mac().expect("none"), None);
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
    fn hardware_addresses() {
        assert_eq!(parse_mac("02:0A:ff:00:00:01"), Ok([2, 10, 255, 0, 0, 1]));
        for bad in
            ["", "02:0a:ff:00:00", "02:0a:ff:00:00:01:02", "2:a:f:0:0:1", "01:00:5e:00:00:01", "00:00:00:00:00:00"]
        {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }
}
