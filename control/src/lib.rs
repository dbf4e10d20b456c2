//! The control service of a Sluice cluster: a Kubernetes-compatible API over a durable store, a scheduler, controllers,
//! and a certificate authority. `service` puts it together; `main` is its command line.

pub mod api;
pub mod bootstrap;
pub mod ca;
pub mod controllers;
pub mod quantity;
pub mod service;
pub mod store;
