//! The sidecar: a meshed pod's inbound and outbound TCP traffic; and the gateway, whose clients are outside the cluster
//! (`gateway`, `front`). Workers (`worker`, `inbound`, `outbound`, `http`,
//! `tcp`, `upstream`, `multiplex`) serve it, each on a thread of its own without locks; the control thread (`control`,
//! `hub`, `discovery`, `identity`, `handover`, `admin`) keeps their tables true.
//!
//! It decides with `sluice-traffic`, reads `config`, and never talks to the kernel's control side.

pub mod admin;
pub mod admission;
pub mod apply;
pub mod attempt;
pub mod body;
pub mod check;
pub mod cluster;
pub mod config;
pub mod connections;
pub mod control;
pub mod discovery;
pub mod drain;
pub mod filter;
pub mod front;
pub mod gateway;
pub mod guard;
pub mod handover;
pub mod headers;
pub mod held;
pub mod http;
pub mod hub;
pub mod identity;
pub mod idle;
pub mod inbound;
pub mod io;
pub mod limits;
pub mod listener;
pub mod live;
pub mod memory;
pub mod metrics;
pub mod multiplex;
pub mod observe;
pub mod otlp;
pub mod outbound;
pub mod paced;
pub mod reason;
pub mod rule;
pub mod run;
pub mod settings;
pub mod socket;
pub mod status;
pub mod tcp;
pub mod tls;
pub mod trace;
pub mod upstream;
pub mod worker;
