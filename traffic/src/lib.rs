//! Traffic decisions: which rule a request follows, which backend of the rule takes it, which endpoint of the backend,
//! what the first bytes of a connection are, and what a dialled address means.
//!
//! PURE: no async, no clock, no socket, no randomness of its own (random numbers are arguments). The sidecar's workers
//! call these on every request; the agent uses [`resolve`] for the same answers.

pub mod balance;
pub mod detect;
mod hello;
pub mod random;
pub mod resolve;
pub mod route;
pub mod split;
