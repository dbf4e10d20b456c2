//! Files of the agent that another process, or the agent after a crash, reads.

use std::{fs, io, path::Path};

/// Replaces a file whole or not at all, also when the agent is killed here; makes its folder. It is not synced: what a
/// power cut leaves may be older, or damaged.
pub fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let next = path.with_extension("new");
    fs::write(&next, contents)?;
    fs::rename(next, path)
}
