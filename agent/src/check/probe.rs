//! A network namespace that the plugin wires as it wires pods, with a responder in it, and connections that are made from
//! it. There is one per node; its lease has a name of its own, by which whoever comes next finds what was left.

use crate::error::describe;
use serde_json::Value;
use sluice_cni::{CONFLIST, command, spec::Environment};
use sluice_netlink::{Netns, ns};
use sluice_wire::check::{WALK_MS, Way};
use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
    task::AbortHandle,
    time::timeout,
};

const CONTAINER: &str = "sluice-check";
const POD: &str = "K8S_POD_NAMESPACE=sluice-check;K8S_POD_NAME=probe";
/// Several packets of any MTU up to 9000.
const PAYLOAD: usize = 32 * 1024;
/// Connections that the responder serves at a time; further ones wait.
const CONNECTIONS: usize = 64;

/// Where the probe's namespace is kept, and where the plugin's configuration is.
#[derive(Clone, Debug)]
pub(super) struct Site {
    conflist: PathBuf,
    netns: PathBuf,
}

/// A probe that answers. Its responder ends with it.
pub(super) struct Probe {
    netns: Netns,
    pub(super) answers: Vec<SocketAddr>,
    responders: Vec<AbortHandle>,
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.responders.iter().for_each(AbortHandle::abort);
    }
}

impl Site {
    pub(super) fn new(run_dir: &Path) -> Self {
        Self { conflist: run_dir.join("cni").join(CONFLIST), netns: run_dir.join("check/netns") }
    }

    /// Takes away what is there, made or half made.
    pub(super) fn clear(&self) -> Result<(), String> {
        if !self.netns.exists() {
            return Ok(());
        }
        self.plugin("DEL")?;
        ns::remove_named(&self.netns).or_else(|e| {
            // One that was killed before it was mounted is a mere file.
            fs::remove_file(&self.netns).map_err(|_| describe(&e))
        })
    }

    pub(super) async fn make(&self) -> Result<Probe, String> {
        let site = self.clone();
        let made = tokio::task::spawn_blocking(move || site.wire()).await.map_err(|e| e.to_string())?;
        let (netns, listeners) = made?;
        let mut probe = Probe { netns, answers: vec![], responders: vec![] };
        for listener in listeners {
            let listener = TcpListener::from_std(listener).map_err(|e| e.to_string())?;
            probe.answers.push(listener.local_addr().map_err(|e| e.to_string())?);
            probe.responders.push(tokio::spawn(respond(listener)).abort_handle());
        }
        Ok(probe)
    }

    fn wire(&self) -> Result<(Netns, Vec<std::net::TcpListener>), String> {
        self.clear()?;
        let dir = self.netns.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
        let netns = ns::make_named(&self.netns).map_err(|e| describe(&e))?;
        let made = self.plugin("ADD").and_then(|answer| listen(&netns, &addresses(&answer)));
        match made {
            Ok(listeners) => Ok((netns, listeners)),
            Err(why) => {
                // The first error counts; what this leaves the next check removes.
                let _ = self.clear();
                Err(why)
            }
        }
    }

    /// As a runtime calls the plugin, with the configuration that runtimes have.
    fn plugin(&self, verb: &str) -> Result<Value, String> {
        let list = fs::read(&self.conflist)
            .map_err(|e| format!("read {}: {e}; the node is not ready yet", self.conflist.display()))?;
        let list: Value = serde_json::from_slice(&list).map_err(|e| format!("{}: {e}", self.conflist.display()))?;
        let mut config = list["plugins"][0].clone();
        config["name"] = list["name"].clone();
        config["cniVersion"] = "1.1.0".into();
        let netns = self.netns.display().to_string();
        let call = || {
            let get = |name: &str| {
                let value = match name {
                    "CNI_COMMAND" => verb,
                    "CNI_CONTAINERID" => CONTAINER,
                    "CNI_IFNAME" => "eth0",
                    "CNI_NETNS" => &netns,
                    "CNI_ARGS" => POD,
                    _ => return None,
                };
                Some(value.to_owned())
            };
            command::run(&Environment::new(&get), config.to_string().as_bytes())
        };
        // The plugin moves its thread between namespaces: one that ends with the call.
        let called = std::thread::scope(|s| s.spawn(call).join());
        let answer = called.map_err(|_| format!("{verb} ended with a panic"))?;
        let text = |e: &sluice_cni::Error| format!("{verb}: {e} {}", e.details()).trim_end().to_owned();
        answer.map(Option::unwrap_or_default).map_err(|e| text(&e))
    }
}

/// PURE: what the plugin's answer gives the probe.
fn addresses(answer: &Value) -> Vec<IpAddr> {
    let ips = answer["ips"].as_array().into_iter().flatten();
    ips.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect()
}

fn listen(netns: &Netns, addresses: &[IpAddr]) -> Result<Vec<std::net::TcpListener>, String> {
    let bind = |ip: &IpAddr| {
        let listener = std::net::TcpListener::bind(SocketAddr::new(*ip, 0))?;
        listener.set_nonblocking(true)?;
        io::Result::Ok(listener)
    };
    let bound = netns.run(|| addresses.iter().map(bind).collect::<io::Result<Vec<_>>>()).map_err(|e| describe(&e))?;
    bound.map_err(|e| format!("listen in the probe: {e}"))
}

/// Sends back what comes, for ever.
async fn respond(listener: TcpListener) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    while let Ok(slot) = slots.clone().acquire_owned().await {
        let Ok((mut stream, _)) = listener.accept().await else { return };
        tokio::spawn(async move {
            let _slot = slot;
            let (mut reader, mut writer) = stream.split();
            // Whoever waits sees what is missing.
            let _ = timeout(Duration::from_millis(WALK_MS), tokio::io::copy(&mut reader, &mut writer)).await;
        });
    }
}

impl Probe {
    /// A socket for each path, in the namespace from which it is walked.
    pub(super) fn sockets(&self, paths: &[(Way, SocketAddr)]) -> Result<Vec<TcpSocket>, String> {
        let new = |to: SocketAddr| {
            let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let of = |node: bool| -> io::Result<Vec<socket2::Socket>> {
            paths.iter().filter(|(way, _)| (*way == Way::FromNode) == node).map(|(_, to)| new(*to)).collect()
        };
        let inside = self.netns.run(|| of(false)).map_err(|e| describe(&e))?;
        let failed = |e: io::Error| format!("open sockets: {e}");
        let (mut inside, mut outside) = (inside.map_err(failed)?.into_iter(), of(true).map_err(failed)?.into_iter());
        let next = |(way, _): &(Way, SocketAddr)| if *way == Way::FromNode { outside.next() } else { inside.next() };
        Ok(paths.iter().filter_map(next).map(|s| TcpSocket::from_std_stream(s.into())).collect())
    }
}

/// Microseconds until the connection stood, or what is wrong with the path.
pub(super) async fn walk(socket: TcpSocket, way: Way, to: SocketAddr) -> Result<u64, String> {
    let began = Instant::now();
    let wait = Duration::from_millis(WALK_MS);
    let mut stream = match timeout(wait, socket.connect(to)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(e)) => return Err(format!("not connected: {e}")),
        Err(_) => return Err(format!("no answer in {WALK_MS} ms")),
    };
    let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    if way != Way::Probe {
        return Ok(took);
    }
    match timeout(wait.saturating_sub(began.elapsed()), full_packets(&mut stream)).await {
        Ok(Ok(())) => Ok(took),
        Ok(Err(e)) => Err(format!("connected, but what was sent did not come back: {e}")),
        Err(_) => Err("connected, but full packets are lost: the MTU does not fit the path".to_owned()),
    }
}

async fn full_packets(stream: &mut TcpStream) -> io::Result<()> {
    let (mut reader, mut writer) = stream.split();
    let sent = vec![0x5c; PAYLOAD];
    let mut back = vec![0; PAYLOAD];
    tokio::try_join!(writer.write_all(&sent), reader.read_exact(&mut back))?;
    if back == sent { Ok(()) } else { Err(io::Error::other("other bytes")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn addresses_are_those_of_the_answer() {
        let answer = json!({"ips": [{"address": "10.244.1.7/32"}, {"address": "fd00::7/128"}, {"address": "x"}]});
        assert_eq!(addresses(&answer), ["10.244.1.7", "fd00::7"].map(|a| a.parse::<IpAddr>().expect(a)));
        assert_eq!(addresses(&json!({})), Vec::<IpAddr>::new());
    }

    /// On loopback: a responder that answers, one that only takes connections, and nobody.
    #[tokio::test]
    async fn paths_are_walked_to_their_end() {
        let bind = || std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let (answers, silent, nobody) = (bind(), bind(), bind());
        let at = |l: &std::net::TcpListener| l.local_addr().expect("address");
        let (whole, half, none) = (at(&answers), at(&silent), at(&nobody));
        drop(nobody);
        answers.set_nonblocking(true).expect("non-blocking");
        tokio::spawn(respond(TcpListener::from_std(answers).expect("listener")));
        for (way, to, expected) in [
            (Way::Probe, whole, None),
            (Way::FromPod, half, None),
            (Way::Probe, half, Some("full packets are lost")),
            (Way::FromPod, none, Some("refused")),
        ] {
            let outcome = walk(TcpSocket::new_v4().expect("socket"), way, to).await;
            match expected {
                None => assert!(outcome.is_ok(), "{way:?}: {outcome:?}"),
                Some(why) => assert!(outcome.as_ref().is_err_and(|e| e.contains(why)), "{way:?}: {outcome:?}"),
            }
        }
    }
}
