//! PURE: a record as people read it: one line, in columns that grow with what they have seen and stay.

use sluice_wire::flows::{Flow, Peer, Record, TooSlow};

/// Widest a column grows; longer text is cut where it is a name, and pushes the rest where it is an address.
const WIDEST: usize = 40;

/// The columns' widths so far.
#[derive(Debug, Default)]
pub struct Columns {
    node: usize,
    source: usize,
    destination: usize,
    addresses: usize,
}

/// `text` in at most `most` characters, the last of them an ellipsis where it was cut.
fn cut(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => text.chars().take(most - 1).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

fn column(width: &mut usize, text: &str) -> String {
    *width = (*width).max(text.chars().count()).min(WIDEST);
    let width = *width;
    format!("{text:<width$}")
}

/// `12:01:02.123` of `2026-01-31T12:01:02.123456Z`; a text of another form as it is.
fn clock(time: &str) -> &str {
    time.get(11..23).unwrap_or(time)
}

impl Columns {
    /// Of a record that is one for people; `None` for a sign of life.
    pub fn line(&mut self, record: &Record) -> Option<String> {
        match record {
            Record::Flow(flow) => Some(self.flow(flow)),
            Record::Lost(lost) => {
                let who = match lost.by {
                    TooSlow::Follower => "this command or its connection was too slow",
                    TooSlow::Agent => "the node's agent was too slow",
                };
                Some(self.remark(&lost.time, &lost.node, &format!("{} records lost: {who}", lost.count)))
            }
            Record::Unknown { time, node, text } => Some(self.remark(time, node, text)),
            Record::Idle { .. } => None,
        }
    }

    fn remark(&mut self, time: &str, node: &str, text: &str) -> String {
        format!("{} {} -- {text}", clock(time), column(&mut self.node, node))
    }

    fn flow(&mut self, flow: &Flow) -> String {
        let node = column(&mut self.node, &flow.node);
        let source = column(&mut self.source, &cut(&source(flow), WIDEST));
        let destination = column(&mut self.destination, &cut(&destination(flow), WIDEST));
        let addresses = column(&mut self.addresses, &addresses(flow));
        let what = flow.verdict.text();
        let why = if flow.verdict.ends() || what == "unknown" { format!(": {}", flow.reason) } else { String::new() };
        let protocol = &flow.protocol;
        format!("{} {node} {source} → {destination} {addresses} {protocol} {what}{why}", clock(&flow.time))
    }
}

fn name(peer: &Peer) -> Option<String> {
    peer.pod.clone().or_else(|| peer.node.as_ref().map(|n| format!("node {n}")))
}

fn source(flow: &Flow) -> String {
    let address = || flow.before.source.clone();
    name(&flow.source).or_else(address).unwrap_or_else(|| "?".to_owned())
}

/// The service that was dialled; else who gets it, with the port.
fn destination(flow: &Flow) -> String {
    if let Some(service) = &flow.service {
        return format!("{}:{}", service.name, service.port);
    }
    let reached = flow.after.as_ref().and_then(|t| t.destination.as_ref()).or(flow.before.destination.as_ref());
    let reached = reached.map_or("?", String::as_str);
    match (name(&flow.destination), port(reached)) {
        (Some(name), Some(port)) => format!("{name}:{port}"),
        (Some(name), None) => name,
        (None, _) => reached.to_owned(),
    }
}

/// Of `10.0.0.1:80` and `[fd00::1]:80`; an address alone has none.
fn port(end: &str) -> Option<&str> {
    let (address, port) = end.rsplit_once(':')?;
    (!address.contains(':') || address.ends_with(']')).then_some(port)
}

/// What was dialled and where that led; the address that it goes on under, where that is another one.
fn addresses(flow: &Flow) -> String {
    let text = |end: &Option<String>| end.clone().unwrap_or_else(|| "?".to_owned());
    let dialled = text(&flow.before.destination);
    let Some(after) = &flow.after else { return format!("({dialled})") };
    let reached = text(&after.destination);
    let to = if reached == dialled { dialled } else { format!("{dialled} → {reached}") };
    match &after.source {
        Some(source) if flow.before.source.as_ref() != Some(source) => format!("({to} as {source})"),
        _ => format!("({to})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn record(value: Value) -> Record {
        let mut whole = json!({"kind": "flow", "time": "2026-01-31T12:01:02.123456Z", "node": "node-1",
            "verdict": "forwarded", "reason": "forwarded", "source": {}, "destination": {}, "protocol": "TCP",
            "before": {}, "hook": "pod"});
        whole.as_object_mut().expect("an object").extend(value.as_object().expect("an object").clone());
        serde_json::from_value(whole).expect("a record")
    }

    #[test]
    fn a_line_says_who_reaches_whom_and_how() {
        let table = [
            (
                json!({"source": {"pod": "shop/web"}, "service": {"name": "shop/api", "port": 80, "by": "virtual"},
                    "destination": {"pod": "shop/api-1"}, "before": {"destination": "10.96.0.7:80"},
                    "after": {"destination": "10.244.2.5:8080"}, "verdict": "translated", "reason": "affine"}),
                "12:01:02.123 node-1 shop/web → shop/api:80 (10.96.0.7:80 → 10.244.2.5:8080) TCP translated",
            ),
            (
                json!({"source": {"pod": "shop/web"}, "before": {"source": "10.244.1.7:5000", "destination": "8.8.8.8:53"},
                    "after": {"source": "192.168.0.1:61002", "destination": "8.8.8.8:53"}, "protocol": "UDP",
                    "verdict": "masqueraded", "reason": "masqueraded"}),
                "12:01:02.123 node-1 shop/web → 8.8.8.8:53 (8.8.8.8:53 as 192.168.0.1:61002) UDP masqueraded",
            ),
            (
                json!({"source": {"node": "node-1"}, "destination": {"pod": "shop/db"},
                    "before": {"source": "[fd00::1]:9", "destination": "[fd00::7]:5432"}}),
                "12:01:02.123 node-1 node node-1 → shop/db:5432 ([fd00::7]:5432) TCP forwarded",
            ),
            (
                json!({"before": {"source": "198.51.100.7", "destination": "fd00::7"}, "destination": {"node": "node-2"},
                    "protocol": "ICMPv6", "verdict": "dropped", "reason": "dropped_no_route"}),
                "12:01:02.123 node-1 198.51.100.7 → node node-2 (fd00::7) ICMPv6 dropped: dropped_no_route",
            ),
            (
                json!({"verdict": "unknown", "reason": "unknown_60", "protocol": "250", "time": "soon"}),
                "soon node-1 ? → ? (?) 250 unknown: unknown_60",
            ),
            (
                json!({"kind": "lost", "count": 12, "by": "follower"}),
                "12:01:02.123 node-1 -- 12 records lost: this command or its connection was too slow",
            ),
            (json!({"kind": "unknown", "text": "an event of 3 bytes"}), "12:01:02.123 node-1 -- an event of 3 bytes"),
        ];
        for (given, wanted) in table {
            assert_eq!(Columns::default().line(&record(given.clone())).as_deref(), Some(wanted), "{given}");
        }
        assert_eq!(Columns::default().line(&record(json!({"kind": "idle"}))), None);
    }

    #[test]
    fn columns_stay_where_they_are_and_names_do_not_push_them() {
        let long = format!("shop/{}", "w".repeat(80));
        let mut columns = Columns::default();
        let to = json!({"destination": "10.0.0.1:1"});
        let first = columns.line(&record(json!({"source": {"pod": long}, "before": to}))).expect("a line");
        let second = columns.line(&record(json!({"source": {"pod": "é/é"}, "before": to}))).expect("a line");
        let arrow = |line: &str| line.chars().position(|c| c == '→');
        assert_eq!(arrow(&first), arrow(&second));
        assert!(first.contains("w… →"), "{first}");
    }
}
