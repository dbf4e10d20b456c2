//! The sidecar: a meshed pod's inbound and outbound TCP traffic. Workers (`worker`, `inbound`, `outbound`, `http`,
//! `tcp`, `upstream`, `multiplex`) serve it, each on a thread of its own without locks; the control thread (`control`,
//! `hub`, `discovery`, `identity`, `handover`, `admin`) keeps their tables true.
//!
//! It decides with `sluice-traffic`, reads `config`, and never talks to the kernel's control side.

pub mod admin;
pub mod attempt;
pub mod body;
pub mod check;
pub mod config;
pub mod control;
pub mod discovery;
pub mod drain;
pub mod guard;
pub mod handover;
pub mod headers;
pub mod held;
pub mod http;
pub mod hub;
pub mod identity;
pub mod inbound;
pub mod io;
pub mod limits;
pub mod listener;
pub mod live;
pub mod metrics;
pub mod multiplex;
pub mod outbound;
pub mod paced;
pub mod reason;
pub mod run;
pub mod settings;
pub mod socket;
pub mod status;
pub mod tcp;
pub mod tls;
pub mod upstream;
pub mod worker;
