//! Takes a sidecar's listeners into the data path and keeps duplicates of them, so that a sidecar that restarts
//! refuses nobody. The protocol and its times are in `sluice_wire::handover`.
//!
//! Per pod there is one registration at a time. It ends [`KEEP_S`] seconds after its stream, or when the pod is gone;
//! then the pod's listeners leave the maps and are closed: a meshed pod without a sidecar refuses.
//!
//! What others take away of a registration is put back by [`Handover::repair`].
//!
//! Only the sidecar is heard: who holds a duplicate of its listeners could take the pod's connections.

use crate::{
    attest::{self, Gate, Peer},
    blocking::blocking,
    error::describe,
    socket,
};
use sluice_cni::store::Lock;
use sluice_ebpf::{
    common::{Addr, INBOUND, ListenKey, OUTBOUND, Pod, map},
    maps::{HashMap, Listeners, pin_dir},
};
use sluice_netlink::{Netns, sock};
use sluice_wire::handover::{KEEP_S, Message, Role, SOCKET, recv, send};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Duration,
};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    runtime::Handle,
    sync::Notify,
};
use tokio_util::sync::CancellationToken;

/// A sidecar has one stream, and its successor another. Beyond this they are not accepted until others end.
const STREAMS_MAX: usize = 8;
/// A stream that has not registered is dropped after so long without a request, or without taking the answer: a place
/// is for a sidecar, which asks and registers within moments.
const SILENCE: Duration = Duration::from_secs(5);

const ROLES: [Role; 4] = [Role::Outbound4, Role::Outbound6, Role::Inbound4, Role::Inbound6];

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("open the data path's maps")]
    Maps(#[source] sluice_ebpf::Error),
    #[error("find out who calls")]
    Attest(#[from] attest::Error),
    #[error(transparent)]
    Socket(#[from] socket::Error),
    #[error("name the network namespace of pod {uid}")]
    Netns {
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
    /// Folder of the pinned maps.
    pins: PathBuf,
    /// Who is heard; without one, any process of the pod (whoever runs the pods then knows no containers).
    gate: Option<Arc<Gate>>,
    cgroup_root: PathBuf,
    state_dir: PathBuf,
    runtime: Handle,
    /// One per served pod; those that have ended are dropped at the next repair.
    served: Mutex<Vec<Weak<Served>>>,
    /// Told when a registered sidecar's stream has ended.
    pub ended: Arc<Notify>,
}

/// Opened for each piece of work: a map that was unpinned is made anew, and what is written to the old one is lost.
struct Maps {
    pods: HashMap<u64, Pod>,
    listeners: Listeners,
}

impl Maps {
    fn open(pins: &Path) -> Result<Self, Error> {
        let pods = HashMap::open(pins, map::PODS).map_err(Error::Maps)?;
        Ok(Self { pods, listeners: Listeners::open(pins).map_err(Error::Maps)? })
    }

    fn present(&self) -> Result<BTreeSet<ListenKey>, Error> {
        Ok(self.listeners.keys().map_err(Error::Maps)?.into_iter().collect())
    }
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
        let pins = pin_dir(bpffs);
        Maps::open(&pins)?;
        Ok(Arc::new(Self {
            pins,
            gate,
            cgroup_root: attest::cgroup_root()?,
            state_dir: sluice_cni::STATE_DIR.into(),
            runtime: Handle::current(),
            served: Mutex::default(),
            ended: Arc::default(),
        }))
    }

    /// Listens inside the pod's namespace; nobody is answered before [`Listening::serve`].
    pub fn listen(self: &Arc<Self>, netns: &Netns, uid: &str) -> Result<Listening, Error> {
        let cookie = netns.cookie().map_err(|cause| Error::Netns { uid: uid.to_owned(), cause })?;
        let listener = socket::listen(netns, SOCKET)?;
        let _inside = self.runtime.enter();
        let listener =
            UnixListener::from_std(listener).map_err(|cause| Error::Runtime { uid: uid.to_owned(), cause })?;
        let served = Served { handover: self.clone(), uid: uid.to_owned(), cookie, state: Mutex::default() };
        Ok(Listening { served: Arc::new(served), listener })
    }

    /// Ends what an agent before this one registered for a pod that is not served: nothing goes in or out of it any more,
    /// except by excluded ports. Its sidecar registers again once it is served.
    pub fn shut(&self, netns: &Netns, uid: &str) -> Result<(), Error> {
        let cookie = netns.cookie().map_err(|cause| Error::Netns { uid: uid.to_owned(), cause })?;
        let _lock = Lock::take(&self.state_dir).map_err(Error::Lock)?;
        let maps = Maps::open(&self.pins)?;
        let Some(pod) = maps.pods.get(&cookie).map_err(Error::Maps)? else { return Ok(()) };
        for key in ROLES.into_iter().filter_map(|role| key(&pod, role)) {
            maps.listeners.remove(&key).map_err(Error::Maps)?;
        }
        if pod.sidecar_cgroup != 0 {
            tracing::warn!(uid, "the pod is closed, its sidecar is not registered any more");
            maps.pods.set(&cookie, &Pod { sidecar_cgroup: 0, ..pod }).map_err(Error::Maps)?;
        }
        Ok(())
    }

    /// Puts listeners and exemptions of all live registrations back where they are missing; says of which pods. Goes on
    /// after a failure, and returns the first one. Call it after the pods' own entries have been repaired.
    pub fn repair(&self) -> Result<Vec<String>, Error> {
        let maps = Maps::open(&self.pins)?;
        let present = maps.present()?;
        let mut outcome = Ok(());
        let mut wrong = Vec::new();
        for served in self.live() {
            match served.restore(&maps, &present) {
                Ok(true) => wrong.push(format!("listeners or exemption of the sidecar of pod {}", served.uid)),
                Ok(false) => {}
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome.map(|()| wrong)
    }

    fn live(&self) -> Vec<Arc<Served>> {
        let mut all = self.served.lock().expect("no holder panics");
        all.retain(|s| s.strong_count() > 0);
        all.iter().filter_map(Weak::upgrade).collect()
    }
}

/// A pod's socket that is bound and not served yet.
pub struct Listening {
    served: Arc<Served>,
    listener: UnixListener,
}

impl Listening {
    /// Until `stop`, which is also when the pod's listeners are closed.
    pub fn serve(self, stop: CancellationToken) {
        let handover = self.served.handover.clone();
        handover.served.lock().expect("no holder panics").push(Arc::downgrade(&self.served));
        handover.runtime.spawn(self.served.accept(self.listener, stop));
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
                    if let Err(error) = self.admit(&stream) {
                        self.turn_away(&stream, &error);
                        continue;
                    }
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
        blocking(|| self.close(None));
    }

    /// Asked again before each registration: which container is the sidecar may have changed since.
    fn admit(&self, stream: &UnixStream) -> Result<(), Error> {
        let Some(gate) = &self.handover.gate else { return Ok(()) };
        Ok(gate.admits(&self.uid, stream.as_fd())?)
    }

    /// Says why. A new stream has room for it, so this never waits.
    fn turn_away(&self, stream: &UnixStream, error: &Error) {
        tracing::warn!(uid = self.uid, error = describe(error), "caller is not the pod's sidecar, refused");
        let _ = send(stream.as_fd(), &Message::Err(describe(error)));
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
            self.handover.ended.notify_one();
            // A task of its own: the stream's place is free for the next sidecar meanwhile.
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(KEEP_S)).await;
                blocking(|| self.close(Some(generation)));
            });
        }
    }

    async fn answer(&self, stream: &UnixStream, registered: &mut Option<u64>) -> io::Result<()> {
        loop {
            let request = stream.async_io(Interest::READABLE, || recv(stream.as_fd()));
            // A registered one is silent for as long as it lives.
            let request = if registered.is_some() { request.await } else { soon(request).await };
            let answer = match request? {
                None => return Ok(()),
                Some(Message::Take) => self.kept(),
                Some(Message::Register(offered)) => blocking(|| self.register(stream, offered)).map(|generation| {
                    *registered = Some(generation);
                    Message::Ok(vec![])
                }),
                Some(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer where a request is due")),
            };
            let answer = answer.unwrap_or_else(|error| {
                tracing::warn!(uid = self.uid, error = describe(&error), "sidecar refused");
                Message::Err(describe(&error))
            });
            soon(stream.async_io(Interest::WRITABLE, || send(stream.as_fd(), &answer))).await?;
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
        self.admit(stream)?;
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

    /// Into the maps: the listeners, then the exemption.
    fn put(&self, offered: &[(Role, OwnedFd)], cgroup: u64) -> Result<Vec<ListenKey>, Error> {
        let _lock = Lock::take(&self.handover.state_dir).map_err(Error::Lock)?;
        let maps = Maps::open(&self.handover.pins)?;
        let pod = maps.pods.get(&self.cookie).map_err(Error::Maps)?.ok_or(Error::NoPod)?;
        let places = places(&pod, offered);
        places.iter().try_for_each(|(key, fd)| maps.listeners.set(key, fd.as_fd())).map_err(Error::Maps)?;
        maps.pods.set(&self.cookie, &Pod { sidecar_cgroup: cgroup, ..pod }).map_err(Error::Maps)?;
        Ok(places.into_keys().collect())
    }

    /// Whether something of the registration was missing, and was put back. A pod without an entry of its own is the
    /// data path's to repair first.
    fn restore(&self, maps: &Maps, present: &BTreeSet<ListenKey>) -> Result<bool, Error> {
        let mut state = self.lock();
        let Some(cgroup) = state.owner.as_ref().map(|o| o.cgroup_id) else { return Ok(false) };
        let intact = |present: &BTreeSet<ListenKey>| -> Result<bool, Error> {
            let Some(pod) = maps.pods.get(&self.cookie).map_err(Error::Maps)? else { return Ok(true) };
            let listening = places(&pod, &state.kept).keys().all(|key| present.contains(key));
            Ok(listening && pod.sidecar_cgroup == cgroup)
        };
        // The list may be older than the registration: what it lacks is looked for again.
        if intact(present)? || intact(&maps.present()?)? {
            return Ok(false);
        }
        state.keys = match self.put(&state.kept, cgroup) {
            Err(Error::NoPod) => return Ok(false),
            put => put?,
        };
        Ok(true)
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
        let _lock = Lock::take(&self.handover.state_dir).map_err(Error::Lock)?;
        let maps = Maps::open(&self.handover.pins)?;
        // The address may be another pod's by now, with a sidecar of its own.
        let pod = maps.pods.get(&self.cookie).map_err(Error::Maps)?;
        let Some(pod) = pod else { return Ok(()) }; // the kernel drops closed listeners by itself
        for key in &ended.keys {
            maps.listeners.remove(key).map_err(Error::Maps)?;
        }
        maps.pods.set(&self.cookie, &Pod { sidecar_cgroup: 0, ..pod }).map_err(Error::Maps)
    }
}

async fn soon<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(SILENCE, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Where the listeners belong: the first of each role, because the kernel selects within its SO_REUSEPORT group.
fn places<'a>(pod: &Pod, listeners: &'a [(Role, OwnedFd)]) -> BTreeMap<ListenKey, &'a OwnedFd> {
    listeners.iter().rev().filter_map(|(role, fd)| Some((key(pod, *role)?, fd))).collect()
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
