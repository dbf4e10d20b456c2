//! mTLS between sidecars: TLS 1.3 only, both sides show a SPIFFE certificate that chains to the bundle. A client also
//! checks that the server is who it should be; a server takes any identity of its trust domain and leaves "who may call
//! what" to policy.
//!
//! A [`Tls`] is immutable. Rotation makes a new one for new connections; those that run keep the old one.

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as RustlsError, RootCertStore,
    ServerConfig, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::TLS13,
};
use sluice_model::Identity;
use sluice_wire::{ALPN_H2, ALPN_TCP};
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("certificate: {0}")]
    Malformed(String),
    #[error("certificate: {0}")]
    Rustls(#[from] RustlsError),
    #[error("certificate from the agent is for {got}, this workload is {wanted}")]
    NotOurs { got: Box<Identity>, wanted: Box<Identity> },
}

/// What a connection between sidecars may carry, by ALPN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Offer {
    /// Bytes.
    Tcp,
    /// Multiplexed requests, or bytes where the other side does not know of these.
    H2OrTcp,
}

impl Offer {
    /// In the order of preference; the server's counts.
    fn protocols(self) -> Vec<Vec<u8>> {
        match self {
            Self::Tcp => vec![ALPN_TCP.to_vec()],
            Self::H2OrTcp => vec![ALPN_H2.to_vec(), ALPN_TCP.to_vec()],
        }
    }
}

/// A certificate with its key, and whom to trust.
#[derive(Debug)]
pub struct Tls {
    pub identity: Identity,
    /// Seconds since 1970 until which it is valid.
    pub not_after_s: i64,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    trust: Trust,
    /// For ports that are opaque, and for the others.
    server_tcp: Arc<ServerConfig>,
    server_any: Arc<ServerConfig>,
}

impl Tls {
    /// From what the agent answered and the key the request was made with.
    pub fn new(
        chain_pem: &str,
        bundle_pem: &str,
        key: PrivateKeyDer<'static>,
        wanted: &Identity,
    ) -> Result<Self, TlsError> {
        let tls = Self::given(chain_pem, bundle_pem, key)?;
        if tls.identity != *wanted {
            return Err(TlsError::NotOurs { got: tls.identity.into(), wanted: wanted.clone().into() });
        }
        Ok(tls)
    }

    /// Of whatever identity the chain is for.
    pub fn given(chain_pem: &str, bundle_pem: &str, key: PrivateKeyDer<'static>) -> Result<Self, TlsError> {
        let chain = certificates(chain_pem)?;
        let leaf = chain.first().ok_or_else(|| TlsError::Malformed("the chain is empty".into()))?;
        let identity = identity_of(leaf)?;
        let not_after_s = not_after_s(leaf)?;
        let mut roots = RootCertStore::empty();
        for root in certificates(bundle_pem)? {
            roots.add(root)?;
        }
        let trust = Trust::new(roots, identity.trust_domain.clone())?;
        let server_any = server_config(&trust, chain.clone(), key.clone_key())?;
        let mut server_tcp = server_any.clone();
        server_tcp.alpn_protocols = Offer::Tcp.protocols();
        let (server_tcp, server_any) = (server_tcp.into(), server_any.into());
        Ok(Self { identity, not_after_s, chain, key, trust, server_tcp, server_any })
    }

    pub fn acceptor(&self, offer: Offer) -> TlsAcceptor {
        TlsAcceptor::from(match offer {
            Offer::Tcp => self.server_tcp.clone(),
            Offer::H2OrTcp => self.server_any.clone(),
        })
    }

    /// For connections to a peer that must prove to be `expected`.
    pub fn client_config(&self, expected: &Arc<Identity>, offer: Offer) -> Arc<ClientConfig> {
        let verifier = Trust { expected: Some(expected.clone()), ..self.trust.clone() };
        let mut config = ClientConfig::builder_with_provider(self.trust.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .expect("the key was checked against the chain when the server side was made");
        config.alpn_protocols = offer.protocols();
        config.enable_sni = false;
        Arc::new(config)
    }

    /// In how many seconds to ask for the next one, from when this one came: it began to be valid before that.
    pub fn renew_in_s(&self, now_s: i64) -> u64 {
        u64::try_from((self.not_after_s - now_s) * 2 / 3).unwrap_or(0)
    }

    /// Whether a connection goes on from an earlier one although a certificate of that has ended since: a handshake that resumes
    /// looks at none again (RFC 8446 §2.2).
    pub fn is_outlived_by(&self, connection: &rustls::CommonState, now_s: i64) -> bool {
        let peer_ends_s = || connection.peer_certificates()?.first().and_then(|leaf| not_after_s(leaf).ok());
        connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
            && (self.not_after_s < now_s || peer_ends_s().is_none_or(|end| end < now_s))
    }
}

/// Seconds since 1970.
pub fn now_s() -> i64 {
    UnixTime::now().as_secs().cast_signed()
}

fn server_config(
    trust: &Trust,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(trust.provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(trust.clone()))
        .with_single_cert(chain, key)?;
    config.alpn_protocols = Offer::H2OrTcp.protocols();
    Ok(config)
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| TlsError::Malformed(e.to_string()))
}

fn not_after_s(der: &CertificateDer<'_>) -> Result<i64, TlsError> {
    let (_, x509) = X509Certificate::from_der(der).map_err(|e| TlsError::Malformed(e.to_string()))?;
    Ok(x509.validity().not_after.timestamp())
}

/// The certificate's SPIFFE identity: its only URI name (X.509-SVID §2).
fn identity_of(der: &CertificateDer<'_>) -> Result<Identity, RustlsError> {
    let bad = |_| RustlsError::from(CertificateError::BadEncoding);
    let (_, x509) = X509Certificate::from_der(der).map_err(|_| RustlsError::from(CertificateError::BadEncoding))?;
    let names = x509.subject_alternative_name().map_err(|_| RustlsError::from(CertificateError::BadEncoding))?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|n| &n.value.general_names)
        .filter_map(|n| match n {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris[..] {
        [uri] => uri.parse().map_err(bad),
        _ => Err(CertificateError::NotValidForName.into()),
    }
}

/// Who a peer is whose chain was verified.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Option<Identity> {
    chain.first().and_then(|leaf| identity_of(leaf).ok())
}

/// Verifies peers. `expected` is set on the client side only.
#[derive(Clone, Debug)]
struct Trust {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    /// Checks the chain of clients, with their key usage.
    clients: Arc<dyn ClientCertVerifier>,
    trust_domain: Arc<str>,
    expected: Option<Arc<Identity>>,
}

impl Trust {
    fn new(roots: RootCertStore, trust_domain: String) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| TlsError::Malformed(format!("trust bundle: {e}")))?;
        Ok(Self { provider, roots, clients, trust_domain: trust_domain.into(), expected: None })
    }

    fn algorithms(&self) -> WebPkiSupportedAlgorithms {
        self.provider.signature_verification_algorithms
    }

    fn check_identity(&self, der: &CertificateDer<'_>) -> Result<(), RustlsError> {
        let identity = identity_of(der)?;
        let right = match &self.expected {
            Some(expected) => identity == **expected,
            None => identity.trust_domain == *self.trust_domain,
        };
        if right { Ok(()) } else { Err(CertificateError::NotValidForName.into()) }
    }
}

/// How signatures are checked: the same for clients and servers, though the traits of their verifiers differ.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, RustlsError> {
            // Never offered.
            Err(RustlsError::General("TLS 1.2 is not spoken here".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, RustlsError> {
            verify_tls13_signature(message, cert, dss, &self.algorithms())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms().supported_schemes()
        }
    };
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, RustlsError> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, self.algorithms().all)?;
        self.check_identity(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!();
}

impl ClientCertVerifier for Trust {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A hint would only make handshakes longer: peers have one certificate.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, RustlsError> {
        let verified = self.clients.verify_client_cert(end_entity, intermediates, now)?;
        self.check_identity(end_entity)?;
        Ok(verified)
    }

    signatures!();
}
