//! PURE: what it means that something was dropped or refused, and what to do about it. One sentence each; the same are in
//! docs/flows.md.

use sluice_ebpf_common::Reason;

/// Of a reason by its label; `None` for one that ends nothing, and for one of agents that are newer than this program.
pub fn explain(label: &str) -> Option<&'static str> {
    EXPLANATIONS.iter().find(|(reason, _)| reason.label() == label).map(|(_, text)| *text)
}

/// What follows from the dropped and refused ones.
const EXPLANATIONS: &[(Reason, &str)] = &[
    (
        Reason::NoBackend,
        "the service has no endpoint that this caller may use; look at `kubectl get endpointslices` and at the \
         readiness of its pods, and with `internalTrafficPolicy: Local` at those of this node",
    ),
    (
        Reason::RaceLost,
        "the service's backends changed each time they were looked at; the caller may try again at once, and if it \
         stays, something rewrites the service all the time",
    ),
    (
        Reason::RefusedNoSidecar,
        "the pod is in the mesh and its sidecar does not live; `kubectl logs <pod> -c sluice-proxy` says why",
    ),
    (
        Reason::RefusedBound,
        "the app bound its socket to a device, which passes the sidecar by, and it could not be unbound; let the \
         app not use SO_BINDTODEVICE, or leave the pod out of the mesh",
    ),
    (
        Reason::RefusedMark,
        "the connection could not be marked for the sidecar, which no app should bring about; see the agent's log \
         and `sluice check`",
    ),
    (
        Reason::DroppedOutbound,
        "the pod is in the mesh and its sidecar takes no outbound connections; wait until it is ready, or see its \
         log",
    ),
    (
        Reason::DroppedInbound,
        "the pod is in the mesh and its sidecar takes no inbound connections; wait until it is ready, see its log, \
         or exclude the port with `sluice.dev/exclude-inbound-ports`",
    ),
    (
        Reason::AssignFailed,
        "the kernel did not hand the connection to the sidecar's listener; see the sidecar's log, and restart the \
         pod if it stays",
    ),
    (
        Reason::DroppedNoBackend,
        "the packet is for a service without an endpoint that callers from there may use; look at the readiness of \
         its pods, and with `externalTrafficPolicy: Local` at those of the node that was reached",
    ),
    (
        Reason::DroppedErrorLimit,
        "the sender is owed an ICMP error (no endpoint, or too large a packet) and the node has sent too many of that \
         kind already; see `dropped_no_backend` and `dropped_too_big` for the cause, and who sends so many",
    ),
    (
        Reason::DroppedMalformed,
        "the packet's headers are cut short or contradict each other; look at what sends it, no setting changes it",
    ),
    (
        Reason::DroppedFragment,
        "a fragment to be translated came whose first one was not seen, so that its ports are not known; let the \
         sender keep to the path's MTU, or find where fragments are lost or reordered",
    ),
    (
        Reason::DroppedNoPort,
        "every port of the node's address is in use towards this destination (61000 to 65535); close connections, \
         or spread the callers over more nodes",
    ),
    (
        Reason::DroppedTableFull,
        "the connection could not be noted in the node's table; if it stays, fewer connections at a time, or more \
         nodes",
    ),
    (
        Reason::DroppedNoRoute,
        "the node has no route to the destination; look at `ip route get <address>` on the node, and at whether \
         the destination's node is ready",
    ),
    (
        Reason::DroppedHopLimit,
        "the packet's hop limit is used up; this is a traceroute, or a routing loop between nodes and their \
         network",
    ),
    (
        Reason::DroppedTooBig,
        "the packet is larger than the link it would leave by takes, and may not be divided; let ICMP through so \
         that senders learn the MTU, or give the pods' links and the nodes' the same one",
    ),
    (
        Reason::DroppedRewrite,
        "the kernel refused to rewrite the packet, for want of memory mostly; see the node's kernel log",
    ),
    (
        Reason::DroppedSpoofed,
        "the pod sends under an address that is not its own, as routers and VPNs inside pods do, or under a \
         link-local one to somebody beyond the link; let them translate to the pod's address",
    ),
    (
        Reason::RefusedSourceRange,
        "the pod, or the node, is in none of the ranges that may use the service's load balancer; add it to \
         `spec.loadBalancerSourceRanges`, or dial the service's cluster address",
    ),
    (
        Reason::DroppedSourceRange,
        "the client is in none of the ranges that may use the service's load balancer; add it to \
         `spec.loadBalancerSourceRanges`, or look at what translated its address on the way",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    const DOCS: &str = include_str!("../../../docs/flows.md");

    #[test]
    fn whatever_ends_has_one_sentence_and_the_rest_none() {
        for reason in Reason::ALL {
            let text = explain(reason.label());
            assert_eq!(text.is_some(), reason.ends(), "{}", reason.label());
            let Some(text) = text else { continue };
            assert!(text.contains("; ") && !text.contains("  ") && !text.ends_with('.'), "{}: {text}", reason.label());
            assert!(text.len() < 260, "{}: {} characters", reason.label(), text.len());
        }
        assert_eq!(explain("unknown_77"), None);
    }

    #[test]
    fn every_reason_is_in_the_docs() {
        for reason in Reason::ALL {
            let row = DOCS.lines().find(|l| l.starts_with(&format!("| `{}` |", reason.label())));
            let row = row.unwrap_or_else(|| panic!("docs/flows.md has no row for {}", reason.label()));
            if let Some(text) = explain(reason.label()) {
                assert!(row.contains(text), "docs/flows.md says otherwise of {}:\n{text}", reason.label());
            }
        }
    }
}
