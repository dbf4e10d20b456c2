//! A typed client of the cluster's API.

use anyhow::{Context, Result};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use sluice_wire::traffic::{PATH, Row};
use std::{future::Future, path::Path};

/// One thread is plenty for a command line.
pub fn block_on<T>(f: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(f)
}

pub async fn connect(kubeconfig: &Path) -> Result<Client> {
    let file = Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("read the kubeconfig {}; is a cluster up? (`sluice up`)", kubeconfig.display()))?;
    let current = file.current_context.clone().unwrap_or_default();
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.with_context(|| {
        format!("use context {current:?} of the kubeconfig {}; is a cluster up? (`sluice up`)", kubeconfig.display())
    })?;
    Ok(Client::try_from(config)?)
}

#[derive(serde::Deserialize)]
struct Traffic {
    items: Vec<Row>,
}

/// What the sidecars counted, per route and backend.
pub async fn traffic(client: &Client) -> Result<Vec<Row>> {
    let request = http::Request::get(PATH).body(vec![])?;
    let t: Traffic = client.request(request).await.context("read the measured traffic")?;
    Ok(t.items)
}
