//! Chains with the reference plugins (Debian's containernetworking-plugins): ours before others, and behind one.

use crate::node::Node;
use serde_json::{Value, json};
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const OTHERS: &str = "/usr/lib/cni";

/// `None`, and a word about it, where the package is not installed.
fn other(name: &str) -> Option<PathBuf> {
    let path = Path::new(OTHERS).join(name);
    if !path.exists() {
        eprintln!("{} is not there: install containernetworking-plugins (make setup) to test chains", path.display());
        return None;
    }
    Some(path)
}

/// Calls another plugin on the node; its answer.
fn call(node: &Node, program: &Path, config: &Value, verb: &str, netns: &Path) -> Value {
    let work = || {
        let mut command = Command::new(program);
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_CONTAINERID", "a").env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", netns).env("CNI_PATH", OTHERS).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("spawn");
        child.stdin.take().expect("piped").write_all(config.to_string().as_bytes()).expect("write");
        let output = child.wait_with_output().expect("wait");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{verb} of {}: {text}", program.display());
        serde_json::from_str(&text).unwrap_or(Value::Null)
    };
    node.netns.run(work).expect("in the node")
}

#[test]
fn others_take_our_result_and_hand_it_back() {
    let (Some(tuning), Some(bandwidth)) = (other("tuning"), other("bandwidth")) else { return };
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0"] {
        let node = Node::new(&format!("chain-{version}"), true);
        let pod = node.pod("a");
        let ours = |previous: Option<&Value>| {
            let mut more = json!({"cniVersion": version});
            if let Some(previous) = previous {
                more["prevResult"] = previous.clone();
            }
            more
        };
        let (ok, first) = node.with("ADD", "a", Some(pod.path()), ours(None));
        assert!(ok, "{first}");
        let plain = json!({"cniVersion": version, "name": "sluice", "type": "tuning",
            "sysctl": {"net.ipv4.conf.IFNAME.log_martians": "1"}, "prevResult": first});
        let second = call(&node, &tuning, &plain, "ADD", pod.path());
        let limits = json!({"ingressRate": 8_000_000, "ingressBurst": 80_000});
        let mut limited = json!({"cniVersion": version, "name": "sluice", "type": "bandwidth",
            "runtimeConfig": {"bandwidth": limits}, "prevResult": second});
        let last = call(&node, &bandwidth, &limited, "ADD", pod.path());
        assert_eq!(last["ips"], first["ips"], "{version}");
        if version != "0.3.0" && version != "0.3.1" {
            let (ok, answer) = node.with("CHECK", "a", Some(pod.path()), ours(Some(&last)));
            assert!(ok, "{version}: {answer}");
        }
        limited["prevResult"] = last.clone();
        call(&node, &bandwidth, &limited, "DEL", pod.path());
        call(&node, &tuning, &plain, "DEL", pod.path());
        let (ok, answer) = node.with("DEL", "a", Some(pod.path()), ours(Some(&last)));
        assert!(ok, "{version}: {answer}");
    }
}

#[test]
fn what_plugins_before_ours_made_stays_in_the_answer() {
    let Some(bridge) = other("bridge") else { return };
    let node = Node::new("behind", true);
    let pod = node.pod("a");
    let data = node.base.join("host-local");
    let before = json!({"cniVersion": "1.0.0", "name": "first", "type": "bridge", "bridge": "slcbehind0",
        "ipam": {"type": "host-local", "dataDir": data, "ranges": [[{"subnet": "10.77.0.0/24"}]]}});
    let first = call(&node, &bridge, &before, "ADD", pod.path());
    // The same interface name is taken; another one is ours.
    let more = json!({"cniVersion": "1.0.0", "prevResult": first});
    assert_eq!(node.with("ADD", "a", Some(pod.path()), more.clone()).1["code"], 106);
    assert_eq!(node.lease_files(), Vec::<String>::new());
    let mut config = node.config.clone();
    config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let netns = pod.path().display().to_string();
    let mut env = [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "net1"), ("CNI_NETNS", &netns)];
    let (ok, second) = node.run(&config.to_string(), &env);
    assert!(ok, "{second}");
    let made = first["interfaces"].as_array().expect("interfaces").len();
    assert_eq!(
        second["interfaces"].as_array().expect("interfaces")[..made],
        first["interfaces"].as_array().expect("interfaces")[..]
    );
    assert_eq!((&second["ips"][0], &second["ips"][1]["interface"]), (&first["ips"][0], &json!(made + 1)));
    config["prevResult"] = second;
    for verb in ["CHECK", "DEL"] {
        env[0].1 = verb;
        let (ok, answer) = node.run(&config.to_string(), &env);
        assert!(ok, "{verb}: {answer}");
    }
    call(&node, &bridge, &before, "DEL", pod.path());
}
