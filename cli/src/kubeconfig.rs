//! The user's kubeconfig: a context of ours is put in and taken out, everything else stays as it is. The current context
//! is set only where none was.

use anyhow::{Context, Result};
use serde_yaml_ng::{Mapping, Value};
use std::{
    fs,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// `$KUBECONFIG` (its first file), or `~/.kube/config` of the user behind sudo.
pub fn path() -> PathBuf {
    if let Some(first) =
        std::env::var("KUBECONFIG").ok().and_then(|v| v.split(':').next().map(str::to_owned)).filter(|s| !s.is_empty())
    {
        return PathBuf::from(first);
    }
    let home = std::env::var("SUDO_USER").ok().and_then(|u| home_of(&u)).or_else(|| std::env::var("HOME").ok());
    Path::new(&home.unwrap_or_else(|| "/root".into())).join(".kube/config")
}

fn home_of(user: &str) -> Option<String> {
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    let line = passwd.lines().find(|l| l.split(':').next() == Some(user))?;
    line.split(':').nth(5).map(str::to_owned)
}

/// Puts the only entries of `admin` (a kubeconfig of control) under `context` into the file at `path`.
pub fn add(path: &Path, context: &str, admin: &str) -> Result<()> {
    let admin: Value = serde_yaml_ng::from_str(admin).context("read control's kubeconfig")?;
    let mut config = read(path)?;
    for (list, key) in [("clusters", "cluster"), ("users", "user")] {
        let entry = admin[list][0][key].clone();
        put(&mut config, list, context, key, entry);
    }
    let mut c = Mapping::new();
    c.insert("cluster".into(), context.into());
    c.insert("user".into(), context.into());
    put(&mut config, "contexts", context, "context", Value::Mapping(c));
    let current = config.get("current-context").and_then(Value::as_str).unwrap_or_default();
    if current.is_empty() {
        config.insert("current-context".into(), context.into());
    }
    write(path, &config)
}

/// All keys of a file that [`add`] made.
const OURS: [&str; 6] = ["apiVersion", "kind", "clusters", "users", "contexts", "current-context"];

/// Takes them out again.
pub fn remove(path: &Path, context: &str) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let mut config = read(path)?;
    for list in ["clusters", "users", "contexts"] {
        if let Some(Value::Sequence(s)) = config.get_mut(list) {
            s.retain(|e| e["name"].as_str() != Some(context));
        }
    }
    if config.get("current-context").and_then(Value::as_str) == Some(context) {
        config.insert("current-context".into(), "".into());
    }
    // A file that was made for our context goes with it.
    let empty = |key: &str| config.get(key).and_then(Value::as_sequence).is_none_or(Vec::is_empty);
    let ours = |key: &Value| key.as_str().is_some_and(|k| OURS.contains(&k));
    if config.keys().all(ours) && ["clusters", "users", "contexts"].into_iter().all(empty) {
        return fs::remove_file(path).with_context(|| format!("remove {}", path.display()));
    }
    write(path, &config)
}

fn read(path: &Path) -> Result<Mapping> {
    let text = match fs::read_to_string(path) {
        Ok(t) if !t.trim().is_empty() => t,
        _ => "apiVersion: v1\nkind: Config\n".to_owned(),
    };
    serde_yaml_ng::from_str(&text).with_context(|| format!("read the kubeconfig {}; mend or move it", path.display()))
}

fn put(config: &mut Mapping, list: &str, name: &str, key: &str, value: Value) {
    let mut entry = Mapping::new();
    entry.insert("name".into(), name.into());
    entry.insert(key.into(), value);
    let all = config.entry(list.into()).or_insert_with(|| Value::Sequence(vec![]));
    if !all.is_sequence() {
        *all = Value::Sequence(vec![]);
    }
    if let Value::Sequence(s) = all {
        s.retain(|e| e["name"].as_str() != Some(name));
        s.push(Value::Mapping(entry));
    }
}

/// Whole or not at all, readable by its owner only; made by root for a user, it stays the user's.
fn write(path: &Path, config: &Mapping) -> Result<()> {
    use std::io::Write;
    let dir = path.parent().context("the kubeconfig has no folder")?;
    fs::create_dir_all(dir)?;
    let tmp = path.with_extension("sluice-new");
    let mut f = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
    f.write_all(serde_yaml_ng::to_string(config)?.as_bytes())?;
    f.sync_all()?;
    let owner = fs::metadata(path).or_else(|_| fs::metadata(dir.parent().unwrap_or(dir)))?;
    let _ = std::os::unix::fs::chown(&tmp, Some(owner.uid()), Some(owner.gid()));
    fs::rename(tmp, path).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADMIN: &str =
        "clusters: [{name: x, cluster: {server: 'https://127.0.0.1:6443'}}]\nusers: [{name: x, user: {token: t}}]\n";

    #[test]
    fn what_others_put_there_stays() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("config");
        fs::write(&path, "current-context: prod\nclusters: [{name: prod, cluster: {server: 'https://p'}}]\n")
            .expect("write");
        for _ in 0..2 {
            add(&path, "sluice", ADMIN).expect("adds");
        }
        let c = read(&path).expect("reads");
        assert_eq!(c["current-context"].as_str(), Some("prod"));
        assert_eq!(c["clusters"].as_sequence().map(Vec::len), Some(2));
        remove(&path, "sluice").expect("removes");
        let c = read(&path).expect("reads");
        assert_eq!(c["clusters"].as_sequence().map(Vec::len), Some(1));
    }

    #[test]
    fn the_first_context_becomes_the_current_one() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("new/config");
        add(&path, "sluice", ADMIN).expect("adds");
        assert_eq!(read(&path).expect("reads")["current-context"].as_str(), Some("sluice"));
        add(&path, "two", ADMIN).expect("adds");
        remove(&path, "sluice").expect("removes");
        assert_eq!(read(&path).expect("reads")["current-context"].as_str(), Some(""));
        remove(&path, "two").expect("removes");
        assert!(!path.exists(), "nothing of anybody else was in it");
    }
}
