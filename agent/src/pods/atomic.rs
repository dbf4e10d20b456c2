//! Files that change all at once: they lie in a folder of their own, `..data` points to it, and each visible name points
//! through `..data`. Replacing that one link replaces everything; a reader sees the old files or the new ones.
//!
//! Same layout as kubelet's, so that programs which watch for `..data` (as many do) notice a change.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink},
    },
    path::Path,
};

/// Contents and mode of each file, by its path below the folder.
pub type Files = BTreeMap<String, (Vec<u8>, u32)>;

const DATA: &str = "..data";

/// Makes the folder show exactly these files. When it already does, nothing is touched. After an interruption at any
/// point the next call completes the work.
pub fn write(dir: &Path, files: &Files) -> io::Result<()> {
    let current = fs::read_link(dir.join(DATA)).ok();
    if !current.as_ref().is_some_and(|c| same(&dir.join(c), files)) {
        let name = ["..a", "..b"].into_iter().find(|n| current.as_deref() != Some(Path::new(n))).unwrap_or("..a");
        fill(&dir.join(name), files)?;
        point(dir, DATA, Path::new(name))?;
    }
    let tops: BTreeSet<OsString> = files.keys().filter_map(|p| p.split('/').next()).map(OsString::from).collect();
    for top in &tops {
        let target = Path::new(DATA).join(top);
        if fs::read_link(dir.join(top)).ok() != Some(target.clone()) {
            point(dir, top, &target)?;
        }
    }
    tidy(dir, &tops)
}

fn same(at: &Path, files: &Files) -> bool {
    let kept = |(path, (bytes, mode)): (&String, &(Vec<u8>, u32))| {
        let file = at.join(path);
        fs::read(&file).is_ok_and(|b| b == *bytes)
            && fs::metadata(&file).is_ok_and(|m| m.permissions().mode() & 0o7777 == *mode)
    };
    count(at).is_ok_and(|n| n == files.len()) && files.iter().all(kept)
}

fn count(dir: &Path) -> io::Result<usize> {
    let one = |e: io::Result<fs::DirEntry>| {
        let e = e?;
        if e.file_type()?.is_dir() { count(&e.path()) } else { Ok(1) }
    };
    fs::read_dir(dir)?.map(one).sum()
}

fn fill(at: &Path, files: &Files) -> io::Result<()> {
    match fs::remove_dir_all(at) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o755).create(at)?;
    for (path, (bytes, mode)) in files {
        let file = at.join(path);
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)?;
        }
        let opened = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file)?;
        io::Write::write_all(&mut &opened, bytes)?;
        opened.set_permissions(fs::Permissions::from_mode(*mode))?;
    }
    Ok(())
}

/// Makes or replaces a link, whole or not at all.
fn point(dir: &Path, name: impl AsRef<Path>, target: &Path) -> io::Result<()> {
    let new = dir.join("..new");
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    symlink(target, &new)?;
    fs::rename(new, dir.join(name))
}

/// Takes away visible names that are no longer wanted, and the folder that `..data` has left.
fn tidy(dir: &Path, tops: &BTreeSet<OsString>) -> io::Result<()> {
    let current = fs::read_link(dir.join(DATA))?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let hidden = name.as_bytes().starts_with(b"..");
        if name == DATA || name == current.as_os_str() || (!hidden && tops.contains(&name)) {
            continue;
        }
        if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(all: &[(&str, &str)]) -> Files {
        all.iter().map(|(path, text)| ((*path).to_owned(), (text.as_bytes().to_vec(), 0o640))).collect()
    }

    fn shown(dir: &Path) -> Vec<String> {
        let names =
            fs::read_dir(dir).expect("read").map(|e| e.expect("entry").file_name().into_string().expect("UTF-8"));
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn files_come_change_and_go_through_one_link() {
        let tmp = tempfile::tempdir().expect("a folder");
        let dir = tmp.path();
        write(dir, &files(&[("a", "1"), ("sub/b", "2")])).expect("first");
        assert_eq!(shown(dir), ["..a", "..data", "a", "sub"]);
        assert_eq!(fs::read_to_string(dir.join("sub/b")).expect("read"), "2");
        assert_eq!(fs::metadata(dir.join("a")).expect("a").permissions().mode() & 0o777, 0o640);
        write(dir, &files(&[("a", "1"), ("sub/b", "2")])).expect("the same");
        assert_eq!(fs::read_link(dir.join(DATA)).expect("link"), Path::new("..a"), "nothing was touched");
        write(dir, &files(&[("a", "3"), ("c", "4")])).expect("changed");
        assert_eq!(shown(dir), ["..b", "..data", "a", "c"]);
        assert_eq!(fs::read_to_string(dir.join("a")).expect("read"), "3");
        write(dir, &files(&[])).expect("emptied");
        assert_eq!(shown(dir), ["..a", "..data"]);
    }

    #[test]
    fn an_interrupted_change_is_completed() {
        let tmp = tempfile::tempdir().expect("a folder");
        let dir = tmp.path();
        write(dir, &files(&[("a", "1")])).expect("first");
        // As if ended between the parts: a half-filled folder and a link that was not renamed.
        fs::create_dir(dir.join("..b")).expect("folder");
        fs::write(dir.join("..b/a"), "hal").expect("half");
        symlink("..b", dir.join("..new")).expect("link");
        assert_eq!(fs::read_to_string(dir.join("a")).expect("read"), "1");
        write(dir, &files(&[("a", "22"), ("b", "2")])).expect("second");
        assert_eq!(shown(dir), ["..b", "..data", "a", "b"]);
        assert_eq!(fs::read_to_string(dir.join("a")).expect("read"), "22");
    }
}
