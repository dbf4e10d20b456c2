//! What keeps the objects true.

use tokio::task::JoinHandle;

use crate::service::{Config, Parts};

/// Starts all of them.
pub fn start(_parts: &Parts, _config: &Config) -> Vec<JoinHandle<()>> {
    Vec::new()
}
