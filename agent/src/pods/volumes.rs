//! The folders behind a pod's volumes on this node: made before the first container, removed with the pod.
//!
//! emptyDir on disk or in memory, configMap and secret written as files (secrets only below the run folder, which is
//! memory), hostPath as it is. Other kinds are refused with their name. Files of configMaps and secrets change all at
//! once, in the layout that Kubernetes' containers know (`atomic`).

use super::{
    atomic,
    convert::{Refs, uid},
    logs, subpath,
};
use k8s_openapi::api::core::v1::{KeyToPath, Pod, Volume};
use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("volume {volume:?}: {object} {name:?} not found; create it or mark the volume optional")]
    NotFound { volume: String, object: &'static str, name: String },
    #[error("volume {volume:?}: key {key:?} is not in {name:?}")]
    NoKey { volume: String, name: String, key: String },
    #[error("volume {volume:?}: {path:?} leaves the volume")]
    Path { volume: String, path: String },
    #[error("volume {volume:?}: hostPath {path}: {why}")]
    HostPath { volume: String, path: String, why: String },
    #[error(
        "volume {volume:?} is of a kind that this agent does not provide; use emptyDir, configMap, secret or hostPath"
    )]
    Kind { volume: String },
    #[error("volume {volume:?}: {path}: {source}")]
    Io { volume: String, path: String, source: io::Error },
}

/// Where volumes live.
#[derive(Clone, Debug)]
pub struct Dirs {
    /// On disk: emptyDir, configMap.
    pub data: PathBuf,
    /// In memory: secrets, emptyDir with medium Memory.
    pub run: PathBuf,
    /// The pods' logs.
    pub logs: PathBuf,
}

impl Dirs {
    fn of(&self, pod: &Pod) -> [PathBuf; 2] {
        [&self.data, &self.run].map(|d| d.join("pods").join(uid(pod)).join("volumes"))
    }

    /// Makes every volume; the host path of each, by name. Repeating it brings changed configMaps and secrets into
    /// their files and changes nothing else.
    pub fn set_up(&self, pod: &Pod, refs: &Refs) -> Result<HashMap<String, String>, VolumeError> {
        let [disk, memory] = self.of(pod);
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        volumes
            .map(|v| {
                let path = set_up(v, &disk, &memory, refs)?;
                Ok((v.name.clone(), path.to_string_lossy().into_owned()))
            })
            .collect()
    }

    /// Host path of a part of a volume, for one mount of one container.
    pub fn sub_path(&self, uid: &str, volume: &str, container: &str, mount: usize, sub: &str) -> io::Result<String> {
        let at = self.data.join("pods").join(uid).join("subpaths").join(container).join(mount.to_string());
        subpath::hold(Path::new(volume), sub, &at)?;
        Ok(at.to_string_lossy().into_owned())
    }

    /// Removes what was made for the pod, its logs too. Every folder is tried; the first error is returned.
    pub fn tear_down(&self, uid: &str) -> io::Result<()> {
        if uid.is_empty() {
            return Ok(());
        }
        let logs = logs::folders_of(&self.logs, uid);
        let folders = [&self.data, &self.run].map(|base| base.join("pods").join(uid));
        // A removal would go on into what is mounted.
        folders.iter().try_for_each(|f| subpath::release(f))?;
        let mut result = Ok(());
        for folder in folders.into_iter().chain(logs) {
            match fs::remove_dir_all(folder) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => result = result.and(Err(e)),
                _ => {}
            }
        }
        result
    }
}

fn set_up(v: &Volume, disk: &Path, memory: &Path, refs: &Refs) -> Result<PathBuf, VolumeError> {
    if let Some(e) = &v.empty_dir {
        let dir = if e.medium.as_deref() == Some("Memory") { memory } else { disk }.join(&v.name);
        return make_dir(v, &dir, 0o777).map(|()| dir);
    }
    if let Some(c) = &v.config_map {
        let dir = disk.join(&v.name);
        let data = found(v, "configmap", &c.name, c.optional, refs.config_maps.get(&c.name))?;
        return files(v, &dir, &c.name, data, c.items.as_deref(), c.default_mode).map(|()| dir);
    }
    if let Some(s) = &v.secret {
        let name = s.secret_name.clone().unwrap_or_default();
        let dir = memory.join(&v.name);
        let data = found(v, "secret", &name, s.optional, refs.secrets.get(&name))?;
        return files(v, &dir, &name, data, s.items.as_deref(), s.default_mode).map(|()| dir);
    }
    if let Some(h) = &v.host_path {
        return host_path(v, &h.path, h.type_.as_deref().unwrap_or_default());
    }
    Err(VolumeError::Kind { volume: v.name.clone() })
}

fn io_error(v: &Volume, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let (volume, path) = (v.name.clone(), path.display().to_string());
    move |source| VolumeError::Io { volume, path, source }
}

fn make_dir(v: &Volume, dir: &Path, mode: u32) -> Result<(), VolumeError> {
    fs::create_dir_all(dir)
        .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(mode)))
        .map_err(io_error(v, dir))
}

type Data = BTreeMap<String, Vec<u8>>;

fn found<'a>(
    v: &Volume,
    object: &'static str,
    name: &str,
    optional: Option<bool>,
    data: Option<&'a Data>,
) -> Result<Option<&'a Data>, VolumeError> {
    match data {
        None if optional != Some(true) => {
            Err(VolumeError::NotFound { volume: v.name.clone(), object, name: name.to_owned() })
        }
        d => Ok(d),
    }
}

fn files(
    v: &Volume,
    dir: &Path,
    name: &str,
    data: Option<&Data>,
    items: Option<&[KeyToPath]>,
    mode: Option<i32>,
) -> Result<(), VolumeError> {
    make_dir(v, dir, 0o755)?;
    let mode = mode.and_then(|m| u32::try_from(m).ok()).unwrap_or(0o644);
    let empty = Data::new();
    // Of an optional object that is not there, no key is missed either.
    let (items, data) = (data.and(items), data.unwrap_or(&empty));
    let all = || data.keys().map(|k| KeyToPath { key: k.clone(), path: k.clone(), mode: None }).collect();
    let mut wanted = atomic::Files::new();
    for item in items.map_or_else(all, <[KeyToPath]>::to_vec) {
        let bytes = data.get(&item.key).ok_or_else(|| VolumeError::NoKey {
            volume: v.name.clone(),
            name: name.to_owned(),
            key: item.key.clone(),
        })?;
        if item.path.split('/').any(|p| p.is_empty() || p.starts_with("..")) {
            return Err(VolumeError::Path { volume: v.name.clone(), path: item.path });
        }
        let mode = item.mode.and_then(|m| u32::try_from(m).ok()).unwrap_or(mode);
        wanted.insert(item.path, (bytes.clone(), mode));
    }
    atomic::write(dir, &wanted).map_err(io_error(v, dir))
}

fn host_path(v: &Volume, path: &str, kind: &str) -> Result<PathBuf, VolumeError> {
    let p = PathBuf::from(path);
    let err = |why: &str| VolumeError::HostPath { volume: v.name.clone(), path: path.to_owned(), why: why.to_owned() };
    match kind {
        "DirectoryOrCreate" => make_dir(v, &p, 0o755)?,
        "Directory" if !p.is_dir() => return Err(err("is not a directory")),
        "File" if !p.is_file() => return Err(err("is not a file")),
        "FileOrCreate" if !p.exists() => fs::write(&p, b"").map_err(io_error(v, &p))?,
        _ if !p.is_absolute() => return Err(err("is not absolute")),
        _ => {}
    }
    Ok(p)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn dirs(at: &Path) -> Dirs {
        Dirs { data: at.join("data"), run: at.join("run"), logs: at.join("logs") }
    }

    #[test]
    fn volumes_appear_and_go_with_the_pod() {
        let tmp = tempfile::tempdir().expect("a folder");
        let dirs = dirs(tmp.path());
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"uid": "u1"},
            "spec": {"containers": [], "volumes": [
                {"name": "e", "emptyDir": {}},
                {"name": "c", "configMap": {"name": "cm", "items": [{"key": "k", "path": "sub/k.txt"}]}},
                {"name": "s", "secret": {"secretName": "sec", "defaultMode": 256}}
            ]}
        }))
        .expect("a pod");
        let data = |v: &[u8]| BTreeMap::from([("k".to_owned(), v.to_vec())]);
        let refs = Refs {
            config_maps: HashMap::from([("cm".to_owned(), data(b"one"))]),
            secrets: HashMap::from([("sec".to_owned(), data(b"two"))]),
        };
        let paths = dirs.set_up(&pod, &refs).expect("sets up");
        assert_eq!(fs::read(Path::new(&paths["c"]).join("sub/k.txt")).expect("read"), b"one");
        assert!(Path::new(&paths["s"]).starts_with(&dirs.run), "secrets stay in memory");
        let changed = Refs { config_maps: HashMap::from([("cm".to_owned(), data(b"three"))]), ..refs };
        dirs.set_up(&pod, &changed).expect("again");
        assert_eq!(fs::read(Path::new(&paths["c"]).join("sub/k.txt")).expect("read"), b"three");
        let part = dirs.sub_path("u1", &paths["e"], "app", 0, "part").expect("a part of it");
        fs::write(Path::new(&paths["e"]).join("part/x"), "").expect("write");
        assert!(Path::new(&part).join("x").is_file());
        fs::create_dir_all(dirs.logs.join("ns_p_u1/app")).expect("logs");
        dirs.tear_down("u1").expect("tears down");
        assert!(!Path::new(&paths["e"]).exists() && !dirs.logs.join("ns_p_u1").exists());
        dirs.tear_down("u1").expect("twice is fine");
    }

    #[test]
    fn paths_that_leave_and_kinds_we_lack_are_refused() {
        let tmp = tempfile::tempdir().expect("a folder");
        let dirs = dirs(tmp.path());
        let refs = Refs {
            config_maps: HashMap::from([("cm".to_owned(), BTreeMap::from([("k".to_owned(), vec![])]))]),
            ..Refs::default()
        };
        for volume in [
            json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "k", "path": "../../x"}]}}),
            json!({"name": "v", "configMap": {"name": "other"}}),
            json!({"name": "v", "iscsi": {"targetPortal": "x", "iqn": "y", "lun": 0}}),
        ] {
            let pod: Pod = serde_json::from_value(json!({
                "metadata": {"uid": "u2"}, "spec": {"containers": [], "volumes": [volume]}
            }))
            .expect("a pod");
            assert!(dirs.set_up(&pod, &refs).is_err());
        }
    }
}
