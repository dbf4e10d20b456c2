//! What a container asks to be done after its start and before its end: exec, httpGet, sleep (Kubernetes,
//! LifecycleHandler). httpGet is dialled as probes are.

use super::probe::{self, Target};
use k8s_openapi::api::core::v1::LifecycleHandler;
use std::time::Duration;

/// Runs a hook to its end, or for `limit`.
pub async fn run(hook: &LifecycleHandler, t: &Target, limit: Duration) -> Result<(), String> {
    let done = async {
        if let Some(e) = &hook.exec {
            return probe::exec(e, t, limit).await;
        }
        if let Some(h) = &hook.http_get {
            return probe::http(h, t).await;
        }
        if let Some(s) = &hook.sleep {
            tokio::time::sleep(Duration::from_secs(s.seconds.max(0).unsigned_abs())).await;
            return Ok(());
        }
        Err("the hook names neither exec, httpGet nor sleep".to_owned())
    };
    tokio::time::timeout(limit, done).await.unwrap_or_else(|_| Err(format!("not done within {} s", limit.as_secs())))
}
