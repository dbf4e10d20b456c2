//! Messages that are well-formed to the parser and still must not be passed on, because two readers could understand
//! them differently: where one ends (request smuggling) or for whom it is (routing by one host, serving by another).
//! PURE.

use crate::{headers::Needs, reason::Reason};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version, header, uri::Authority};

/// Whether a request may be passed on. Its connection is closed after an error in HTTP/1: where the next request begins
/// is not certain.
pub fn request<B>(request: &Request<B>) -> Result<(), Reason> {
    let headers = request.headers();
    lengths(headers)?;
    let connect = request.method() == Method::CONNECT;
    if connect && has_content(headers) {
        // RFC 9110 §9.3.6: no such content is defined; a server may take it for the tunnel's first bytes.
        return Err(Reason::MalformedRequest);
    }
    target(request)?;
    let authority = request.uri().authority();
    if authority.is_some_and(|a| a.as_str().contains('@')) {
        // RFC 9110 §4.2.4: user information is for phishing.
        return Err(Reason::MalformedRequest);
    }
    let named = host(headers)?;
    match (request.version(), named) {
        // RFC 9112 §3.2: a 1.1 request without is refused, also one with an absolute target.
        (Version::HTTP_11, None) => Err(Reason::MalformedRequest),
        // RFC 9113 §8.3.1: the two must not differ.
        (Version::HTTP_2, Some(host)) if authority.is_some_and(|a| !same_host(a.as_str(), host, request.uri())) => {
            Err(Reason::MalformedRequest)
        }
        // One of them must be there, and fit for the other's place.
        (Version::HTTP_2, named) if authority.is_none() => {
            let fit = named.is_some_and(|host| Authority::try_from(host).is_ok());
            if fit { Ok(()) } else { Err(Reason::MalformedRequest) }
        }
        _ => Ok(()),
    }
}

/// The form that the method asks for (RFC 9112 §3.2; RFC 9113 §8.3.1, §8.5).
fn target<B>(request: &Request<B>) -> Result<(), Reason> {
    let (uri, method) = (request.uri(), request.method());
    let fit = match uri.scheme_str() {
        None if method == Method::CONNECT => uri.authority().is_some_and(|a| a.port().is_some()) && uri.path() == "",
        // In HTTP/2 this is an extended CONNECT (RFC 8441), which has a target like all others.
        Some(_) if method == Method::CONNECT && request.version() != Version::HTTP_2 => false,
        None if uri.authority().is_some() => false,
        Some(scheme) if scheme != "http" && scheme != "https" => false,
        _ => uri.path().starts_with('/') || (uri.path() == "*" && method == Method::OPTIONS),
    };
    if fit { Ok(()) } else { Err(Reason::MalformedRequest) }
}

/// `chunked` and nothing else is a transfer coding here (RFC 9112 §6.1); one length at most (RFC 9110 §8.6).
fn lengths(headers: &HeaderMap) -> Result<(), Reason> {
    // The parser has refused HTTP/1 with differing lengths, not HTTP/2.
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    if lengths.next().is_some() && lengths.next().is_some() {
        return Err(Reason::MalformedRequest);
    }
    if only_chunked(headers) { Ok(()) } else { Err(Reason::UnknownTransferCoding) }
}

fn only_chunked(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    codings.next().is_none_or(|c| c.as_bytes().eq_ignore_ascii_case(b"chunked")) && codings.next().is_none()
}

fn has_content(headers: &HeaderMap) -> bool {
    let length = headers.get(header::CONTENT_LENGTH).is_some_and(|l| l != "0");
    length || headers.contains_key(header::TRANSFER_ENCODING)
}

/// The one `Host`, if any.
fn host(headers: &HeaderMap) -> Result<Option<&[u8]>, Reason> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let Some(host) = hosts.next() else { return Ok(None) };
    let host = host.as_bytes();
    if hosts.next().is_some() || !host.iter().all(|b| of_a_host(*b)) {
        return Err(Reason::MalformedRequest);
    }
    Ok(Some(host))
}

/// Of a host and port (RFC 3986 §3.2), and neither a delimiter of another part nor a comma, at which some servers split
/// it. Names that DNS does not know pass: apps inside a cluster have made up stranger ones.
fn of_a_host(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=:[]".contains(&b)
}

/// Equal but for case and the scheme's own port.
fn same_host(authority: &str, host: &[u8], uri: &http::Uri) -> bool {
    let own_port: &[u8] = if uri.scheme_str() == Some("https") { b":443" } else { b":80" };
    let bare = |h: &[u8]| h.strip_suffix(own_port).unwrap_or(h).to_ascii_lowercase();
    authority.as_bytes() == host || bare(authority.as_bytes()) == bare(host)
}

/// Whether an upstream's answer may be passed on.
pub fn answer<B>(response: &Response<B>, needs: Needs) -> Result<(), Reason> {
    // A coding that is not undone here would be lost with its header.
    let understood = only_chunked(response.headers());
    // Nobody asked for another protocol: the client would wait for an answer that the upstream has given already.
    let unasked = response.status() == StatusCode::SWITCHING_PROTOCOLS && needs != Needs::Tunnel;
    if understood && !unasked { Ok(()) } else { Err(Reason::UpstreamMalformed) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn check(version: Version, target: &str, headers: &[(&'static str, &'static str)]) -> Result<(), Reason> {
        let mut r = Request::new(());
        *r.version_mut() = version;
        *r.uri_mut() = target.parse().expect("a target");
        for (name, value) in headers {
            r.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        request(&r)
    }

    #[test]
    fn a_request_has_one_host() {
        let malformed = Err(Reason::MalformedRequest);
        let h1 = |headers: &[_]| check(Version::HTTP_11, "/", headers);
        assert_eq!(h1(&[("host", "a.example:80")]), Ok(()));
        assert_eq!(h1(&[("host", "")]), Ok(()));
        assert_eq!(h1(&[("host", "[::1]:8080")]), Ok(()));
        assert_eq!(h1(&[]), malformed);
        assert_eq!(h1(&[("host", "a"), ("host", "a")]), malformed);
        for bad in ["a b", "a,b", "a@b", "a/b", "a?b", "a#b", "a\\b"] {
            assert_eq!(h1(&[("host", bad)]), malformed, "{bad}");
        }
        assert_eq!(check(Version::HTTP_10, "/", &[]), Ok(()));
        assert_eq!(check(Version::HTTP_11, "http://a/", &[("host", "b")]), Ok(()), "the target counts");
        assert_eq!(check(Version::HTTP_11, "http://a/", &[]), malformed);
        assert_eq!(check(Version::HTTP_11, "http://u@a/", &[("host", "a")]), malformed);
        assert_eq!(check(Version::HTTP_11, "ftp://a/", &[("host", "a")]), malformed);
    }

    #[test]
    fn authority_and_host_agree() {
        let h2 = |host| check(Version::HTTP_2, "http://web.shop:80/", &[("host", host)]);
        assert_eq!(
            (h2("web.shop:80"), h2("WEB.shop"), h2("admin.shop")),
            (Ok(()), Ok(()), Err(Reason::MalformedRequest))
        );
        assert_eq!(check(Version::HTTP_2, "/", &[("host", "web")]), Ok(()));
        assert_eq!(check(Version::HTTP_2, "/", &[]), Err(Reason::MalformedRequest));
    }

    #[test]
    fn a_body_has_one_length() {
        let with = |headers: &[_]| check(Version::HTTP_2, "http://a/", headers);
        assert_eq!(with(&[("content-length", "3")]), Ok(()));
        assert_eq!(with(&[("content-length", "3"), ("content-length", "4")]), Err(Reason::MalformedRequest));
        assert_eq!(with(&[("transfer-encoding", "Chunked")]), Ok(()));
        for bad in ["gzip, chunked", "chunked, chunked", "identity", "chunked;q=1"] {
            assert_eq!(with(&[("transfer-encoding", bad)]), Err(Reason::UnknownTransferCoding), "{bad}");
        }
        let twice = [("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")];
        assert_eq!(with(&twice), Err(Reason::UnknownTransferCoding));
    }
}
