//! Which node may join: a token lets one node in, told by its key, until it expires. The verdict is PURE; `admit` reads
//! the token's Secret and marks it as used in one fenced change before the certificate goes out, so that of many joins
//! with one token, at any number of replicas, one succeeds. Who has a node's certificate is never asked for a token.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use sluice_wire::join::{JoinToken, NAMESPACE, SECRET_TYPE, key};

use crate::api::client::Client;
use crate::api::status::ApiError;
use crate::api::value::rfc3339;
use crate::ca::same_secret;

/// Tries against others' changes of the same token. Each is lost to a change that came through, and one that let another
/// node in ends it.
const TRIES: usize = 8;

/// What is known of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The token's public part.
    pub id: String,
    /// Hash of the whole token.
    pub secret_hash: String,
    /// When it stops being worth anything.
    pub expires: Timestamp,
    /// The only node that may use it; `None` = any.
    pub node: Option<String>,
    /// Who has used it.
    pub used: Option<Use>,
}

/// The node that a token let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// Its name.
    pub node: String,
    /// Hash of its public key.
    pub key_hash: String,
}

/// How a node may join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// For the first time: the token is to be marked as used.
    First,
    /// Again, with the key it joined with: the answer was lost.
    Repeated,
}

/// Why a node may not join. All of it is the operator's to put right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not `id.secret`, no such id, or another secret: which of these, a guesser need not know.
    #[error("the join token is not valid, or has expired and was removed; make one with `sluice token create`")]
    Invalid,
    /// Too late.
    #[error("join token {id} expired at {at}; make another with `sluice token create`")]
    Expired {
        /// Which token.
        id: String,
        /// Since when.
        at: Timestamp,
    },
    /// Bound to another name.
    #[error(
        "join token {id} is for node {bound} alone, not for {asked}; make one with `sluice token create --node {asked}`"
    )]
    OtherNode {
        /// Which token.
        id: String,
        /// Who may use it.
        bound: String,
        /// Who wanted to.
        asked: String,
    },
    /// Another node, or the same one with another key, was faster.
    #[error(
        "join token {id} has let node {node} in with another key, and lets one node in; make another with `sluice token create`"
    )]
    Used {
        /// Which token.
        id: String,
        /// Who used it.
        node: String,
    },
}

/// Why `admit` let nobody in.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The objects cannot be read or written now; to be tried again.
    #[error("read or mark the join token: {0}")]
    Unavailable(#[from] ApiError),
}

/// Whether `node` with this key may join by `token` now, as far as `record` knows the token.
pub fn decide(
    record: Option<&Record>,
    token: &JoinToken,
    (node, key_hash): (&str, &str),
    now: Timestamp,
) -> Result<Admission, Refusal> {
    let record = record.filter(|r| same_secret(&r.secret_hash, &token.secret_hash())).ok_or(Refusal::Invalid)?;
    let id = || record.id.clone();
    if now >= record.expires {
        return Err(Refusal::Expired { id: id(), at: record.expires });
    }
    if let Some(bound) = record.node.as_ref().filter(|bound| *bound != node) {
        return Err(Refusal::OtherNode { id: id(), bound: bound.clone(), asked: node.to_owned() });
    }
    match &record.used {
        None => Ok(Admission::First),
        Some(used) if used.node == node && used.key_hash == key_hash => Ok(Admission::Repeated),
        Some(used) => Err(Refusal::Used { id: id(), node: used.node.clone() }),
    }
}

/// The token that a Secret holds; `None` if it holds none, or not all of one.
pub fn record(secret: &Secret) -> Option<Record> {
    let data = secret.data.as_ref().filter(|_| secret.type_.as_deref() == Some(SECRET_TYPE))?;
    let text = |key: &str| Some(String::from_utf8_lossy(&data.get(key)?.0).into_owned()).filter(|t| !t.is_empty());
    let used =
        text(key::USED_BY_KEY).map(|key_hash| Use { node: text(key::USED_BY_NODE).unwrap_or_default(), key_hash });
    Some(Record {
        id: text(key::ID)?,
        secret_hash: text(key::SECRET_HASH)?,
        expires: text(key::EXPIRATION)?.parse().ok()?,
        node: text(key::NODE),
        used,
    })
}

/// Lets a node in, or says why not. What it lets in is marked as used when this returns.
pub async fn admit(client: &Client, token: &str, node: &str, key_hash: &str) -> Result<Admission, JoinError> {
    let token = JoinToken::parse(token).ok_or(Refusal::Invalid)?;
    let mut overtaken = None;
    for _ in 0..TRIES {
        let secret = client.get::<Secret>(NAMESPACE, &token.object_name()).await?.unwrap_or_default();
        let now = Timestamp::now();
        let admission = decide(record(&secret).as_ref(), &token, (node, key_hash), now)?;
        if admission == Admission::Repeated {
            return Ok(admission);
        }
        // The revision read goes with the change: it fails if anything came in between.
        match client.update(&marked(secret, node, key_hash, now)).await {
            Ok(_) => return Ok(admission),
            Err(error) if error.is_conflict() || error.is_not_found() => overtaken = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    Err(overtaken.map_or(JoinError::Refused(Refusal::Invalid), JoinError::Unavailable))
}

fn marked(mut secret: Secret, node: &str, key_hash: &str, now: Timestamp) -> Secret {
    let data: &mut BTreeMap<String, ByteString> = secret.data.get_or_insert_default();
    for (key, value) in [(key::USED_BY_NODE, node), (key::USED_BY_KEY, key_hash), (key::USED_AT, rfc3339(now).as_str())]
    {
        data.insert(key.to_owned(), ByteString(value.as_bytes().to_vec()));
    }
    secret
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "abcdef.0123456789abcdef";

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    fn known(node: Option<&str>, used: Option<(&str, &str)>) -> Record {
        Record {
            id: "abcdef".into(),
            secret_hash: JoinToken::parse(TOKEN).expect("a token").secret_hash(),
            expires: at(100),
            node: node.map(str::to_owned),
            used: used.map(|(node, key)| Use { node: node.into(), key_hash: key.into() }),
        }
    }

    /// Node `n1` with key `k1` asks.
    fn ask(record: Option<&Record>, token: &str, second: i64) -> Result<Admission, Refusal> {
        decide(record, &JoinToken::parse(token).expect("a token"), ("n1", "k1"), at(second))
    }

    #[test]
    fn one_node_one_key_one_life() {
        let expired = Refusal::Expired { id: "abcdef".into(), at: at(100) };
        let used = |node: &str| Refusal::Used { id: "abcdef".into(), node: node.into() };
        let bound = Refusal::OtherNode { id: "abcdef".into(), bound: "n2".into(), asked: "n1".into() };
        let cases = [
            ("unused", known(None, None), 99, Ok(Admission::First)),
            ("unused, for this node", known(Some("n1"), None), 99, Ok(Admission::First)),
            ("unused, for another node", known(Some("n2"), None), 99, Err(bound.clone())),
            ("used by the same key", known(None, Some(("n1", "k1"))), 99, Ok(Admission::Repeated)),
            ("used by the same key, bound", known(Some("n1"), Some(("n1", "k1"))), 99, Ok(Admission::Repeated)),
            ("used by another key", known(None, Some(("n1", "k2"))), 99, Err(used("n1"))),
            ("used by another node", known(None, Some(("n2", "k2"))), 99, Err(used("n2"))),
            ("the same key under another name", known(None, Some(("n2", "k1"))), 99, Err(used("n2"))),
            ("expired", known(None, None), 100, Err(expired.clone())),
            ("expired, used by the same key", known(None, Some(("n1", "k1"))), 101, Err(expired.clone())),
        ];
        for (what, record, second, verdict) in cases {
            assert_eq!(ask(Some(&record), TOKEN, second), verdict, "{what}");
        }
    }

    #[test]
    fn a_wrong_secret_learns_nothing_of_the_token() {
        let wrong = "abcdef.0123456789abcdeg";
        for record in [known(None, None), known(Some("n2"), None), known(None, Some(("n2", "k2")))] {
            assert_eq!(ask(Some(&record), wrong, 99), Err(Refusal::Invalid));
            assert_eq!(ask(Some(&record), wrong, 101), Err(Refusal::Invalid));
        }
        assert_eq!(ask(None, TOKEN, 99), Err(Refusal::Invalid));
    }

    #[test]
    fn what_is_marked_is_read_back() {
        let text = |text: &str| ByteString(text.as_bytes().to_vec());
        let data = [(key::ID, "abcdef"), (key::SECRET_HASH, "h"), (key::EXPIRATION, "1970-01-01T00:01:40Z")];
        let data = data.map(|(key, value)| (key.to_owned(), text(value)));
        let secret = Secret { data: Some(data.into()), type_: Some(SECRET_TYPE.to_owned()), ..Secret::default() };
        let fresh = record(&secret).expect("a token");
        assert_eq!((fresh.expires, &fresh.used), (at(100), &None));
        let used = record(&marked(secret.clone(), "n1", "k1", at(50))).expect("a token").used;
        assert_eq!(used, Some(Use { node: "n1".into(), key_hash: "k1".into() }));
        assert_eq!(record(&Secret { type_: Some("Opaque".to_owned()), ..secret.clone() }), None);
        for missing in [key::ID, key::SECRET_HASH, key::EXPIRATION] {
            let mut secret = secret.clone();
            secret.data.as_mut().expect("data").remove(missing);
            assert_eq!(record(&secret), None, "{missing}");
        }
    }
}
