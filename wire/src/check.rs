//! What agents and `sluice check` say to each other: how a node finds itself, and which paths it has walked. JSON, as the
//! answers of an agent's server.

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Where an agent says how it finds its node ([`Report`]); it then keeps a probe for [`KEPT_S`] seconds.
pub const PATH: &str = "/check";
/// Where it walks the paths of a [`Walk`], and answers with a list of [`Walked`].
pub const PATHS_PATH: &str = "/paths";
/// How long a probe is kept after it was last asked for.
pub const KEPT_S: u64 = 10;
/// Longest time for one path: less than control waits for an answer.
pub const WALK_MS: u64 = 3_000;
/// Most paths of one walk.
pub const PATHS_MAX: usize = 1024;

/// A node as its agent finds it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    pub node: String,
    pub kernel: Vec<Feature>,
    /// Of the snapshot that the maps were compared with.
    pub revision: u64,
    /// What differed from it in maps, programs, routes and rules. It has been put right, or `errors` says why not.
    pub differences: Vec<String>,
    /// What of the snapshot cannot be had on this node.
    pub problems: Vec<String>,
    pub errors: Vec<String>,
    /// Of pods' links; none before the nodes are known.
    pub mtu: Option<u32>,
    /// Where the node's probe answers: one address per family. Empty with an error in `errors`.
    pub probe: Vec<SocketAddr>,
    /// The cluster's DNS address.
    pub dns: Option<SocketAddr>,
}

/// Something that not every kernel has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Feature {
    pub name: String,
    /// What is done without it; none where the kernel has it.
    pub fallback: Option<String>,
}

/// Paths to walk. The query of [`PATHS_PATH`]: addresses with commas between them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Walk {
    /// Probes of nodes, from this node's probe: full packets there and back.
    pub probes: String,
    /// Whatever takes connections, from this node's probe.
    pub from_pod: String,
    /// The same, from the node's own network.
    pub from_node: String,
}

/// How a path is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    Probe,
    FromPod,
    FromNode,
}

/// What came of one path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walked {
    pub way: Way,
    pub to: SocketAddr,
    /// Microseconds until the connection stood, or why it does not.
    pub outcome: Result<u64, String>,
}

impl Walk {
    pub fn new(probes: &[SocketAddr], from_pod: &[SocketAddr], from_node: &[SocketAddr]) -> Self {
        let list = |all: &[SocketAddr]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        Self { probes: list(probes), from_pod: list(from_pod), from_node: list(from_node) }
    }

    /// The path and query to ask with. Addresses need no escaping but for the brackets of IPv6.
    pub fn query(&self) -> String {
        let escaped = |list: &str| list.replace('[', "%5B").replace(']', "%5D");
        let Self { probes, from_pod, from_node } = self;
        format!(
            "{PATHS_PATH}?probes={}&from_pod={}&from_node={}",
            escaped(probes),
            escaped(from_pod),
            escaped(from_node)
        )
    }

    /// Every path; what is no address, or too much, is said.
    pub fn paths(&self) -> Result<Vec<(Way, SocketAddr)>, String> {
        let mut paths = vec![];
        for (way, list) in
            [(Way::Probe, &self.probes), (Way::FromPod, &self.from_pod), (Way::FromNode, &self.from_node)]
        {
            for text in list.split(',').filter(|t| !t.is_empty()) {
                paths.push((way, text.parse().map_err(|_| format!("{text:?} is no address with a port"))?));
            }
        }
        if paths.len() > PATHS_MAX {
            return Err(format!("{} paths are asked for; {PATHS_MAX} at once are walked", paths.len()));
        }
        Ok(paths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_survive_the_query() {
        let a = |s: &str| s.parse::<SocketAddr>().expect(s);
        let walk = Walk::new(&[a("10.0.0.1:80"), a("[fd00::1]:80")], &[], &[a("172.30.0.2:30080")]);
        assert_eq!(walk.query(), "/paths?probes=10.0.0.1:80,%5Bfd00::1%5D:80&from_pod=&from_node=172.30.0.2:30080");
        let expected =
            [(Way::Probe, a("10.0.0.1:80")), (Way::Probe, a("[fd00::1]:80")), (Way::FromNode, a("172.30.0.2:30080"))];
        assert_eq!(walk.paths(), Ok(expected.to_vec()));
        let bad = |probes: &str| Walk { probes: probes.into(), ..Walk::default() }.paths().expect_err("bad");
        assert!(bad("10.0.0.1").contains("10.0.0.1"));
        assert!(bad(&"10.0.0.1:1,".repeat(PATHS_MAX + 1)).contains("1024"));
    }
}
