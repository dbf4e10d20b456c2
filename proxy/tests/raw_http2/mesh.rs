//! A peer with a certificate that speaks `sluice-h2` by hand: its requests leave as HTTP/1.1, which is where a malformed
//! one would become two.

use crate::{common::*, frames::*, ground::Conn};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::{
    ClientConnection, StreamOwned,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
};
use sluice_model::{Identity, Revision, Snapshot};
use sluice_proxy::{
    control::Source,
    run::{Listen, Running},
    tls::{Offer, Tls},
};
use std::{net::TcpStream, sync::Arc};

fn identity(account: &str) -> Identity {
    format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().expect("an identity")
}

fn certificates() -> [Arc<Tls>; 2] {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let bundle = params.self_signed(&key).expect("self-signed").pem();
    let issuer = Issuer::new(params, key);
    ["server", "client"].map(|account| {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity(account).to_string().try_into().expect("a URI"))];
        let chain = params.signed_by(&key, &issuer).expect("signed").pem();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Arc::new(Tls::new(&chain, &bundle, key, &identity(account)).expect("a certificate"))
    })
}

type Secure = Conn<StreamOwned<ClientConnection, TcpStream>>;

fn connect(running: &Running, tls: &Tls) -> Secure {
    let tcp = TcpStream::connect(running.inbound[0]).expect("connect");
    let config = tls.client_config(&Arc::new(identity("server")), Offer::H2OrTcp);
    let name = ServerName::from(running.inbound[0].ip());
    let session = ClientConnection::new(config, name).expect("a session");
    let mut conn = Conn::over(StreamOwned::new(session, tcp.try_clone().expect("clone")), &tcp);
    conn.begin();
    conn
}

/// A request that is to leave as HTTP/1.1.
fn old(method: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let pseudo = [(":method", method), (":scheme", "http"), (":path", "/first")];
    block(&[&pseudo[..], &[("sluice-version", "1.1")], headers].concat())
}

#[test]
fn nothing_is_smuggled_into_http1() {
    let app = start("v1");
    let [server, client] = certificates();
    let mut settings = settings(vec![]);
    settings.listen = Listen::At { outbound: vec![], inbound: vec![(LOCAL, app.address)] };
    let (_kept, certificate) = tokio::sync::watch::channel(Some(server));
    settings.source = Source::Static { snapshot: Snapshot::new(Revision(1), vec![]), certificate };
    let running = Running::start(settings).expect("the sidecar starts");
    eventually("it has its certificate", || running.status.borrow().missing().is_empty());

    let host = ("host", "web");
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n";
    // Of these, the sidecar makes an answer.
    for (name, headers) in [("no Host", vec![]), ("two Hosts", vec![host, ("host", "admin")])] {
        let mut conn = connect(&running, &client);
        conn.send([frame(HEADERS, END_HEADERS, 1, old("POST", &headers)), data(1, smuggled)].concat());
        assert_eq!(conn.status(1), (400, "malformed_request".to_owned()), "{name}");
    }
    // These are no HTTP/2.
    for (name, headers) in [
        ("a coding", vec![host, ("transfer-encoding", "chunked")]),
        ("a connection's option", vec![host, ("connection", "x")]),
        ("a line end in a value", vec![host, ("x", "a\r\n\r\nGET /smuggled HTTP/1.1")]),
        ("a line end in a name", vec![host, ("x: y\r\nz", "a")]),
        ("differing lengths", vec![host, ("content-length", "37"), ("content-length", "0")]),
        ("a length that is too short", vec![host, ("content-length", "0")]),
        ("a length that is too long", vec![host, ("content-length", "99")]),
    ] {
        let mut conn = connect(&running, &client);
        conn.send([frame(HEADERS, END_HEADERS, 1, old("POST", &headers)), data(1, smuggled)].concat());
        assert_eq!(conn.refused(1), Some(PROTOCOL_ERROR), "{name}");
    }
    assert_eq!(app.seen(), 0);
    // And what is in order arrives as one request.
    let mut conn = connect(&running, &client);
    let length = ("content-length", "37");
    conn.send([frame(HEADERS, END_HEADERS, 1, old("POST", &[host, length])), data(1, smuggled)].concat());
    assert_eq!(conn.status(1), (200, "none".to_owned()));
    conn.send([frame(HEADERS, END_HEADERS, 3, old("POST", &[host])), data(3, smuggled)].concat());
    assert_eq!(conn.status(3), (200, "none".to_owned()));
    assert_eq!(app.seen(), 2);
    running.stop();
}
