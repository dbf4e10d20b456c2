//! What installing decides: which configurations of others are in the way, how the agent's service is described, what to
//! ask the plugin. PURE.

use serde_json::Value;
use sluice_cni::CONFLIST;
use std::path::Path;

pub const PLUGIN: &str = "sluice-cni";
pub const AGENT: &str = "sluice-agent";
pub const SERVICE: &str = "sluice-agent.service";
pub const SOCKET: &str = "sluice-agent.socket";

/// The resolver's sockets, which wait while the agent is started again (docs/cluster.md).
pub const SOCKET_UNIT: &str = "\
[Unit]
Description=Sockets of the Sluice node agent's resolver

[Socket]
ListenDatagram=169.254.1.1:53
ListenStream=169.254.1.1:53
FreeBind=yes

[Install]
WantedBy=sockets.target
";

/// Network configurations that the runtime prefers to ours: it takes the first by name. `files` are the folder's names
/// with their contents.
pub fn in_the_way(files: &[(String, Vec<u8>)]) -> Vec<&str> {
    let read = |name: &str| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end));
    let ahead = files.iter().filter(|(name, text)| read(name) && name.as_str() < CONFLIST && !is_ours(text));
    let mut names: Vec<&str> = ahead.map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    names
}

/// Whether a configuration has our plugin in it. One that cannot be read has not.
fn is_ours(text: &[u8]) -> bool {
    serde_json::from_slice::<Value>(text).is_ok_and(|v| ours(&v).is_some())
}

fn ours(conf: &Value) -> Option<&Value> {
    let of_us = |p: &&Value| p["type"] == PLUGIN;
    Some(conf).filter(of_us).or_else(|| conf["plugins"].as_array()?.iter().find(of_us))
}

/// What STATUS is asked with, made from the list as a runtime does it.
pub fn status_request(conflist: &[u8]) -> Result<String, String> {
    let list: Value = serde_json::from_slice(conflist).map_err(|e| format!("it is no JSON: {e}"))?;
    let mut request = ours(&list).ok_or_else(|| format!("it has no plugin of type {PLUGIN}"))?.clone();
    request["name"] = list["name"].clone();
    request["cniVersion"] = "1.1.0".into(); // STATUS came with it
    Ok(request.to_string())
}

/// What the plugin's error says, or all that it has printed.
pub fn status_error(answer: &[u8]) -> String {
    let said: Value = serde_json::from_slice(answer).unwrap_or_default();
    let text = |field: &str| said[field].as_str().unwrap_or_default().to_owned();
    match (text("msg"), text("details")) {
        (msg, _) if msg.is_empty() => String::from_utf8_lossy(answer).trim().to_owned(),
        (msg, details) if details.is_empty() => msg,
        (msg, details) => format!("{msg}: {details}"),
    }
}

/// The agent's service. That its folder of configurations is the one that is waited for is said here, unless the
/// arguments say it.
pub fn service_unit(agent: &Path, arguments: &[String], conf_dir: &Path) -> String {
    const CONF_DIR: &str = "--cni-conf-dir";
    let told = arguments.iter().any(|a| a == CONF_DIR || a.starts_with(&format!("{CONF_DIR}=")));
    let conf_dir = (!told).then(|| format!("{CONF_DIR}={}", conf_dir.display()));
    let words: Vec<String> =
        [agent.display().to_string()].iter().chain(arguments).chain(&conf_dir).map(|w| word(w)).collect();
    format!(
        "\
[Unit]
Description=Sluice node agent
Wants=network-online.target
After=network-online.target containerd.service crio.service
Requires={SOCKET}

[Service]
ExecStart={}
Restart=always
RestartSec=1
OOMScoreAdjust=-999
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
",
        words.join(" ")
    )
}

/// As one word of a command line of systemd (systemd.service(5), "Command lines").
fn word(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '%' | '$' => quoted.extend([c, c]),
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

/// What becomes of the service: written from arguments, or left as an earlier installation has written it.
#[derive(Debug, PartialEq, Eq)]
pub enum Service {
    Write(String),
    Keep,
}

pub fn service(agent: &Path, arguments: &[String], conf_dir: &Path, there: bool) -> Result<Service, String> {
    match (arguments.is_empty(), there) {
        (false, _) => Ok(Service::Write(service_unit(agent, arguments, conf_dir))),
        (true, true) => Ok(Service::Keep),
        (true, false) => Err(format!(
            "there is no {SERVICE} yet, and the agent's arguments are not known: give them behind `--` \
             (`sluice-agent --help` lists them), or --no-service where something else runs the agent"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_what_the_runtime_would_take_instead_is_in_the_way() {
        let other = br#"{"name":"x","plugins":[{"type":"bridge"}]}"#.to_vec();
        let chained = br#"{"name":"x","plugins":[{"type":"sluice-cni"},{"type":"tuning"}]}"#.to_vec();
        let single = br#"{"name":"x","type":"sluice-cni"}"#.to_vec();
        for (name, text, expected) in [
            ("05-other.conflist", &other, true),
            ("05-other.conf", &other, true),
            ("05-other.json", &other, true),
            ("00-damaged.conflist", &b"{".to_vec(), true),
            ("10-aaa.conflist", &other, true),
            ("05-other.conflist.aside", &other, false),
            (".05-other.swp", &other, false),
            ("10-sluice.conflist", &other, false),
            ("10-sluicf.conflist", &other, false),
            ("99-other.conflist", &other, false),
            ("05-own.conflist", &chained, false),
            ("05-own.conf", &single, false),
        ] {
            let files = [(name.to_owned(), text.clone())];
            assert_eq!(!in_the_way(&files).is_empty(), expected, "{name}");
        }
        let two = ["b.conf", "10-b.conf", "10-a.conf"].map(|n| (n.to_owned(), other.clone()));
        assert_eq!(in_the_way(&two), ["10-a.conf", "10-b.conf"]);
    }

    #[test]
    fn the_plugin_is_asked_as_a_runtime_would() {
        let plugin = json!({"type": "sluice-cni", "ranges": ["10.0.0.0/24"]});
        let list = json!({"cniVersion": "1.0.0", "name": "sluice", "plugins": [plugin]});
        let asked: Value =
            serde_json::from_str(&status_request(list.to_string().as_bytes()).expect("good")).expect("JSON");
        assert_eq!(
            asked,
            json!({"cniVersion": "1.1.0", "name": "sluice", "type": "sluice-cni", "ranges": ["10.0.0.0/24"]})
        );
        for bad in ["", "{", "[]", r#"{"plugins":[{"type":"bridge"}]}"#] {
            status_request(bad.as_bytes()).expect_err(bad);
        }
        for (answer, said) in [
            (r#"{"code":50,"msg":"no","details":"really"}"#, "no: really"),
            (r#"{"code":50,"msg":"no","details":""}"#, "no"),
            ("panicked\n", "panicked"),
        ] {
            assert_eq!(status_error(answer.as_bytes()), said);
        }
    }

    #[test]
    fn arguments_reach_the_agent_as_they_are() {
        let line = |arguments: &[&str]| {
            let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
            let unit = service_unit(Path::new("/usr/local/bin/sluice-agent"), &arguments, Path::new("/etc/cni/net.d"));
            unit.lines().find_map(|l| l.strip_prefix("ExecStart=")).expect("a command").to_owned()
        };
        let agent = r#""/usr/local/bin/sluice-agent""#;
        assert_eq!(line(&["--node-name=a"]), format!(r#"{agent} "--node-name=a" "--cni-conf-dir=/etc/cni/net.d""#));
        assert_eq!(line(&["--cni-conf-dir=/x"]), format!(r#"{agent} "--cni-conf-dir=/x""#));
        assert_eq!(line(&["--cni-conf-dir", "/x"]), format!(r#"{agent} "--cni-conf-dir" "/x""#));
        assert_eq!(line(&["--cni-conf-dir=/x", "a b\"%$\\"]), format!(r#"{agent} "--cni-conf-dir=/x" "a b\"%%$$\\""#));
    }

    #[test]
    fn a_service_is_written_kept_or_asked_for() {
        let decide = |arguments: &[String], there| service(Path::new("/a"), arguments, Path::new("/c"), there);
        let arguments = ["--node-name=a".to_owned()];
        assert!(matches!(decide(&arguments, true), Ok(Service::Write(_))));
        assert!(matches!(decide(&arguments, false), Ok(Service::Write(_))));
        assert_eq!(decide(&[], true), Ok(Service::Keep));
        assert!(decide(&[], false).expect_err("nothing is known").contains("--no-service"));
    }
}
