//! The token with which a node joins, in the form of Kubernetes' bootstrap tokens (`id.secret`), and the Secret by which
//! the API knows it: type and name are Kubernetes' own, but only a hash of the secret is kept, so that neither the store
//! nor a backup of it lets anyone join.
//!
//! Whether a token lets a node join is decided in control.

use sha2::{Digest, Sha256};
use std::fmt;

/// Where tokens are kept.
pub const NAMESPACE: &str = "kube-system";
/// Type of their Secrets.
pub const SECRET_TYPE: &str = "bootstrap.kubernetes.io/token";
/// Their Secrets are named by this and the token's id.
pub const NAME_PREFIX: &str = "bootstrap-token-";

/// Keys of a token's Secret. The first three are there from the beginning, `NODE` only in a token that is bound to a
/// node's name, the rest once it has been used.
pub mod key {
    /// The token's public part.
    pub const ID: &str = "token-id";
    /// [`super::JoinToken::secret_hash`]. Kubernetes keeps the secret itself, as `token-secret`; Sluice does not.
    pub const SECRET_HASH: &str = "token-secret-sha256";
    /// RFC 3339; from then on the token is worth nothing, and is removed.
    pub const EXPIRATION: &str = "expiration";
    /// The only node that may join with it.
    pub const NODE: &str = "node";
    /// The node that has joined with it.
    pub const USED_BY_NODE: &str = "used-by-node";
    /// [`super::fingerprint`] of that node's public key.
    pub const USED_BY_KEY: &str = "used-by-key-sha256";
    /// RFC 3339.
    pub const USED_AT: &str = "used-at";
}

const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
const ID_LEN: usize = 6;
/// 82 random bits: a plain hash of them cannot be searched within a token's life.
const SECRET_LEN: usize = 16;

/// A token. It is shown whole by `Display` alone, never by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    id: String,
    secret: String,
}

impl JoinToken {
    /// A new one.
    pub fn generate(random: &mut impl rand::CryptoRng) -> Self {
        let mut letters = |count: usize| -> String {
            (0..count).map(|_| char::from(ALPHABET[rand::Rng::random_range(random, 0..ALPHABET.len())])).collect()
        };
        JoinToken { id: letters(ID_LEN), secret: letters(SECRET_LEN) }
    }

    /// Reads `id.secret`; `None` if it is anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, secret) = text.split_once('.')?;
        let fits = |part: &str, len: usize| part.len() == len && part.bytes().all(|b| ALPHABET.contains(&b));
        (fits(id, ID_LEN) && fits(secret, SECRET_LEN))
            .then(|| JoinToken { id: id.to_owned(), secret: secret.to_owned() })
    }

    /// Its public part: names its Secret.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Name of its Secret.
    pub fn object_name(&self) -> String {
        object_name(&self.id)
    }

    /// What is kept of the secret. The id is hashed with it, so that equal secrets do not look equal.
    pub fn secret_hash(&self) -> String {
        fingerprint(self.to_string().as_bytes())
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.id, self.secret)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}.…)", self.id)
    }
}

/// Name of the Secret of the token with this id.
pub fn object_name(id: &str) -> String {
    format!("{NAME_PREFIX}{id}")
}

/// SHA-256 in hexadecimal.
pub fn fingerprint(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_their_text_and_hide_from_debug() {
        let token = JoinToken::generate(&mut rand::rng());
        assert_eq!(JoinToken::parse(&token.to_string()), Some(token.clone()));
        assert_eq!(token.object_name(), format!("bootstrap-token-{}", token.id()));
        assert!(!format!("{token:?}").contains(&token.secret));
        assert_ne!(token.secret_hash(), JoinToken { id: "aaaaaa".into(), ..token.clone() }.secret_hash());
    }

    #[test]
    fn anything_else_is_no_token() {
        for text in [
            "",
            ".",
            "abcdef",
            "abcdef.",
            "abcdef.0123456789abcde",
            "abcdef.0123456789abcdefg",
            "Abcdef.0123456789abcdef",
            "abcdef.0123456789abcde/",
            "abcde.f0123456789abcdef",
            " abcdef.0123456789abcdef",
            "äbcde.0123456789abcdef",
        ] {
            assert_eq!(JoinToken::parse(text), None, "{text:?}");
        }
        assert!(JoinToken::parse("abcdef.0123456789abcdef").is_some());
    }

    #[test]
    fn a_fingerprint_is_sha256() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(fingerprint(b"abc"), abc);
    }
}
