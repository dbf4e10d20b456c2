//! TLS towards the clients of a gateway's listener: the certificates of its Secrets, chosen by the name that a client asks
//! for, with HTTP/2 and HTTP/1.1. A [`Front`] is immutable and shared by all workers; other certificates make another one,
//! for new connections, and those that run keep theirs.

use rustls::{
    ServerConfig,
    crypto::ring::{self, sign::any_supported_type},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use sluice_model::Certificate;
use sluice_traffic::route::Host;
use std::sync::{Arc, OnceLock};
use tokio_rustls::TlsAcceptor;
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

pub const ALPN_H2: &[u8] = b"h2";
const ALPN_HTTP1: &[u8] = b"http/1.1";

/// A listener's certificates, made ready when the first client comes.
#[derive(Debug)]
pub struct Front {
    certificates: Vec<Certificate>,
    config: OnceLock<Option<Arc<ServerConfig>>>,
}

impl Front {
    pub fn new(certificates: Vec<Certificate>) -> Self {
        Self { certificates, config: OnceLock::new() }
    }

    /// The same certificates, in the same order.
    pub fn is_of(&self, certificates: &[Certificate]) -> bool {
        self.certificates == certificates
    }

    /// `None` when none of the certificates can be used, which control has ruled out.
    pub fn acceptor(&self) -> Option<TlsAcceptor> {
        self.config.get_or_init(|| self.build()).clone().map(TlsAcceptor::from)
    }

    fn build(&self) -> Option<Arc<ServerConfig>> {
        let pairs: Vec<Pair> = self.certificates.iter().filter_map(Pair::read).collect();
        if pairs.is_empty() {
            tracing::error!("a listener has no certificate that can be used");
            return None;
        }
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider has both versions of TLS");
        let mut config = builder.with_no_client_auth().with_cert_resolver(Arc::new(Pairs(pairs)));
        config.alpn_protocols = vec![ALPN_H2.to_vec(), ALPN_HTTP1.to_vec()];
        match ring::Ticketer::new() {
            Ok(ticketer) => config.ticketer = ticketer,
            Err(error) => tracing::warn!(%error, "clients cannot resume their sessions"),
        }
        Some(Arc::new(config))
    }
}

#[derive(Debug)]
struct Pair {
    names: Vec<Host>,
    key: Arc<CertifiedKey>,
}

impl Pair {
    fn read(certificate: &Certificate) -> Option<Self> {
        let chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(certificate.chain_pem.as_bytes()).collect::<Result<_, _>>().ok()?;
        let names = names(chain.first()?);
        let key = PrivateKeyDer::from_pem_slice(certificate.key_pem.0.as_bytes()).ok()?;
        let key = any_supported_type(&key).ok()?;
        Some(Self { names, key: Arc::new(CertifiedKey::new(chain, key)) })
    }
}

/// The DNS names that a certificate is for.
fn names(leaf: &CertificateDer<'_>) -> Vec<Host> {
    let Ok((_, x509)) = X509Certificate::from_der(leaf) else { return vec![] };
    let alternative = x509.subject_alternative_name().ok().flatten();
    let all = alternative.iter().flat_map(|n| &n.value.general_names);
    all.filter_map(|n| if let GeneralName::DNSName(name) = n { Some(Host::parse(name)) } else { None }).collect()
}

#[derive(Debug)]
struct Pairs(Vec<Pair>);

impl ResolvesServerCert for Pairs {
    /// The first for the name; the first of all where none is: the client will say what it thinks of it.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().unwrap_or_default();
        let named = self.0.iter().find(|p| p.names.iter().any(|n| n.matches(name)));
        named.or(self.0.first()).map(|p| p.key.clone())
    }
}
