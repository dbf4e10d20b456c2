//! The cluster's certificate authority (ECDSA P-256): made once in the data directory, it signs the API's serving
//! certificate, the administrator's and each node's client certificate, and workload certificates with SPIFFE names.
//!
//! It decides nothing about who may have a certificate: callers check the token or the pod's binding first. How its own
//! key lies on disk is `ca::keyfile`'s.

mod keyfile;

use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sluice_wire::join::fingerprint;

pub use keyfile::{DEFAULT_PASSPHRASE_FILE, PassphraseFile};

const DAY: Duration = Duration::from_secs(24 * 3600);
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// Clocks of two machines differ; certificates are valid a little before they were made.
const BACKDATE: Duration = Duration::from_secs(300);

/// Why no certificate was made.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file of the authority cannot be read or written.
    #[error("{operation} {path}: {source}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// What is in a file is not what it should be.
    #[error("{what} does not parse: {cause}; restore it, or remove the data directory to begin a new cluster")]
    Malformed {
        /// Which thing.
        what: &'static str,
        /// The parser's words.
        cause: String,
    },
    /// The passphrase of the authority's key cannot be had.
    #[error("read the passphrase of {key} from {path}: {cause}")]
    Passphrase {
        /// Of which key.
        key: PathBuf,
        /// The file it should be in.
        path: PathBuf,
        /// What is wrong, and what to do.
        cause: String,
    },
    /// The passphrase is not the key's.
    #[error(
        "decrypt {key}: the passphrase in {path} is not the one it was encrypted with, or the key is damaged; give the \
         right one with --ca-passphrase-file, or restore both from their backups (nothing was changed)"
    )]
    WrongPassphrase {
        /// Which key.
        key: PathBuf,
        /// Where the passphrase came from.
        path: PathBuf,
    },
    /// A request is not acceptable.
    #[error("sign request for {subject}: {cause}")]
    Request {
        /// For whom.
        subject: String,
        /// Why it was refused.
        cause: String,
    },
}

/// Certificate chain (leaf first) and private key, in PEM.
#[derive(Clone)]
pub struct Pair {
    /// The chain.
    pub certificate_pem: String,
    /// The key, PKCS#8.
    pub key_pem: String,
}

impl Pair {
    /// The chain and key as rustls wants them.
    pub fn to_rustls(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), CaError> {
        let malformed =
            |e: rustls::pki_types::pem::Error| CaError::Malformed { what: "certificate", cause: e.to_string() };
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(self.certificate_pem.as_bytes()).collect();
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(malformed)?;
        Ok((chain.map_err(malformed)?, key))
    }
}

/// The authority of one cluster.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    bundle_pem: String,
}

impl Authority {
    /// Loads `ca.crt` and `ca.key` of the data directory, or makes them. The key is encrypted with the passphrase; one
    /// that lies there in plain, from before keys were, is encrypted now.
    pub fn load_or_create(dir: &Path, passphrase: &PassphraseFile) -> Result<Self, CaError> {
        let (cert_path, key_path) = (dir.join("ca.crt"), dir.join("ca.key"));
        // The key goes first: a crash in between leaves a key without certificate, which is made for it at the next start.
        let key = if cert_path.exists() || key_path.exists() {
            keyfile::load(&key_path, passphrase)?
        } else {
            keyfile::create(&key_path, passphrase)?
        };
        if !cert_path.exists() {
            write_private(&cert_path, &new_root(&key)?)?;
        }
        let bundle_pem = read(&cert_path)?;
        let malformed = |e: rcgen::Error| CaError::Malformed { what: "certificate authority", cause: e.to_string() };
        let issuer = Issuer::from_ca_cert_pem(&bundle_pem, key).map_err(malformed)?;
        Ok(Authority { issuer, bundle_pem })
    }

    /// The trust roots, in PEM.
    pub fn bundle_pem(&self) -> &str {
        &self.bundle_pem
    }

    /// A root store for verifying peers.
    pub fn roots(&self) -> Result<rustls::RootCertStore, CaError> {
        let malformed = |cause: String| CaError::Malformed { what: "ca.crt", cause };
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(self.bundle_pem.as_bytes()) {
            let certificate = certificate.map_err(|e| malformed(e.to_string()))?;
            roots.add(certificate).map_err(|e| malformed(e.to_string()))?;
        }
        Ok(roots)
    }

    /// A serving certificate for the API and discovery ports.
    pub fn serving(&self, names: &[String]) -> Result<Pair, CaError> {
        let mut params = leaf("sluice-control", &[], YEAR);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        for name in names {
            params.subject_alt_names.push(san(name)?);
        }
        self.issue(params)
    }

    /// A client certificate: user (CN) and groups (O).
    pub fn client(&self, user: &str, groups: &[&str], life: Duration) -> Result<Pair, CaError> {
        let mut params = leaf(user, groups, life);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params)
    }

    /// Signs a node's request: user `system:node:<name>`, group `system:nodes`, DNS name = the node's name (its log
    /// server is verified by that). Only the key is taken from the request. Returns the chain.
    pub fn sign_node(&self, csr_pem: &str, node: &str) -> Result<String, CaError> {
        let mut params = leaf(&format!("system:node:{node}"), &["system:nodes"], YEAR);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names = vec![san(node)?];
        self.sign(csr_pem, node, params)
    }

    /// Signs a workload's request with its SPIFFE identity as the only name. Returns the chain.
    pub fn sign_workload(&self, csr_pem: &str, spiffe_uri: &str, life: Duration) -> Result<String, CaError> {
        let refuse = |cause: String| CaError::Request { subject: spiffe_uri.to_owned(), cause };
        if !spiffe_uri.starts_with("spiffe://") {
            return Err(refuse("not a SPIFFE URI".to_owned()));
        }
        let mut params = leaf("", &[], life);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let uri = spiffe_uri.to_owned().try_into().map_err(|e: rcgen::Error| refuse(e.to_string()))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        self.sign(csr_pem, spiffe_uri, params)
    }

    fn issue(&self, params: CertificateParams) -> Result<Pair, CaError> {
        let failed = |e: rcgen::Error| CaError::Request { subject: "own certificate".to_owned(), cause: e.to_string() };
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(Pair { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    fn sign(&self, csr_pem: &str, subject: &str, params: CertificateParams) -> Result<String, CaError> {
        let refuse = |e: rcgen::Error| CaError::Request { subject: subject.to_owned(), cause: e.to_string() };
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(refuse)?;
        request.params = params;
        Ok(request.signed_by(&self.issuer).map_err(refuse)?.pem())
    }
}

/// Hash of the public key that a request is for; the request must be signed by it.
pub fn key_fingerprint(csr_pem: &str, subject: &str) -> Result<String, CaError> {
    let refuse = |e: rcgen::Error| CaError::Request { subject: subject.to_owned(), cause: e.to_string() };
    let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(refuse)?;
    Ok(fingerprint(&request.public_key.subject_public_key_info()))
}

/// The certificate of a new authority with this key.
fn new_root(key: &KeyPair) -> Result<String, CaError> {
    let failed = |e: rcgen::Error| CaError::Malformed { what: "new authority", cause: e.to_string() };
    let mut params = leaf("sluice cluster CA", &[], CA_LIFE);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = false;
    Ok(params.self_signed(key).map_err(failed)?.pem())
}

fn leaf(user: &str, groups: &[&str], life: Duration) -> CertificateParams {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(DAY);
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut name = DistinguishedName::new();
    for group in groups {
        name.push(DnType::OrganizationName, *group);
    }
    if !user.is_empty() {
        name.push(DnType::CommonName, user);
    }
    let mut params = CertificateParams::default();
    params.not_before = epoch + now.saturating_sub(BACKDATE);
    params.not_after = epoch + now + life;
    params.distinguished_name = name;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

fn san(name: &str) -> Result<SanType, CaError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let refuse = |e: rcgen::Error| CaError::Request { subject: name.to_owned(), cause: e.to_string() };
    Ok(SanType::DnsName(name.to_owned().try_into().map_err(refuse)?))
}

/// Equality of two secrets in time that depends on their length only; an empty one equals nothing.
pub fn same_secret(ours: &str, presented: &str) -> bool {
    let (ours, presented) = (ours.as_bytes(), presented.as_bytes());
    let differing = ours.iter().zip(presented).fold(0, |seen, (a, b)| seen | (a ^ b));
    ours.len() == presented.len() && differing == 0 && !ours.is_empty()
}

/// A kubeconfig with everything inline; cluster, user and context are named `sluice`.
pub fn kubeconfig(url: &str, bundle_pem: &str, client: &Pair) -> String {
    use base64::Engine as _;
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: sluice\nclusters:\n- name: sluice\n  cluster:\n    server: {url}\n    \
         certificate-authority-data: {}\nusers:\n- name: sluice\n  user:\n    client-certificate-data: {}\n    \
         client-key-data: {}\ncontexts:\n- name: sluice\n  context:\n    cluster: sluice\n    user: sluice\n",
        encode(bundle_pem),
        encode(&client.certificate_pem),
        encode(&client.key_pem),
    )
}

fn read(path: &Path) -> Result<String, CaError> {
    std::fs::read_to_string(path).map_err(|source| CaError::File { operation: "read", path: path.to_owned(), source })
}

/// Writes a file for the owner only, whole or not at all; it is on the disk when this returns.
pub fn write_private(path: &Path, text: &str) -> Result<(), CaError> {
    let failed = |operation| move |source| CaError::File { operation, path: path.to_owned(), source };
    let temporary = path.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    options.create(true).truncate(true).write(true).mode(0o600);
    let mut file = options.open(&temporary).map_err(failed("create"))?;
    file.write_all(text.as_bytes()).map_err(failed("write"))?;
    file.sync_all().map_err(failed("sync"))?;
    std::fs::rename(&temporary, path).map_err(failed("rename"))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync the folder of"))
}
