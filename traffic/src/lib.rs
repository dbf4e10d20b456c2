//! Traffic decisions: which rule a request follows, which backend of the rule takes it, which endpoint of the backend,
//! what the first bytes of a connection are, what a dialled address means; whether a request may pass, is tried again, and
//! which endpoints are left out for a while.
//!
//! PURE: no async, no clock, no socket, no randomness of its own (random numbers are arguments). The sidecar's workers
//! call these on every request; the agent uses [`resolve`] for the same answers.

pub mod access;
pub mod balance;
pub mod budget;
pub mod detect;
pub mod hash;
mod hello;
pub mod outlier;
pub mod random;
pub mod rate;
pub mod resolve;
pub mod retry;
pub mod ring;
pub mod route;
pub mod split;
pub mod sticky;
