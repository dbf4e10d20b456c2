//! Takes a sidecar's listeners into the data path and keeps duplicates of them, so that a sidecar that restarts
//! refuses nobody. The protocol and its times are in `sluice_wire::handover`.
//!
//! Per pod there is one registration at a time. It ends [`KEEP_S`] seconds after its stream, or when the pod is gone;
//! then the pod's listeners leave the maps and are closed: a meshed pod without a sidecar refuses.

use crate::attest::{self, Gate, Peer};
use sluice_cni::store::Lock;
use sluice_ebpf::{
    common::{Addr, INBOUND, ListenKey, OUTBOUND, Pod, map},
    maps::{HashMap, Listeners, pin_dir},
};
use sluice_netlink::{Netns, listen_abstract_in, sock};
use sluice_wire::handover::{KEEP_S, Message, Role, SOCKET, recv, send};
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    runtime::Handle,
};
use tokio_util::sync::CancellationToken;

/// A sidecar has one stream; the app could open more. Beyond this they are not accepted until others end.
const STREAMS_MAX: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("open the data path's maps")]
    Maps(#[source] sluice_ebpf::Error),
    #[error("find out who calls")]
    Attest(#[from] attest::Error),
    #[error("listen for the sidecar of pod {uid}")]
    Listen {
        uid: String,
        #[source]
        cause: sluice_netlink::Error,
    },
    #[error("listen for the sidecar of pod {uid}")]
    Runtime {
        uid: String,
        #[source]
        cause: io::Error,
    },
    #[error("take the node's lock")]
    Lock(#[source] sluice_cni::Error),
    #[error("prepare a listener")]
    Listener(#[source] sluice_netlink::Error),
    #[error("a listener belongs to another network namespace than the pod's")]
    ForeignListener,
    #[error("the data path does not know the pod any more")]
    NoPod,
    #[error("process {live} of another cgroup is this pod's live sidecar")]
    Taken { live: i32 },
    #[error("no listener was offered")]
    Nothing,
}

/// One for the node.
pub struct Handover {
    pods: HashMap<u64, Pod>,
    listeners: Listeners,
    /// Who may register; without one, any process of the pod (whoever runs the pods then knows no containers).
    gate: Option<Arc<Gate>>,
    cgroup_root: PathBuf,
    state_dir: PathBuf,
    runtime: Handle,
}

/// What is registered for one pod.
#[derive(Default)]
struct Registration {
    kept: Vec<(Role, OwnedFd)>,
    keys: Vec<ListenKey>,
    owner: Option<Peer>,
    /// Grows with each registration: a timer of an older one ends nothing.
    generation: u64,
}

/// One served pod.
struct Served {
    handover: Arc<Handover>,
    uid: String,
    cookie: u64,
    state: Mutex<Registration>,
}

impl Handover {
    /// Call inside a tokio runtime, after the data path was opened.
    pub fn new(bpffs: &Path, gate: Option<Arc<Gate>>) -> Result<Arc<Self>, Error> {
        let dir = pin_dir(bpffs);
        Ok(Arc::new(Self {
            pods: HashMap::open(&dir, map::PODS).map_err(Error::Maps)?,
            listeners: Listeners::open(&dir).map_err(Error::Maps)?,
            gate,
            cgroup_root: attest::cgroup_root()?,
            state_dir: sluice_cni::STATE_DIR.into(),
            runtime: Handle::current(),
        }))
    }

    /// Listens inside the pod's namespace until `stop`, which is also when its listeners are closed.
    pub fn serve(self: &Arc<Self>, netns: &Netns, uid: &str, stop: CancellationToken) -> Result<(), Error> {
        let named = |cause| Error::Listen { uid: uid.to_owned(), cause };
        let listener = listen_abstract_in(netns, SOCKET).map_err(named)?;
        let cookie = netns.cookie().map_err(named)?;
        let failed = |cause| Error::Runtime { uid: uid.to_owned(), cause };
        listener.set_nonblocking(true).map_err(failed)?;
        let _inside = self.runtime.enter();
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        let served = Arc::new(Served { handover: self.clone(), uid: uid.to_owned(), cookie, state: Mutex::default() });
        self.runtime.spawn(served.accept(listener, stop));
        Ok(())
    }
}

impl Served {
    async fn accept(self: Arc<Self>, listener: UnixListener, stop: CancellationToken) {
        let room = Arc::new(tokio::sync::Semaphore::new(STREAMS_MAX));
        loop {
            let Ok(permit) = room.clone().acquire_owned().await else { break };
            let accepted = tokio::select! {
                _ = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (served, stop) = (self.clone(), stop.clone());
                    tokio::spawn(async move {
                        tokio::select! {
                            _ = stop.cancelled() => {}
                            () = served.talk(stream) => {}
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(uid = self.uid, %error, "sidecar not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        self.close(None);
    }

    /// One stream to its end.
    async fn talk(self: Arc<Self>, stream: UnixStream) {
        let mut registered = None;
        let outcome = self.answer(&stream, &mut registered).await;
        if let Err(error) = outcome {
            tracing::debug!(uid = self.uid, %error, "handover stream failed");
        }
        drop(stream);
        if let Some(generation) = registered {
            tracing::info!(uid = self.uid, keep_s = KEEP_S, "sidecar gone, its listeners are kept");
            // A task of its own: the stream's place is free for the next sidecar meanwhile.
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(KEEP_S)).await;
                self.close(Some(generation));
            });
        }
    }

    async fn answer(&self, stream: &UnixStream, registered: &mut Option<u64>) -> io::Result<()> {
        loop {
            let message = stream.async_io(Interest::READABLE, || recv(stream.as_fd())).await?;
            let answer = match message {
                None => return Ok(()),
                Some(Message::Take) => self.kept(),
                Some(Message::Register(offered)) => self.register(stream, offered).map(|generation| {
                    *registered = Some(generation);
                    Message::Ok(vec![])
                }),
                Some(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer where a request is due")),
            };
            let answer = answer.unwrap_or_else(|error| {
                tracing::warn!(uid = self.uid, error = describe(&error), "sidecar refused");
                Message::Err(describe(&error))
            });
            stream.async_io(Interest::WRITABLE, || send(stream.as_fd(), &answer)).await?;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registration> {
        self.state.lock().expect("no holder panics")
    }

    /// Duplicates of the kept listeners.
    fn kept(&self) -> Result<Message, Error> {
        let state = self.lock();
        let copies = state.kept.iter().map(|(role, fd)| fd.try_clone().map(|fd| (*role, fd)));
        let copies = copies.collect::<io::Result<_>>();
        copies.map(Message::Ok).map_err(|cause| Error::Runtime { uid: self.uid.clone(), cause })
    }

    /// Attests the caller, makes its listeners fit and puts them in force.
    fn register(&self, stream: &UnixStream, offered: Vec<(Role, OwnedFd)>) -> Result<u64, Error> {
        if let Some(gate) = &self.handover.gate {
            gate.admits(&self.uid, stream.as_fd())?;
        }
        let peer = attest::peer(stream.as_fd(), &self.handover.cgroup_root)?;
        if offered.is_empty() {
            return Err(Error::Nothing);
        }
        for (role, fd) in &offered {
            if sock::netns_cookie(fd.as_fd()).map_err(Error::Listener)? != self.cookie {
                return Err(Error::ForeignListener);
            }
            if role.outbound() {
                sock::set_transparent(fd.as_fd(), *role == Role::Outbound6).map_err(Error::Listener)?;
            }
        }
        let mut state = self.lock();
        if let Some(live) = state.owner.as_ref()
            && live.cgroup_id != peer.cgroup_id
            && !attest::ended(&live.pidfd)
        {
            return Err(Error::Taken { live: live.pid });
        }
        let (pid, cgroup) = (peer.pid, peer.cgroup_id);
        let keys = self.put(&offered, cgroup)?;
        *state = Registration { kept: offered, keys, owner: Some(peer), generation: state.generation + 1 };
        tracing::info!(uid = self.uid, pid, cgroup, listeners = state.keys.len(), "sidecar registered");
        Ok(state.generation)
    }

    /// Into the maps: one listener per role (the kernel selects within its SO_REUSEPORT group), then the exemption.
    fn put(&self, offered: &[(Role, OwnedFd)], cgroup: u64) -> Result<Vec<ListenKey>, Error> {
        let handover = &self.handover;
        let _lock = Lock::take(&handover.state_dir).map_err(Error::Lock)?;
        let pod = handover.pods.get(&self.cookie).map_err(Error::Maps)?.ok_or(Error::NoPod)?;
        let first: BTreeMap<Role, &OwnedFd> = offered.iter().rev().map(|(role, fd)| (*role, fd)).collect();
        let mut keys = Vec::new();
        for (role, fd) in first {
            let Some(key) = key(&pod, role) else { continue };
            handover.listeners.set(&key, fd.as_fd()).map_err(Error::Maps)?;
            keys.push(key);
        }
        handover.pods.set(&self.cookie, &Pod { sidecar_cgroup: cgroup, ..pod }).map_err(Error::Maps)?;
        Ok(keys)
    }

    /// Ends the registration: the given one if it is still the newest, or any.
    fn close(&self, generation: Option<u64>) {
        let mut state = self.lock();
        if generation.is_some_and(|g| g != state.generation) || state.keys.is_empty() && state.owner.is_none() {
            return;
        }
        let generation = state.generation;
        let ended = std::mem::replace(&mut *state, Registration { generation, ..Registration::default() });
        tracing::info!(uid = self.uid, "no sidecar, the pod is closed");
        if let Err(error) = self.withdraw(&ended) {
            tracing::warn!(uid = self.uid, error = describe(&error), "registration not withdrawn");
        }
    }

    fn withdraw(&self, ended: &Registration) -> Result<(), Error> {
        let handover = &self.handover;
        let _lock = Lock::take(&handover.state_dir).map_err(Error::Lock)?;
        // The address may be another pod's by now, with a sidecar of its own.
        let pod = handover.pods.get(&self.cookie).map_err(Error::Maps)?;
        let Some(pod) = pod else { return Ok(()) }; // the kernel drops closed listeners by itself
        for key in &ended.keys {
            handover.listeners.remove(key).map_err(Error::Maps)?;
        }
        handover.pods.set(&self.cookie, &Pod { sidecar_cgroup: 0, ..pod }).map_err(Error::Maps)
    }
}

/// Where a listener of this role belongs; `None` where the pod has no address of the family.
fn key(pod: &Pod, role: Role) -> Option<ListenKey> {
    let addr = match role {
        Role::Outbound4 | Role::Inbound4 => pod.addr4,
        Role::Outbound6 | Role::Inbound6 => pod.addr6,
    };
    let direction = if role.outbound() { OUTBOUND } else { INBOUND };
    (addr != Addr::UNSET).then_some(ListenKey { addr, direction })
}

fn describe(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |e| e.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
