//! PURE: the network configuration of one plugin, as runtimes hand it over (CNI specification 1.1.0, section 1), with
//! what they add to it: `runtimeConfig` (capabilities), `args`, `prevResult`, the valid attachments of GC.
//!
//! Everything is checked here, so that nothing is made for a configuration that is wrong; nothing is asked of the host.

use crate::{
    BPFFS, Error, STATE_DIR,
    bandwidth::{Bandwidth, RawBandwidth},
    error::Result,
    ipam::{Pool, Range, Wanted},
    result::{Dns, Previous},
    spec::{Attachment, VERSIONS, parse_mac},
};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use sluice_netlink::plan::Prefix;
use std::{net::IpAddr, path::PathBuf};

/// The name by which configurations ask for this plugin.
const TYPE: &str = "sluice-cni";
/// Smallest MTU: what IPv6 needs (RFC 8200, section 5).
const MTU: std::ops::RangeInclusive<u32> = 1280..=65535;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    name: String,
    #[serde(default, rename = "type")]
    kind: String,
    plugins: Option<Value>,
    ipam: Option<Value>,
    #[serde(default, deserialize_with = "or_default")]
    ranges: Vec<Value>,
    #[serde(default, deserialize_with = "or_default")]
    exclude: Vec<String>,
    mtu: Option<u32>,
    state_dir: Option<PathBuf>,
    bpffs: Option<PathBuf>,
    #[serde(default, deserialize_with = "or_default")]
    dns: Dns,
    prev_result: Option<Value>,
    #[serde(default, deserialize_with = "or_default")]
    runtime_config: Runtime,
    #[serde(default, deserialize_with = "or_default")]
    args: Args,
    /// Runtimes by libcni give both: the second is what the first was called before.
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<Attachment>>,
    #[serde(rename = "cni.dev/attachments")]
    attachments: Option<Vec<Attachment>>,
}

/// What runtimes give for capabilities (CNI conventions, "Dynamic plugin specific fields").
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Runtime {
    #[serde(default, deserialize_with = "or_default")]
    ips: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    ip_ranges: Vec<Value>,
    mac: Option<String>,
    dns: Option<RuntimeDns>,
    bandwidth: Option<RawBandwidth>,
    #[serde(default, deserialize_with = "or_default")]
    port_mappings: Vec<PortMapping>,
}

/// The `dns` capability's words differ from those of results.
#[derive(Debug, Default, Deserialize)]
struct RuntimeDns {
    #[serde(default, deserialize_with = "or_default", alias = "Servers")]
    servers: Vec<String>,
    #[serde(default, deserialize_with = "or_default", alias = "Searches")]
    searches: Vec<String>,
    #[serde(default, deserialize_with = "or_default", alias = "Options")]
    options: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Args {
    #[serde(default, deserialize_with = "or_default")]
    cni: CniArgs,
}

#[derive(Debug, Default, Deserialize)]
struct CniArgs {
    #[serde(default, deserialize_with = "or_default")]
    ips: Vec<String>,
    mac: Option<String>,
}

/// The names with capitals here and in other capabilities are containerd's, whose types carry no others: plugins in Go
/// read names of either kind.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PortMapping {
    #[serde(default, alias = "HostPort")]
    host_port: i64,
    #[serde(default, alias = "ContainerPort")]
    container_port: i64,
    #[serde(default, deserialize_with = "or_default", alias = "Protocol")]
    protocol: String,
    #[serde(default, rename = "hostIP", alias = "HostIP", deserialize_with = "or_default")]
    host_ip: String,
}

/// A range as host-local writes it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawRange {
    subnet: String,
    range_start: Option<IpAddr>,
    range_end: Option<IpAddr>,
    gateway: Option<IpAddr>,
}

/// Go writes `null` for lists that are empty.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> std::result::Result<T, D::Error> {
    Option::deserialize(d).map(Option::unwrap_or_default)
}

/// A port of the node that leads to a pod's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    pub host: u16,
    pub pod: u16,
    pub protocol: HostProtocol,
    /// On this address of the node alone; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostProtocol {
    Tcp,
    Udp,
    /// Known, but not served.
    Sctp,
}

#[derive(Clone, Debug)]
pub struct Config {
    pub version: &'static str,
    pub name: String,
    pub pool: Pool,
    /// Addresses that the pod is to have.
    pub asked: Vec<IpAddr>,
    pub mac: Option<[u8; 6]>,
    pub dns: Dns,
    pub bandwidth: Bandwidth,
    pub host_ports: Vec<HostPort>,
    pub mtu: Option<u32>,
    pub state_dir: PathBuf,
    pub bpffs: PathBuf,
    pub previous: Option<Previous>,
    pub valid_attachments: Option<Vec<Attachment>>,
}

impl Config {
    pub fn parse(text: &[u8]) -> Result<Self> {
        let raw: Raw = serde_json::from_slice(text).map_err(Error::Decode)?;
        let known = VERSIONS.into_iter().find(|v| *v == raw.cni_version);
        let version = known.ok_or_else(|| Error::Version(raw.cni_version.clone()))?;
        refuse_foreign(&raw)?;
        if let Some(mtu) = raw.mtu.filter(|m| !MTU.contains(m)) {
            return Err(wrong(format!("mtu {mtu} is not between {} and {}", MTU.start(), MTU.end())));
        }
        let runtime = raw.runtime_config;
        let bandwidth = runtime.bandwidth.map(Bandwidth::try_from).transpose().map_err(within("bandwidth"))?;
        let mac = runtime.mac.or(raw.args.cni.mac).filter(|m| !m.is_empty());
        Ok(Self {
            version,
            name: raw.name,
            pool: pool(&raw.ranges, &runtime.ip_ranges, &raw.exclude)?,
            asked: runtime.ips.iter().chain(&raw.args.cni.ips).map(|s| asked_address(s)).collect::<Result<_>>()?,
            mac: mac.map(|m| parse_mac(&m).map_err(wrong)).transpose()?,
            dns: runtime.dns.map_or(raw.dns.clone(), |d| d.over(raw.dns)),
            bandwidth: bandwidth.unwrap_or_default(),
            host_ports: host_ports(&runtime.port_mappings)?,
            mtu: raw.mtu,
            state_dir: raw.state_dir.unwrap_or_else(|| STATE_DIR.into()),
            bpffs: raw.bpffs.unwrap_or_else(|| BPFFS.into()),
            previous: raw.prev_result.as_ref().map(Previous::parse).transpose().map_err(within("prevResult"))?,
            valid_attachments: raw.valid_attachments.or(raw.attachments),
        })
    }

    /// The version to answer in, also to a configuration that is otherwise wrong.
    pub fn answer_version(text: &[u8]) -> String {
        let value: Value = serde_json::from_slice(text).unwrap_or(Value::Null);
        let asked = value.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
        VERSIONS.into_iter().find(|v| *v == asked).unwrap_or(VERSIONS[VERSIONS.len() - 1]).to_owned()
    }
}

impl RuntimeDns {
    fn over(self, configured: Dns) -> Dns {
        let or = |new: Vec<String>, old| if new.is_empty() { old } else { new };
        Dns {
            nameservers: or(self.servers, configured.nameservers),
            search: or(self.searches, configured.search),
            options: or(self.options, configured.options),
            domain: configured.domain,
        }
    }
}

fn wrong(what: String) -> Error {
    Error::Config(what)
}

fn within(place: &str) -> impl Fn(String) -> Error + '_ {
    move |what| wrong(format!("{place}: {what}"))
}

/// What is written for other plugins is not half understood.
fn refuse_foreign(raw: &Raw) -> Result<()> {
    if raw.plugins.is_some() {
        return Err(wrong("this is a list of plugins; the runtime hands over one plugin's part of it".into()));
    }
    if raw.name.is_empty() {
        return Err(wrong("name is missing".into()));
    }
    if !raw.kind.is_empty() && raw.kind != TYPE {
        return Err(wrong(format!("type is {:?}, this plugin is {TYPE:?}", raw.kind)));
    }
    match raw.ipam.as_ref().filter(|v| !v.is_null() && **v != serde_json::json!({})) {
        Some(value) => Err(Error::Unsupported { field: "ipam", value: value.to_string() }),
        None => Ok(()),
    }
}

fn prefix(text: &str) -> Result<Prefix, String> {
    match text.parse::<IpAddr>() {
        Ok(ip) => Ok(Prefix::host(ip)),
        Err(_) => text.parse().map_err(|e: sluice_netlink::Error| e.to_string()),
    }
}

/// The ranges that the runtime gives replace those of the network for their families.
fn pool(ranges: &[Value], from_runtime: &[Value], exclude: &[String]) -> Result<Pool> {
    let excluded = exclude.iter().map(|e| prefix(e)).collect::<Result<Vec<_>, _>>().map_err(within("exclude"))?;
    let of = |values: &[Value]| sets(values, &excluded).and_then(Pool::new);
    let configured = of(ranges).map_err(within("ranges"))?;
    Ok(configured.behind(of(from_runtime).map_err(within("runtimeConfig.ipRanges"))?))
}

/// Plain ranges are one set per family; a list of ranges is a set, as host-local reads it.
fn sets(values: &[Value], excluded: &[Prefix]) -> Result<Vec<Vec<Range>>, String> {
    let (mut v4, mut v6, mut sets) = (Vec::new(), Vec::new(), Vec::new());
    for value in values {
        match value {
            Value::String(text) => {
                let subnet: Prefix = text.parse().map_err(|e: sluice_netlink::Error| e.to_string())?;
                let range = Range::new(&subnet.into(), excluded)?;
                if range.is_ipv4() { v4.push(range) } else { v6.push(range) }
            }
            Value::Array(set) => sets.push(set.iter().map(|r| range(r, excluded)).collect::<Result<_, _>>()?),
            other => return Err(format!("{other} is neither an address range nor a list of ranges")),
        }
    }
    Ok([v4, v6].into_iter().chain(sets).collect())
}

/// As host-local does it, the first address of the subnet is its gateway if none is named.
fn range(value: &Value, excluded: &[Prefix]) -> Result<Range, String> {
    let raw = RawRange::deserialize(value).map_err(|e| format!("{value}: {e}"))?;
    let subnet: Prefix = raw.subnet.parse().map_err(|e: sluice_netlink::Error| e.to_string())?;
    let single = subnet.len == Prefix::host(subnet.address).len;
    let gateway = raw.gateway.or_else(|| if single { None } else { first_of(subnet) });
    Range::new(&Wanted { subnet, start: raw.range_start, end: raw.range_end, gateway }, excluded)
}

fn first_of(subnet: Prefix) -> Option<IpAddr> {
    match subnet.address {
        IpAddr::V4(a) => a.to_bits().checked_add(1).map(|n| std::net::Ipv4Addr::from_bits(n).into()),
        IpAddr::V6(a) => a.to_bits().checked_add(1).map(|n| std::net::Ipv6Addr::from_bits(n).into()),
    }
}

/// An address that somebody asks for, with or without the length of its subnet.
pub(crate) fn asked_address(text: &str) -> Result<IpAddr> {
    let bare = text.split('/').next().unwrap_or_default();
    bare.parse().map_err(|_| wrong(format!("{text:?} is asked for as the pod's address, but is none")))
}

/// Entries without a host's port ask for nothing, as the reference portmap reads them.
fn host_ports(mappings: &[PortMapping]) -> Result<Vec<HostPort>> {
    mappings.iter().filter(|m| m.host_port != 0).map(host_port).collect()
}

fn host_port(m: &PortMapping) -> Result<HostPort> {
    let place = within("portMappings");
    let port = |n: i64| u16::try_from(n).ok().filter(|p| *p > 0).ok_or_else(|| place(format!("{n} is no port")));
    let protocol = match m.protocol.to_ascii_lowercase().as_str() {
        "" | "tcp" => HostProtocol::Tcp,
        "udp" => HostProtocol::Udp,
        "sctp" => HostProtocol::Sctp,
        other => return Err(place(format!("protocol {other:?} is not tcp, udp or sctp"))),
    };
    let address = match m.host_ip.as_str() {
        "" => None,
        text => Some(text.parse::<IpAddr>().map_err(|_| place(format!("hostIP {text:?} is no address")))?),
    };
    let address = address.map(|a| a.to_canonical()).filter(|a| !a.is_unspecified());
    Ok(HostPort { host: port(m.host_port)?, pod: port(m.container_port)?, protocol, address })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{prelude::*, sample::select};
    use serde_json::json;

    fn with(more: Value) -> Result<Config> {
        let mut config = json!({"cniVersion": "1.0.0", "name": "n", "type": "sluice-cni"});
        let fields = config.as_object_mut().expect("an object");
        fields.extend(more.as_object().expect("an object").clone());
        Config::parse(config.to_string().as_bytes())
    }

    #[test]
    fn configuration_is_checked_whole() {
        let config = with(json!({"ranges": ["10.244.1.0/24"], "x": 1})).expect("good");
        assert_eq!((config.version, config.mtu), ("1.0.0", None));
        assert_eq!(config.state_dir, PathBuf::from(STATE_DIR));
        for (bad, code) in [
            (&b"{"[..], 6),
            (br#"[]"#, 6),
            (br#"{"cniVersion":"9.9.9","name":"n","ranges":["10.0.0.0/24"]}"#, 1),
            (br#"{"name":"n","ranges":["10.0.0.0/24"]}"#, 1),
            (br#"{"cniVersion":"1.0.0","ranges":["10.0.0.0/24"]}"#, 7),
            (br#"{"cniVersion":"1.0.0","name":"n","type":"bridge","ranges":["10.0.0.0/24"]}"#, 7),
            (br#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"sluice-cni"}]}"#, 7),
            (br#"{"cniVersion":"1.0.0","name":"n","ipam":{"type":"host-local"}}"#, 2),
        ] {
            assert_eq!(Config::parse(bad).expect_err("bad").code(), code, "{}", String::from_utf8_lossy(bad));
        }
        for bad in [
            json!({"ranges": ["10.0.0.0"]}),
            json!({"ranges": ["10.0.0.0/24", "10.0.0.128/25"]}),
            json!({"ranges": [{"subnet": "10.0.0.0/24"}]}),
            json!({"ranges": [[{"sub": "10.0.0.0/24"}]]}),
            json!({"ranges": ["10.0.0.0/24"], "exclude": ["x"]}),
            json!({"mtu": 5}),
            json!({"prevResult": []}),
            json!({"runtimeConfig": {"mac": "01:00:00:00:00:00"}}),
            json!({"runtimeConfig": {"ips": ["10.0.0"]}}),
            json!({"runtimeConfig": {"bandwidth": {"ingressRate": -1}}}),
            json!({"runtimeConfig": {"portMappings": [{"hostPort": 70000, "containerPort": 80}]}}),
            json!({"runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "x"}]}}),
        ] {
            let error = with(bad.clone()).expect_err("bad");
            assert!([6, 7].contains(&error.code()), "{bad}: {error}");
        }
        assert_eq!(Config::answer_version(b"{"), "1.1.0");
    }

    #[test]
    fn ranges_of_both_manners() {
        let ranges = |c: &Config| c.pool.ranges().map(ToString::to_string).collect::<Vec<_>>();
        let plain = with(json!({"ranges": ["10.0.0.0/24", "fd00::/64", "10.1.0.0/24"]})).expect("good");
        assert_eq!(ranges(&plain), ["10.0.0.0/24", "10.1.0.0/24", "fd00::/64"]);
        let sets = json!([
            [{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9", "gateway": "10.0.0.10"}, {"subnet": "10.1.0.0/24"}],
            [{"subnet": "fd00::/64"}]
        ]);
        let config = with(json!({"ranges": sets})).expect("good");
        let want = ["10.0.0.0/24 from 10.0.0.9 to 10.0.0.254", "10.1.0.0/24", "fd00::/64"];
        assert_eq!(ranges(&config), want);
        let offered = |ip: &str| config.pool.ranges().any(|r| r.offers(ip.parse().expect(ip)));
        assert!(offered("10.0.0.9") && !offered("10.0.0.10"), "the named gateway");
        assert!(!offered("10.1.0.1") && offered("10.1.0.2") && !offered("fd00::1"), "the gateway that is not named");
        let runtime = json!({"ipRanges": [[{"subnet": "10.7.0.0/24"}]], "ips": null, "portMappings": [{}]});
        let config = with(json!({"ranges": ["10.0.0.0/24", "fd00::/64"], "runtimeConfig": runtime})).expect("good");
        assert_eq!(ranges(&config), ["10.7.0.0/24", "fd00::/64"]);
        assert_eq!(config.host_ports, []);
    }

    #[test]
    fn what_runtimes_ask_for() {
        let runtime = json!({
            "ips": ["10.0.0.7/24"], "mac": "02:11:22:33:44:55",
            "dns": {"servers": ["10.0.0.2"], "searches": ["shop.svc"]},
            "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": ""}],
            "bandwidth": {"ingressRate": 8000000, "ingressBurst": 800000},
        });
        let args = json!({"cni": {"ips": ["fd00::7"]}});
        let dns = json!({"domain": "x", "search": ["y"]});
        let config = with(json!({"runtimeConfig": runtime, "args": args, "dns": dns})).expect("good");
        assert_eq!(config.asked.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.7", "fd00::7"]);
        assert_eq!(config.mac, Some([2, 0x11, 0x22, 0x33, 0x44, 0x55]));
        assert_eq!(config.host_ports, [HostPort { host: 8080, pod: 80, protocol: HostProtocol::Tcp, address: None }]);
        assert_eq!((config.dns.domain.as_str(), config.dns.search), ("x", vec!["shop.svc".to_owned()]));
        assert_eq!(config.bandwidth.ingress.expect("a limit").rate, 1_000_000);
    }

    /// go-cni's types have no names for JSON, so that containerd sends those of their fields.
    #[test]
    fn capabilities_as_containerd_writes_them() {
        let runtime = json!({
            "dns": {"Servers": ["10.0.0.2"], "Searches": ["shop.svc"], "Options": null},
            "portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "udp", "HostIP": "192.0.2.1"}],
            "bandwidth": {"IngressRate": 8000000, "IngressBurst": 0, "EgressRate": 16000000, "EgressBurst": 0},
        });
        let config = with(json!({"runtimeConfig": runtime})).expect("good");
        let address = Some("192.0.2.1".parse().expect("address"));
        assert_eq!(config.host_ports, [HostPort { host: 8080, pod: 80, protocol: HostProtocol::Udp, address }]);
        assert_eq!(config.dns.search, ["shop.svc"]);
        let rate = |limit: Option<crate::bandwidth::Limit>| limit.map(|l| l.rate);
        let rates = (rate(config.bandwidth.ingress), rate(config.bandwidth.egress));
        assert_eq!(rates, (Some(1_000_000), Some(2_000_000)));
    }

    proptest! {
        /// Whatever a field holds: an answer, never a panic.
        #[test]
        fn nothing_that_comes_in_panics(
            field in select(vec![
                "ranges", "exclude", "mtu", "dns", "prevResult", "args", "ipam", "name", "type", "ips", "ipRanges",
                "mac", "bandwidth", "portMappings",
            ]),
            value in select(vec![
                "null", "0", "-1", "1e99", "\"\"",
                "\"::/0\"", "\"0.0.0.0/0\"", "\"255.255.255.255/32\"", "\"ffff::/16\"",
                "{\"cni\":{\"ips\":[\"x\"]}}", "{\"ingressRate\":9223372036854775807,\"ingressBurst\":1}",
                "{\"hostPort\":-1}", "{\"subnet\":\"::/127\"}", "{\"subnet\":\"255.255.255.255/32\"}",
                "{\"ips\":[{\"address\":\"1.1.1.1/8\",\"interface\":18446744073709551615}]}",
            ]),
            depth in 0usize..3, noise in ".{0,40}",
        ) {
            let value = format!("{}{value}{}", "[".repeat(depth), "]".repeat(depth));
            let value: Value = serde_json::from_str(&value).expect("JSON");
            let mut runtime = json!({});
            runtime[field] = value.clone();
            let _ = with(json!({field: value}));
            let _ = with(json!({"runtimeConfig": runtime}));
            let _ = Config::parse(noise.as_bytes());
        }
    }
}
