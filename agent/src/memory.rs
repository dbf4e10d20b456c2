//! What views took while they were read and compiled goes back to the kernel.

use crate::view::View;
use std::time::Duration;
use tokio::sync::watch;

/// Views come in bursts; and what they took is not taken away from the next one of a burst.
const PAUSE: Duration = Duration::from_secs(10);

/// For as long as there are views: some time after each, once for all that came in it.
pub async fn tidy(mut views: watch::Receiver<View>) {
    loop {
        tokio::time::sleep(PAUSE).await;
        views.mark_unchanged();
        if tokio::task::spawn_blocking(give_back).await.is_err() || views.changed().await.is_err() {
            return;
        }
    }
}

/// Gives free pages of all heaps back: the C library gives back what lies at the end of one alone.
fn give_back() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "the C library's own function, which has no safe form")]
    // SAFETY: it takes no pointer, and locks each heap that it looks at.
    unsafe {
        libc::malloc_trim(0);
    }
}
