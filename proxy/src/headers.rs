//! Message heads on their way from one hop to the next: what belongs to a connection stays on it (RFC 9110 §7.6.1),
//! targets get the form that servers expect. Everything else passes untouched. PURE.

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Version, header, uri::Authority};

/// Headers of one connection, removed when a message is passed on (`te` is handled apart).
const HOP_BY_HOP: [HeaderName; 5] = [
    HeaderName::from_static("http2-settings"),
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// With these a client would strip by `Connection` what others rely on: they frame or address the message, say who sent
/// it, or belong to its content. RFC 9110 §7.6.1 forbids to name such fields there, so nothing well-meant is lost.
const END_TO_END: [&str; 19] = [
    "host",
    "content-length",
    "te",
    "close",
    "keep-alive",
    "upgrade",
    "authorization",
    "cache-control",
    "content-encoding",
    "content-type",
    "cookie",
    "forwarded",
    "set-cookie",
    "traceparent",
    "tracestate",
    "trailer",
    "via",
    "x-real-ip",
    "x-request-id",
];
const END_TO_END_PREFIXES: [&str; 3] = ["x-forwarded-", "x-b3-", "x-sluice-"];

/// Present on `sluice-h2`: the request came as HTTP/1.1 and leaves as that at the other side; absent: HTTP/2. The name
/// is the sidecars' own: what an app sends under it goes nowhere.
const VERSION: HeaderName = HeaderName::from_static("sluice-version");

/// What a request needs of the connection it travels on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// A turn: others may be under way beside it.
    Stream,
    /// All of it until the answer's end: HTTP/1.0 knows of nothing else.
    Connection,
    /// All of it for good, as a pipe: upgrades and CONNECT.
    Tunnel,
}

/// Makes a request fit for the next hop.
pub fn prepare_request<B>(request: &mut Request<B>) -> Needs {
    request.headers_mut().remove(VERSION);
    let connect = request.method() == Method::CONNECT;
    let version = std::mem::replace(request.version_mut(), Version::HTTP_11);
    if version == Version::HTTP_2 {
        authority_of_host(request);
        // Its frames carry what belongs to the connection; nothing of that kind is in the headers.
        *request.version_mut() = version;
        return if connect { Needs::Tunnel } else { Needs::Stream };
    }
    origin_form(request);
    if version < Version::HTTP_11 {
        // RFC 9112 §3.2: a request of 1.1, which this becomes, has one, if with nothing in it.
        request.headers_mut().entry(header::HOST).or_insert(HeaderValue::from_static(""));
    }
    let upgrade = requested_upgrade(request.headers());
    let trailers = request.headers().get(header::TE).is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    remove_hop_by_hop(request.headers_mut());
    if request.headers_mut().remove(header::TE).is_some() && trailers {
        request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if let Some(upgrade) = upgrade {
        request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(header::UPGRADE, upgrade);
        return Needs::Tunnel;
    }
    match version {
        _ if connect => Needs::Tunnel,
        Version::HTTP_11 => Needs::Stream,
        _ => Needs::Connection,
    }
}

/// Gives a request of a gateway's client the version that its backend speaks: `http2`, or as it came for gRPC; else HTTP/1.1,
/// which every app knows. A client chooses its version by what the gateway speaks, not by what the app does. Upgrades and
/// CONNECT stay as they are.
pub fn convert_version<B>(request: &mut Request<B>, http2: bool) {
    let came_so = request.version() == Version::HTTP_2;
    let http2 = http2 || (came_so && request.headers().get(header::CONTENT_TYPE).is_some_and(is_grpc));
    if request.method() == Method::CONNECT {
        return;
    }
    match request.version() {
        Version::HTTP_2 if !http2 => {
            *request.version_mut() = Version::HTTP_11;
            join_cookies(request.headers_mut());
        }
        Version::HTTP_11 if http2 && requested_upgrade(request.headers()).is_none() => {
            let trailers = request.headers().get(header::TE).is_some_and(|te| te == "trailers");
            remove_hop_by_hop(request.headers_mut());
            request.headers_mut().remove(header::TE);
            if trailers {
                request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
            }
            *request.version_mut() = Version::HTTP_2;
        }
        _ => {}
    }
}

/// By gRPC's protocol over HTTP/2: `application/grpc`, with a format or parameters behind it. What browsers send
/// (`application/grpc-web`) is another protocol, which does not need HTTP/2.
fn is_grpc(content_type: &HeaderValue) -> bool {
    let rest = content_type.as_bytes().strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
}

/// HTTP/2 may send cookies apart, HTTP/1.1 may not (RFC 9113 §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let all: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if all.len() < 2 {
        return;
    }
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

/// Says for the sidecar at the other side of `sluice-h2` in which version the prepared request came. An HTTP/1.1 request
/// keeps its target and its `Host` as they are: it has no `:authority`.
pub fn mark_version<B>(mut request: Request<B>) -> Request<B> {
    if request.version() == Version::HTTP_11 {
        request.headers_mut().insert(VERSION, HeaderValue::from_static("1.1"));
    }
    request
}

/// Gives a request that came by `sluice-h2` the version it had before. To be believed only from a sidecar.
pub fn restore_version<B>(request: &mut Request<B>) {
    if request.headers_mut().remove(VERSION).is_some_and(|v| v == "1.1") {
        *request.version_mut() = Version::HTTP_11;
    }
}

/// A request of HTTP/2 may name its host as HTTP/1.1 does, and leaves with the authority that it has here (RFC 9113
/// §8.3.1).
fn authority_of_host<B>(request: &mut Request<B>) {
    if request.uri().authority().is_some() {
        return;
    }
    let authority = request.headers().get(header::HOST).and_then(|h| Authority::try_from(h.as_bytes()).ok());
    let (Some(authority), Some(path)) = (authority, request.uri().path_and_query().cloned()) else { return };
    let uri = http::Uri::builder().scheme("http").authority(authority).path_and_query(path).build();
    *request.uri_mut() = uri.unwrap_or_else(|_| std::mem::take(request.uri_mut()));
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
    asks.then(|| upgrade.clone()).filter(|u| !names_h2c(u))
}

/// An upgrade to HTTP/2 would carry requests past routes and policies. RFC 9113 §3.1 has withdrawn it; the request is
/// served as if it had not asked.
fn names_h2c(upgrade: &HeaderValue) -> bool {
    upgrade.as_bytes().split(|b| *b == b',').any(|p| p.trim_ascii().eq_ignore_ascii_case(b"h2c"))
}

/// Removes what belongs to one connection: the headers that `Connection` names, and those that always do.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderValue> = headers.get_all(header::CONNECTION).iter().cloned().collect();
    for connection in &named {
        for name in connection.to_str().unwrap_or_default().split(',') {
            let name = name.trim();
            if !end_to_end(name) {
                headers.remove(name);
            }
        }
    }
    headers.remove(header::CONNECTION);
    if headers.contains_key(header::TRANSFER_ENCODING) {
        // RFC 9112 §6.3: the coding counts, and the length does not go on.
        headers.remove(header::CONTENT_LENGTH);
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

/// The value of the cookie called `name` (RFC 6265 §4.2): the first, where there are several.
pub fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let lines = headers.get_all(header::COOKIE).iter().filter_map(|line| line.to_str().ok());
    let mut pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(n, _)| *n == name).map(|(_, value)| value)
}

fn end_to_end(name: &str) -> bool {
    let begins = |prefix: &&str| name.get(..prefix.len()).is_some_and(|n| n.eq_ignore_ascii_case(prefix));
    END_TO_END.iter().any(|e| name.eq_ignore_ascii_case(e)) || END_TO_END_PREFIXES.iter().any(begins)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(method: Method, target: &str, headers: &[(&'static str, &'static str)]) -> (Request<()>, Needs) {
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = target.parse().expect("a target");
        for (name, value) in headers {
            request.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        let needs = prepare_request(&mut request);
        (request, needs)
    }

    #[test]
    fn a_gateways_request_gets_its_backends_version() {
        type Case = (Version, &'static [(&'static str, &'static str)], bool, Version);
        let table: [Case; 11] = [
            (Version::HTTP_2, &[], false, Version::HTTP_11),
            (Version::HTTP_2, &[], true, Version::HTTP_2),
            (Version::HTTP_2, &[("content-type", "application/grpc")], false, Version::HTTP_2),
            (Version::HTTP_2, &[("content-type", "application/grpc+proto")], false, Version::HTTP_2),
            (Version::HTTP_2, &[("content-type", "application/grpc-web+proto")], false, Version::HTTP_11),
            (Version::HTTP_2, &[("content-type", "application/grpc-web-text")], false, Version::HTTP_11),
            (Version::HTTP_11, &[("content-type", "application/grpc")], false, Version::HTTP_11),
            (Version::HTTP_11, &[], false, Version::HTTP_11),
            (Version::HTTP_11, &[("connection", "x-a"), ("x-a", "1")], true, Version::HTTP_2),
            (Version::HTTP_11, &[("connection", "upgrade"), ("upgrade", "websocket")], true, Version::HTTP_11),
            (Version::HTTP_10, &[], true, Version::HTTP_10),
        ];
        for (version, headers, http2, want) in table {
            let mut request = Request::builder().version(version).uri("http://a.example/").body(()).expect("a request");
            for (name, value) in headers {
                request.headers_mut().append(*name, HeaderValue::from_static(value));
            }
            convert_version(&mut request, http2);
            assert_eq!(request.version(), want, "{version:?} {headers:?}");
            assert!(!request.headers().contains_key("x-a"));
        }
        let mut request = Request::builder().version(Version::HTTP_2).uri("http://a.example/p?q").body(());
        let headers = request.as_mut().expect("a request").headers_mut();
        headers.append(header::COOKIE, HeaderValue::from_static("a=1"));
        headers.append(header::COOKIE, HeaderValue::from_static("b=2"));
        let mut request = request.expect("a request");
        convert_version(&mut request, false);
        prepare_request(&mut request);
        assert_eq!(
            (request.uri().to_string().as_str(), &request.headers()[header::HOST]),
            ("/p?q", &HeaderValue::from_static("a.example"))
        );
        assert_eq!(request.headers()[header::COOKIE], "a=1; b=2");
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
        let (request, needs) = prepared(Method::GET, "/", &all);
        assert_eq!(needs, Needs::Stream, "an upgrade that Connection does not name is none");
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
    fn nobody_strips_what_others_rely_on() {
        let all =
            [("connection", "close, X-Forwarded-For, authorization, x-own"), ("x-forwarded-for", "a"), ("x-own", "1")];
        let (request, _) = prepared(Method::GET, "/", &all);
        assert_eq!(request.headers().keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-forwarded-for"]);
    }

    #[test]
    fn nobody_upgrades_to_http2() {
        for upgrade in ["h2c", "websocket, H2C"] {
            let all = [("connection", "Upgrade, HTTP2-Settings"), ("upgrade", upgrade), ("http2-settings", "AAMAAABk")];
            let (request, needs) = prepared(Method::GET, "/", &all);
            assert_eq!((needs, request.headers().len()), (Needs::Stream, 0));
        }
    }

    #[test]
    fn upgrades_are_asked_for_again() {
        let (request, needs) = prepared(Method::GET, "/", &[("connection", "Upgrade"), ("upgrade", "websocket")]);
        assert_eq!(needs, Needs::Tunnel);
        assert!(request.headers()["connection"] == "upgrade" && request.headers()["upgrade"] == "websocket");
        assert_eq!(prepared(Method::CONNECT, "a.example:443", &[]).1, Needs::Tunnel);
    }

    #[test]
    fn old_requests_get_a_connection_of_their_own() {
        let mut request = Request::new(());
        *request.version_mut() = Version::HTTP_10;
        assert_eq!(prepare_request(&mut request), Needs::Connection);
        assert_eq!((request.version(), &request.headers()["host"]), (Version::HTTP_11, &HeaderValue::from_static("")));
    }

    #[test]
    fn the_version_travels_and_nobody_else_can_say_it() {
        for version in [Version::HTTP_11, Version::HTTP_2] {
            let mut request = Request::new(());
            *request.version_mut() = version;
            for forged in ["1.1", "2"] {
                request.headers_mut().append(VERSION, HeaderValue::from_static(forged));
            }
            prepare_request(&mut request);
            assert!(!request.headers().contains_key(VERSION));
            let mut request = mark_version(request);
            *request.version_mut() = Version::HTTP_2;
            restore_version(&mut request);
            assert_eq!((request.version(), request.headers().len()), (version, 0));
        }
    }

    #[test]
    fn cookies_are_found_by_their_whole_name() {
        let mut headers = HeaderMap::new();
        for line in ["a=1; user-id=no; user=x=y", "user=second"] {
            headers.append(header::COOKIE, HeaderValue::from_static(line));
        }
        assert_eq!(
            (cookie(&headers, "user"), cookie(&headers, "a"), cookie(&headers, "b")),
            (Some("x=y"), Some("1"), None)
        );
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
