//! The node's own key and certificate: made here at the first start, signed by control for a one-time token, kept in
//! the data folder, renewed at two thirds of its life.

use anyhow::{Context, Result, bail};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
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

#[derive(Clone, Debug)]
pub struct NodeIdentity {
    pub certificate_pem: String,
    pub key_pem: String,
    /// Trust roots of the cluster.
    pub bundle_pem: String,
}

pub struct Paths {
    dir: PathBuf,
}

impl Paths {
    pub fn new(data_dir: &Path) -> Self {
        Self { dir: data_dir.join("identity") }
    }

    fn load(&self) -> Option<NodeIdentity> {
        let read = |name: &str| fs::read_to_string(self.dir.join(name)).ok();
        let id = NodeIdentity {
            certificate_pem: read("node.crt")?,
            key_pem: read("node.key")?,
            bundle_pem: read("ca.crt")?,
        };
        life(&id.certificate_pem).filter(|l| l.left > Duration::ZERO).map(|_| id)
    }

    fn save(&self, id: &NodeIdentity) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        fs::set_permissions(&self.dir, fs::Permissions::from_mode(0o700))?;
        for (name, text) in [("ca.crt", &id.bundle_pem), ("node.key", &id.key_pem), ("node.crt", &id.certificate_pem)] {
            let tmp = self.dir.join(format!("{name}.new"));
            let mut f = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
            f.write_all(text.as_bytes())?;
            f.sync_all()?;
            fs::rename(tmp, self.dir.join(name))?;
        }
        Ok(())
    }
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

fn request(node: &str) -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, format!("system:node:{node}"));
    name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name = name;
    Ok((params.serialize_request(&key)?.pem()?, key.serialize_pem()))
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
        format!("read the join token {}; make one with `sluice-control token`", token_file.display())
    })?;
    let (csr_pem, key_pem) = request(node)?;
    let mut client = IdentityClient::new(channel(url, &ca_pem, None)?);
    loop {
        let join = JoinRequest { node: node.to_owned(), token: token.trim().to_owned(), csr_pem: csr_pem.clone() };
        match client.join(join).await {
            Ok(r) => {
                let r = r.into_inner();
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
    let (csr_pem, key_pem) = request(node)?;
    let r = IdentityClient::new(channel).sign(SignRequest { csr_pem, workload: None }).await?.into_inner();
    let id = NodeIdentity { certificate_pem: r.certificate_pem, key_pem, bundle_pem: r.bundle_pem };
    Paths::new(data_dir).save(&id)?;
    Ok(id)
}
