//! A pod's wiring against the real kernel: what is planned is accepted, reads back as wanted, and carries packets.

use sluice_netlink::{
    Connection, Netns, kernel,
    link::{self, Veth},
    ns,
    plan::{Address, Capture, LO, Operation, Prefix, host_state, node_state, plan, pod_state},
};
use std::{
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
    path::PathBuf,
};

struct Named(PathBuf);

impl Named {
    fn new(name: &str) -> (Self, Netns) {
        let path = std::env::temp_dir().join(format!("sluice-test-{name}-{}", std::process::id()));
        let ns = ns::make_named(&path).expect("make (root is needed)");
        (Self(path), ns)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = ns::remove_named(&self.0);
    }
}

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
