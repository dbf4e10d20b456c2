//! What backends may answer, well-formed and not, and what the client gets of it (RFC 9112 §6.3, RFC 9110 §15).

use crate::{
    common::Client,
    ground::{ALL, Ground, grounds},
    recorder::Play,
};
use sluice_proxy::limits::Limits;

const GET: &str = "GET /first HTTP/1.1\r\nhost: web\r\n\r\n";
const HEAD: &str = "HEAD /first HTTP/1.1\r\nhost: web\r\n\r\n";

/// What the client gets before the next answer, for each way in. The backend ends the connection after its answer.
fn got(ask: &str, answer: impl AsRef<[u8]>) -> Vec<String> {
    grounds(ALL, Limits::default())
        .into_iter()
        .map(|ground| {
            let text = all_of(&ground, ask, answer.as_ref());
            ground.running.stop();
            text
        })
        .collect()
}

/// All bytes that come for a request after which the client ends its half.
fn all_of(ground: &Ground, ask: &str, answer: &[u8]) -> String {
    ground.backend.begin(Play::Last(answer.to_vec()));
    let mut client = ground.client();
    client.send(ask);
    client.half_close();
    client.rest()
}

/// Each entry's bytes hold each of `has` and none of `lacks`.
fn check(name: &str, got: Vec<String>, has: &[&str], lacks: &[&str]) {
    for text in got {
        let lower = text.to_ascii_lowercase();
        let missing: Vec<_> = has.iter().filter(|h| !lower.contains(**h)).collect();
        let found: Vec<_> = lacks.iter().filter(|l| lower.contains(**l)).collect();
        assert!(missing.is_empty() && found.is_empty(), "{name}: missing {missing:?}, found {found:?}: {text:?}");
    }
}

/// The client sees our 502 and nothing of the answer.
fn refused(name: &str, answer: impl AsRef<[u8]>) {
    let reason = "\r\nx-sluice-reason: upstream_malformed\r\n";
    check(name, got(GET, answer), &["http/1.1 502 bad gateway\r\n", reason], &["secret"]);
}

#[test]
fn answers_that_end_in_one_way_pass() {
    let head = "HTTP/1.1 200 OK\r\n";
    let chunks = format!("{head}transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n");
    check("chunks", got(GET, chunks), &["\r\n\r\n2\r\nhi\r\n0\r\n\r\n"], &["content-length"]);
    // RFC 9112 §6.3: the coding counts and the length goes.
    let both = format!("{head}content-length: 50\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\nsecret");
    check(
        "CL and TE",
        got(GET, both),
        &["transfer-encoding: chunked", "2\r\nhi\r\n0\r\n\r\n"],
        &["content-length", "secret"],
    );
    check("until the end", got(GET, format!("{head}\r\nhi")), &["hi"], &["content-length"]);
    let two = format!("{head}content-length: 2\r\n\r\nhi{head}content-length: 6\r\n\r\nsecret");
    check("a second answer that nobody asked for", got(GET, two), &["\r\n\r\nhi"], &["secret"]);
    let equal = format!("{head}content-length: 2\r\ncontent-length: 2\r\n\r\nhi");
    check("equal CLs", got(GET, equal), &["content-length: 2\r\n", "\r\n\r\nhi"], &[]);
}

#[test]
fn answers_without_a_body() {
    let head = |status: &str| format!("HTTP/1.1 {status}\r\ncontent-length: 6\r\n\r\n");
    check("HEAD", got(HEAD, head("200 OK")), &["200 ok", "content-length: 6\r\n"], &[]);
    check("HEAD with a body", got(HEAD, head("200 OK") + "secret"), &["200 ok"], &["secret"]);
    check("304", got(GET, head("304 Not Modified")), &["304 not modified"], &[]);
    check(
        "204 with a body",
        got(GET, head("204 No Content") + "secret"),
        &["204 no content"],
        &["secret", "content-length: 6"],
    );
    check("304 with a body", got(GET, head("304 Not Modified") + "secret"), &["304"], &["secret"]);
}

#[test]
fn informational_answers() {
    let early = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n";
    let last = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi";
    // Not passed on: a proxy may drop what it did not ask for only where it cannot send it; the library cannot.
    check("103", got(GET, format!("{early}{last}")), &["http/1.1 200 ok", "\r\n\r\nhi"], &["103", "100 continue"]);
    let many = "HTTP/1.1 102 Processing\r\n\r\n".repeat(1000);
    check("1xx a thousand times", got(GET, format!("{many}{last}")), &["http/1.1 200 ok"], &["102"]);
    check("1xx and the end", got(GET, early), &["http/1.1 502", "x-sluice-reason: upstream_closed"], &["103"]);
}

#[test]
fn answers_that_are_none() {
    let head = "HTTP/1.1 200 OK\r\n";
    refused("not HTTP", "220 mail.example secret\r\n");
    refused("HTTP/0.9", "<html>secret</html>\r\n\r\n");
    refused("HTTP/2", "HTTP/2.0 200 OK\r\n\r\nsecret");
    refused("differing CLs", format!("{head}content-length: 2\r\ncontent-length: 6\r\n\r\nsecret"));
    refused("a signed CL", format!("{head}content-length: +6\r\n\r\nsecret"));
    refused("a list of CLs", format!("{head}content-length: 2, 6\r\n\r\nsecret"));
    refused("a fold", format!("{head}x: a\r\n secret\r\n\r\n"));
    refused("a space before the colon", format!("{head}content-length : 6\r\n\r\nsecret"));
    refused("a NUL", format!("{head}x: secret\0\r\n\r\n"));
    refused("a bare CR", format!("{head}x: a\rset-cookie: secret\r\n\r\n"));
    refused("gzip, chunked", format!("{head}transfer-encoding: gzip, chunked\r\n\r\n6\r\nsecret\r\n0\r\n\r\n"));
    refused("gzip", format!("{head}transfer-encoding: gzip\r\n\r\nsecret"));
    refused("two TEs", format!("{head}transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"));
    refused("an unasked switch", "HTTP/1.1 101 Go\r\nupgrade: secret\r\nconnection: upgrade\r\n\r\n");
    refused("a long head", format!("{head}x: {}\r\n\r\n", "secret".repeat(20_000)));
    refused("many headers", format!("{head}{}\r\n", "x: secret\r\n".repeat(101)));
}

#[test]
fn answers_cut_short_are_not_taken_for_whole() {
    for cut in [
        "content-length: 10\r\n\r\nhi",
        "transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n",
        "transfer-encoding: chunked\r\n\r\n5\r\nhi",
        "transfer-encoding: chunked\r\n\r\n2\r\nhi\r\nzz\r\n",
    ] {
        for ground in grounds(ALL, Limits::default()) {
            ground.backend.begin(Play::Last(format!("HTTP/1.1 200 OK\r\n{cut}").into_bytes()));
            let mut client = ground.client();
            client.send(GET);
            // The head may be out already; then the connection ends before the body's end, which the client notices.
            let answer = client.answer(false);
            assert!(answer.as_ref().is_none_or(|a| a.status == 502), "{cut:?}: {answer:?}");
            assert!(client.ended());
            ground.running.stop();
        }
    }
}

#[test]
fn headers_of_a_hop_end_with_it() {
    let answer = "HTTP/1.1 200 OK\r\nconnection: x-own\r\nx-own: secret\r\nkeep-alive: timeout=9\r\nproxy-connection: x\r\n\
                  upgrade: h2c\r\nset-cookie: a\r\ncontent-length: 2\r\n\r\nhi";
    check(
        "hop by hop",
        got(GET, answer),
        &["set-cookie: a", "\r\n\r\nhi"],
        &["secret", "timeout=9", "h2c", "proxy-connection"],
    );
    let forged = "HTTP/1.1 503 No\r\nx-sluice-reason: secret\r\ncontent-length: 0\r\n\r\n";
    check("a reason that an app made up", got(GET, forged), &["http/1.1 503"], &["secret"]);
}

/// A connection that said more than it was asked is not used again.
#[test]
fn what_comes_unasked_answers_nobody_else() {
    for ground in grounds(ALL, Limits::default()) {
        let two = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecret";
        ground.backend.begin(Play::Answer(two.as_bytes().to_vec()));
        let mut clients: Vec<Client> = (0..20).map(|_| ground.client()).collect();
        for turn in 0..100 {
            let client = &mut clients[turn % 20];
            let answer = client.get("/first");
            assert!(answer.body != "secret" && matches!(answer.status, 200 | 502), "{answer:?}");
        }
        ground.running.stop();
    }
}
