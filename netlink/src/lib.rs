//! The kernel's control side: namespaces, links, addresses, routes, rules and neighbours, and the sockets that must be
//! made inside a namespace.
//!
//! [`plan`] is pure: wanted state against present state gives operations; so is [`between`], which chooses the ways to
//! other nodes. [`kernel`] reads the present state and
//! carries operations out, [`link`] makes and removes veth pairs and lists the node's devices, [`qdisc`] limits what
//! links carry, [`filter`] puts programs on them, [`groups`] joins multicast groups, [`watch`] hears of changes, [`diag`] finds and closes sockets. No eBPF
//! is loaded here, and nothing decides about what is wanted.

#![allow(unsafe_code)] // setns, unshare and two socket options have no safe wrapper; each use says why it is sound

pub mod announce;
pub mod between;
mod device;
pub mod diag;
mod error;
pub mod filter;
pub mod groups;
pub mod kernel;
pub mod lab;
pub mod link;
pub mod ns;
pub mod plan;
pub mod qdisc;
mod rtnl;
pub mod sock;
pub mod sysctl;
pub mod watch;

pub use error::Error;
pub use ns::Netns;
pub use rtnl::Connection;
pub use sock::listen_abstract_in;
