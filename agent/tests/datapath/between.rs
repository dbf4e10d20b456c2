//! Given other nodes near and far, when they come, move and leave, then the ways to their pods follow, and a tunnel that
//! somebody deletes is made anew.

use crate::{
    balance::node,
    ground::{Ground, until},
};
use sluice_model::{Name, Node, Resource};
use sluice_netlink::{
    Connection, Netns, kernel, lab, link,
    plan::{Prefix, Route},
    sysctl,
};

const TUNNEL: &str = "slcvx4";

fn other(address: &str) -> Resource {
    let (addresses, pod_cidrs) = (vec![address.parse().expect(address)], vec!["10.244.7.0/24".to_owned()]);
    Resource::Node(Node { name: Name::cluster("n7"), addresses, pod_cidrs, zone: String::new(), ready: true })
}

pub fn story(ground: &Ground) {
    let here = Netns::current().expect("the node");
    lab::bridge(&here, "br0", "192.168.78.1".parse().expect("address"), 24).expect("the node's network");
    let mut connection = Connection::open().expect("rtnetlink");
    let c = &mut connection;

    ground.apply(vec![node(), other("203.0.113.7")]);
    let tunnel = tunnel(c).expect("the far node's way");
    let way = way(c).expect("a route");
    assert_eq!((way.link, way.via, way.mtu), (Some(tunnel), Some("10.244.7.0".parse().expect("address")), Some(1450)));
    assert_eq!(sysctl::get("ipv4/conf/slcvx4/rp_filter").expect("read"), "2");
    let reserved = sysctl::get("ipv4/ip_local_reserved_ports").expect("read");
    assert_eq!(reserved, "30000-32767,61000-65535");

    assert!(link::delete(c, tunnel).expect("delete"));
    until("the tunnel is made anew", || self::tunnel(c).is_some() && self::way(c).is_some_and(|w| w.link.is_some()));

    // It moves into a network of ours.
    ground.apply(vec![node(), other("192.168.78.7")]);
    assert_eq!(self::tunnel(c), None, "nobody needs it");
    let way = self::way(c).expect("a route");
    assert_eq!((way.via, way.mtu), (Some("192.168.78.7".parse().expect("address")), None));

    ground.apply(vec![node()]);
    assert_eq!(self::way(c), None);
    let bridge = link::find(c, "br0").expect("find").expect("made").index;
    assert!(link::delete(c, bridge).expect("delete"));
}

fn tunnel(c: &mut Connection) -> Option<u32> {
    link::find(c, TUNNEL).expect("find").map(|l| l.index)
}

/// The route to the other node's pods.
fn way(c: &mut Connection) -> Option<Route> {
    let range: Prefix = "10.244.7.0/24".parse().expect("range");
    kernel::read_routes(c).expect("routes").into_iter().find(|r| r.to == range)
}
