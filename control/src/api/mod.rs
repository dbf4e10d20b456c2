//! The Kubernetes-compatible API. [`registry`] is the only way to change an object; [`http`] and [`server`] are how
//! others reach it over TLS, [`client`] and [`cache`] how the control service's own parts do. Everything specific to a
//! kind is in one table, [`kinds`].

pub mod addresses;
pub mod apply;
pub mod auth;
pub mod cache;
pub mod client;
pub mod columns;
pub mod defaults;
pub mod describe;
pub mod events;
pub mod extra;
pub mod families;
pub mod http;
pub mod kinds;
pub mod lists;
pub mod logs;
pub mod metrics;
pub mod nodes;
pub mod patch;
pub mod prepare;
pub mod protobuf;
pub mod registry;
pub mod render;
pub mod request;
pub mod scale;
pub mod schema;
pub mod selector;
pub mod server;
pub mod services;
pub mod status;
pub mod validate;
pub mod value;
pub mod watch;
