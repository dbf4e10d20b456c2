//! Programs to test and measure with: an echo server that proves what it has seen, an open-loop load generator that
//! counts honestly, and side-by-side runs against peers (in `src/bin`).

pub mod backend;
pub mod closed;
pub mod contender;
pub mod datagrams;
pub mod echo;
pub mod echo_state;
pub mod load;
pub mod load_report;
pub mod outside;
pub mod packets;
pub mod stats;
pub mod stream;

/// Spawns what an HTTP/2 connection wants done beside it, on its own thread.
#[derive(Clone, Copy)]
pub(crate) struct LocalExecutor;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, f: F) {
        tokio::task::spawn_local(f);
    }
}
