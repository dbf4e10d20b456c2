//! PURE: from an event of the kernel's to a record with names.

use super::names::{Local, Names, Owner, TCP, UDP};
use k8s_openapi::jiff::Timestamp;
use sluice_ebpf::{
    common::{Addr, Event, Flow as Addresses, ICMP, ICMPV6, Reason, hook},
    events::Decoded,
    ip,
};
use sluice_wire::flows::{Flow, Peer, Record, Tuple, Verdict};
use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

/// What a record needs beside its event.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Name of this node.
    pub node: &'a str,
    /// When it was booted, which events' times count from.
    pub booted: SystemTime,
    /// The cluster's names.
    pub names: &'a Names,
    /// This node's.
    pub local: &'a dyn Local,
}

/// What is told of one record of the ring buffer.
pub fn record(decoded: Decoded, now: SystemTime, context: &Context<'_>) -> Record {
    match decoded {
        Decoded::Known(event, reason) => {
            Record::Flow(Box::new(flow(&event, verdict(&event, reason), reason.label().to_owned(), context)))
        }
        Decoded::UnknownReason(event) => {
            let reason = format!("unknown_{}", event.reason);
            Record::Flow(Box::new(flow(&event, verdict_unknown(&event), reason, context)))
        }
        Decoded::Malformed(length) => Record::Unknown {
            time: text_of(now),
            node: context.node.to_owned(),
            text: format!(
                "an event of {length} bytes, where this agent knows those of {}: its programs are of another version",
                size_of::<Event>()
            ),
        },
    }
}

/// A moment as records have it.
pub fn text_of(time: SystemTime) -> String {
    // The years that a timestamp cannot hold are none that a clock shows.
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time =
        i128::try_from(since.as_nanos()).ok().and_then(|n| Timestamp::from_nanosecond(n).ok()).unwrap_or_default();
    format!("{time:.6}")
}

fn flow(event: &Event, verdict: Verdict, reason: String, c: &Context<'_>) -> Flow {
    let (before, after) = (&event.before, &event.after);
    let time = c.booted.checked_add(Duration::from_nanos(event.time_ns)).unwrap_or(c.booted);
    let source = source(event, c);
    let dialled = ip(before.dst);
    let moved = after != before && *after != Addresses::default();
    let reached = if moved { ip(after.dst) } else { dialled };
    let destination = match reached.is_loopback() {
        true => source.clone(),
        false => c.names.peer(reached, c.node, c.local),
    };
    let service = c.names.service(dialled, u16::from_be(before.dport_be), before.proto, c.local);
    Flow {
        time: text_of(time),
        node: c.node.to_owned(),
        verdict,
        reason,
        source,
        destination,
        service: service.cloned(),
        protocol: protocol(before.proto),
        before: tuple(before),
        after: moved.then(|| tuple(after)),
        hook: hook_name(event.hook),
        interface: c.local.interface(event.ifindex).filter(|_| event.ifindex != 0),
        bytes: event.len,
    }
}

/// A socket is known by its namespace, a packet by its address.
fn source(event: &Event, c: &Context<'_>) -> Peer {
    let node = || Peer { pod: None, node: Some(c.node.to_owned()) };
    match c.local.netns(event.netns).filter(|_| event.netns != 0) {
        Some(Owner::Pod(pod)) => return Peer { pod: Some(pod), node: None },
        Some(Owner::Node) => return node(),
        None => {}
    }
    let address = ip(event.before.src);
    let known = if address.is_unspecified() { Peer::default() } else { c.names.peer(address, c.node, c.local) };
    if known == Peer::default() && event.hook == hook::HOST { node() } else { known }
}

/// A refusal is told to the caller at its socket; a packet just ends.
fn verdict(event: &Event, reason: Reason) -> Verdict {
    let ends = event.dropped != 0 || reason.ends();
    match reason {
        _ if ends => ended(event),
        Reason::Masqueraded => Verdict::Masqueraded,
        Reason::Captured | Reason::SteeredOutbound | Reason::SteeredInbound => Verdict::Captured,
        Reason::AddressAnswered => Verdict::Answered,
        Reason::Translated
        | Reason::TranslatedDatagram
        | Reason::Affine
        | Reason::PacketTranslated
        | Reason::HostPort
        | Reason::IcmpTranslated => Verdict::Translated,
        _ if event.after != event.before && event.after != Addresses::default() => Verdict::Translated,
        _ => Verdict::Forwarded,
    }
}

fn verdict_unknown(event: &Event) -> Verdict {
    if event.dropped == 0 { Verdict::Unknown } else { ended(event) }
}

fn ended(event: &Event) -> Verdict {
    if event.hook == hook::SOCKET { Verdict::Refused } else { Verdict::Dropped }
}

fn protocol(number: u8) -> String {
    match number {
        TCP => "TCP".to_owned(),
        UDP => "UDP".to_owned(),
        ICMP => "ICMP".to_owned(),
        ICMPV6 => "ICMPv6".to_owned(),
        132 => "SCTP".to_owned(),
        other => other.to_string(),
    }
}

fn hook_name(number: u8) -> String {
    match number {
        hook::SOCKET => "socket".to_owned(),
        hook::POD => "pod".to_owned(),
        hook::WIRE => "wire".to_owned(),
        hook::HOST => "host".to_owned(),
        hook::LISTENER => "listener".to_owned(),
        other => other.to_string(),
    }
}

fn tuple(flow: &Addresses) -> Tuple {
    let ports = matches!(flow.proto, TCP | UDP);
    let end = |address: Addr, port_be: u16| -> Option<String> {
        let (address, port): (IpAddr, u16) = (ip(address), u16::from_be(port_be));
        match (address.is_unspecified() && port == 0, ports) {
            (true, _) => None,
            (false, true) => Some(SocketAddr::new(address, port).to_string()),
            (false, false) => Some(address.to_string()),
        }
    };
    Tuple { source: end(flow.src, flow.sport_be), destination: end(flow.dst, flow.dport_be) }
}

#[cfg(test)]
mod tests {
    use super::{
        super::names::tests::{Here, ip, names},
        *,
    };
    use serde_json::{Value, json};

    fn addresses(proto: u8, source: &str, destination: &str) -> Addresses {
        let end = |text: &str| match text {
            "" => (Addr::UNSET, 0),
            text => {
                let a: SocketAddr = text.parse().expect(text);
                (sluice_ebpf::addr(a.ip()), a.port().to_be())
            }
        };
        let ((src, sport_be), (dst, dport_be)) = (end(source), end(destination));
        Addresses { src, dst, sport_be, dport_be, proto, ..Addresses::default() }
    }

    fn told(event: Event, reason: Reason) -> Value {
        let event = Event { time_ns: 1_500_000, reason: reason as u32, ..event };
        said(sluice_ebpf::events::decode(&sluice_ebpf::events::encode(&event)))
    }

    fn said(decoded: Decoded) -> Value {
        let booted = SystemTime::UNIX_EPOCH + Duration::from_secs(1_769_860_862);
        let context = Context { node: "n1", booted, names: &names(), local: &Here };
        serde_json::to_value(record(decoded, booted, &context)).expect("a record is JSON")
    }

    #[test]
    fn a_socket_that_dials_a_service() {
        let before = addresses(TCP, "", "10.96.0.7:80");
        let after = addresses(TCP, "", "10.244.2.5:8080");
        let event = Event { netns: 2, before, after, hook: hook::SOCKET, ..Event::default() };
        let wanted = json!({
            "kind": "flow", "time": "2026-01-31T12:01:02.001500Z", "node": "n1", "verdict": "translated",
            "reason": "translated", "source": {"pod": "shop/web-2"}, "destination": {"pod": "shop/api-5"},
            "service": {"name": "shop/api", "port": 80, "by": "virtual"}, "protocol": "TCP",
            "before": {"destination": "10.96.0.7:80"}, "after": {"destination": "10.244.2.5:8080"},
            "hook": "socket", "bytes": 0,
        });
        assert_eq!(told(event, Reason::Translated), wanted);
    }

    #[test]
    fn a_pod_that_reaches_the_outside() {
        let before = addresses(UDP, "10.244.1.3:5000", "8.8.8.8:53");
        let after = addresses(UDP, "192.168.0.1:61002", "8.8.8.8:53");
        let event = Event { before, after, ifindex: 7, len: 70, hook: hook::POD, ..Event::default() };
        let wanted = json!({
            "kind": "flow", "time": "2026-01-31T12:01:02.001500Z", "node": "n1", "verdict": "masqueraded",
            "reason": "masqueraded", "source": {"pod": "shop/web-3"}, "destination": {}, "protocol": "UDP",
            "before": {"source": "10.244.1.3:5000", "destination": "8.8.8.8:53"},
            "after": {"source": "192.168.0.1:61002", "destination": "8.8.8.8:53"},
            "hook": "pod", "interface": "eth7", "bytes": 70,
        });
        assert_eq!(told(event, Reason::Masqueraded), wanted);
    }

    #[test]
    fn ends_have_names_wherever_they_come_from() {
        let table = [
            // netns, hook, source, destination; names of both ends, service
            (1, hook::SOCKET, "", "10.96.0.7:80", json!({"node": "n1"}), json!({}), json!("shop/api")),
            (99, hook::SOCKET, "", "192.168.0.2:22", json!({}), json!({"node": "n2"}), json!(null)),
            (
                4,
                hook::SOCKET,
                "",
                "127.0.0.1:22",
                json!({"pod": "shop/web-4"}),
                json!({"pod": "shop/web-4"}),
                json!(null),
            ),
            (0, hook::WIRE, "198.51.100.7:9", "192.168.0.1:30080", json!({}), json!({"node": "n1"}), json!("shop/api")),
            (
                0,
                hook::HOST,
                "10.8.8.8:9",
                "10.244.1.2:80",
                json!({"node": "n1"}),
                json!({"pod": "shop/web-2"}),
                json!(null),
            ),
            (0, hook::POD, "[fd00::7]:9", "[fd01::7]:81", json!({"pod": "shop/cart-1"}), json!({}), json!("shop/api")),
        ];
        for (netns, hook, source, destination, from, to, service) in table {
            let before = addresses(TCP, source, destination);
            let event = Event { netns, hook, before, after: before, ..Event::default() };
            let flow = told(event, Reason::Forwarded);
            assert_eq!((&flow["source"], &flow["destination"]), (&from, &to), "{source} to {destination}");
            assert_eq!(flow["service"].get("name").unwrap_or(&Value::Null), &service, "{source} to {destination}");
            assert_eq!(flow.get("after"), None);
        }
    }

    #[test]
    fn verdicts_follow_the_reason_and_the_place() {
        let same = addresses(TCP, "10.244.1.2:1", "10.244.2.7:2");
        let other = addresses(TCP, "10.244.1.2:1", "10.244.2.7:3");
        let verdict_of = |reason, hook, dropped, after| {
            verdict(&Event { before: same, after, hook, dropped, ..Event::default() }, reason)
        };
        let table = [
            (Reason::Forwarded, hook::POD, 0, same, Verdict::Forwarded),
            (Reason::ToPod, hook::WIRE, 0, other, Verdict::Translated),
            (Reason::ToPod, hook::WIRE, 0, Addresses::default(), Verdict::Forwarded),
            (Reason::Affine, hook::SOCKET, 0, other, Verdict::Translated),
            (Reason::Masqueraded, hook::POD, 0, other, Verdict::Masqueraded),
            (Reason::Captured, hook::SOCKET, 0, same, Verdict::Captured),
            (Reason::AddressAnswered, hook::WIRE, 0, same, Verdict::Answered),
            (Reason::NoBackend, hook::SOCKET, 1, same, Verdict::Refused),
            (Reason::NoBackend, hook::SOCKET, 0, same, Verdict::Refused),
            (Reason::DroppedNoRoute, hook::POD, 1, same, Verdict::Dropped),
            (Reason::SteeredInbound, hook::LISTENER, 0, same, Verdict::Captured),
            (Reason::DroppedInbound, hook::LISTENER, 1, same, Verdict::Dropped),
            (Reason::Forwarded, hook::POD, 1, same, Verdict::Dropped),
        ];
        for (reason, hook, dropped, after, wanted) in table {
            assert_eq!(verdict_of(reason, hook, dropped, after), wanted, "{reason:?} at {hook}, dropped {dropped}");
        }
    }

    #[test]
    fn what_is_not_understood_is_told() {
        let event = Event { reason: 60, before: addresses(TCP, "10.244.1.2:1", "8.8.8.8:2"), ..Event::default() };
        let flow = said(Decoded::UnknownReason(event));
        assert_eq!((&flow["verdict"], &flow["reason"]), (&json!("unknown"), &json!("unknown_60")));
        assert_eq!(flow["source"], json!({"pod": "shop/web-2"}), "the rest is told all the same");
        let dropped = Event { dropped: 1, hook: hook::WIRE, ..event };
        assert_eq!(said(Decoded::UnknownReason(dropped))["verdict"], json!("dropped"));
        let odd = Event { before: Addresses { proto: 250, ..event.before }, hook: 77, time_ns: u64::MAX, ..event };
        let flow = said(Decoded::UnknownReason(odd));
        assert_eq!((&flow["protocol"], &flow["hook"]), (&json!("250"), &json!("77")));
        let unknown = said(Decoded::Malformed(17));
        assert_eq!(unknown["kind"], json!("unknown"));
        assert!(unknown["text"].as_str().is_some_and(|t| t.contains("17 bytes") && t.contains("112")), "{unknown}");
    }

    #[test]
    fn addresses_are_written_as_their_protocol_has_them() {
        let icmp = Addresses { sport_be: 9, ..addresses(ICMP, "10.244.1.2:1", "10.96.0.7:0") };
        let wanted = Tuple { source: Some("10.244.1.2".into()), destination: Some("10.96.0.7".into()) };
        assert_eq!(tuple(&icmp), wanted);
        let six = tuple(&addresses(TCP, "", "[fd00::1]:80"));
        assert_eq!(six, Tuple { source: None, destination: Some("[fd00::1]:80".into()) });
        let bound = tuple(&addresses(TCP, "0.0.0.0:80", "10.0.0.1:1"));
        assert_eq!(bound.source.as_deref(), Some("0.0.0.0:80"));
        assert!(ip("0.0.0.0").is_unspecified());
    }
}
