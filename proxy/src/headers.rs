//! Message heads on their way from one hop to the next: what belongs to a connection stays on it (RFC 9110 §7.6.1),
//! targets get the form that servers expect. Everything else passes untouched. PURE.

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Version, header};

/// Headers of one connection, removed when a message is passed on (`te` is handled apart).
const HOP_BY_HOP: [HeaderName; 4] = [
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Makes a request fit for the next hop. True when it asks for a tunnel.
pub fn prepare_request<B>(request: &mut Request<B>) -> bool {
    if request.version() == Version::HTTP_2 {
        // Its frames carry what belongs to the connection; nothing of that kind is in the headers.
        return request.method() == Method::CONNECT;
    }
    *request.version_mut() = Version::HTTP_11;
    origin_form(request);
    let upgrade = requested_upgrade(request.headers());
    let trailers = request.headers().get(header::TE).is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    remove_hop_by_hop(request.headers_mut());
    if request.headers_mut().remove(header::TE).is_some() && trailers {
        request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    }
    let tunnel = upgrade.is_some() || request.method() == Method::CONNECT;
    if let Some(upgrade) = upgrade {
        request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(header::UPGRADE, upgrade);
    }
    tunnel
}

/// A target with scheme and host, as clients of a proxy send it, becomes a path and a `Host` (RFC 9112 §3.2.2).
fn origin_form<B>(request: &mut Request<B>) {
    if request.uri().scheme().is_none() || request.method() == Method::CONNECT {
        return;
    }
    let host = request.uri().authority().and_then(|a| HeaderValue::from_str(a.as_str()).ok());
    if let Some(host) = host {
        request.headers_mut().insert(header::HOST, host);
    }
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = path.map_or_else(|| http::Uri::from_static("/"), Into::into);
}

fn requested_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let upgrade = headers.get(header::UPGRADE)?;
    let asks = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|c| c.to_str().ok())
        .flat_map(|c| c.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("upgrade"));
    asks.then(|| upgrade.clone())
}

/// Removes what belongs to one connection: the headers that `Connection` names, and those that always do.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderValue> = headers.get_all(header::CONNECTION).iter().cloned().collect();
    for connection in &named {
        for name in connection.to_str().unwrap_or_default().split(',') {
            let name = name.trim();
            // These decide where a message goes and how long it is; nobody may strip them this way.
            let protected = ["host", "content-length", "te", "close", "keep-alive", "upgrade"];
            if !protected.iter().any(|p| name.eq_ignore_ascii_case(p)) {
                headers.remove(name);
            }
        }
    }
    headers.remove(header::CONNECTION);
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(method: Method, target: &str, headers: &[(&'static str, &'static str)]) -> (Request<()>, bool) {
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = target.parse().expect("a target");
        for (name, value) in headers {
            request.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        let tunnel = prepare_request(&mut request);
        (request, tunnel)
    }

    #[test]
    fn what_connection_names_stays() {
        let all = [
            ("connection", "x-a, Keep-Alive"),
            ("connection", "x-b"),
            ("x-a", "1"),
            ("x-b", "1"),
            ("x-c", "1"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("te", "gzip"),
        ];
        let (request, tunnel) = prepared(Method::GET, "/", &all);
        assert!(!tunnel, "an upgrade that Connection does not name is none");
        let left: Vec<_> = request.headers().keys().map(HeaderName::as_str).collect();
        assert_eq!(left, ["x-c"]);
    }

    #[test]
    fn nobody_strips_what_frames_or_addresses_a_message() {
        let all = [("connection", "host, content-length"), ("host", "a"), ("content-length", "3")];
        let (request, _) = prepared(Method::POST, "/", &all);
        assert_eq!(request.headers().len(), 2);
    }

    #[test]
    fn upgrades_are_asked_for_again() {
        let (request, tunnel) = prepared(Method::GET, "/", &[("connection", "Upgrade"), ("upgrade", "websocket")]);
        assert!(tunnel && request.headers()["connection"] == "upgrade" && request.headers()["upgrade"] == "websocket");
        assert!(prepared(Method::CONNECT, "a.example:443", &[]).1);
    }

    #[test]
    fn absolute_targets_become_paths() {
        let (request, _) = prepared(Method::GET, "http://a.example:8080/x?y=1", &[("host", "b.example")]);
        assert_eq!(
            (request.uri().to_string().as_str(), &request.headers()["host"]),
            ("/x?y=1", &HeaderValue::from_static("a.example:8080"))
        );
    }
}
