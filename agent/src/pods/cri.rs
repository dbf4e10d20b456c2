//! The runtime behind its socket (CRI v1 over gRPC): the calls the pod worker needs, and nothing decided.

use super::convert::LABEL_UID;
use super::plan::{ContainerSeen, SandboxSeen, Seen, State};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    self as cri, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use std::{collections::HashMap, path::PathBuf, time::Duration};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

#[derive(Debug, thiserror::Error)]
pub enum CriError {
    #[error("container runtime at {socket}: {source}; is containerd running with its CRI plugin enabled?")]
    Connect { socket: String, source: tonic::transport::Error },
    #[error("{call}: {}", .status.message())]
    Call { call: &'static str, status: Box<tonic::Status> },
}

impl CriError {
    fn call(call: &'static str) -> impl FnOnce(tonic::Status) -> Self {
        move |status| Self::Call { call, status: Box::new(status) }
    }
}

type Result<T> = std::result::Result<T, CriError>;

/// Of each call, beyond what the call itself waits for (an app's grace period, a command, a pull's progress).
const LIMIT: Duration = Duration::from_secs(120);
/// A pull of a large image over a slow line.
const PULL_LIMIT: Duration = Duration::from_secs(1800);

#[derive(Clone)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    v4_first: bool,
}

/// An image, and as whom its programs run unless the pod says otherwise.
pub struct Image {
    /// The runtime's name for it.
    pub id: String,
    uid: Option<i64>,
    username: String,
}

impl Image {
    /// A number, or the name that the image gives; root when it gives none.
    pub fn user(&self) -> std::result::Result<i64, &str> {
        match self.uid {
            None if !self.username.is_empty() => Err(&self.username),
            uid => Ok(uid.unwrap_or(0)),
        }
    }
}

impl Cri {
    /// Lazily: the runtime may start after the agent, and come back after a crash.
    /// `v4_first`: of a pod's addresses, that of IPv4 is its first.
    pub fn new(socket: PathBuf, v4_first: bool) -> Result<Self> {
        let at = socket.display().to_string();
        let connect = |source| CriError::Connect { socket: at.clone(), source };
        let channel = Endpoint::try_from("http://cri").map_err(connect)?.connect_with_connector_lazy(
            tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }),
        );
        let limit = 32 << 20;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(limit),
            images: ImageServiceClient::new(channel).max_decoding_message_size(limit),
            v4_first,
        })
    }

    /// The runtime answers and its network plugin is configured; otherwise why not.
    pub async fn ready(&self) -> Result<std::result::Result<(), String>> {
        let r = self
            .runtime
            .clone()
            .status(limited(cri::StatusRequest::default()))
            .await
            .map_err(CriError::call("Status"))?;
        let conditions = r.into_inner().status.unwrap_or_default().conditions;
        Ok(match conditions.iter().find(|c| !c.status) {
            Some(c) => Err(format!("{}: {}", c.r#type, c.message)),
            None => Ok(()),
        })
    }

    pub async fn version(&self) -> Result<String> {
        let r = self
            .runtime
            .clone()
            .version(limited(cri::VersionRequest::default()))
            .await
            .map_err(CriError::call("Version"))?;
        let v = r.into_inner();
        Ok(format!("{}://{}", v.runtime_name, v.runtime_version))
    }

    /// Everything on the node, by pod UID.
    pub async fn list(&self) -> Result<HashMap<String, Seen>> {
        self.list_with(HashMap::new()).await
    }

    /// One pod, with what the list does not carry: times, exit codes and addresses.
    pub async fn pod(&self, uid: &str) -> Result<Seen> {
        let selector = HashMap::from([(LABEL_UID.to_owned(), uid.to_owned())]);
        let mut seen = self.list_with(selector).await?.remove(uid).unwrap_or_default();
        for c in &mut seen.containers {
            self.container_status(c).await?;
        }
        for s in seen.sandboxes.iter_mut().filter(|s| s.ready) {
            s.ips = self.sandbox_ips(&s.id).await?;
        }
        Ok(seen)
    }

    async fn list_with(&self, selector: HashMap<String, String>) -> Result<HashMap<String, Seen>> {
        let mut out: HashMap<String, Seen> = HashMap::new();
        let mut by_sandbox: HashMap<String, String> = HashMap::new();
        let filter = cri::PodSandboxFilter { label_selector: selector.clone(), ..Default::default() };
        let r =
            self.runtime.clone().list_pod_sandbox(limited(cri::ListPodSandboxRequest { filter: Some(filter) })).await;
        for s in r.map_err(CriError::call("ListPodSandbox"))?.into_inner().items {
            let meta = s.metadata.unwrap_or_default();
            by_sandbox.insert(s.id.clone(), meta.uid.clone());
            let ready = s.state == cri::PodSandboxState::SandboxReady as i32;
            let seen = SandboxSeen { id: s.id, attempt: meta.attempt, ready, created: s.created_at, ips: vec![] };
            out.entry(meta.uid).or_default().sandboxes.push(seen);
        }
        let filter = cri::ContainerFilter { label_selector: selector, ..Default::default() };
        let r =
            self.runtime.clone().list_containers(limited(cri::ListContainersRequest { filter: Some(filter) })).await;
        for c in r.map_err(CriError::call("ListContainers"))?.into_inner().containers {
            let uid = by_sandbox.get(&c.pod_sandbox_id).or_else(|| c.labels.get(LABEL_UID)).cloned();
            if let Some(uid) = uid {
                out.entry(uid).or_default().containers.push(listed(c));
            }
        }
        Ok(out)
    }

    /// Start, end and exit code, which the list does not carry.
    pub async fn container_status(&self, c: &mut ContainerSeen) -> Result<()> {
        let req = cri::ContainerStatusRequest { container_id: c.id.clone(), verbose: false };
        let r = self.runtime.clone().container_status(limited(req)).await.map_err(CriError::call("ContainerStatus"))?;
        let s = r.into_inner().status.unwrap_or_default();
        c.state = state(s.state);
        c.exit_code = s.exit_code;
        c.started = s.started_at;
        c.finished = s.finished_at;
        c.reason = s.reason;
        c.image_ref = s.image_ref;
        if let Some(i) = s.image {
            c.image = if i.user_specified_image.is_empty() { i.image } else { i.user_specified_image };
        }
        Ok(())
    }

    pub async fn sandbox_ips(&self, id: &str) -> Result<Vec<std::net::IpAddr>> {
        let req = cri::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let r =
            self.runtime.clone().pod_sandbox_status(limited(req)).await.map_err(CriError::call("PodSandboxStatus"))?;
        let n = r.into_inner().status.unwrap_or_default().network.unwrap_or_default();
        let all = std::iter::once(n.ip).chain(n.additional_ips.into_iter().map(|p| p.ip));
        let mut all: Vec<std::net::IpAddr> = all.filter_map(|ip| ip.parse().ok()).collect();
        // The runtime has an order of its own; the cluster's is that of the node's addresses, as in Kubernetes.
        all.sort_by_key(|ip| ip.is_ipv4() != self.v4_first);
        Ok(all)
    }

    pub async fn run_sandbox(&self, config: cri::PodSandboxConfig) -> Result<String> {
        let req = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        let r = self.runtime.clone().run_pod_sandbox(limited(req)).await.map_err(CriError::call("RunPodSandbox"))?;
        Ok(r.into_inner().pod_sandbox_id)
    }

    pub async fn stop_sandbox(&self, id: &str) -> Result<()> {
        let req = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.clone().stop_pod_sandbox(limited(req)).await.map_err(CriError::call("StopPodSandbox"))?;
        Ok(())
    }

    pub async fn remove_sandbox(&self, id: &str) -> Result<()> {
        let req = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.clone().remove_pod_sandbox(limited(req)).await.map_err(CriError::call("RemovePodSandbox"))?;
        Ok(())
    }

    pub async fn create_container(
        &self,
        sandbox: &str,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String> {
        let req = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let r = self.runtime.clone().create_container(limited(req)).await.map_err(CriError::call("CreateContainer"))?;
        Ok(r.into_inner().container_id)
    }

    pub async fn start_container(&self, id: &str) -> Result<()> {
        let req = cri::StartContainerRequest { container_id: id.to_owned() };
        self.runtime.clone().start_container(limited(req)).await.map_err(CriError::call("StartContainer"))?;
        Ok(())
    }

    /// The runtime waits for the app's end up to `grace_s` and then kills it; its own limit is that and a margin.
    pub async fn stop_container(&self, id: &str, grace_s: i64) -> Result<()> {
        let message = cri::StopContainerRequest { container_id: id.to_owned(), timeout: grace_s };
        let mut req = tonic::Request::new(message);
        req.set_timeout(LIMIT + Duration::from_secs(grace_s.max(0).unsigned_abs()));
        self.runtime.clone().stop_container(req).await.map_err(CriError::call("StopContainer"))?;
        Ok(())
    }

    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let req = cri::RemoveContainerRequest { container_id: id.to_owned() };
        self.runtime.clone().remove_container(limited(req)).await.map_err(CriError::call("RemoveContainer"))?;
        Ok(())
    }

    /// Lets the runtime go on with a log file of the same name after it was put aside.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let req = cri::ReopenContainerLogRequest { container_id: id.to_owned() };
        self.runtime.clone().reopen_container_log(limited(req)).await.map_err(CriError::call("ReopenContainerLog"))?;
        Ok(())
    }

    /// Exit code and combined output of a command in a container.
    pub async fn exec(&self, id: &str, cmd: Vec<String>, timeout: Duration) -> Result<(i32, String)> {
        let timeout_s = i64::try_from(timeout.as_secs().max(1)).unwrap_or(i64::MAX);
        let mut req =
            tonic::Request::new(cri::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: timeout_s });
        req.set_timeout(LIMIT + timeout);
        let r = self.runtime.clone().exec_sync(req).await.map_err(CriError::call("ExecSync"))?.into_inner();
        let mut out = r.stdout;
        out.extend(r.stderr);
        out.truncate(4096);
        Ok((r.exit_code, String::from_utf8_lossy(&out).into_owned()))
    }

    /// An image that is on the node.
    pub async fn image(&self, image: &str) -> Result<Option<Image>> {
        let req = cri::ImageStatusRequest { image: Some(spec(image)), verbose: false };
        let r = self.images.clone().image_status(limited(req)).await.map_err(CriError::call("ImageStatus"))?;
        Ok(r.into_inner().image.map(|i| Image { id: i.id, uid: i.uid.map(|u| u.value), username: i.username }))
    }

    pub async fn pull(&self, image: &str) -> Result<()> {
        let mut req = tonic::Request::new(cri::PullImageRequest { image: Some(spec(image)), ..Default::default() });
        req.set_timeout(PULL_LIMIT);
        self.images.clone().pull_image(req).await.map_err(CriError::call("PullImage"))?;
        Ok(())
    }
}

/// A call that ends within [`LIMIT`].
fn limited<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(LIMIT);
    request
}

fn spec(image: &str) -> cri::ImageSpec {
    cri::ImageSpec { image: image.to_owned(), ..Default::default() }
}

fn state(s: i32) -> State {
    match cri::ContainerState::try_from(s) {
        Ok(cri::ContainerState::ContainerRunning) => State::Running,
        Ok(cri::ContainerState::ContainerCreated) => State::Created,
        _ => State::Exited,
    }
}

fn listed(c: cri::Container) -> ContainerSeen {
    let meta = c.metadata.unwrap_or_default();
    ContainerSeen {
        id: c.id,
        sandbox: c.pod_sandbox_id,
        name: meta.name,
        attempt: meta.attempt,
        state: state(c.state),
        exit_code: 0,
        started: 0,
        finished: 0,
        reason: String::new(),
        image: c.image.map(|i| i.image).unwrap_or_default(),
        image_ref: c.image_ref,
    }
}
