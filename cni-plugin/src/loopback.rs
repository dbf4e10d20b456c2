//! The `loopback` plugin: containerd up to 1.7 calls one by that name for every pod before the configured network. The
//! same program answers to it, so that a node needs no other plugin. ADD sets `lo` up; the rest has nothing to do.

use crate::{
    Error,
    config::Config,
    error::Result,
    result,
    spec::{Environment, Verb},
};
use serde_json::{Value, json};
use sluice_netlink::{Netns, lab};

/// The configuration asks for this plugin.
pub fn asked(stdin: &[u8]) -> bool {
    serde_json::from_slice::<Value>(stdin).is_ok_and(|v| v["type"] == "loopback")
}

/// Carries out the verb; what to print, if anything.
pub fn run(env: &Environment<'_>, stdin: &[u8]) -> Result<Option<Value>> {
    let version = Config::answer_version(stdin);
    match env.verb()? {
        Verb::Version => Ok(Some(result::version_result(&version))),
        Verb::Add => add(env, &version).map(Some),
        // The namespace takes its loopback along.
        Verb::Del | Verb::Check | Verb::Gc | Verb::Status => Ok(None),
    }
}

fn add(env: &Environment<'_>, version: &str) -> Result<Value> {
    let path = env.netns()?;
    let wiring = |cause| Error::Wiring { pod: path.display().to_string(), cause };
    Netns::open(&path).and_then(|ns| ns.run(lab::loopback_up)?).map_err(wiring)?;
    let interface = json!({"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": path.display().to_string()});
    Ok(json!({
        "cniVersion": version,
        "interfaces": [interface],
        "ips": [{"version": "4", "interface": 0, "address": "127.0.0.1/8"}],
    }))
}
