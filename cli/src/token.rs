//! `sluice token`: the one-time tokens with which nodes join. The secret is made here and shown once; the API gets a hash
//! of it.

use crate::client::{block_on, connect};
use anyhow::{Context, Result, bail};
use clap::Subcommand;
use k8s_openapi::{
    ByteString,
    api::core::v1::Secret,
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::{SignedDuration, Timestamp},
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use sluice_wire::join::{JoinToken, NAMESPACE, SECRET_TYPE, key, object_name};
use std::{collections::BTreeMap, path::Path};

/// A token that nobody uses must not lie about for ever.
const LONGEST_TTL_S: i64 = 30 * 24 * 3600;

#[derive(Subcommand)]
pub enum Command {
    /// Make a token and print it: it is not shown again
    Create {
        /// The only node that may join with it (default: any name)
        #[arg(long)]
        node: Option<String>,
        /// How long it is good for: 90s, 30m, 24h, at most 720h
        #[arg(long, default_value = "24h", value_parser = ttl)]
        ttl: SignedDuration,
    },
    /// Which tokens there are, until when, and who has used them
    List,
    /// Take a token back; a node that has joined with it stays
    Delete {
        /// What stands before the dot
        id: String,
    },
}

pub fn run(kubeconfig: &Path, command: &Command) -> Result<()> {
    match command {
        Command::Create { node, ttl } => {
            println!("{}", create(kubeconfig, node.as_deref(), *ttl)?);
            Ok(())
        }
        Command::List => list(kubeconfig),
        Command::Delete { id } => delete(kubeconfig, id),
    }
}

/// A new token that the API knows.
pub fn create(kubeconfig: &Path, node: Option<&str>, ttl: SignedDuration) -> Result<JoinToken> {
    let token = JoinToken::generate(&mut rand::rng());
    let secret = secret(&token, node, Timestamp::now(), ttl);
    block_on(async {
        secrets(kubeconfig).await?.create(&PostParams::default(), &secret).await.context("create the join token")
    })?;
    Ok(token)
}

fn ttl(text: &str) -> Result<SignedDuration, String> {
    let ttl: SignedDuration = text.parse().map_err(|e| format!("{e}; write it as 30m or 24h"))?;
    if (1..=LONGEST_TTL_S).contains(&ttl.as_secs()) { Ok(ttl) } else { Err("must be between 1s and 720h".to_owned()) }
}

/// What the API keeps of a token.
fn secret(token: &JoinToken, node: Option<&str>, now: Timestamp, ttl: SignedDuration) -> Secret {
    let expiration = Timestamp::from_second(now.as_second() + ttl.as_secs()).unwrap_or(now).to_string();
    let mut data =
        vec![(key::ID, token.id().to_owned()), (key::SECRET_HASH, token.secret_hash()), (key::EXPIRATION, expiration)];
    data.extend(node.map(|node| (key::NODE, node.to_owned())));
    let data = data.into_iter().map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes()))).collect();
    Secret {
        metadata: ObjectMeta {
            name: Some(token.object_name()),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        type_: Some(SECRET_TYPE.to_owned()),
        data: Some(data),
        ..Secret::default()
    }
}

async fn secrets(kubeconfig: &Path) -> Result<Api<Secret>> {
    Ok(Api::namespaced(connect(kubeconfig).await?, NAMESPACE))
}

fn list(kubeconfig: &Path) -> Result<()> {
    let tokens = ListParams::default().fields(&format!("type={SECRET_TYPE}"));
    let found = block_on(async { secrets(kubeconfig).await?.list(&tokens).await.context("list the join tokens") })?;
    println!("{:<8} {:<22} {:<24} USED BY", "TOKEN", "EXPIRES", "FOR NODE");
    for secret in found {
        println!("{}", row(&secret.data.unwrap_or_default()));
    }
    Ok(())
}

fn row(data: &BTreeMap<String, ByteString>) -> String {
    let text = |key: &str, missing: &str| {
        data.get(key).map_or_else(|| missing.to_owned(), |value| String::from_utf8_lossy(&value.0).into_owned())
    };
    let used = text(key::USED_BY_NODE, "-");
    format!("{:<8} {:<22} {:<24} {used}", text(key::ID, "?"), text(key::EXPIRATION, "?"), text(key::NODE, "any"))
}

fn delete(kubeconfig: &Path, id: &str) -> Result<()> {
    // Whoever gives the whole token means this one too; the secret is not needed.
    let id = id.split('.').next().unwrap_or_default();
    block_on(async {
        match secrets(kubeconfig).await?.delete(&object_name(id), &DeleteParams::default()).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(e)) if e.code == 404 => bail!("there is no join token {id}; see `sluice token list`"),
            Err(e) => Err(e).context("delete the join token"),
        }
    })?;
    println!("join token {id} is deleted");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_are_bounded() {
        assert_eq!(ttl("24h").map(|t| t.as_secs()), Ok(86_400));
        assert_eq!(ttl("1h 30m").map(|t| t.as_secs()), Ok(5_400));
        for wrong in ["", "24", "0s", "-1h", "721h", "soon"] {
            assert!(ttl(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_api_gets_no_secret() {
        let token = JoinToken::generate(&mut rand::rng());
        let now = Timestamp::from_second(1_000_000_000).expect("in range");
        let made = secret(&token, Some("n1"), now, SignedDuration::from_secs(60));
        let data = made.data.clone().expect("data");
        assert_eq!(data[key::EXPIRATION].0, b"2001-09-09T01:47:40Z");
        assert_eq!(row(&data), format!("{:<8} {:<22} {:<24} -", token.id(), "2001-09-09T01:47:40Z", "n1"));
        let secret_part = token.to_string().split_off(7);
        assert!(data.values().all(|value| !String::from_utf8_lossy(&value.0).contains(&secret_part)));
        assert_eq!(made.metadata.name, Some(token.object_name()));
    }
}
