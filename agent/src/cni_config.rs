//! The plugin's configuration for the container runtime: written under the run folder, which a boot empties, and
//! linked from the runtime's folder only when the node is ready. After a boot the link leads nowhere until then, so
//! the runtime waits instead of making pods that the data path does not know.

use serde_json::json;
use sluice_cni::CONFLIST as FILE;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{operation} {path}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("no address range for pods: the node has none yet")]
    NoRange,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |cause| Error::Io { operation, path: path.to_owned(), cause }
}

/// Writes and links the configuration; what is right already is not touched, so it may be called again and again.
pub fn install(run_dir: &Path, conf_dir: &Path, ranges: &[String], mtu: u32) -> Result<(), Error> {
    if ranges.is_empty() {
        return Err(Error::NoRange);
    }
    let dir = run_dir.join("cni");
    for folder in [dir.as_path(), conf_dir] {
        fs::create_dir_all(folder).map_err(failed("create", folder))?;
    }
    let target = dir.join(FILE);
    let text = conflist(ranges, mtu);
    let rewritten = fs::read_to_string(&target).ok().as_deref() != Some(&text);
    if rewritten {
        let next = dir.join(".next");
        fs::write(&next, &text).map_err(failed("write", &next))?;
        fs::rename(&next, &target).map_err(failed("write", &target))?;
    }
    let link = conf_dir.join(FILE);
    if !rewritten && fs::read_link(&link).is_ok_and(|to| to == target) {
        return Ok(());
    }
    // Runtimes watch the folder: the rename is the event that makes them read it.
    let next = conf_dir.join(".sluice-next");
    let _ = fs::remove_file(&next); // left by an agent that was killed here
    std::os::unix::fs::symlink(&target, &next).map_err(failed("link", &next))?;
    fs::rename(&next, &link).map_err(failed("link", &link))
}

/// Takes the link away: the runtime makes no more pods with the plugin.
pub fn uninstall(conf_dir: &Path) -> Result<(), Error> {
    let link = conf_dir.join(FILE);
    match fs::remove_file(&link) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &link)(e)),
        _ => Ok(()),
    }
}

/// A runtime of CNI 1.1 picks the newest of `cniVersions` that it speaks; older ones know only `cniVersion`.
fn conflist(ranges: &[String], mtu: u32) -> String {
    let capabilities = json!({ "bandwidth": true, "portMappings": true });
    let plugin = json!({ "type": "sluice-cni", "ranges": ranges, "mtu": mtu, "capabilities": capabilities });
    let list = json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "name": "sluice",
        "plugins": [plugin],
    });
    format!("{list:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_appears_once_and_follows_a_change() {
        let base = tempfile::tempdir().expect("folder");
        let (run, conf) = (base.path().join("run"), base.path().join("conf"));
        assert!(matches!(install(&run, &conf, &[], 1500), Err(Error::NoRange)));
        let ranges = ["10.244.1.0/24".to_owned()];
        install(&run, &conf, &ranges, 1500).expect("install");
        let read = || fs::read_to_string(conf.join(FILE)).expect("through the link");
        let list: serde_json::Value = serde_json::from_str(&read()).expect("JSON");
        assert_eq!(list["plugins"][0]["ranges"][0], "10.244.1.0/24");
        let made = fs::symlink_metadata(conf.join(FILE)).expect("link").modified().expect("time");
        install(&run, &conf, &ranges, 1500).expect("again");
        assert_eq!(fs::symlink_metadata(conf.join(FILE)).expect("link").modified().expect("time"), made);
        install(&run, &conf, &["10.244.2.0/24".to_owned()], 1500).expect("changed");
        assert!(read().contains("10.244.2.0/24") && read().contains("\"mtu\": 1500"));
        install(&run, &conf, &["10.244.2.0/24".to_owned()], 1450).expect("changed");
        assert!(read().contains("\"mtu\": 1450"));
        uninstall(&conf).expect("uninstall");
        uninstall(&conf).expect("again");
        assert!(!conf.join(FILE).exists());
    }
}
