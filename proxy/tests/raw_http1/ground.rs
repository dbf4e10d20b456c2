//! The sidecars of a table of cases, and how a case is played and judged.

use crate::{
    common::*,
    recorder::{Play, Recorder, ok},
};
use sluice_model::AppProtocol;
use sluice_proxy::{
    limits::Limits,
    run::{Listen, Running},
};
use std::net::SocketAddr;

/// Where a client connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The app's own connection, to a port that is known to be HTTP.
    Known,
    /// The same, to a port where it is detected.
    Detected,
    /// Another pod's connection to the app.
    Inbound,
}

pub const ALL: &[Entry] = &[Entry::Known, Entry::Detected, Entry::Inbound];
/// Where the sidecar need not recognize HTTP first.
pub const KNOWN: &[Entry] = &[Entry::Known];
/// Where it must.
pub const DETECTING: &[Entry] = &[Entry::Detected, Entry::Inbound];

/// A sidecar with one recording backend behind it.
pub struct Ground {
    pub entry: Entry,
    pub running: Running,
    pub backend: Recorder,
}

impl Ground {
    pub fn new(entry: Entry, limits: Limits) -> Self {
        let backend = Recorder::start();
        let protocol = if entry == Entry::Known { AppProtocol::Http } else { AppProtocol::Detect };
        let resources = service("web", "10.96.0.1", protocol, &[backend.address]);
        let mut settings = settings(resources);
        settings.limits = limits;
        if entry == Entry::Inbound {
            settings.listen = Listen::At { outbound: vec![], inbound: vec![(LOCAL, backend.address)] };
        }
        let running = Running::start(settings).expect("the sidecar starts");
        Self { entry, running, backend }
    }

    pub fn address(&self) -> SocketAddr {
        let listening = if self.entry == Entry::Inbound { &self.running.inbound } else { &self.running.outbound };
        listening[0]
    }

    pub fn client(&self) -> Client {
        Client::connect(self.address())
    }

    /// The sidecar's counter of answers that it made for this reason.
    pub fn counted(&self, reason: &str) -> u64 {
        let metrics = Client::connect(self.running.admin).get("/metrics").body;
        let line = metrics.lines().find(|l| l.contains(&format!("reason=\"{reason}\"")) && !l.starts_with('#'));
        line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    }
}

/// One ground per entry.
pub fn grounds(entries: &[Entry], limits: Limits) -> Vec<Ground> {
    entries.iter().map(|e| Ground::new(*e, limits)).collect()
}

/// What must come of a case.
#[derive(Clone, Copy, Debug)]
pub enum Want {
    /// The backend's answers, one for each request that it saw, all of which have these texts in order and not those;
    /// then the connection takes another request.
    Served(&'static [u16]),
    /// As before, and then the connection is closed.
    ServedLast(&'static [u16]),
    /// An answer of the sidecar's own and then the end; the backend has seen no whole request.
    Refused(u16, &'static str),
    /// The backend saw the request, and its answer could not be passed on.
    Unusable,
}

pub struct Case {
    pub name: &'static str,
    pub entries: &'static [Entry],
    pub send: Vec<u8>,
    pub play: Play,
    pub want: Want,
    /// In what the backend got.
    pub has: &'static [&'static str],
    pub lacks: &'static [&'static str],
}

pub fn case(name: &'static str, send: impl AsRef<[u8]>, want: Want) -> Case {
    Case { name, entries: ALL, send: send.as_ref().to_vec(), play: ok(), want, has: &[], lacks: &[] }
}

impl Case {
    pub fn has(self, has: &'static [&'static str]) -> Self {
        Self { has, ..self }
    }

    pub fn lacks(self, lacks: &'static [&'static str]) -> Self {
        Self { lacks, ..self }
    }

    pub fn on(self, entries: &'static [Entry]) -> Self {
        Self { entries, ..self }
    }

    pub fn play(self, play: Play) -> Self {
        Self { play, ..self }
    }

    fn judge(&self, ground: &Ground) -> Result<(), String> {
        ground.backend.begin(self.play.clone());
        let mut client = ground.client();
        // Whatever it is closed for may come before all is sent.
        let _ = client.try_send(&self.send);
        self.answers(ground, &mut client)?;
        let seen = ground.backend.seen();
        let all = String::from_utf8_lossy(&ground.backend.bytes()).into_owned();
        let found: Vec<_> = self.lacks.iter().filter(|t| all.contains(**t)).collect();
        let missing: Vec<_> = self.has.iter().filter(|t| !all.contains(**t)).collect();
        if !found.is_empty() || !missing.is_empty() {
            return Err(format!("found {found:?}, missing {missing:?} in {seen:?}"));
        }
        match self.want {
            Want::Served(_) => match client.try_ask("GET /after HTTP/1.1\r\nhost: web\r\n\r\n") {
                Some(answer) if answer.reason() == "none" => Ok(()),
                other => Err(format!("the connection takes no other request: {other:?}")),
            },
            Want::Unusable => Ok(()),
            _ if client.ended() => Ok(()),
            _ => Err("the connection stays open".to_owned()),
        }
    }

    fn answers(&self, ground: &Ground, client: &mut Client) -> Result<(), String> {
        match self.want {
            Want::Served(statuses) | Want::ServedLast(statuses) => {
                let head = self.send.starts_with(b"HEAD");
                for status in statuses {
                    match client.answer(head) {
                        Some(a) if a.status == *status && a.reason() == "none" => {}
                        other => return Err(format!("not {status}: {other:?}, seen {:?}", ground.backend.seen())),
                    }
                }
                let seen = ground.backend.seen();
                let count = statuses.iter().filter(|s| **s >= 200).count();
                if seen.len() == count { Ok(()) } else { Err(format!("{} requests: {seen:?}", seen.len())) }
            }
            Want::Refused(status, reason) => match client.answer(self.send.starts_with(b"HEAD")) {
                Some(a) if (a.status, a.reason()) == (status, reason) => nothing_seen(ground),
                other => Err(format!("not {status} {reason}: {other:?}, seen {:?}", ground.backend.seen())),
            },
            Want::Unusable => match client.answer(false) {
                Some(a) if (a.status, a.reason()) == (502, "upstream_malformed") => Ok(()),
                other => Err(format!("not 502: {other:?}")),
            },
        }
    }
}

fn nothing_seen(ground: &Ground) -> Result<(), String> {
    let seen = ground.backend.seen();
    if seen.is_empty() { Ok(()) } else { Err(format!("the backend saw {seen:?}")) }
}

/// Plays every case at each of its entries; one failure hides no other.
pub fn play(cases: &[Case]) {
    let mut failures = Vec::new();
    for ground in grounds(ALL, Limits::default()) {
        for case in cases.iter().filter(|c| c.entries.contains(&ground.entry)) {
            if let Err(error) = case.judge(&ground) {
                failures.push(format!("{:?}: {}: {error}", ground.entry, case.name));
            }
        }
        ground.running.stop();
    }
    assert!(failures.is_empty(), "{} of the cases:\n{}", failures.len(), failures.join("\n"));
}
