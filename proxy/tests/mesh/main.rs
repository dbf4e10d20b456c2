//! Two sidecars that speak mTLS with each other: what requests look like at the other side, what shares a connection,
//! and that nothing is lost when connections, certificates or sidecars go.

#[path = "../common/mod.rs"]
mod common;

mod changes;
mod pair;
mod shapes;
mod sharing;
