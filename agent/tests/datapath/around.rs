//! The network around a node: a hub, a caller outside, another node; and what callers and servers of these stories do.

use crate::ground::Ground;
use sluice_netlink::{
    Connection, Netns, kernel, lab, link, ns,
    plan::{Address, LO, Operation, Prefix, Route, RouteKind},
};
use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

pub const WAIT: Duration = Duration::from_secs(5);
pub const NODE4: &str = "192.168.50.1";
pub const NODE6: &str = "fd00:50::1";
/// Two machines of the network: a caller, and another node, which is its own only pod as well.
pub const CALLER4: &str = "192.168.50.2";
pub const CALLER6: &str = "fd00:50::2";
pub const OTHER4: &str = "192.168.50.3";
pub const OTHER6: &str = "fd00:50::3";
pub const ANY: [&str; 2] = ["0.0.0.0", "::"];
pub const FAR_POD4: &str = "10.244.2.5";
pub const FAR_POD6: &str = "fd00:2::5";

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

pub fn at(text: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(text), port)
}

/// The network around the node.
pub struct Around<'g> {
    ground: &'g Ground,
    pub hub: Netns,
    pub caller: Netns,
    pub other: Netns,
    _cards: Vec<OwnedFd>,
}

impl<'g> Around<'g> {
    pub fn new(ground: &'g Ground) -> Self {
        let make = |name: &str| ns::make_named(Path::new(&format!("/run/sluice-test/{name}"))).expect("namespace");
        let (hub, caller, other) = (make("hub"), make("caller"), make("other"));
        let own = Netns::current().expect("own namespace");
        lab::bridge(&hub, "br0", ip("192.168.50.254"), 24).expect("bridge");
        let mut cards = vec![];
        let machines = [(&own, NODE4, NODE6), (&caller, CALLER4, CALLER6), (&other, OTHER4, OTHER6)];
        for (number, (machine, v4, v6)) in machines.into_iter().enumerate() {
            lab::cable(&hub, "br0", &format!("port{number}"), machine, "eth0", ip(v4), 24).expect("cable");
            add_address(machine, "eth0", v6, 64);
            machine.run(|| lab::loopback_up().expect("lo")).expect("run");
            if ground.xdp.get() {
                // The node's own end gets its program from the agent.
                let card = |end: &Netns, name: &str| end.run(|| lab::as_card(name).expect("card")).expect("run");
                cards.push(card(&hub, &format!("port{number}")));
                if number > 0 {
                    cards.push(card(machine, "eth0"));
                }
            }
        }
        for address in [FAR_POD4, FAR_POD6] {
            add_address(&other, "lo", address, if address.contains(':') { 128 } else { 32 });
        }
        // What the far pods' node would know: where this node's pods are.
        for (range, via) in [("10.244.1.0/24", NODE4), ("fd00:1::/64", NODE6)] {
            add_route(&other, range, via);
            add_route(&caller, range, via);
        }
        Self { ground, hub, caller, other, _cards: cards }
    }

    /// As the machine outside.
    pub fn call<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.ground.outside(|| within(&self.caller, work))
    }
}

impl Drop for Around<'_> {
    fn drop(&mut self) {
        for netns in [&self.hub, &self.caller, &self.other] {
            let _ = ns::remove_named(netns.path());
        }
    }
}

pub fn add_address(machine: &Netns, link_name: &str, address: &str, len: u8) {
    let mut c = Connection::open_in(machine).expect("connection");
    let link = if link_name == "lo" { LO } else { link::find(&mut c, link_name).expect("find").expect("link").index };
    let prefix = Prefix { address: ip(address), len };
    kernel::apply(&mut c, &[Operation::AddAddress(Address { link, prefix })]).expect("address");
}

pub fn add_route(machine: &Netns, range: &str, via: &str) {
    let mut c = Connection::open_in(machine).expect("connection");
    let link = link::find(&mut c, "eth0").expect("find").expect("link").index;
    let to: Prefix = range.parse().expect(range);
    let route = Route {
        table: 254,
        to,
        kind: RouteKind::Unicast,
        via: Some(ip(via)),
        link: Some(link),
        source: None,
        protocol: 4,
        mtu: None,
    };
    kernel::apply(&mut c, &[Operation::AddRoute(route)]).expect("route");
}

/// Answers with its name and what it sees of the caller; a datagram's length too.
pub fn serve(netns: &Netns, name: &str, on: [&str; 2], port: u16) {
    for address in on {
        let to = at(address, port);
        let bind = || {
            let make = |kind| -> io::Result<socket2::Socket> {
                let s = socket2::Socket::new(socket2::Domain::for_address(to), kind, None)?;
                if to.is_ipv6() {
                    s.set_only_v6(true)?;
                }
                s.set_reuse_address(true)?;
                s.bind(&to.into())?;
                Ok(s)
            };
            let tcp = make(socket2::Type::STREAM)?;
            tcp.listen(1024)?;
            Ok::<_, io::Error>((TcpListener::from(tcp), UdpSocket::from(make(socket2::Type::DGRAM)?)))
        };
        let (tcp, udp) = netns.run(bind).expect("run").expect("bind");
        let (a, b) = (name.to_owned(), name.to_owned());
        thread::spawn(move || {
            for mut c in tcp.incoming().flatten() {
                let a = a.clone();
                thread::spawn(move || answer(&mut c, &a));
            }
        });
        thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while let Ok((n, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(format!("{b} {} {n}", from.ip()).as_bytes(), from);
            }
        });
    }
}

/// `name source` at once; then everything that comes is sent back.
fn answer(c: &mut TcpStream, name: &str) {
    let Ok(peer) = c.peer_addr() else { return };
    let _ = c.write_all(format!("{name} {}\n", peer.ip()).as_bytes());
    let Ok(mut reader) = c.try_clone() else { return };
    let _ = io::copy(&mut reader, c);
}

pub fn dial(to: SocketAddr) -> io::Result<String> {
    greeting(&mut TcpStream::connect_timeout(&to, WAIT)?)
}

pub fn greeting(c: &mut TcpStream) -> io::Result<String> {
    c.set_read_timeout(Some(WAIT))?;
    let mut line = Vec::new();
    let mut byte = [0];
    while c.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

/// A connected socket takes answers from nobody but whom it asked.
pub fn ask(to: SocketAddr, length: usize) -> io::Result<String> {
    let s = UdpSocket::bind(SocketAddr::new(ip(if to.is_ipv4() { "0.0.0.0" } else { "::" }), 0))?;
    s.set_read_timeout(Some(WAIT))?;
    s.connect(to)?;
    s.send(&vec![7; length])?;
    let mut buffer = [0; 256];
    let n = s.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
}

pub fn within<T: Send>(netns: &Netns, work: impl FnOnce() -> T + Send) -> T {
    netns.run(work).expect("run")
}

pub fn remove_eth0() {
    let mut c = Connection::open().expect("connection");
    let eth0 = link::find(&mut c, "eth0").expect("find").expect("link").index;
    link::delete(&mut c, eth0).expect("delete");
}

/// As a host firewall that forwards nothing.
pub fn forbid_forwarding() {
    let rules = "table inet filter { chain forward { type filter hook forward priority 0; policy drop; }; }";
    let status = Command::new("nft").arg(rules).status().expect("nft (package nftables)");
    assert!(status.success(), "nft");
}

/// Four megabytes there and back.
pub fn echoed(to: SocketAddr) {
    let mut c = TcpStream::connect_timeout(&to, WAIT).expect("connect");
    greeting(&mut c).expect("greeting");
    let data: Vec<u8> = (0..4_000_000_u32).map(|i| (i % 251) as u8).collect();
    let mut writer = c.try_clone().expect("clone");
    let sent = data.clone();
    let sending = thread::spawn(move || {
        writer.write_all(&sent).expect("write");
        writer.shutdown(std::net::Shutdown::Write).expect("shutdown");
    });
    let mut back = Vec::new();
    c.read_to_end(&mut back).expect("read");
    sending.join().expect("join");
    assert!(back == data, "{to}: {} of {} bytes come back the same", back.len(), data.len());
}

/// Who answers a socket that may hear from anybody.
pub fn asked_by(s: &UdpSocket, to: SocketAddr) -> io::Result<String> {
    s.send_to(b"?", to)?;
    let mut buffer = [0; 256];
    let (n, from) = s.recv_from(&mut buffer)?;
    assert_eq!(from, to, "the answer comes from where the question went");
    Ok(String::from_utf8_lossy(&buffer[..n]).split(' ').next().unwrap_or_default().to_owned())
}
