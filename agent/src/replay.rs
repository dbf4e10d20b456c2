//! Views from a file instead of from control: a node's data path by itself, for looking at a saved view again
//! (`view.json` of a node's agent), for tests, and for nodes whose services are known in advance.
//!
//! The file is read again whenever it changes; replace it by a rename. One that cannot be read changes nothing.

use crate::{uplink::Source, view};
use std::{path::PathBuf, time::Duration};
use tokio::time::{MissedTickBehavior, interval};

const LOOK_EVERY: Duration = Duration::from_millis(100);

pub struct Replay {
    path: PathBuf,
    ends: Source,
}

impl Replay {
    pub fn new(path: PathBuf, ends: Source) -> Self {
        Self { path, ends }
    }

    /// For ever.
    pub async fn run(mut self) {
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Vec::new();
        loop {
            tokio::select! {
                _ = look.tick() => self.look(&mut last).await,
                Some(v) = self.ends.verdicts.recv() => match v.result {
                    Ok(()) => tracing::info!(revision = v.revision, "in force"),
                    Err(error) => tracing::warn!(revision = v.revision, error, "not in force"),
                },
                // Nobody asks for them.
                Some(_) = self.ends.metrics.recv() => {}
            }
        }
    }

    async fn look(&self, last: &mut Vec<u8>) {
        let path = self.path.display();
        let text = match tokio::fs::read(&self.path).await {
            Ok(text) if text != *last => text,
            Ok(_) => return,
            Err(error) => return tracing::debug!(%path, %error, "no view"),
        };
        match view::parse(&text) {
            Ok(view) => drop(self.ends.views.send_replace(view)),
            Err(error) => tracing::warn!(%path, %error, "view does not parse, the last one stays"),
        }
        *last = text;
    }
}
