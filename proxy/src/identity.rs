//! The workload's certificate: key and request are made here, the agent has the request signed, and a new one is asked
//! for at two thirds of the old one's life. The key never leaves the process.

use crate::{
    socket::channel,
    tls::{Tls, TlsError, now_s},
};
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use sluice_model::Identity;
use sluice_wire::v1::{SignRequest, WorkloadRef, identity_client::IdentityClient};
use std::{sync::Arc, time::Duration};
use tokio::sync::{mpsc, watch};

const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Without an answer; only the node's agent is asked, which knows at once whether control is there.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What became of a request.
#[derive(Debug)]
pub enum Event {
    Signed(Arc<Tls>),
    /// This cluster signs no workload certificates.
    NotOffered,
}

#[derive(Debug, thiserror::Error)]
enum SignError {
    #[error("make a signing request: {0}")]
    Request(#[from] rcgen::Error),
    #[error("reach the agent: {0}")]
    Connect(#[from] tonic::transport::Error),
    #[error("have the request signed: {0}")]
    Refused(#[from] tonic::Status),
    #[error(transparent)]
    Answer(#[from] TlsError),
}

/// Keeps a valid certificate for as long as `events` are read. Starts when `identity` is known.
pub async fn run(
    socket: String,
    workload: WorkloadRef,
    mut identity: watch::Receiver<Option<Identity>>,
    events: mpsc::Sender<Event>,
) {
    let mut pause = FIRST_PAUSE;
    while !events.is_closed() {
        let Ok(wanted) = identity.wait_for(Option::is_some).await.map(|i| i.clone()) else { return };
        let Some(wanted) = wanted else { continue };
        let wait = match sign(&socket, &workload, &wanted).await {
            Ok(tls) => {
                pause = FIRST_PAUSE;
                let wait = until_renewal(&tls);
                tracing::info!(identity = %tls.identity, renew_in = ?wait, "certificate in use");
                if events.send(Event::Signed(Arc::new(tls))).await.is_err() {
                    return;
                }
                wait
            }
            Err(error) => {
                tracing::warn!(%error, "no certificate");
                if not_offered(&error) && events.send(Event::NotOffered).await.is_err() {
                    return;
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
                pause
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// Reports the certificates that are given from elsewhere, for as long as some are and `events` are read.
pub async fn pass_on(mut certificate: watch::Receiver<Option<Arc<Tls>>>, events: mpsc::Sender<Event>) {
    loop {
        let given = certificate.borrow_and_update().clone();
        if let Some(tls) = given
            && events.send(Event::Signed(tls)).await.is_err()
        {
            return;
        }
        if certificate.changed().await.is_err() {
            return;
        }
    }
}

fn not_offered(error: &SignError) -> bool {
    matches!(error, SignError::Refused(status) if status.code() == tonic::Code::Unimplemented)
}

async fn sign(socket: &str, workload: &WorkloadRef, identity: &Identity) -> Result<Tls, SignError> {
    let key = KeyPair::generate()?;
    let csr_pem = request(&key, identity)?;
    let mut client = IdentityClient::new(channel(socket).await?);
    let answer = client.sign(SignRequest { csr_pem, workload: Some(workload.clone()) }).await?.into_inner();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(Tls::new(&answer.certificate_pem, &answer.bundle_pem, key, identity)?)
}

fn request(key: &KeyPair, identity: &Identity) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    params.serialize_request(key)?.pem()
}

/// With up to a tenth of jitter earlier, so that a cluster's sidecars do not renew all at once.
fn until_renewal(tls: &Tls) -> Duration {
    let left = Duration::from_secs(tls.renew_in_s(now_s()));
    left.mul_f64(rand::random_range(0.9..1.0)).max(Duration::from_secs(1))
}
