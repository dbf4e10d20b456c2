//! The node's own network devices: which links packets from outside the node come in by, and with what addresses.
//!
//! Reading is one dump of links and one of addresses; the choice among them is [`choose`], which is pure.

use crate::{Connection, error::Result, plan::Prefix};
use netlink_packet_route::{
    RouteNetlinkMessage as Message,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
};
use std::{collections::HashMap, net::IpAddr};

const POD_LINK_PREFIX: &str = "slc";
const POD_LINK_DIGITS: usize = 12;

/// A device by which the node talks to others: a network card, a bridge, a bond, a VLAN, the tunnel between nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number in this namespace; another link may get it once this one has gone.
    pub index: u32,
    pub name: String,
    /// `vxlan`, `bond`, `veth` and so on; `None` of hardware.
    pub kind: Option<String>,
    pub mac: [u8; 6],
    pub mtu: u32,
    /// Usable addresses of global scope with the lengths of their networks. In each family the primary one comes
    /// first; IPv4 before IPv6.
    pub addresses: Vec<Prefix>,
}

impl Device {
    /// The primary address of a family.
    pub fn primary(&self, v4: bool) -> Option<IpAddr> {
        self.addresses.iter().map(|p| p.address).find(|a| a.is_ipv4() == v4)
    }

    /// Whether an address is in a network that this device is directly connected to.
    pub fn reaches(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|p| p.contains(ip))
    }
}

/// The devices of the connection's namespace, by index. Pods' links are none, nor are ports of a bridge or a bond:
/// what comes in by a port arrives on the bridge or bond as well.
pub fn devices(connection: &mut Connection) -> Result<Vec<Device>> {
    let links = connection.dump(Message::GetLink(LinkMessage::default()), "list links")?;
    let addresses = connection.dump(Message::GetAddress(AddressMessage::default()), "list addresses")?;
    let links: Vec<_> =
        links.into_iter().filter_map(|m| if let Message::NewLink(m) = m { Some(m) } else { None }).collect();
    let addresses = addresses.into_iter().filter_map(|m| if let Message::NewAddress(m) = m { Some(m) } else { None });
    Ok(choose(&links, &addresses.collect::<Vec<_>>()))
}

/// PURE: devices among these links, with their addresses.
fn choose(links: &[LinkMessage], addresses: &[AddressMessage]) -> Vec<Device> {
    let mut of: HashMap<u32, Vec<(bool, Prefix)>> = HashMap::new();
    for message in addresses {
        of.entry(message.header.index).or_default().extend(usable(message));
    }
    let mut devices: Vec<_> = links.iter().filter_map(device).collect();
    for device in &mut devices {
        let mut found = of.remove(&device.index).unwrap_or_default();
        // Stable: among equals the kernel's order, which is that of their making.
        found.sort_by_key(|(secondary, prefix)| (prefix.address.is_ipv6(), *secondary));
        device.addresses = found.into_iter().map(|(_, prefix)| prefix).collect();
    }
    devices.sort_by_key(|d| d.index);
    devices
}

fn device(m: &LinkMessage) -> Option<Device> {
    let flags = m.header.flags;
    if !flags.contains(LinkFlags::Up)
        || flags.contains(LinkFlags::Loopback)
        || m.header.link_layer_type != LinkLayerType::Ether
    {
        return None;
    }
    let (mut name, mut mac, mut mtu, mut kind, mut controller, mut in_vrf) = (None, None, None, None, false, false);
    for attribute in &m.attributes {
        match attribute {
            LinkAttribute::IfName(n) => name = Some(n.clone()),
            LinkAttribute::Address(bytes) => mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::Mtu(m) => mtu = Some(*m),
            LinkAttribute::Controller(index) => controller = *index != 0,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(k) => kind = Some(k.to_string()),
                        // A VRF only chooses routing tables: its members are devices like others.
                        LinkInfo::PortKind(k) => in_vrf = *k == InfoPortKind::Vrf,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let name = name.filter(|n| !is_pod_link(n))?;
    if controller && !in_vrf {
        return None;
    }
    Some(Device { index: m.header.index, name, kind, mac: mac?, mtu: mtu?, addresses: Vec::new() })
}

/// Whether the plugin names pods' links like this.
fn is_pod_link(name: &str) -> bool {
    name.strip_prefix(POD_LINK_PREFIX)
        .is_some_and(|h| h.len() == POD_LINK_DIGITS && h.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// An address that others can answer to; with it, whether it comes after the primary ones.
fn usable(m: &AddressMessage) -> Option<(bool, Prefix)> {
    if m.header.scope != AddressScope::Universe {
        return None;
    }
    let (mut local, mut address) = (None, None);
    // The header has room for eight flags; the attribute, where there is one, says all.
    let mut flags = AddressFlags::from_bits_retain(u32::from(m.header.flags.bits()));
    for attribute in &m.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(f) => flags = *f,
            _ => {}
        }
    }
    // Duplicate address detection has not ended, or has found a duplicate.
    if flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed) && !flags.contains(AddressFlags::Optimistic)
    {
        return None;
    }
    let later = flags.intersects(AddressFlags::Secondary | AddressFlags::Deprecated);
    Some((later, Prefix { address: local.or(address)?, len: m.header.prefix_len }))
}

const _: () = assert!(AddressHeaderFlags::Secondary.bits() as u32 == AddressFlags::Secondary.bits());

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lab,
        ns::{Unshare, unshare},
    };
    use netlink_packet_route::link::InfoKind;

    const UP: LinkFlags = LinkFlags::Up;

    fn link(index: u32, name: &str, flags: LinkFlags, more: Vec<LinkAttribute>) -> LinkMessage {
        let mut m = LinkMessage::default();
        m.header.index = index;
        m.header.flags = flags;
        m.header.link_layer_type = LinkLayerType::Ether;
        m.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, index as u8]),
            LinkAttribute::Mtu(1500),
        ];
        m.attributes.extend(more);
        m
    }

    fn address(link: u32, text: &str, scope: AddressScope, flags: AddressFlags) -> AddressMessage {
        let (ip, len) = text.split_once('/').expect(text);
        let mut m = AddressMessage::default();
        m.header.index = link;
        m.header.scope = scope;
        m.header.prefix_len = len.parse().expect(text);
        m.attributes = vec![AddressAttribute::Address(ip.parse().expect(text)), AddressAttribute::Flags(flags)];
        m
    }

    fn kind(kind: InfoKind) -> LinkAttribute {
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])
    }

    fn port(kind: InfoPortKind) -> Vec<LinkAttribute> {
        vec![LinkAttribute::Controller(9), LinkAttribute::LinkInfo(vec![LinkInfo::PortKind(kind)])]
    }

    #[test]
    fn what_is_a_device() {
        let mut wireguard = link(20, "wg0", UP, vec![]);
        wireguard.header.link_layer_type = LinkLayerType::None;
        let mut nameless = link(21, "x", UP, vec![]);
        nameless.attributes.remove(0);
        for (message, expected) in [
            (link(2, "eth0", UP, vec![]), Some(None)),
            (link(3, "eth1", LinkFlags::empty(), vec![]), None),
            (link(1, "lo", UP | LinkFlags::Loopback, vec![]), None),
            (link(4, "slc0123456789ab", UP, vec![kind(InfoKind::Veth)]), None),
            (link(5, "slc0123456789a", UP, vec![]), Some(None)),
            (link(6, "slcvx4", UP, vec![kind(InfoKind::Vxlan)]), Some(Some("vxlan"))),
            (link(7, "slcxxxxxxxxxxxx", UP, vec![]), Some(None)),
            (link(8, "eth2", UP, port(InfoPortKind::Bond)), None),
            (link(9, "bond0", UP, vec![kind(InfoKind::Bond)]), Some(Some("bond"))),
            (link(10, "veth1", UP, port(InfoPortKind::Bridge)), None),
            (link(11, "red0", UP, port(InfoPortKind::Vrf)), Some(None)),
            (link(12, "br0", UP, vec![kind(InfoKind::Bridge)]), Some(Some("bridge"))),
            (link(13, "eth0.7", UP, vec![kind(InfoKind::Vlan), LinkAttribute::Controller(0)]), Some(Some("vlan"))),
            (wireguard, None),
            (nameless, None),
        ] {
            let found = choose(std::slice::from_ref(&message), &[]);
            let got = found.first().map(|d| d.kind.as_deref());
            assert_eq!(got, expected, "{message:?}");
        }
    }

    #[test]
    fn addresses_primary_first_and_only_usable_ones() {
        use AddressScope::{Host, Link, Universe};
        let none = AddressFlags::empty();
        let all = [
            address(2, "fd00::9/64", Universe, AddressFlags::Secondary),
            address(2, "fd00::1/64", Universe, none),
            address(2, "fe80::1/64", Link, none),
            address(2, "fd00::7/64", Universe, AddressFlags::Tentative),
            address(2, "fd00::8/64", Universe, AddressFlags::Tentative | AddressFlags::Optimistic),
            address(2, "10.0.0.2/24", Universe, AddressFlags::Secondary),
            address(2, "10.0.0.1/24", Universe, AddressFlags::Permanent),
            address(2, "169.254.9.9/16", Link, none),
            address(2, "10.9.9.9/32", Host, none),
            address(3, "10.1.0.1/24", Universe, none),
        ];
        let found = choose(&[link(3, "b", UP, vec![]), link(2, "a", UP, vec![])], &all);
        let texts = |d: &Device| d.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(found.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(texts(&found[0]), ["10.0.0.1/24", "10.0.0.2/24", "fd00::1/64", "fd00::8/64", "fd00::9/64"]);
        assert_eq!(texts(&found[1]), ["10.1.0.1/24"]);
        assert_eq!(found[0].primary(true), Some("10.0.0.1".parse().expect("ip")));
        assert_eq!(found[0].primary(false), Some("fd00::1".parse().expect("ip")));
        assert!(
            found[0].reaches("10.0.0.77".parse().expect("ip")) && !found[0].reaches("10.1.0.1".parse().expect("ip"))
        );
    }

    /// In a namespace of its own: the thread ends with the test.
    #[test]
    fn a_bridge_is_a_device_and_its_address_is_seen() {
        unshare(Unshare { net: true, ..Unshare::default() }).expect("needs root");
        let here = crate::Netns::current().expect("current");
        lab::loopback_up().expect("lo");
        lab::bridge(&here, "br0", "192.168.7.1".parse().expect("ip"), 24).expect("bridge");
        let found = devices(&mut Connection::open().expect("connection")).expect("devices");
        let [bridge] = &found[..] else { panic!("{found:?}") };
        assert_eq!((bridge.name.as_str(), bridge.kind.as_deref(), bridge.mtu), ("br0", Some("bridge"), 1500));
        assert_eq!(bridge.addresses[0].to_string(), "192.168.7.1/24");
    }
}
