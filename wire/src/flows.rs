//! Flows and drops as agents tell them to operators' programs: one JSON object per line, on the agents' port, passed on by
//! control's API under `/api/v1/nodes/<node>/proxy`. PURE.

use serde::{Deserialize, Serialize};

/// Where an agent serves its flows: [`Record`]s, one per line, for as long as the caller listens.
pub const PATH: &str = "/flows";
/// Where an agent serves its programs' counters.
pub const COUNTERS_PATH: &str = "/counters";
/// Longest time without a line: where nothing happens, an agent says [`Record::Idle`].
pub const IDLE_S: u64 = 5;
/// Longest line that is taken. Names are bounded by Kubernetes, everything else is short.
pub const MAX_LINE_BYTES: usize = 16 * 1024;

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// A new flow, or the end of one.
    Flow(Box<Flow>),
    /// Flows that are not told.
    Lost(Lost),
    /// Something that the agent does not understand: its programs are of another version.
    Unknown {
        /// As in [`Flow::time`].
        time: String,
        /// The agent's node.
        node: String,
        /// What came instead.
        text: String,
    },
    /// Nothing happens, and the agent is there.
    Idle {
        /// As in [`Flow::time`].
        time: String,
        /// The agent's node.
        node: String,
    },
}

impl Record {
    /// When, as in [`Flow::time`].
    pub fn time(&self) -> &str {
        match self {
            Self::Flow(f) => &f.time,
            Self::Lost(l) => &l.time,
            Self::Unknown { time, .. } | Self::Idle { time, .. } => time,
        }
    }
}

/// Flows that were lost, whichever they were.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// As in [`Flow::time`].
    pub time: String,
    /// The agent's node.
    pub node: String,
    /// How many, of all kinds: what a filter would have left out is counted too.
    pub count: u64,
    /// Who was too slow.
    pub by: TooSlow,
}

/// Who did not keep up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooSlow {
    /// Who follows: its connection took the lines more slowly than they came.
    Follower,
    /// The agent: the kernel's ring buffer was full.
    Agent,
}

/// What became of a packet or connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Went on as it was.
    Forwarded,
    /// Given a backend of the service, or the pod of the host port.
    Translated,
    /// Went on under an address of the node.
    Masqueraded,
    /// Handed to the pod's sidecar.
    Captured,
    /// Answered here.
    Answered,
    /// The packet ends here, without a word to its sender or with an ICMP error.
    Dropped,
    /// The caller was told at once that it cannot connect.
    Refused,
    /// The agent does not know the reason.
    Unknown,
}

impl Verdict {
    /// As people read it, and as it is in JSON.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Translated => "translated",
            Self::Masqueraded => "masqueraded",
            Self::Captured => "captured",
            Self::Answered => "answered",
            Self::Dropped => "dropped",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
        }
    }

    /// Whether the packet or connection ends with it.
    pub const fn ends(self) -> bool {
        matches!(self, Self::Dropped | Self::Refused)
    }
}

/// Addresses and ports; what is not known is absent (a socket's own end before it is connected).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuple {
    /// `address:port`, `[address]:port`, or the address alone where there are no ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
}

/// Who is at an end of a flow, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The node itself: one of its addresses, or a process in its own network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// How a service was dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dialled {
    /// By its own address.
    Virtual,
    /// By an external address or one of its load balancer.
    External,
    /// By a port of a node's own address.
    NodePort,
}

/// The service that was dialled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRef {
    /// `namespace/name`.
    pub name: String,
    /// The service's port, whatever number was dialled.
    pub port: u16,
    /// By which kind of address.
    pub by: Dialled,
}

/// A new flow, or the end of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// In UTC with six digits of the second, as `2026-01-31T12:01:02.123456Z`: texts sort as times do.
    pub time: String,
    /// The node whose kernel saw it.
    pub node: String,
    /// What became of it.
    pub verdict: Verdict,
    /// Why: the label of a counter, or `unknown_<number>`.
    pub reason: String,
    /// Who began it.
    pub source: Peer,
    /// Who gets it, after translation.
    pub destination: Peer,
    /// Which service was dialled, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceRef>,
    /// `TCP`, `UDP`, `ICMP`, `ICMPv6`, or the number.
    pub protocol: String,
    /// As it came.
    pub before: Tuple,
    /// As it goes on; absent where that is the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Tuple>,
    /// Where it was seen: `socket`, `pod`, `wire`, `host`, `listener`, or the number.
    pub hook: String,
    /// Link over which it came; absent for sockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Bytes of the packet; 0 for sockets.
    #[serde(default)]
    pub bytes: u32,
}

/// Which flows are asked for: those that fit everything that is given. The query of [`PATH`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// Only what ends: drops and refusals.
    pub drops: bool,
    /// `namespace/name` of a pod at either end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Of a pod at either end, or of the service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// `namespace/name` of the service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
}

/// A name that no object can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// A pod or service.
    #[error("{field} {value:?} is not namespace/name, as shop/web is")]
    Name {
        /// Which.
        field: &'static str,
        /// What was given.
        value: String,
    },
    /// A namespace.
    #[error("namespace {0:?} is not the name of a namespace")]
    Namespace(String),
}

/// Whether an object can have the name (RFC 1123): the characters need no escape in a URL.
fn plain(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    !name.is_empty() && name.len() <= 253 && name.chars().all(fits)
}

impl Filter {
    /// Refuses names that nothing can have: such a filter would wait for ever.
    pub fn checked(self) -> Result<Self, FilterError> {
        for (field, value) in [("pod", &self.pod), ("service", &self.service)] {
            if let Some(value) = value
                && !value.split_once('/').is_some_and(|(ns, name)| plain(ns) && plain(name))
            {
                return Err(FilterError::Name { field, value: value.clone() });
            }
        }
        match &self.namespace {
            Some(ns) if !plain(ns) => Err(FilterError::Namespace(ns.clone())),
            _ => Ok(self),
        }
    }

    /// As the query of a URL, without the question mark. Of a [`Self::checked`] filter.
    pub fn query(&self) -> String {
        let mut query = format!("drops={}", self.drops);
        for (field, value) in [("pod", &self.pod), ("namespace", &self.namespace), ("service", &self.service)] {
            if let Some(value) = value {
                query.push_str(&format!("&{field}={value}"));
            }
        }
        query
    }

    /// Whether the flow is asked for.
    pub fn takes(&self, flow: &Flow) -> bool {
        let pods = || [&flow.source, &flow.destination].into_iter().filter_map(|p| p.pod.as_deref());
        let service = flow.service.as_ref().map(|s| s.name.as_str());
        let inside = |name: &str, ns: &str| name.split_once('/').is_some_and(|(n, _)| n == ns);
        (!self.drops || flow.verdict.ends())
            && self.pod.as_deref().is_none_or(|pod| pods().any(|p| p == pod))
            && self.service.as_deref().is_none_or(|name| service == Some(name))
            && self.namespace.as_deref().is_none_or(|ns| pods().chain(service).any(|name| inside(name, ns)))
    }
}

/// What an agent's programs counted since their maps were made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// The agent's node.
    pub node: String,
    /// By label of the reason.
    pub counters: std::collections::BTreeMap<String, u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(verdict: Verdict, source: &str, destination: &str, service: &str) -> Flow {
        let peer = |pod: &str| Peer { pod: (!pod.is_empty()).then(|| pod.to_owned()), node: None };
        let service = ServiceRef { name: service.to_owned(), port: 80, by: Dialled::Virtual };
        Flow {
            time: "2026-01-31T12:01:02.123456Z".into(),
            node: "n1".into(),
            verdict,
            reason: "x".into(),
            source: peer(source),
            destination: peer(destination),
            service: (!service.name.is_empty()).then_some(service),
            protocol: "TCP".into(),
            before: Tuple::default(),
            after: None,
            hook: "socket".into(),
            interface: None,
            bytes: 0,
        }
    }

    #[test]
    fn a_filter_takes_what_fits_all_of_it() {
        use Verdict::{Dropped, Refused, Translated};
        let filter = |drops, pod: &str, namespace: &str, service: &str| {
            let given = |s: &str| (!s.is_empty()).then(|| s.to_owned());
            Filter { drops, pod: given(pod), namespace: given(namespace), service: given(service) }
        };
        let table = [
            (filter(false, "", "", ""), flow(Translated, "", "", ""), true),
            (filter(true, "", "", ""), flow(Translated, "a/x", "", ""), false),
            (filter(true, "", "", ""), flow(Dropped, "", "", ""), true),
            (filter(true, "", "", ""), flow(Refused, "", "", ""), true),
            (filter(true, "", "", ""), flow(Verdict::Unknown, "", "", ""), false),
            (filter(false, "a/x", "", ""), flow(Translated, "a/x", "", ""), true),
            (filter(false, "a/x", "", ""), flow(Translated, "", "a/x", ""), true),
            (filter(false, "a/x", "", ""), flow(Translated, "b/x", "a/xy", "a/x"), false),
            (filter(false, "", "a", ""), flow(Translated, "a/x", "", ""), true),
            (filter(false, "", "a", ""), flow(Translated, "", "", "a/s"), true),
            (filter(false, "", "a", ""), flow(Translated, "aa/x", "b/x", "b/a"), false),
            (filter(false, "", "", "a/s"), flow(Translated, "", "", "a/s"), true),
            (filter(false, "", "", "a/s"), flow(Translated, "a/s", "a/s", ""), false),
            (filter(true, "a/x", "b", "b/s"), flow(Refused, "a/x", "", "b/s"), true),
            (filter(true, "a/x", "b", "b/s"), flow(Translated, "a/x", "", "b/s"), false),
        ];
        for (filter, flow, wanted) in table {
            assert_eq!(filter.takes(&flow), wanted, "{filter:?} {flow:?}");
        }
    }

    #[test]
    fn names_that_nothing_can_have_are_refused() {
        let pod = |pod: &str| Filter { pod: Some(pod.into()), ..Filter::default() }.checked();
        for bad in ["", "web", "/web", "shop/", "a/b/c", "shop/we b", "shop/web&drops=true", "shop/\u{e9}"] {
            assert!(pod(bad).is_err(), "{bad}");
        }
        assert!(pod("shop/web-7f.x").is_ok());
        assert!(Filter { namespace: Some("a/b".into()), ..Filter::default() }.checked().is_err());
        let all = Filter { drops: true, service: Some("a/s".into()), namespace: Some("a".into()), pod: None };
        assert_eq!(all.checked().map(|f| f.query()), Ok("drops=true&namespace=a&service=a/s".to_owned()));
    }
}
