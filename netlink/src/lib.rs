//! The kernel's control side: namespaces, links, addresses, routes, rules and neighbours, and the sockets that must be
//! made inside a namespace.
//!
//! [`plan`] is pure: wanted state against present state gives operations. [`kernel`] reads the present state and
//! carries operations out, [`link`] makes and removes veth pairs, [`qdisc`] limits what they carry, [`diag`] finds and
//! closes sockets. No eBPF here, and no decision about what is wanted.

#![allow(unsafe_code)] // setns, unshare and two socket options have no safe wrapper; each use says why it is sound

pub mod diag;
mod error;
pub mod kernel;
pub mod lab;
pub mod link;
pub mod ns;
pub mod plan;
pub mod qdisc;
mod rtnl;
pub mod sock;
pub mod sysctl;

pub use error::Error;
pub use ns::Netns;
pub use rtnl::Connection;
pub use sock::listen_abstract_in;
