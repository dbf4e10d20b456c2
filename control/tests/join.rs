//! Nodes as control's gRPC port meets them: joining by one-time tokens, the certificates they live on afterwards, and how
//! their acknowledgements are measured.

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Secret, Service as CoreService};
use k8s_openapi::jiff::Timestamp;
use rcgen::{CertificateParams, KeyPair};
use serde_json::json;
use sluice_control::api::client::Object;
use sluice_control::api::registry::{Context, DeleteOptions};
use sluice_control::api::status::ApiError;
use sluice_control::{api::kinds, mesh};
use sluice_wire::join::{JoinToken, NAMESPACE, SECRET_TYPE, key};
use sluice_wire::v1::client_message::Kind;
use sluice_wire::v1::{
    Ack, ClientMessage, Hello, JoinRequest, SignRequest, SignResponse, discovery_client::DiscoveryClient,
    hello::Subscriber, identity_client::IdentityClient, server_message,
};
use support::{Cluster, eventually};
use tokio::task::JoinHandle;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};

/// A cluster whose gRPC port is open, too.
struct Nodes {
    cluster: Cluster,
    address: SocketAddr,
    parts: Vec<JoinHandle<()>>,
}

impl Nodes {
    async fn start() -> Self {
        Self::over(Cluster::start().await).await
    }

    async fn over(cluster: Cluster) -> Self {
        let config = mesh::Config {
            listen: "127.0.0.1:0".parse().expect("an address"),
            trust_domain: "cluster.local".to_owned(),
            pool: sluice_control::pool::Pool::default(),
            workload_life: Duration::from_secs(3_600),
        };
        let (address, parts) = mesh::start(&cluster.service.parts, &config).await.expect("the port opens");
        Nodes { cluster, address, parts }
    }

    /// A connection of its own; with a certificate and its key, as the node of that name.
    fn channel(&self, node: Option<(&SignResponse, &KeyPair)>) -> Channel {
        let ca = Certificate::from_pem(self.cluster.service.parts.authority.bundle_pem());
        let mut tls = ClientTlsConfig::new().ca_certificate(ca).domain_name("localhost");
        if let Some((answer, key)) = node {
            tls = tls.identity(Identity::from_pem(&answer.certificate_pem, key.serialize_pem()));
        }
        let endpoint = Endpoint::from_shared(format!("https://{}", self.address)).expect("a URL");
        endpoint.tls_config(tls).expect("TLS").connect_lazy()
    }

    /// As `sluice token create` makes it.
    async fn token(&self, node: Option<&str>, life_s: i64) -> JoinToken {
        let token = JoinToken::generate(&mut rand::rng());
        let expires = Timestamp::from_second(Timestamp::now().as_second() + life_s).expect("in range").to_string();
        let mut data = json!({key::ID: token.id(), key::SECRET_HASH: token.secret_hash(), key::EXPIRATION: expires});
        if let Some(node) = node {
            data[key::NODE] = json!(node);
        }
        self.create_token(&token, data).await.expect("a token");
        token
    }

    async fn create_token(&self, token: &JoinToken, data: serde_json::Value) -> Result<(), ApiError> {
        let kind = kinds::find("", "v1", "secrets").expect("secrets");
        let body = json!({"metadata": {"name": token.object_name()}, "type": SECRET_TYPE, "stringData": data});
        let registry = self.cluster.service.parts.client.registry();
        registry.create(&Context::internal("test"), kind, NAMESPACE, body).await.map(drop)
    }

    async fn join(&self, token: &str, node: &str, key: &KeyPair) -> Result<SignResponse, Status> {
        let request = JoinRequest { node: node.to_owned(), token: token.to_owned(), csr_pem: csr(key) };
        Ok(IdentityClient::new(self.channel(None)).join(request).await?.into_inner())
    }

    async fn stored(&self, token: &JoinToken) -> Option<Secret> {
        self.cluster.client().get::<Secret>(NAMESPACE, &token.object_name()).await.expect("reads")
    }

    async fn used_by(&self, token: &JoinToken) -> Option<String> {
        let data = self.stored(token).await.expect("it is there").data.unwrap_or_default();
        data.get(key::USED_BY_NODE).map(|name| String::from_utf8_lossy(&name.0).into_owned())
    }

    async fn stop(self) -> tempfile::TempDir {
        let dir = self.cluster.stop().await;
        for part in self.parts {
            part.await.expect("no part panics");
        }
        dir
    }
}

fn new_key() -> KeyPair {
    KeyPair::generate().expect("a key")
}

fn csr(key: &KeyPair) -> String {
    CertificateParams::default().serialize_request(key).expect("a request").pem().expect("PEM")
}

/// Subject, and whether the certificate is for this key.
fn read(answer: &SignResponse, key: &KeyPair) -> (String, bool) {
    let (_, pem) = x509_parser::pem::parse_x509_pem(answer.certificate_pem.as_bytes()).expect("PEM");
    let certificate = pem.parse_x509().expect("a certificate");
    let own = certificate.public_key().subject_public_key.data.as_ref() == key.public_key_raw();
    (certificate.subject().to_string(), own)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_joins_with_one_token_one_succeeds() {
    let nodes = Nodes::start().await;
    for round in 0..20 {
        let token = nodes.token(None, 600).await;
        let text = token.to_string();
        // Two in most rounds; then many, each with its own name, and the same name with other keys.
        let count = if round % 5 == 4 { 12 } else { 2 };
        let name = |index: usize| if round % 2 == 0 { format!("n{index}") } else { "n0".to_owned() };
        let keys: Vec<KeyPair> = (0..count).map(|_| new_key()).collect();
        let joins = keys.iter().enumerate().map(|(index, key)| {
            let (nodes, text, name) = (&nodes, &text, name(index));
            async move { nodes.join(text, &name, key).await }
        });
        let answers = futures::future::join_all(joins).await;
        let winners: Vec<usize> = (0..count).filter(|index| answers[*index].is_ok()).collect();
        let [winner] = winners[..] else { panic!("round {round}: {winners:?} joined with one token") };
        assert_eq!(nodes.used_by(&token).await, Some(name(winner)));
        for status in answers.into_iter().filter_map(Result::err) {
            assert_eq!(status.code(), Code::PermissionDenied, "{status}");
            let said = format!("has let node {} in with another key", name(winner));
            assert!(status.message().contains(&said), "{status}");
            assert!(status.message().contains("sluice token create"), "{status}");
        }
    }
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_whose_answer_was_lost_is_repeated_with_the_same_key() {
    let nodes = Nodes::start().await;
    let token = nodes.token(None, 600).await;
    let (text, key, other) = (token.to_string(), new_key(), new_key());
    // Nothing that is refused uses the token up.
    let bad_request = JoinRequest { node: "n1".to_owned(), token: text.clone(), csr_pem: "nonsense".to_owned() };
    let status = IdentityClient::new(nodes.channel(None)).join(bad_request).await.expect_err("no request");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    for name in ["", "UPPER", "a/b", "-a"] {
        assert_eq!(nodes.join(&text, name, &key).await.expect_err(name).code(), Code::InvalidArgument);
    }
    assert_eq!(nodes.used_by(&token).await, None);

    let first = nodes.join(&text, "n1", &key).await.expect("joins");
    let marked = nodes.stored(&token).await.expect("it is there").revision();
    // At once, and several times.
    let (a, b) = tokio::join!(nodes.join(&text, "n1", &key), nodes.join(&text, "n1", &key));
    for answer in [first, a.expect("joins again"), b.expect("joins again")] {
        assert_eq!(read(&answer, &key), ("O=system:nodes, CN=system:node:n1".to_owned(), true));
    }
    for (name, key) in [("n1", &other), ("n2", &other), ("n2", &key)] {
        let status = nodes.join(&text, name, key).await.expect_err("the token is used");
        assert_eq!(status.code(), Code::PermissionDenied, "{name}: {status}");
    }
    assert_eq!(nodes.stored(&token).await.expect("it is there").revision(), marked, "repeats change nothing");
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_for_one_node_and_end() {
    let nodes = Nodes::start().await;
    let key = new_key();
    let bound = nodes.token(Some("n1"), 600).await;
    let status = nodes.join(&bound.to_string(), "n2", &key).await.expect_err("another's token");
    assert!(status.message().contains("is for node n1 alone, not for n2"), "{status}");
    nodes.join(&bound.to_string(), "n1", &key).await.expect("its own token");

    let unknown = JoinToken::generate(&mut rand::rng()).to_string();
    let mut wrong = bound.to_string();
    wrong.replace_range(7.., "0000000000000000");
    for text in ["", "nonsense", &unknown, &wrong] {
        let status = nodes.join(text, "n1", &key).await.expect_err("no token");
        assert_eq!(status.code(), Code::PermissionDenied, "{text}");
        assert!(status.message().starts_with("the join token is not valid"), "{text}: {status}");
    }

    // One that is used is collected like one that nobody used.
    let short = [nodes.token(None, 2).await, nodes.token(Some("n9"), 2).await];
    nodes.join(&short[0].to_string(), "n3", &key).await.expect("in time");
    for token in &short {
        eventually("the token is collected", || async { nodes.stored(token).await.is_none() }).await;
        let status = nodes.join(&token.to_string(), "n3", &key).await.expect_err("too late");
        assert!(status.message().contains("expired"), "{status}");
    }
    assert!(nodes.stored(&bound).await.is_some(), "others stay");

    // Taken back by the operator.
    let secret = nodes.stored(&bound).await.expect("it is there");
    nodes.cluster.client().delete(&secret, DeleteOptions::default()).await.expect("deletes");
    nodes.join(&bound.to_string(), "n1", &key).await.expect_err("deleted");
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_gets_into_the_store() {
    let nodes = Nodes::start().await;
    let token = JoinToken::generate(&mut rand::rng());
    let good =
        json!({key::ID: token.id(), key::SECRET_HASH: token.secret_hash(), key::EXPIRATION: "2100-01-01T00:00:00Z"});
    let with = |name: &str, value: &str| {
        let mut data = good.clone();
        data[name] = json!(value);
        data
    };
    for (data, field) in [
        (with("token-secret", "0123456789abcdef"), "data.token-secret: Forbidden"),
        (with(key::ID, "other"), "data.token-id: Invalid value"),
        (with(key::SECRET_HASH, "0123456789abcdef"), "data.token-secret-sha256: Invalid value"),
        (with(key::EXPIRATION, "tomorrow"), "data.expiration: Invalid value"),
    ] {
        let error = nodes.create_token(&token, data).await.expect_err(field);
        assert_eq!(error.code, 422, "{error}");
        assert!(error.message.contains(field), "{error}");
    }
    nodes.create_token(&token, good).await.expect("a good one");
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_a_certificate_needs_no_token() {
    let nodes = Nodes::start().await;
    let token = nodes.token(None, 600).await;
    let (first_key, next_key) = (new_key(), new_key());
    let first = nodes.join(&token.to_string(), "n1", &first_key).await.expect("joins");
    let secret = nodes.stored(&token).await.expect("it is there");
    nodes.cluster.client().delete(&secret, DeleteOptions::default()).await.expect("deletes");

    let renew = |by: (SignResponse, KeyPair), key: &KeyPair, nodes: &Nodes| {
        let (channel, csr_pem) = (nodes.channel(Some((&by.0, &by.1))), csr(key));
        async move { IdentityClient::new(channel).sign(SignRequest { csr_pem, workload: None }).await }
    };
    let next = renew((first, first_key), &next_key, &nodes).await.expect("renews").into_inner();
    assert_eq!(read(&next, &next_key), ("O=system:nodes, CN=system:node:n1".to_owned(), true));

    // Control restarts; its authority is the same, and so is the node's certificate.
    let nodes = Nodes::over(Cluster::start_again(nodes.stop().await).await).await;
    let last_key = new_key();
    let last = renew((next, next_key), &last_key, &nodes).await.expect("renews after the restart").into_inner();
    assert_eq!(read(&last, &last_key), ("O=system:nodes, CN=system:node:n1".to_owned(), true));
    nodes.stop().await;
}

/// The value of a series of `/metrics`.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_measured_until_the_last_node_has_it() {
    let mut nodes = Nodes::start().await;
    nodes.cluster.add_node("n1", "4").await;
    let (token, key) = (nodes.token(Some("n1"), 600).await, new_key());
    let answer = nodes.join(&token.to_string(), "n1", &key).await.expect("joins");

    let (messages, outgoing) = tokio::sync::mpsc::channel(8);
    let say = |kind| messages.send(ClientMessage { kind: Some(kind) });
    let hello = Hello { subscriber: Some(Subscriber::Node("n1".to_owned())), ..Hello::default() };
    say(Kind::Hello(hello)).await.expect("sends");
    let mut client = DiscoveryClient::new(nodes.channel(Some((&answer, &key))));
    let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
    let mut updates = client.stream(outgoing).await.expect("the stream opens").into_inner();

    let service = json!({"metadata": {"name": "web", "namespace": "default"}, "spec": {"ports": [{"port": 80}]}});
    let service: CoreService = serde_json::from_value(service).expect("a service");
    nodes.cluster.client().create(&service).await.expect("creates");
    let metrics = || async { nodes.cluster.kubectl(&["get", "--raw", "/metrics"]).await };
    let count = |text: &str| value(text, "sluice_change_acknowledged_seconds_count").expect("the histogram");
    eventually("the change waits for the node", || async {
        value(&metrics().await, "sluice_changes_pending").is_some_and(|pending| pending >= 1.0)
    })
    .await;
    let before = count(&metrics().await);
    let acknowledge = async {
        while let Some(Ok(message)) = updates.next().await {
            if let Some(server_message::Kind::Update(update)) = message.kind
                && update.last
            {
                let ack = Ack { epoch: update.epoch, revision: update.revision };
                if say(Kind::Ack(ack)).await.is_err() {
                    return;
                }
            }
        }
    };
    let measured = eventually("the change is measured", || async {
        let text = metrics().await;
        count(&text) > before && value(&text, "sluice_changes_pending") == Some(0.0)
    });
    tokio::select! {
        () = acknowledge => panic!("the stream ended"),
        () = measured => {}
    }
    let text = metrics().await;
    assert_eq!(value(&text, "sluice_objects{resource=\"nodes\"}"), Some(1.0));
    assert!(value(&text, "sluice_objects{resource=\"services\"}").is_some_and(|n| n >= 3.0), "{text}");
    assert!(value(&text, "sluice_store_watches").is_some_and(|n| n >= 9.0), "{text}");
    for series in ["sluice_store_commit_duration_seconds_count", "sluice_compile_duration_seconds_count"] {
        assert!(value(&text, series).is_some_and(|n| n >= 1.0), "{series}");
    }
    nodes.stop().await;
}
