//! One image as an OCI archive (image-spec 1.0: layout, index, manifest, config, one uncompressed layer). Programs come
//! with the libraries they load, as `ldd` names them, so no base image and no registry is needed.

use crate::cpio::Archive;
use anyhow::{Context, Result, bail};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

#[derive(Default)]
pub struct Image {
    /// Name as containerd is to know it, with registry part and tag.
    pub name: String,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub user: String,
    pub labels: BTreeMap<String, String>,
    files: BTreeMap<String, (Vec<u8>, u32)>,
    links: BTreeMap<String, String>,
    dirs: BTreeMap<String, u32>,
}

impl Image {
    pub fn new(name: &str) -> Self {
        let mut image = Self { name: name.to_owned(), ..Self::default() };
        for (dir, mode) in [
            ("etc", 0o755),
            ("tmp", 0o1777),
            ("var", 0o755),
            ("run", 0o755),
            ("proc", 0o555),
            ("sys", 0o555),
            ("dev", 0o755),
        ] {
            image.dir(dir, mode);
        }
        image.file("etc/passwd", b"root:x:0:0:root:/:/sbin/nologin\nwww-data:x:33:33:www-data:/:/sbin/nologin\nsluice:x:1337:1337:sluice:/:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n", 0o644);
        image.file("etc/group", b"root:x:0:\nwww-data:x:33:\nsluice:x:1337:\nnogroup:x:65534:\n", 0o644);
        image.file("etc/nsswitch.conf", b"hosts: files dns\n", 0o644);
        image
    }

    pub fn dir(&mut self, path: &str, mode: u32) {
        self.dirs.insert(path.to_owned(), mode);
    }

    pub fn file(&mut self, path: &str, bytes: &[u8], mode: u32) {
        self.files.insert(path.to_owned(), (bytes.to_vec(), mode));
    }

    pub fn link(&mut self, path: &str, to: &str) {
        self.links.insert(path.to_owned(), to.to_owned());
    }

    /// A program of this machine, at `at`, with its libraries.
    pub fn program(&mut self, from: &Path, at: &str) -> Result<()> {
        self.file(at, &stripped(from)?, 0o755);
        for lib in libraries(from)? {
            let bytes = fs::read(&lib).with_context(|| format!("read the library {}", lib.display()))?;
            self.file(lib.to_string_lossy().trim_start_matches('/'), &bytes, 0o755);
        }
        Ok(())
    }

    /// The same files for a kernel that has no disk.
    pub fn initramfs(&self) -> Vec<u8> {
        let mut archive = Archive::default();
        self.all_dirs().iter().for_each(|(path, mode)| archive.dir(path, *mode));
        self.files.iter().for_each(|(path, (bytes, mode))| archive.file(path, bytes, *mode));
        self.links.iter().for_each(|(path, to)| archive.link(path, to));
        archive.finish()
    }

    /// Those that files lie in as well, each after the one that it lies in.
    fn all_dirs(&self) -> BTreeMap<String, u32> {
        let mut dirs = self.dirs.clone();
        for path in self.files.keys().chain(self.links.keys()) {
            let mut at = Path::new(path).parent();
            while let Some(p) = at.filter(|p| !p.as_os_str().is_empty()) {
                dirs.entry(p.to_string_lossy().into_owned()).or_insert(0o755);
                at = p.parent();
            }
        }
        dirs
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut tar = tar::Builder::new(vec![]);
        for (path, mode) in &self.all_dirs() {
            tar.append_data(&mut header(tar::EntryType::Directory, 0, *mode), format!("{path}/"), &[][..])?;
        }
        for (path, (bytes, mode)) in &self.files {
            tar.append_data(&mut header(tar::EntryType::Regular, bytes.len() as u64, *mode), path, &bytes[..])?;
        }
        for (path, to) in &self.links {
            tar.append_link(&mut header(tar::EntryType::Symlink, 0, 0o777), path, to)?;
        }
        Ok(tar.into_inner()?)
    }

    /// Writes the archive; equal inputs give equal bytes.
    pub fn write(&self, path: &Path) -> Result<()> {
        let layer = self.layer()?;
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({
            "architecture": arch, "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint, "Cmd": self.cmd, "User": self.user, "Labels": self.labels,
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
            "history": [{"created_by": "sluice xtask images"}],
        });
        let config = serde_json::to_vec(&config)?;
        let blob = |media: &str, b: &[u8]| json!({"mediaType": media, "digest": digest(b), "size": b.len()});
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": blob("application/vnd.oci.image.config.v1+json", &config),
            "layers": [blob("application/vnd.oci.image.layer.v1.tar", &layer)],
        });
        let manifest = serde_json::to_vec(&manifest)?;
        let mut entry = blob("application/vnd.oci.image.manifest.v1+json", &manifest);
        entry["annotations"] =
            json!({"io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": self.name});
        entry["platform"] = json!({"architecture": arch, "os": "linux"});
        let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [entry]}))?;
        let mut tar = tar::Builder::new(vec![]);
        let mut put = |name: String, b: &[u8]| {
            tar.append_data(&mut header(tar::EntryType::Regular, b.len() as u64, 0o644), name, b)
        };
        put("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        put("index.json".into(), &index)?;
        for b in [&manifest, &config, &layer] {
            put(format!("blobs/sha256/{}", &digest(b)["sha256:".len()..]), b)?;
        }
        fs::write(path, tar.into_inner()?).with_context(|| format!("write {}", path.display()))
    }
}

fn header(kind: tar::EntryType, size: u64, mode: u32) -> tar::Header {
    let mut h = tar::Header::new_gnu();
    h.set_entry_type(kind);
    h.set_size(size);
    h.set_mode(mode);
    h.set_uid(0);
    h.set_gid(0);
    h.set_mtime(0);
    h
}

fn digest(b: &[u8]) -> String {
    let hex: String = Sha256::digest(b).iter().map(|x| format!("{x:02x}")).collect();
    format!("sha256:{hex}")
}

/// The program without its debug information, which would be most of the image; whole where there is no `strip`.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let out = tempfile::NamedTempFile::new()?;
    let strip = Command::new("strip").arg("--strip-debug").arg("-o").arg(out.path()).arg(program).output();
    let from = if strip.is_ok_and(|o| o.status.success()) { out.path() } else { program };
    fs::read(from).with_context(|| format!("read the program {}; is it built?", program.display()))
}

/// What the program loads, the loader included; nothing for a static one.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let out = Command::new("ldd").arg(program).output().context("run ldd (Debian package libc-bin)")?;
    let text = String::from_utf8_lossy(&out.stdout);
    if !out.status.success() || text.contains("statically linked") {
        return Ok(BTreeSet::new());
    }
    if text.contains("not found") {
        bail!("{}: a library it loads is missing:\n{text}", program.display());
    }
    let path = |line: &str| line.split_whitespace().find(|w| w.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter_map(path).collect())
}
