//! A pod's wiring against the real kernel: what is planned is accepted, reads back as wanted, and carries packets.

mod common;

use common::Named;
use sluice_netlink::{
    Connection, Netns, kernel,
    link::{self, Veth},
    plan::{Address, Capture, LO, Operation, Prefix, host_state, node_state, plan, pod_state},
    qdisc::{self, TokenBucket},
};
use std::{
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
};

#[test]
fn a_pod_is_wired_and_reached_in_both_families() {
    let (_node_guard, node) = Named::new("wiring-node");
    let (_pod_guard, pod) = Named::new("wiring-pod");
    let addresses: Vec<IpAddr> = ["10.244.9.2", "fd00:9::2"].map(|a| a.parse().expect(a)).to_vec();
    let mut host = Connection::open_in(&node).expect("node's connection");
    let mut inside = Connection::open_in(&pod).expect("pod's connection");
    let veth = Veth { host: "slcwiring", pod: "eth0", pod_mac: [2, 0, 0, 0, 0, 9], mtu: Some(1400) };
    link::make_veth(&mut host, &pod, &veth).expect("veth");
    let outer = link::find(&mut host, "slcwiring").expect("find").expect("made");
    let inner = link::find(&mut inside, "eth0").expect("find").expect("made");
    assert_eq!((outer.mtu, inner.mtu, inner.mac), (Some(1400), Some(1400), Some(veth.pod_mac)));
    assert_eq!(link::find(&mut host, "nothing").expect("find"), None);

    // Limits are accepted, replaced and read back; a link without one says so.
    for rate in [1_000_000, 6_000_000_000] {
        let bucket = TokenBucket { rate, burst: 40_000, limit: 65_000 };
        qdisc::set_bucket(&mut host, outer.index, &bucket).expect("a limit (CONFIG_NET_SCH_TBF)");
        assert_eq!(qdisc::bucket(&mut host, outer.index).expect("read"), Some((rate, 65_000)));
    }
    assert_eq!(qdisc::bucket(&mut inside, inner.index).expect("read"), None);

    let capture = Capture { mark: 0x77, table: 0x51c, priority: 100 };
    let wanted_pod = pod_state(inner.index, &addresses, capture);
    let mut wanted_host = host_state(outer.index, veth.pod_mac, &addresses);
    let node_only = node_state(&["10.244.9.0/24".parse().expect("range")], &[]);
    wanted_host.up.extend(node_only.up);
    wanted_host.addresses.extend(node_only.addresses);
    wanted_host.routes.extend(node_only.routes);
    for a in ["192.168.9.1", "fd00:f::1"] {
        let prefix = Prefix::host(a.parse().expect(a));
        wanted_host.addresses.insert(Address { link: LO, prefix });
    }
    for (connection, wanted) in [(&mut inside, &wanted_pod), (&mut host, &wanted_host)] {
        let done = kernel::reconcile(connection, wanted, None).expect("wire");
        assert!(!done.is_empty());
        let left = plan(wanted, &kernel::read(connection).expect("read"), None);
        assert_eq!(left, [], "everything reads back as wanted");
        kernel::apply(connection, &done).expect("doing it twice is no error");
    }
    for address in addresses {
        let listener = pod.run(|| TcpListener::bind((address, 80))).expect("run").expect("bind");
        let mut client = node.run(|| TcpStream::connect((address, 80))).expect("run").expect("node to pod");
        let (mut accepted, _) = listener.accept().expect("accept");
        client.write_all(b"hello").expect("write");
        let mut got = [0; 5];
        accepted.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"hello");
    }
    // The gateway answers with the node's link-local address.
    let gateway = node.run(|| TcpListener::bind("169.254.1.1:53")).expect("run").expect("bind the gateway address");
    pod.run(|| TcpStream::connect("169.254.1.1:53")).expect("run").expect("pod to gateway");
    drop(gateway);

    let stray = kernel::read_routes(&mut host).expect("routes");
    let gone =
        plan(&Default::default(), &sluice_netlink::plan::State { routes: stray, ..Default::default() }, Some(93));
    assert!(matches!(&gone[..], [Operation::RemoveRoute(_)]), "{gone:?}");
    kernel::apply(&mut host, &gone).expect("remove");
    assert!(link::delete(&mut host, outer.index).expect("delete"));
    assert!(!link::delete(&mut host, outer.index).expect("delete again"));
}

/// Two nodes on one wire, a pod on each: routes as a snapshot of two nodes asks for them.
#[test]
fn pods_of_two_nodes_reach_each_other_by_routes() {
    let named: Vec<(Named, Netns)> = ["na", "nb", "pa", "pb"].map(Named::new).into_iter().collect();
    let ns = |n: usize| &named[n].1;
    let ip = |text: &str| -> IpAddr { text.parse().expect(text) };
    let mut nodes = [0, 1].map(|n| Connection::open_in(ns(n)).expect("connection"));
    let wire = Veth { host: "up0", pod: "up0", pod_mac: [2, 0, 0, 0, 0, 2], mtu: None };
    link::make_veth(&mut nodes[0], ns(1), &wire).expect("wire");
    let ranges = ["10.244.1.0/24", "10.244.2.0/24"].map(|r| r.parse::<Prefix>().expect(r));
    let others = [(ip("192.168.5.2"), ranges[1]), (ip("192.168.5.1"), ranges[0])];
    let pods = [ip("10.244.1.2"), ip("10.244.2.2")];
    for n in [0, 1] {
        let up = link::find(&mut nodes[n], "up0").expect("find").expect("made").index;
        let veth = Veth { host: "slctwo", pod: "eth0", pod_mac: [2, 0, 0, 0, 1, n as u8], mtu: None };
        link::make_veth(&mut nodes[n], ns(2 + n), &veth).expect("pod's link");
        let mut inside = Connection::open_in(ns(2 + n)).expect("connection");
        let (eth0, slc) = (link::find(&mut inside, "eth0"), link::find(&mut nodes[n], "slctwo"));
        let (eth0, slc) = (eth0.expect("find").expect("made").index, slc.expect("find").expect("made").index);
        let capture = Capture { mark: 1, table: 2, priority: 3 };
        kernel::reconcile(&mut inside, &pod_state(eth0, &[pods[n]], capture), None).expect("pod");
        let mut wanted = node_state(&[ranges[n]], &others[n..=n]);
        let own = if n == 0 { "192.168.5.1" } else { "192.168.5.2" };
        wanted.addresses.insert(Address { link: up, prefix: Prefix { address: ip(own), len: 24 } });
        let pod = host_state(slc, veth.pod_mac, &[pods[n]]);
        wanted.up.extend(pod.up.into_iter().chain([up]));
        wanted.routes.extend(pod.routes);
        wanted.neighbours.extend(pod.neighbours);
        kernel::reconcile(&mut nodes[n], &wanted, Some(93)).expect("node");
        ns(n).run(|| sluice_netlink::sysctl::ensure("ipv4/ip_forward", "1")).expect("run").expect("forwarding");
        let left = plan(&wanted, &kernel::read(&mut nodes[n]).expect("read"), Some(93));
        assert_eq!(left, [], "reads back as wanted");
    }
    let _server = ns(3).run(|| TcpListener::bind((pods[1], 80))).expect("run").expect("bind");
    let dial = |to: IpAddr| TcpStream::connect_timeout(&(to, 80).into(), std::time::Duration::from_secs(5));
    ns(2).run(|| dial(pods[1])).expect("run").expect("pod to pod across nodes");
    let nobody = ns(2).run(|| dial(ip("10.244.2.99"))).expect("run").expect_err("no such pod");
    assert_eq!(nobody.kind(), std::io::ErrorKind::HostUnreachable, "answered, not lost");
}
