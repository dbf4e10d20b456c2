//! A part of a volume for one mount (`subPath`). The containers of a pod can make links in its volumes, so the path is
//! resolved inside the volume as if that were the root, and what was found is held by a bind mount of our own: whatever
//! is changed afterwards, the runtime mounts exactly that.

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, mkdirat, open, openat2},
    io::Errno,
    mount::{UnmountFlags, mount_bind, unmount},
};
use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Component, Path, PathBuf},
};

/// Makes `hold` the part `sub` of `volume`; missing folders on the way are made. A mount that is there already stays:
/// it belongs to an earlier run of the same container.
pub fn hold(volume: &Path, sub: &str, hold: &Path) -> io::Result<()> {
    if mounted_below(hold)?.contains(&hold.to_path_buf()) {
        return Ok(());
    }
    let found = resolve(volume, Path::new(sub))?;
    let handle = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
    if fs::metadata(&handle)?.is_dir() {
        fs::create_dir_all(hold)?;
    } else {
        fs::create_dir_all(hold.parent().unwrap_or(hold))?;
        fs::File::create(hold)?;
    }
    Ok(mount_bind(handle, hold)?)
}

/// Ends the holds below a folder. While this fails the folder must not be removed: that would remove what is held.
pub fn release(below: &Path) -> io::Result<()> {
    for at in mounted_below(below)? {
        unmount(&at, UnmountFlags::DETACH)?;
    }
    Ok(())
}

fn resolve(volume: &Path, sub: &Path) -> io::Result<OwnedFd> {
    let refused = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("subPath {}: {why}", sub.display()));
    if sub.components().any(|c| !matches!(c, Component::Normal(_) | Component::CurDir)) {
        return Err(refused("must be relative and without .."));
    }
    let root = open(volume, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|_| refused("the volume is not a folder"))?;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let find = |path: &Path| openat2(&root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), inside);
    let mut so_far = PathBuf::from(".");
    let mut at = find(&so_far)?;
    for part in sub.components() {
        so_far.push(part);
        at = match find(&so_far) {
            Err(Errno::NOENT) => {
                match mkdirat(&at, part.as_os_str(), Mode::from_raw_mode(0o750)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(e) => return Err(e.into()),
                }
                find(&so_far)?
            }
            other => other?,
        };
    }
    Ok(at)
}

/// Mount points at or below a folder, the last mounted first.
fn mounted_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read("/proc/self/mountinfo")?;
    let point = |line: &[u8]| line.split(|b| *b == b' ').nth(4).map(unescape);
    let mut points: Vec<PathBuf> =
        table.split(|b| *b == b'\n').filter_map(point).filter(|p| p.starts_with(folder)).collect();
    points.reverse();
    Ok(points)
}

/// Blanks and the like stand as `\ooo` in mountinfo (proc(5)).
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&b, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| b == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(value) => {
                out.push(value);
                rest = &tail[3..];
            }
            None => {
                out.push(b);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Ends the holds also when the test fails.
    struct Held(PathBuf);

    impl Drop for Held {
        fn drop(&mut self) {
            let _ = release(&self.0);
        }
    }

    #[test]
    fn a_link_that_leaves_the_volume_stays_inside() {
        let tmp = tempfile::tempdir().expect("a folder");
        let volume = tmp.path().join("v");
        fs::create_dir(&volume).expect("volume");
        fs::write(tmp.path().join("secret"), "of the node").expect("write");
        symlink("/", volume.join("root")).expect("link");
        symlink("../secret", volume.join("up")).expect("link");
        let _held = Held(tmp.path().join("held"));
        let held = |sub: &str, name: &str| {
            let at = tmp.path().join("held").join(name);
            hold(&volume, sub, &at).map(|()| at)
        };
        let root = held("root", "a").expect("the volume itself");
        assert!(root.join("up").is_symlink() && !root.join("etc").exists(), "not the node's root");
        assert!(held("up", "b").is_err(), "leads to nothing inside the volume");
        held("made/on/the way", "c").expect("missing folders are made");
        held("made/on/the way", "c").expect("and held once");
        assert!(volume.join("made/on/the way").is_dir());
        for bad in ["../secret", "/etc", "a/../../secret"] {
            assert!(held(bad, "d").is_err(), "{bad}");
        }
        release(&tmp.path().join("held")).expect("released");
        assert!(mounted_below(tmp.path()).expect("mounts").is_empty());
        assert!(volume.join("made/on/the way").is_dir() && tmp.path().join("secret").is_file());
    }
}
