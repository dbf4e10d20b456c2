//! What a hub needs of the kernel, and how it is had: watch bits in the settings, the ring buffer, the maps of pods.

use super::names::{Local, Owner};
use futures::stream::{BoxStream, StreamExt, unfold};
use sluice_ebpf::{
    addr,
    common::{Addr, Pod, PodAddr, Reason, WATCH_DROPS, WATCH_FLOWS, map},
    events::{Decoded, EventReader, since_boot},
    maps::{Counters, HashMap, unpadded},
    settings::SettingsMap,
};
use std::{
    collections,
    net::{IpAddr, UdpSocket},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("turn the programs' events on or off")]
    Watch(#[source] sluice_ebpf::Error),
    #[error("open the programs' events")]
    Open(#[source] sluice_ebpf::Error),
    #[error("wait for the programs' events")]
    Wait(#[source] std::io::Error),
    #[error("read the clock that events count by")]
    Clock(#[source] std::io::Error),
}

/// The kernel, or in tests what stands for it.
pub trait Kernel: Send + Sync + 'static {
    /// Puts [`WATCH_DROPS`] and [`WATCH_FLOWS`] at `bits`.
    fn watch(&self, bits: u32) -> Result<(), Error>;
    /// Begins to read; what was there before is forgotten. One at a time.
    fn open(&self) -> Result<Session, Error>;
    /// When the node was booted, by the clock of the wall as it is set now.
    fn booted(&self) -> Result<SystemTime, Error>;
}

/// Reading.
pub struct Session {
    /// Ends when the ring buffer is no longer the one that is pinned: another session must be opened.
    pub events: BoxStream<'static, Decoded>,
    /// Names of this node.
    pub local: Arc<dyn Local>,
    /// Events that the programs could not put into the ring buffer, since boot.
    pub lost: Box<dyn Fn() -> u64 + Send + Sync>,
}

/// The pinned maps of this node.
pub struct Pins {
    /// Their folder.
    pub dir: PathBuf,
    /// The settings, shared with everybody who has a say in them.
    pub settings: Arc<SettingsMap>,
    /// Cookie of the node's own network namespace.
    pub host_netns: u64,
    /// Changes when the pins were made anew.
    pub renewed: watch::Receiver<()>,
}

/// Both bits of this part.
pub const WATCH: u32 = WATCH_DROPS | WATCH_FLOWS;

impl Kernel for Pins {
    fn watch(&self, bits: u32) -> Result<(), Error> {
        self.settings.set_flags(WATCH, bits).map(drop).map_err(Error::Watch)
    }

    fn open(&self) -> Result<Session, Error> {
        // Before the map is opened: what is renewed meanwhile ends the session at once.
        let mut renewed = self.renewed.clone();
        renewed.mark_unchanged();
        let mut reader = EventReader::open(&self.dir).map_err(Error::Open)?;
        reader.discard();
        let events = wait_on(reader).map_err(Error::Wait)?;
        let local = Maps::open(self).map_err(Error::Open)?;
        let counters = Counters::open(&self.dir).map_err(Error::Open)?;
        Ok(Session {
            events: stream(events, renewed),
            local: Arc::new(local),
            lost: Box::new(move || counters.get(Reason::EventLost).unwrap_or(0)),
        })
    }

    fn booted(&self) -> Result<SystemTime, Error> {
        let up = since_boot().map_err(Error::Clock)?;
        Ok(SystemTime::now().checked_sub(up).unwrap_or(SystemTime::UNIX_EPOCH))
    }
}

/// What is said against this function is that a value may give another descriptor each time; the reader's stays what it is.
/// The one that takes its place is unsafe.
#[allow(deprecated)]
fn wait_on(reader: EventReader) -> std::io::Result<AsyncFd<EventReader>> {
    AsyncFd::with_interest(reader, Interest::READABLE)
}

fn stream(events: AsyncFd<EventReader>, renewed: watch::Receiver<()>) -> BoxStream<'static, Decoded> {
    let next = |(mut events, mut renewed): (AsyncFd<EventReader>, watch::Receiver<()>)| async move {
        loop {
            if let Some(decoded) = events.get_mut().next_record() {
                return Some((decoded, (events, renewed)));
            }
            let decoded = tokio::select! {
                biased;
                _ = renewed.changed() => return None,
                ready = events.readable_mut() => {
                    let mut ready = ready
                        .inspect_err(|error| tracing::warn!(%error, "events cannot be waited for, opening them again"))
                        .ok()?;
                    let decoded = ready.get_inner_mut().next_record();
                    // Only after a look that found nothing: what comes after that look makes it ready again.
                    if decoded.is_none() {
                        ready.clear_ready();
                    }
                    decoded
                }
            };
            if let Some(decoded) = decoded {
                return Some((decoded, (events, renewed)));
            }
        }
    };
    unfold((events, renewed), next).boxed()
}

/// Most names of links that are remembered; all are forgotten then.
const MAX_LINKS: usize = 1024;

/// The maps of pods, read at each question: never behind, and two system calls are cheaper than a record's JSON.
struct Maps {
    pods: HashMap<u64, Pod>,
    addrs: HashMap<Addr, PodAddr>,
    locals: HashMap<Addr, u32>,
    host_netns: u64,
    /// Any socket: the kernel names links to those who hold one.
    socket: Option<UdpSocket>,
    /// Numbers of links are not used again before they run out.
    links: Mutex<collections::HashMap<u32, String>>,
}

impl Maps {
    fn open(pins: &Pins) -> Result<Self, sluice_ebpf::Error> {
        Ok(Self {
            pods: HashMap::open(&pins.dir, map::PODS)?,
            addrs: HashMap::open(&pins.dir, map::ADDRS)?,
            locals: HashMap::open(&pins.dir, map::LOCALS)?,
            host_netns: pins.host_netns,
            socket: UdpSocket::bind(("127.0.0.1", 0)).ok(),
            links: Mutex::default(),
        })
    }

    fn name(&self, cookie: u64) -> Option<String> {
        let pod = self.pods.get(&cookie).ok()??;
        Some(format!("{}/{}", unpadded(&pod.namespace), unpadded(&pod.name)))
    }
}

impl Local for Maps {
    fn netns(&self, cookie: u64) -> Option<Owner> {
        if cookie == self.host_netns {
            return Some(Owner::Node);
        }
        self.name(cookie).map(Owner::Pod)
    }

    fn pod(&self, address: IpAddr) -> Option<String> {
        let entry = self.addrs.get(&addr(address)).ok()??;
        self.name(entry.netns)
    }

    fn is_own(&self, address: IpAddr) -> bool {
        self.locals.get(&addr(address)).is_ok_and(|found| found.is_some())
    }

    fn interface(&self, index: u32) -> Option<String> {
        if index == 0 {
            return None;
        }
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = links.get(&index) {
            return Some(name.clone());
        }
        let name = rustix::net::netdevice::index_to_name(self.socket.as_ref()?, index).ok()?;
        if links.len() >= MAX_LINKS {
            links.clear();
        }
        links.insert(index, name.clone());
        Some(name)
    }
}
