//! The programs' settings, the only entry of their map. Several parts of an agent have a say in it; one [`SettingsMap`] per
//! process, shared by them, lets each change its own bits and nothing else.

use crate::{error::Result, maps::HashMap};
use sluice_ebpf_common::{Settings, map};
use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

/// Bits of [`Settings::flags`] with others put in place of those in `mask`.
pub const fn with_bits(flags: u32, mask: u32, bits: u32) -> u32 {
    flags & !mask | bits & mask
}

/// The owner of the settings.
pub struct SettingsMap {
    dir: PathBuf,
    /// An array is read and written as a hash map is. Held from reading to writing: nobody's change is lost.
    entry: Mutex<HashMap<u32, Settings>>,
}

const ONLY: u32 = 0;

impl SettingsMap {
    /// Opens the map pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self { dir: dir.to_owned(), entry: Mutex::new(HashMap::open(dir, map::SETTINGS)?) })
    }

    /// What is in force.
    pub fn get(&self) -> Result<Settings> {
        read(&self.entry())
    }

    /// Changes what `change` changes and leaves the rest; written only where there is a difference. What is in force then.
    pub fn update(&self, change: impl FnOnce(&mut Settings)) -> Result<Settings> {
        let entry = self.entry();
        let before = read(&entry)?;
        let mut after = before;
        change(&mut after);
        if after != before {
            entry.set(&ONLY, &after)?;
        }
        Ok(after)
    }

    /// Puts `bits` in place of the flags in `mask`.
    pub fn set_flags(&self, mask: u32, bits: u32) -> Result<Settings> {
        self.update(|s| s.flags = with_bits(s.flags, mask, bits))
    }

    /// After the pins were made anew: the map that is pinned now, told what the one before it said.
    pub fn reopen(&self) -> Result<()> {
        let mut entry = self.entry();
        let next = HashMap::open(&self.dir, map::SETTINGS)?;
        // Whoever holds the old map can still read it.
        let settings = read(&entry)?;
        if read(&next)? != settings {
            next.set(&ONLY, &settings)?;
        }
        *entry = next;
        Ok(())
    }

    fn entry(&self) -> MutexGuard<'_, HashMap<u32, Settings>> {
        self.entry.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The entry of an array is always there, zero at first.
fn read(entry: &HashMap<u32, Settings>) -> Result<Settings> {
    Ok(entry.get(&ONLY)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_ebpf_common::{MASQUERADE, WATCH_DROPS, WATCH_FLOWS};

    #[test]
    fn bits_of_others_stay() {
        let watch = WATCH_DROPS | WATCH_FLOWS;
        assert_eq!(with_bits(MASQUERADE, watch, WATCH_DROPS), MASQUERADE | WATCH_DROPS);
        assert_eq!(with_bits(MASQUERADE | watch, watch, 0), MASQUERADE);
        assert_eq!(with_bits(0, watch, MASQUERADE | WATCH_FLOWS), WATCH_FLOWS, "nothing outside the mask is set");
    }
}
