//! The node's own key and certificate: made here at the first start, signed by control for a one-time token, kept in
//! the data folder, renewed at two thirds of its life. While there is a certificate that lives, no token is needed.
//!
//! Key, certificate and roots are one file, replaced by one rename: a crash leaves the old ones or the new ones, never
//! a key without its certificate.

use anyhow::{Context, Result, bail};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData};
use sluice_wire::v1::{JoinRequest, SignRequest, identity_client::IdentityClient};
use std::{
    fs,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// Name that control's serving certificate always carries, whatever address it is dialled by.
pub const CONTROL_NAME: &str = "sluice-control";

#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct NodeIdentity {
    pub certificate_pem: String,
    pub key_pem: String,
    /// Trust roots of the cluster.
    pub bundle_pem: String,
}

const FILE: &str = "node.json";
/// What versions before kept the same in: roots, key, certificate.
const PARTS: [&str; 3] = ["ca.crt", "node.key", "node.crt"];
const JOINING_KEY: &str = "joining.key";

pub struct Paths {
    dir: PathBuf,
}

impl Paths {
    pub fn new(data_dir: &Path) -> Self {
        Self { dir: data_dir.join("identity") }
    }

    /// The stored identity, if it is one that control would accept.
    fn load(&self) -> Option<NodeIdentity> {
        let path = self.dir.join(FILE);
        let id = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "identity does not parse"))
                .ok()?,
            Err(_) => self.load_parts()?,
        };
        match usable(&id) {
            Ok(()) => Some(id),
            Err(why) => {
                tracing::warn!(path = %self.dir.display(), why, "stored identity is of no use, joining again");
                None
            }
        }
    }

    /// As versions before wrote it; moved into the one file.
    fn load_parts(&self) -> Option<NodeIdentity> {
        let [bundle_pem, key_pem, certificate_pem] = PARTS.map(|name| fs::read_to_string(self.dir.join(name)).ok());
        let id = NodeIdentity { certificate_pem: certificate_pem?, key_pem: key_pem?, bundle_pem: bundle_pem? };
        if usable(&id).is_ok()
            && let Err(error) = self.save(&id)
        {
            tracing::warn!(path = %self.dir.display(), error = format!("{error:#}"), "identity not moved into one file");
        }
        Some(id)
    }

    fn save(&self, id: &NodeIdentity) -> Result<()> {
        let path = self.dir.join(FILE);
        self.replace(&path, &serde_json::to_vec(id)?).with_context(|| {
            format!("save the node's identity as {}; is there room, and may it be written?", path.display())
        })?;
        for name in PARTS.iter().chain([&JOINING_KEY]) {
            let _ = fs::remove_file(self.dir.join(name)); // nothing reads them any more
        }
        Ok(())
    }

    /// The key to join with: made once and kept until there is a certificate, because a join whose answer was lost can
    /// be repeated with the same key only.
    fn joining_key(&self) -> Result<KeyPair> {
        let path = self.dir.join(JOINING_KEY);
        if let Ok(pem) = fs::read_to_string(&path) {
            return KeyPair::from_pem(&pem)
                .with_context(|| format!("read the key {}; remove it, and join with a new token", path.display()));
        }
        let key = KeyPair::generate()?;
        let save = self.replace(&path, key.serialize_pem().as_bytes());
        save.with_context(|| format!("save the key to join with as {}; may it be written?", path.display()))?;
        Ok(key)
    }

    /// Whole and on the disk, or as before.
    fn replace(&self, path: &Path, text: &[u8]) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        fs::set_permissions(&self.dir, fs::Permissions::from_mode(0o700))?;
        let tmp = path.with_extension("new");
        // A crash may have left one; opened again, it would keep whatever mode it has.
        if let Err(error) = fs::remove_file(&tmp)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error.into());
        }
        let mut f = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&tmp)?;
        f.write_all(text)?;
        f.sync_all()?;
        fs::rename(tmp, path)?;
        Ok(fs::File::open(&self.dir)?.sync_all()?)
    }
}

/// Why an identity would not get the node into the cluster.
fn usable(id: &NodeIdentity) -> Result<(), &'static str> {
    let left = life(&id.certificate_pem).ok_or("the certificate does not parse")?.left;
    if left == Duration::ZERO {
        return Err("the certificate has expired");
    }
    let key = KeyPair::from_pem(&id.key_pem).map_err(|_| "the key does not parse")?;
    match public_key(&id.certificate_pem) {
        Some(certified) if certified == key.subject_public_key_info() => Ok(()),
        _ => Err("the key is not the one that the certificate was issued for"),
    }
}

/// The certified key, as DER of its SubjectPublicKeyInfo.
fn public_key(certificate_pem: &str) -> Option<Vec<u8>> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate_pem.as_bytes()).ok()?;
    Some(pem.parse_x509().ok()?.public_key().raw.to_vec())
}

/// How long a certificate lives and how much of that is left.
pub struct Life {
    pub total: Duration,
    pub left: Duration,
}

impl Life {
    /// Two thirds are over.
    pub fn renew_in(&self) -> Duration {
        self.left.saturating_sub(self.total / 3)
    }
}

pub fn life(certificate_pem: &str) -> Option<Life> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate_pem.as_bytes()).ok()?;
    let cert = pem.parse_x509().ok()?;
    let v = cert.validity();
    let seconds = |n: i64| Duration::from_secs(u64::try_from(n).unwrap_or(0));
    let now = k8s_openapi::jiff::Timestamp::now().as_second();
    Some(Life {
        total: seconds(v.not_after.timestamp() - v.not_before.timestamp()),
        left: seconds(v.not_after.timestamp() - now),
    })
}

fn request(node: &str, key: &KeyPair) -> Result<String> {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, format!("system:node:{node}"));
    name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name = name;
    Ok(params.serialize_request(key)?.pem()?)
}

/// A channel to control's discovery port; without an identity only `Join` is answered.
pub fn channel(url: &str, ca_pem: &str, id: Option<&NodeIdentity>) -> Result<Channel> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca_pem)).domain_name(CONTROL_NAME);
    if let Some(id) = id {
        tls = tls.identity(Identity::from_pem(&id.certificate_pem, &id.key_pem));
    }
    let endpoint = Endpoint::from_shared(url.to_owned())
        .with_context(|| format!("discovery address {url:?}"))?
        .tls_config(tls)?
        .connect_timeout(Duration::from_secs(3))
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true);
    Ok(endpoint.connect_lazy())
}

/// The stored identity, or a new one for the token. Waits for control as long as it takes; a refused token ends it.
pub async fn obtain(data_dir: &Path, node: &str, url: &str, ca_file: &Path, token_file: &Path) -> Result<NodeIdentity> {
    let paths = Paths::new(data_dir);
    if let Some(id) = paths.load() {
        return Ok(id);
    }
    let ca_pem = fs::read_to_string(ca_file).with_context(|| format!("read the cluster's CA {}", ca_file.display()))?;
    let token = fs::read_to_string(token_file).with_context(|| {
        format!("read the join token {}; make one with `sluice token create`", token_file.display())
    })?;
    let key = paths.joining_key()?;
    let csr_pem = request(node, &key)?;
    let mut client = IdentityClient::new(channel(url, &ca_pem, None)?);
    loop {
        let join = JoinRequest { node: node.to_owned(), token: token.trim().to_owned(), csr_pem: csr_pem.clone() };
        match client.join(join).await {
            Ok(r) => {
                let r = r.into_inner();
                let key_pem = key.serialize_pem();
                let id = NodeIdentity { certificate_pem: r.certificate_pem, key_pem, bundle_pem: r.bundle_pem };
                paths.save(&id)?;
                return Ok(id);
            }
            Err(s) if matches!(s.code(), tonic::Code::PermissionDenied | tonic::Code::InvalidArgument) => {
                bail!("control refused to let node {node} join: {}", s.message())
            }
            Err(status) => {
                tracing::info!(status = status.message(), "control does not answer yet, joining again");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

/// Gets the next certificate with a new key.
pub async fn renew(data_dir: &Path, node: &str, channel: Channel) -> Result<NodeIdentity> {
    let key = KeyPair::generate()?;
    let csr_pem = request(node, &key)?;
    let r = IdentityClient::new(channel).sign(SignRequest { csr_pem, workload: None }).await?.into_inner();
    let key_pem = key.serialize_pem();
    let id = NodeIdentity { certificate_pem: r.certificate_pem, key_pem, bundle_pem: r.bundle_pem };
    Paths::new(data_dir).save(&id)?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> NodeIdentity {
        let key = KeyPair::generate().expect("a key");
        let certificate = CertificateParams::default().self_signed(&key).expect("self-signed");
        NodeIdentity { certificate_pem: certificate.pem(), key_pem: key.serialize_pem(), bundle_pem: "roots".into() }
    }

    fn write_parts(paths: &Paths, id: &NodeIdentity) {
        fs::create_dir_all(&paths.dir).expect("a folder");
        for (name, text) in PARTS.iter().zip([&id.bundle_pem, &id.key_pem, &id.certificate_pem]) {
            fs::write(paths.dir.join(name), text).expect("written");
        }
    }

    #[test]
    fn a_crash_at_any_point_of_a_renewal_leaves_a_key_with_its_certificate() {
        let data = tempfile::tempdir().expect("a folder");
        let (paths, old, new) = (Paths::new(data.path()), identity(), identity());
        paths.save(&old).expect("saved");
        let text = serde_json::to_vec(&new).expect("encodes");
        for written in [0, 1, text.len() / 2, text.len()] {
            fs::write(paths.dir.join("node.new"), &text[..written]).expect("the crash's leavings");
            assert_eq!(paths.load().expect("usable").key_pem, old.key_pem, "{written} bytes written");
        }
        paths.save(&new).expect("saved");
        let loaded = paths.load().expect("usable");
        assert_eq!((loaded.key_pem, loaded.certificate_pem), (new.key_pem, new.certificate_pem));
        let mode = fs::metadata(paths.dir.join(FILE)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn an_identity_in_parts_is_moved_into_one_file() {
        let data = tempfile::tempdir().expect("a folder");
        let (paths, id) = (Paths::new(data.path()), identity());
        write_parts(&paths, &id);
        assert_eq!(paths.load().expect("usable").key_pem, id.key_pem);
        assert!(PARTS.iter().all(|name| !paths.dir.join(name).exists()), "read once");
        assert_eq!(paths.load().expect("usable").certificate_pem, id.certificate_pem);
    }

    #[test]
    fn a_key_that_does_not_fit_its_certificate_is_of_no_use() {
        let data = tempfile::tempdir().expect("a folder");
        let (paths, mixed) = (Paths::new(data.path()), NodeIdentity { key_pem: identity().key_pem, ..identity() });
        write_parts(&paths, &mixed);
        assert!(paths.load().is_none(), "in parts");
        paths.save(&mixed).expect("saved");
        assert!(paths.load().is_none(), "in one file");
        fs::write(paths.dir.join(FILE), "{").expect("damaged");
        assert!(paths.load().is_none(), "damaged");
    }

    #[test]
    fn a_join_is_repeated_with_the_same_key_until_there_is_a_certificate() {
        let data = tempfile::tempdir().expect("a folder");
        let first = Paths::new(data.path()).joining_key().expect("a key");
        // The agent started again before the answer came.
        let paths = Paths::new(data.path());
        assert_eq!(paths.joining_key().expect("a key").serialize_pem(), first.serialize_pem());
        let mode = fs::metadata(paths.dir.join(JOINING_KEY)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        paths.save(&identity()).expect("saved");
        assert_ne!(paths.joining_key().expect("a key").serialize_pem(), first.serialize_pem());
    }

    #[tokio::test]
    async fn with_a_certificate_no_token_is_read_and_nobody_is_asked() {
        let (data, fresh) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let (id, nowhere) = (identity(), data.path().join("nothing"));
        Paths::new(data.path()).save(&id).expect("saved");
        let nobody = "https://127.0.0.1:1";
        let kept = obtain(data.path(), "n1", nobody, &nowhere, &nowhere).await.expect("its own");
        assert_eq!((kept.key_pem, kept.certificate_pem), (id.key_pem, id.certificate_pem));
        let error = obtain(fresh.path(), "n1", nobody, &nowhere, &nowhere).await.expect_err("no token");
        assert!(format!("{error:#}").contains("nothing"), "{error:#}");
    }
}
