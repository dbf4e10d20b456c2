//! The control service of a Sluice cluster: a Kubernetes-compatible API over a durable store, a scheduler, controllers,
//! and a certificate authority. `service` puts it together; `main` is its command line.

pub mod api;
pub mod bootstrap;
pub mod ca;
pub mod compile;
pub mod controllers;
pub mod discovery;
pub mod duration;
pub mod gateway;
pub mod histogram;
pub mod inject;
pub mod join;
pub mod mesh;
pub mod own;
pub mod pool;
pub mod quantity;
pub mod range;
pub mod schedule;
pub mod service;
pub mod store;
