//! One task per pod: looks, asks `plan`, does what it says, reports the status; again after every change. It decides
//! nothing that `plan` and `status` could decide.

use super::{
    Deps, SIDECAR,
    convert::{self, ContainerContext, ConvertError, Refs},
    cri::{CriError, Image},
    events::Type,
    hooks,
    plan::{self, Action, Backoff, Inputs, Nanos, Plan, Seen},
    probe::Target,
    probes::{self, Probes},
    status::{self, Context, Waiting},
    volumes::VolumeError,
};
use k8s_openapi::{
    api::core::v1::{ConfigMap, Container, LifecycleHandler, Pod, PodSpec, PodStatus, Secret, Volume, VolumeMount},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

/// How long the apps of a deleted pod go on while their endpoints are being withdrawn, at most.
const WITHDRAW_WAIT: Duration = Duration::from_secs(3);
/// And for how long after that, so that requests already on their way arrive.
const WITHDRAW_SETTLE: Duration = Duration::from_millis(300);
/// Looks again after a failed step.
const RETRY: Duration = Duration::from_secs(1);
/// How often the files of config maps and secrets are brought up to date (kubelet's syncFrequency).
const REFRESH: Duration = Duration::from_secs(60);
/// How long a postStart hook may take.
const POST_START_LIMIT: Duration = Duration::from_secs(120);
/// Steps in one go, before the queue is looked at again.
const MAX_STEPS: usize = 32;

/// What a worker is told: the newest state of things. It is told the same again when the runtime shows something new.
#[derive(Clone)]
pub struct Told {
    /// The object as the API last had it.
    pub pod: Arc<Pod>,
    /// The API no longer has it.
    pub removed: bool,
}

#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Cri(#[from] CriError),
    #[error(transparent)]
    Convert(#[from] ConvertError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("{0}")]
    Network(String),
    #[error("{reason}: {message}")]
    Image { reason: &'static str, message: String },
    #[error("postStart hook: {0}")]
    PostStart(String),
    #[error("read {what}: {source}")]
    Api { what: String, source: Box<kube::Error> },
}

impl StepError {
    /// Kubernetes' reason for a container that waits because of this.
    fn reason(&self) -> &'static str {
        match self {
            Self::Cri(CriError::Call { call: "StartContainer", .. }) => "RunContainerError",
            Self::Cri(_) | Self::Network(_) => "CreateContainerError",
            Self::Convert(_) | Self::Volume(_) | Self::Api { .. } => "CreateContainerConfigError",
            Self::PostStart(_) => "PostStartHookError",
            Self::Image { reason, .. } => reason,
        }
    }
}

pub struct Worker {
    deps: Arc<Deps>,
    pod: Pod,
    /// What `pod` was made from.
    heard: Arc<Pod>,
    removed: bool,
    seen: Seen,
    backoff: Backoff,
    waiting: Waiting,
    sandbox_error: Option<String>,
    probes: Probes,
    reported: Option<PodStatus>,
    deleted_since: Option<Instant>,
    withdrawn_since: Option<Instant>,
    hooks_done: bool,
    /// When config maps and secrets in files were last read.
    refreshed: Instant,
    wake: Option<Instant>,
}

impl Worker {
    pub fn new(deps: Arc<Deps>, heard: Arc<Pod>) -> Self {
        Self {
            deps,
            reported: None,
            pod: Pod::clone(&heard),
            removed: false,
            seen: Seen::default(),
            backoff: Backoff::default(),
            waiting: Waiting::new(),
            sandbox_error: None,
            probes: Probes::new(&heard),
            heard,
            deleted_since: None,
            withdrawn_since: None,
            hooks_done: false,
            refreshed: Instant::now(),
            wake: None,
        }
    }

    /// Until the pod is gone from this node.
    pub async fn run(mut self, mut told: watch::Receiver<Told>) {
        loop {
            if self.reconcile().await {
                break;
            }
            let wake = self.wake.unwrap_or_else(|| Instant::now() + Duration::from_secs(30));
            tokio::select! {
                heard = told.changed() => {
                    if heard.is_err() {
                        return;
                    }
                    let now = told.borrow_and_update().clone();
                    self.take(now);
                }
                () = self.probes.changed() => {}
                () = sleep_until(wake) => {}
            }
            self.refresh().await;
            for failure in self.probes.take_failures() {
                self.event(Type::Warning, "Unhealthy", failure);
            }
        }
        self.probes.stop_all();
        self.deps.network.gone(convert::uid(&self.pod));
        if let Err(error) = self.deps.dirs.tear_down(convert::uid(&self.pod)) {
            tracing::warn!(pod = %self.id(), %error, "volumes not removed");
        }
    }

    fn take(&mut self, told: Told) {
        if !Arc::ptr_eq(&told.pod, &self.heard) {
            self.pod = Pod::clone(&told.pod);
            self.heard = told.pod;
        }
        self.removed = told.removed;
        if self.removed && self.pod.metadata.deletion_timestamp.is_none() {
            self.pod.metadata.deletion_timestamp = Some(Time(Timestamp::now()));
        }
    }

    /// Brings changed config maps and secrets into the files of running containers, within `REFRESH` and the time
    /// between two looks. What cannot be read now stays as it is.
    async fn refresh(&mut self) {
        let files = |v: &Volume| v.config_map.is_some() || v.secret.is_some();
        let Some(spec) = self.pod.spec.as_ref().filter(|s| s.volumes.iter().flatten().any(files)) else { return };
        let running = self.seen.containers.iter().any(|c| c.state == plan::State::Running);
        if !running || self.refreshed.elapsed() < REFRESH || self.pod.metadata.deletion_timestamp.is_some() {
            return;
        }
        self.refreshed = Instant::now();
        let written = match self.references(spec).await {
            Ok(refs) => self.deps.dirs.set_up(&self.pod, &refs).map(drop).map_err(StepError::from),
            Err(e) => Err(e),
        };
        if let Err(error) = written {
            tracing::warn!(pod = %self.id(), %error, "volumes not brought up to date");
        }
    }

    fn id(&self) -> String {
        format!("{}/{}", convert::namespace(&self.pod), convert::name(&self.pod))
    }

    fn event(&self, type_: Type, reason: &str, message: String) {
        self.deps.events.emit(&self.pod, type_, reason, message);
    }

    /// True when the pod is gone.
    async fn reconcile(&mut self) -> bool {
        self.wake = None;
        for _ in 0..MAX_STEPS {
            match self.deps.cri.pod(convert::uid(&self.pod)).await {
                Ok(seen) => self.seen = seen,
                Err(error) => {
                    tracing::warn!(pod = %self.id(), %error, "runtime not readable");
                    self.wake_in(RETRY);
                    return false;
                }
            }
            self.probes.follow(&self.pod, &self.seen, &self.deps);
            if let Some(sidecar) = self.seen.container(SIDECAR).filter(|c| c.state == plan::State::Running) {
                self.deps.network.sidecar(convert::uid(&self.pod), &sidecar.id);
            }
            let plan = self.plan();
            self.report().await;
            if let Some(at) = plan.wake {
                self.wake_in(Duration::from_nanos((at - now()).max(0).unsigned_abs()));
            }
            if plan.actions.is_empty() {
                return false;
            }
            for action in plan.actions {
                match self.act(action).await {
                    Ok(true) => return true,
                    Ok(false) => {}
                    Err(error) => {
                        tracing::warn!(pod = %self.id(), %error, "step failed");
                        self.report().await;
                        self.wake_in(RETRY);
                        return false;
                    }
                }
            }
        }
        self.wake_in(Duration::ZERO);
        false
    }

    fn wake_in(&mut self, d: Duration) {
        let at = Instant::now() + d;
        self.wake = Some(self.wake.map_or(at, |w| w.min(at)));
    }

    fn plan(&mut self) -> Plan {
        let withdrawn = self.withdrawn();
        let health = self.probes.health();
        let inputs = Inputs { seen: &self.seen, health: &health, now: now(), withdrawn };
        plan::plan(&self.pod, &mut self.backoff, &inputs)
    }

    /// The apps of a deleted pod end only after nobody sends to them any more, as far as this node can see.
    fn withdrawn(&mut self) -> bool {
        if self.pod.metadata.deletion_timestamp.is_none() || self.removed {
            return true;
        }
        let t = Instant::now();
        let deleted = *self.deleted_since.get_or_insert(t);
        if self.withdrawn_since.is_none() && (self.deps.network.withdrawn(&self.pod) || t >= deleted + WITHDRAW_WAIT) {
            self.withdrawn_since = Some(t);
        }
        match self.withdrawn_since {
            Some(since) if t >= since + WITHDRAW_SETTLE => true,
            _ => {
                self.wake_in(Duration::from_millis(50));
                false
            }
        }
    }

    async fn report(&mut self) {
        let health = self.probes.health();
        let context = Context {
            seen: &self.seen,
            health: &health,
            backoff: &self.backoff,
            waiting: &self.waiting,
            sandbox_error: self.sandbox_error.as_deref(),
            host_ips: &self.deps.node.host_ips,
            now: now(),
        };
        let status = status::status(&self.pod, &context);
        if self.removed || self.reported.as_ref() == Some(&status) || self.pod.status.as_ref() == Some(&status) {
            return;
        }
        let patch = serde_json::json!({"metadata": {"uid": convert::uid(&self.pod)}, "status": status});
        match self.api().patch_status(convert::name(&self.pod), &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(p) if p.metadata.uid == self.pod.metadata.uid => {
                self.pod.status = Some(status.clone());
                self.reported = Some(status);
            }
            Ok(_) => {}
            Err(kube::Error::Api(e)) if e.code == 404 || e.code == 409 => self.reported = Some(status),
            Err(error) => {
                tracing::debug!(pod = %self.id(), %error, "status not written, trying again");
                self.wake_in(RETRY);
            }
        }
    }

    fn api(&self) -> Api<Pod> {
        Api::namespaced(self.deps.client.clone(), convert::namespace(&self.pod))
    }

    /// True when nothing of the pod is left.
    async fn act(&mut self, action: Action) -> Result<bool, StepError> {
        match action {
            Action::CreateSandbox { attempt } => self.create_sandbox(attempt).await?,
            Action::StopSandbox { id } => self.deps.cri.stop_sandbox(&id).await?,
            Action::RemoveSandbox { id } => self.deps.cri.remove_sandbox(&id).await?,
            Action::RemoveContainer { id } => self.deps.cri.remove_container(&id).await?,
            Action::Start { name, attempt } => self.start(&name, attempt).await,
            Action::Stop { ids, grace_s, why } => self.stop(ids, grace_s, &why).await?,
            Action::Gone => {
                self.forget().await?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn create_sandbox(&mut self, attempt: u32) -> Result<(), StepError> {
        let spec = self.pod.spec.clone().unwrap_or_default();
        let config = convert::sandbox(&self.pod, &spec, attempt, &self.deps.node);
        let made = match self.deps.cri.run_sandbox(config).await {
            Ok(_) if spec.host_network == Some(true) => Ok(()),
            Ok(_) => self.deps.network.attached(&self.pod).map_err(StepError::Network),
            Err(e) => Err(e.into()),
        };
        match &made {
            Ok(()) => self.sandbox_error = None,
            Err(e) => {
                self.event(Type::Warning, "FailedCreatePodSandBox", format!("Failed to create pod sandbox: {e}"));
                self.sandbox_error = Some(e.to_string());
            }
        }
        made
    }

    async fn start(&mut self, name: &str, attempt: u32) {
        match self.try_start(name, attempt).await {
            Ok(()) => {
                self.waiting.remove(name);
                self.backoff.start_succeeded(name);
            }
            Err(e) => {
                self.event(Type::Warning, "Failed", format!("Error: {e}"));
                self.waiting.insert(name.to_owned(), (e.reason().to_owned(), e.to_string()));
                self.backoff.start_failed(name, now());
            }
        }
    }

    async fn try_start(&mut self, name: &str, attempt: u32) -> Result<(), StepError> {
        let spec = self.pod.spec.clone().unwrap_or_default();
        let all = spec.init_containers.iter().flatten().chain(&spec.containers);
        let Some(c) = all.clone().find(|c| c.name == name).cloned() else { return Ok(()) };
        let Some(sandbox) = self.seen.sandbox().cloned() else { return Ok(()) };
        if attempt > 0 && self.seen.container(name).is_some() {
            tracing::info!(pod = %self.id(), container = name, attempt, "restarting");
        }
        // The last gate before anything of the app runs: its network is complete, capture included.
        if spec.host_network != Some(true) {
            self.deps.network.attached(&self.pod).map_err(StepError::Network)?;
        }
        let refs = self.references(&spec).await?;
        let host_paths = self.deps.dirs.set_up(&self.pod, &refs)?;
        let image = self.image(&c).await?;
        convert::may_run(&spec, &c, image.user())?;
        let pod_ips: Vec<String> = match spec.host_network {
            Some(true) => self.deps.node.host_ips.iter().map(ToString::to_string).collect(),
            _ => sandbox.ips.iter().map(ToString::to_string).collect(),
        };
        let sub_path = |i: usize, m: &VolumeMount, sub: &str| {
            let volume = host_paths.get(&m.name).map(String::as_str).unwrap_or_default();
            let uid = convert::uid(&self.pod);
            self.deps.dirs.sub_path(uid, volume, name, i, sub).map_err(|e| e.to_string())
        };
        let context = ContainerContext {
            sub_path: &sub_path,
            node: &self.deps.node,
            refs: &refs,
            image_ref: &image.id,
            host_paths: &host_paths,
            pod_ips: &pod_ips,
        };
        let config = convert::container(&self.pod, &spec, &c, attempt, &context)?;
        let sandbox_config = convert::sandbox(&self.pod, &spec, sandbox.attempt, &self.deps.node);
        // The largest of the calls: what awaits it should not carry it.
        let id = Box::pin(self.deps.cri.create_container(&sandbox.id, config, sandbox_config)).await?;
        self.event(Type::Normal, "Created", format!("Created container: {name}"));
        if name == SIDECAR {
            self.deps.network.sidecar(convert::uid(&self.pod), &id);
        }
        if let Err(e) = self.deps.cri.start_container(&id).await {
            // A container that never ran is no restart: take it away so that the next attempt starts clean.
            let _ = self.deps.cri.remove_container(&id).await;
            return Err(e.into());
        }
        self.event(Type::Normal, "Started", format!("Started container {name}"));
        self.post_start(&c, &id).await
    }

    /// The image on this node, pulled if the policy says so (Kubernetes: `:latest` means Always, others IfNotPresent).
    async fn image(&self, c: &Container) -> Result<Image, StepError> {
        let image = c.image.clone().unwrap_or_default();
        let tag = image.rsplit('/').next().unwrap_or(&image);
        let latest = !tag.contains('@') && (!tag.contains(':') || tag.ends_with(":latest"));
        let policy = c.image_pull_policy.as_deref().unwrap_or(if latest { "Always" } else { "IfNotPresent" });
        if policy != "Always"
            && let Some(found) = self.deps.cri.image(&image).await?
        {
            self.event(Type::Normal, "Pulled", format!("Container image \"{image}\" already present on machine"));
            return Ok(found);
        }
        if policy == "Never" {
            let message = format!("Container image \"{image}\" is not present with pull policy of Never");
            return Err(StepError::Image { reason: "ErrImageNeverPull", message });
        }
        self.event(Type::Normal, "Pulling", format!("Pulling image \"{image}\""));
        let pulled = self.deps.cri.pull(&image).await;
        if let Err(e) = pulled {
            let message = format!("Failed to pull image \"{image}\": {e}");
            let again = self.waiting.contains_key(&c.name);
            return Err(StepError::Image { reason: if again { "ImagePullBackOff" } else { "ErrImagePull" }, message });
        }
        let missing = || StepError::Image {
            reason: "ErrImagePull",
            message: format!("image \"{image}\" is not there after its pull"),
        };
        self.deps.cri.image(&image).await?.ok_or_else(missing)
    }

    /// Reads the config maps and secrets that the pod names.
    async fn references(&self, spec: &PodSpec) -> Result<Refs, StepError> {
        let (config_maps, secrets) = referenced(spec);
        let ns = convert::namespace(&self.pod);
        let mut refs = Refs::default();
        for name in config_maps {
            let api: Api<ConfigMap> = Api::namespaced(self.deps.client.clone(), ns);
            let got = api
                .get_opt(&name)
                .await
                .map_err(|e| StepError::Api { what: format!("configmap {ns}/{name}"), source: Box::new(e) })?;
            if let Some(m) = got {
                let text = m.data.into_iter().flatten().map(|(k, v)| (k, v.into_bytes()));
                let binary = m.binary_data.into_iter().flatten().map(|(k, v)| (k, v.0));
                refs.config_maps.insert(name, text.chain(binary).collect());
            }
        }
        for name in secrets {
            let api: Api<Secret> = Api::namespaced(self.deps.client.clone(), ns);
            let got = api
                .get_opt(&name)
                .await
                .map_err(|e| StepError::Api { what: format!("secret {ns}/{name}"), source: Box::new(e) })?;
            if let Some(s) = got {
                refs.secrets.insert(name, s.data.into_iter().flatten().map(|(k, v)| (k, v.0)).collect());
            }
        }
        Ok(refs)
    }

    async fn stop(&mut self, ids: Vec<String>, grace_s: i64, why: &str) -> Result<(), StepError> {
        let spec = self.pod.spec.clone().unwrap_or_default();
        let grace_s = match grace_s {
            g if g >= 0 => g,
            _ => spec.termination_grace_period_seconds.unwrap_or(30),
        };
        let named: Vec<_> = ids
            .iter()
            .map(|id| {
                let name = self.seen.containers.iter().find(|c| c.id == *id).map(|c| c.name.clone());
                (id.clone(), name.unwrap_or_default())
            })
            .collect();
        for (_, name) in &named {
            self.event(Type::Normal, "Killing", format!("Stopping container {name}: {why}"));
        }
        let run_hooks = !std::mem::replace(&mut self.hooks_done, self.pod.metadata.deletion_timestamp.is_some());
        let this = &*self;
        let all = named.iter().map(|(id, name)| {
            let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
            let hook = all.clone().find(|c| c.name == *name).filter(|_| run_hooks).and_then(|c| {
                let hook = c.lifecycle.as_ref()?.pre_stop.clone()?;
                Some((hook, probes::target(&this.pod, c, id, &this.seen, &this.deps)?))
            });
            async move {
                let left = match &hook {
                    Some((hook, target)) => grace_s - this.pre_stop(hook, target, grace_s).await,
                    None => grace_s,
                };
                this.deps.cri.stop_container(id, left.max(0)).await
            }
        });
        let results: Vec<Result<(), CriError>> = futures::future::join_all(all).await;
        results.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(())
    }

    /// Runs a preStop hook; the seconds it took. The container ends whatever the hook says.
    async fn pre_stop(&self, hook: &LifecycleHandler, target: &Target, grace_s: i64) -> i64 {
        let began = Instant::now();
        if let Err(e) = hooks::run(hook, target, Duration::from_secs(grace_s.max(1).unsigned_abs())).await {
            self.event(Type::Warning, "FailedPreStopHook", format!("PreStopHook failed: {e}"));
        }
        i64::try_from(began.elapsed().as_secs()).unwrap_or(i64::MAX)
    }

    /// Runs a postStart hook; a container whose hook fails is stopped.
    async fn post_start(&self, c: &Container, id: &str) -> Result<(), StepError> {
        let Some(hook) = c.lifecycle.as_ref().and_then(|l| l.post_start.as_ref()) else { return Ok(()) };
        let Some(target) = probes::target(&self.pod, c, id, &self.seen, &self.deps) else { return Ok(()) };
        let Err(why) = hooks::run(hook, &target, POST_START_LIMIT).await else { return Ok(()) };
        self.event(Type::Warning, "FailedPostStartHook", format!("PostStartHook failed: {why}"));
        self.deps.cri.stop_container(id, 1).await?;
        Err(StepError::PostStart(why))
    }

    async fn forget(&mut self) -> Result<(), StepError> {
        if self.removed {
            return Ok(());
        }
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: self.pod.metadata.uid.clone(), resource_version: None }),
            ..DeleteParams::default()
        };
        match self.api().delete(convert::name(&self.pod), &params).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(e)) if e.code == 404 || e.code == 409 => Ok(()),
            Err(e) => Err(StepError::Api { what: format!("pod {}", self.id()), source: Box::new(e) }),
        }
    }
}

/// Names of the config maps and secrets a pod's containers and volumes refer to.
fn referenced(spec: &PodSpec) -> (Vec<String>, Vec<String>) {
    let (mut maps, mut secrets) = (vec![], vec![]);
    for c in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        for from in c.env_from.iter().flatten() {
            maps.extend(from.config_map_ref.iter().map(|r| r.name.clone()));
            secrets.extend(from.secret_ref.iter().map(|r| r.name.clone()));
        }
        for from in c.env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
            maps.extend(from.config_map_key_ref.iter().map(|r| r.name.clone()));
            secrets.extend(from.secret_key_ref.iter().map(|r| r.name.clone()));
        }
    }
    for v in spec.volumes.iter().flatten() {
        maps.extend(v.config_map.iter().map(|c| c.name.clone()));
        secrets.extend(v.secret.iter().filter_map(|s| s.secret_name.clone()));
    }
    for list in [&mut maps, &mut secrets] {
        list.sort();
        list.dedup();
    }
    (maps, secrets)
}

pub fn now() -> Nanos {
    i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}
