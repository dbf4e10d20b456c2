//! Kernel settings under /proc/sys/net of the calling thread's network namespace.

use crate::{Error, error::Result};
use std::{fs, path::PathBuf};

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(name)
}

/// Reads a setting, such as `ipv4/ip_forward`.
pub fn get(name: &str) -> Result<String> {
    let path = path(name);
    fs::read_to_string(&path).map(|s| s.trim().to_owned()).map_err(|e| Error::io("read setting", path.display(), e))
}

/// Writes a setting unless it has that value; true when it was written.
pub fn ensure(name: &str, value: &str) -> Result<bool> {
    if get(name)? == value {
        return Ok(false);
    }
    let path = path(name);
    fs::write(&path, value).map(|()| true).map_err(|e| Error::io("write setting", path.display(), e))
}
