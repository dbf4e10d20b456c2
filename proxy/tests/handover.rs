//! The sidecar's end of the handover against an agent's end that the test plays.

use sluice_proxy::handover::{keep, take};
use sluice_wire::handover::{Message, Role, recv, send};
use std::{
    net::TcpListener,
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    time::Duration,
};
use tokio::sync::watch;

fn bind(name: &str) -> UnixListener {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).expect("a name")).expect("bind")
}

fn name(test: &str) -> String {
    format!("sluice-test-handover-{}-{test}", std::process::id())
}

fn listener() -> (u16, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    (listener.local_addr().expect("an address").port(), listener.into())
}

fn message(stream: &UnixStream) -> Message {
    recv(stream.as_fd()).expect("received").expect("not closed")
}

#[test]
fn kept_listeners_are_taken_and_work() {
    let name = name("take");
    let agent = bind(&name);
    let playing = std::thread::spawn(move || {
        let (stream, _) = agent.accept().expect("accept");
        assert!(matches!(message(&stream), Message::Take));
        let (port, fd) = listener();
        send(stream.as_fd(), &Message::Ok(vec![(Role::Inbound4, fd)])).expect("sent");
        port
    });
    let (_stream, taken) = take(&name, Duration::from_secs(5)).expect("an agent");
    let port = playing.join().expect("played");
    let [(Role::Inbound4, fd)] = &taken[..] else { panic!("{taken:?}") };
    let listener = TcpListener::from(fd.try_clone().expect("a descriptor"));
    let client = std::net::TcpStream::connect(("127.0.0.1", port)).expect("connect");
    assert_eq!(listener.accept().expect("accept").1, client.local_addr().expect("an address"));
}

#[test]
fn without_an_agent_the_sidecar_goes_on() {
    assert!(take(&name("nobody"), Duration::from_millis(10)).is_none());
}

#[tokio::test]
async fn an_agent_that_restarts_gets_the_listeners_again() {
    let name = name("keep");
    let (registered, mut seen) = watch::channel(false);
    let agent = bind(&name);
    let keeping = tokio::spawn(keep(name.clone(), None, vec![(Role::Outbound4, listener().1)], registered));
    let (stream, agent) =
        tokio::task::spawn_blocking(move || (accept_and_register(&agent), agent)).await.expect("played");
    seen.wait_for(|r| *r).await.expect("kept");
    drop(stream);
    seen.wait_for(|r| !*r).await.expect("kept");
    let again = tokio::task::spawn_blocking(move || accept_and_register(&agent)).await.expect("played");
    seen.wait_for(|r| *r).await.expect("kept");
    drop(again);
    keeping.abort();
}

fn accept_and_register(agent: &UnixListener) -> UnixStream {
    let (stream, _) = agent.accept().expect("accept");
    let Message::Register(listeners) = message(&stream) else { panic!("not a registration") };
    assert!(matches!(listeners[..], [(Role::Outbound4, _)]));
    send(stream.as_fd(), &Message::Ok(vec![])).expect("sent");
    stream
}
