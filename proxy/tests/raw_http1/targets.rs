//! For whom a request is: targets, `Host`, CONNECT and upgrades (RFC 9112 §3.2, RFC 9110 §7.2, §9.3.6, §7.8).

use crate::{
    ground::{Want::*, case, play},
    recorder::Play,
};

const MALFORMED: crate::ground::Want = Refused(400, "malformed_request");

fn get(target: &str, headers: &str) -> String {
    format!("GET {target} HTTP/1.1\r\n{headers}\r\n")
}

#[test]
fn hosts() {
    play(&[
        case("no Host", get("/", ""), MALFORMED),
        case("two Hosts", get("/", "host: web\r\nhost: admin\r\n"), MALFORMED),
        case("two equal Hosts", get("/", "host: web\r\nhost: web\r\n"), MALFORMED),
        case("an empty Host", get("/first", "host:\r\n"), Served(&[200])).has(&["\r\nhost: \r\n"]),
        case("a Host with a comma", get("/", "host: web,admin\r\n"), MALFORMED),
        case("a Host with a space", get("/", "host: web admin\r\n"), MALFORMED),
        case("a Host with a path", get("/", "host: web/admin\r\n"), MALFORMED),
        case("a Host with a user", get("/", "host: admin@web\r\n"), MALFORMED),
        case("a Host with bytes above ASCII", get("/", "host: w\u{e9}b\r\n"), MALFORMED),
        case("an IPv6 Host", get("/", "host: [::1]:8080\r\n"), Served(&[200])).has(&["host: [::1]:8080"]),
        case("an absolute target wins", get("http://other:81/first?q", "host: web\r\n"), Served(&[200]))
            .has(&["GET /first?q HTTP/1.1\r\n", "host: other:81\r\n"])
            .lacks(&["host: web"]),
        case("an absolute target without Host", get("http://other/", ""), MALFORMED),
        case("an absolute target and two Hosts", get("http://other/", "host: web\r\nhost: other\r\n"), MALFORMED),
        case("an absolute target without path", get("http://other", "host: web\r\n"), Served(&[200]))
            .has(&["GET / HTTP/1.1\r\n"]),
        case("an absolute target with a user", get("http://u:p@other/", "host: web\r\n"), MALFORMED),
        case("an absolute target of another scheme", get("ftp://other/", "host: web\r\n"), MALFORMED),
        case("an authority as GET's target", get("other:80", "host: web\r\n"), MALFORMED),
        case("a relative target", get("first", "host: web\r\n"), MALFORMED),
        case("a star for GET", get("*", "host: web\r\n"), MALFORMED),
        case("a star for OPTIONS", "OPTIONS * HTTP/1.1\r\nhost: web\r\n\r\n", Served(&[200]))
            .has(&["OPTIONS * HTTP/1.1\r\n"]),
        case("a path that begins with two slashes", get("//other/x", "host: web\r\n"), Served(&[200]))
            .has(&["GET //other/x HTTP/1.1\r\n", "host: web\r\n"]),
        case("dots are the backend's business", get("/a/../b", "host: web\r\n"), Served(&[200])).has(&["/a/../b"]),
        case("an encoded line end stays encoded", get("/a%0d%0ahost:b", "host: web\r\n"), Served(&[200]))
            .has(&["/a%0d%0ahost:b"]),
    ]);
}

#[test]
fn connect() {
    let connect = |target: &str, headers: &str| format!("CONNECT {target} HTTP/1.1\r\nhost: web\r\n{headers}\r\n");
    let refusal = Play::Answer(b"HTTP/1.1 405 No\r\ncontent-length: 0\r\n\r\n".to_vec());
    play(&[
        // The app's server decides; here it declines.
        case("to a host and port", connect("other:443", ""), Served(&[405]))
            .play(refusal.clone())
            .has(&["CONNECT other:443 HTTP/1.1\r\n"]),
        case("without a port", connect("other", ""), MALFORMED),
        case("with an empty port", connect("other:", ""), MALFORMED),
        case("with a port that is none", connect("other:99999", ""), MALFORMED),
        case("with a user", connect("u@other:443", ""), MALFORMED),
        case("with a path", connect("/first", ""), MALFORMED),
        case("with a scheme", connect("http://other:443/", ""), MALFORMED),
        case("with a body", connect("other:443", "content-length: 5\r\n") + "hello", MALFORMED),
        case("with chunks", connect("other:443", "transfer-encoding: chunked\r\n") + "0\r\n\r\n", MALFORMED),
    ]);
}

#[test]
fn upgrades() {
    let h2c = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n";
    let head = |h: &str| format!("GET /first HTTP/1.1\r\nhost: web\r\n{h}\r\n");
    let switch = Play::Answer(b"HTTP/1.1 101 Go\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n".to_vec());
    play(&[
        // RFC 9113 §3.1: withdrawn; it would carry requests past routes and policies.
        case("h2c is not asked for", head(h2c), Served(&[200])).lacks(&["h2c", "http2-settings", "upgrade"]),
        case("nor h2c among others", head("connection: upgrade\r\nupgrade: websocket, h2c\r\n"), Served(&[200]))
            .lacks(&["h2c", "websocket"]),
        case("an upgrade that Connection does not name", head("upgrade: websocket\r\n"), Served(&[200]))
            .lacks(&["websocket"]),
        case(
            "an upgrade in HTTP/1.0",
            "GET /first HTTP/1.0\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
            ServedLast(&[200]),
        ),
        case("declined", head("connection: upgrade\r\nupgrade: websocket\r\n"), Served(&[200]))
            .has(&["upgrade: websocket"]),
        case("a switch that nobody asked for", head(""), Unusable).play(switch.clone()),
        case("a switch to h2c", head(h2c), Unusable).play(switch),
    ]);
}
