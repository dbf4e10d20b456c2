//! Why the sidecar answered by itself: one closed list for the `x-sluice-reason` header and the metric label.

use http::StatusCode;

/// The header that says who made an answer and why.
pub const HEADER: &str = "x-sluice-reason";

/// Each an outcome an operator can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The chosen backend has no ready endpoint.
    NoEndpoints,
    /// Routes are attached and none matches.
    NoRoute,
    /// The rule names no backend that exists, or all weights are 0.
    NoBackend,
    /// No endpoint that was tried took the connection.
    ConnectFailed,
    /// The upstream closed before it answered.
    UpstreamClosed,
    /// The upstream's answer is not HTTP.
    UpstreamMalformed,
    /// The endpoint takes mTLS and there is no certificate yet.
    NoCertificate,
    /// The endpoint could not prove that it is who it should be.
    IdentityNotProven,
    /// Plain bytes where the policy asks for mTLS.
    PlainRefused,
    /// Inbound: the app does not take connections. The request did not reach it.
    AppUnreachable,
    /// Requests for the sidecar's own ports.
    Loop,
    /// Too many connections.
    Overload,
    /// An address of the cluster whose meaning did not come in time: it might be a meshed pod's, so nothing is sent to
    /// it in the clear.
    DestinationUnknown,
    /// The rule redirects to a place that is none.
    BadRedirect,
    /// The route's or policy's rate is used up.
    RateLimited,
    /// A rule that tests callers answered instead.
    FaultInjected,
    /// No answer within the rule's time for the whole request.
    RouteTimeout,
    /// No answer within the time for one try.
    TryTimeout,
    /// The backend's policy allows no more requests, connections or retries at a time.
    CircuitOpen,
    /// The try before failed, and the retry budget is used up.
    RetryBudget,
    /// The body is longer than the rule allows.
    BodyTooLarge,
    /// No access policy lets this caller do this.
    Denied,
    /// The request is not HTTP, or could be understood in two ways.
    MalformedRequest,
    /// A transfer coding other than `chunked`.
    UnknownTransferCoding,
    /// A request's line or headers are too long or too many.
    HeadTooLarge,
    /// The client did not send its request to the end in time.
    RequestTimeout,
    /// At a gateway: the host is another listener's than the name that TLS asked for.
    Misdirected,
}

impl Reason {
    pub const ALL: [Reason; 27] = [
        Self::NoEndpoints,
        Self::NoRoute,
        Self::NoBackend,
        Self::ConnectFailed,
        Self::UpstreamClosed,
        Self::UpstreamMalformed,
        Self::NoCertificate,
        Self::IdentityNotProven,
        Self::PlainRefused,
        Self::AppUnreachable,
        Self::Loop,
        Self::Overload,
        Self::DestinationUnknown,
        Self::BadRedirect,
        Self::RateLimited,
        Self::FaultInjected,
        Self::RouteTimeout,
        Self::TryTimeout,
        Self::CircuitOpen,
        Self::RetryBudget,
        Self::BodyTooLarge,
        Self::Denied,
        Self::MalformedRequest,
        Self::UnknownTransferCoding,
        Self::HeadTooLarge,
        Self::RequestTimeout,
        Self::Misdirected,
    ];
    pub const COUNT: usize = Self::ALL.len();

    pub fn label(self) -> &'static str {
        match self {
            Self::NoEndpoints => "no_endpoints",
            Self::NoRoute => "no_route",
            Self::NoBackend => "no_backend",
            Self::ConnectFailed => "connect_failed",
            Self::UpstreamClosed => "upstream_closed",
            Self::UpstreamMalformed => "upstream_malformed",
            Self::NoCertificate => "no_certificate",
            Self::IdentityNotProven => "identity_not_proven",
            Self::PlainRefused => "plain_refused",
            Self::AppUnreachable => "app_unreachable",
            Self::Loop => "loop",
            Self::Overload => "overload",
            Self::DestinationUnknown => "destination_unknown",
            Self::BadRedirect => "bad_redirect",
            Self::RateLimited => "rate_limited",
            Self::FaultInjected => "fault_injected",
            Self::RouteTimeout => "route_timeout",
            Self::TryTimeout => "try_timeout",
            Self::CircuitOpen => "circuit_open",
            Self::RetryBudget => "retry_budget",
            Self::BodyTooLarge => "body_too_large",
            Self::Denied => "denied",
            Self::MalformedRequest => "malformed_request",
            Self::UnknownTransferCoding => "unknown_transfer_coding",
            Self::HeadTooLarge => "head_too_large",
            Self::RequestTimeout => "request_timeout",
            Self::Misdirected => "misdirected",
        }
    }

    pub fn status(self) -> StatusCode {
        match self {
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::NoBackend | Self::BadRedirect => StatusCode::INTERNAL_SERVER_ERROR,
            Self::UpstreamClosed | Self::UpstreamMalformed => StatusCode::BAD_GATEWAY,
            Self::PlainRefused | Self::Denied => StatusCode::FORBIDDEN,
            Self::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Self::RouteTimeout | Self::TryTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Loop => StatusCode::LOOP_DETECTED,
            Self::MalformedRequest => StatusCode::BAD_REQUEST,
            Self::UnknownTransferCoding => StatusCode::NOT_IMPLEMENTED,
            Self::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_in_order() {
        assert!(Reason::ALL.iter().enumerate().all(|(i, r)| *r as usize == i));
    }
}
