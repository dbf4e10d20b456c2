//! Health-check node ports: load balancers outside the cluster ask each node by HTTP whether it has an endpoint of a
//! service whose `externalTrafficPolicy` is `Local`, and send traffic only to nodes that say yes. Answers are those of
//! kube-proxy: 200 with the number of endpoints that are ready, or 503. One that terminates and still serves takes what comes
//! all the same, but is no reason to send more.

use crate::view::View;
use axum::{Json, Router, extract::State, http::StatusCode, routing::get};
use serde_json::{Value, json};
use sluice_model::{Name, Snapshot};
use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};
use tokio::{net::TcpListener, sync::watch, task::AbortHandle};

/// What is asked for on one port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    service: Name,
    endpoints: usize,
}

/// PURE: by port; of two services with one port the first by name.
fn asked(snapshot: &Snapshot, node: &str) -> BTreeMap<u16, Asked> {
    let mut ports = BTreeMap::new();
    for service in snapshot.services() {
        let Some(port) = service.health_check_node_port else { continue };
        let here = |set: &sluice_model::EndpointSet| {
            // Of endpoints of the fallback `ready` says that they take traffic.
            set.endpoints.iter().filter(|e| e.ready && !e.draining && e.node == node).count()
        };
        let endpoints = snapshot.endpoint_set(&service.name).map_or(0, here);
        ports.entry(port).or_insert_with(|| Asked { service: service.name.clone(), endpoints });
    }
    ports
}

struct Port {
    state: watch::Sender<Asked>,
    task: AbortHandle,
}

impl Drop for Port {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Before a port that somebody holds is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// For ever: listens on the ports that the view names.
pub async fn serve(node: String, mut views: watch::Receiver<View>) {
    let mut ports = BTreeMap::<u16, Port>::new();
    loop {
        let wanted = asked(&views.borrow_and_update().snapshot, &node);
        ports.retain(|port, _| wanted.contains_key(port));
        let mut missing = false;
        for (port, asked) in wanted {
            match ports.get(&port) {
                Some(open) => drop(open.state.send_replace(asked)),
                None => match listen(port) {
                    Ok(listeners) => drop(ports.insert(port, open(listeners, asked))),
                    Err(error) => {
                        missing = true;
                        let service = asked.service.to_string();
                        tracing::warn!(port, service, %error, "health-check node port not served, trying again");
                    }
                },
            }
        }
        let again = async {
            match missing {
                true => tokio::time::sleep(RETRY).await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = views.changed() => if changed.is_err() { return },
            () = again => {}
        }
    }
}

/// On every address of each family; a machine without IPv6 has one listener.
fn listen(port: u16) -> io::Result<Vec<TcpListener>> {
    let v4 = bind((Ipv4Addr::UNSPECIFIED, port).into())?;
    let v6 = bind((Ipv6Addr::UNSPECIFIED, port).into()).ok();
    Ok([Some(v4), v6].into_iter().flatten().collect())
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

fn open(listeners: Vec<TcpListener>, asked: Asked) -> Port {
    let (state, receiver) = watch::channel(asked);
    let app = Router::new().route("/", get(answer)).route("/healthz", get(answer)).with_state(receiver);
    let task = tokio::spawn(async move {
        let mut all = tokio::task::JoinSet::new();
        for listener in listeners {
            let app = app.clone();
            all.spawn(async move { axum::serve(listener, app).await });
        }
        while all.join_next().await.is_some() {}
    });
    Port { state, task: task.abort_handle() }
}

async fn answer(State(state): State<watch::Receiver<Asked>>) -> (StatusCode, Json<Value>) {
    let Asked { service, endpoints } = state.borrow().clone();
    let status = if endpoints > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let service = json!({ "namespace": service.namespace, "name": service.name });
    (status, Json(json!({ "service": service, "localEndpoints": endpoints, "serviceProxyHealthy": true })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{Endpoint, EndpointSet, ExternalPolicy, Mesh, Resource, Revision, Service};
    use std::{
        io::{Read, Write},
        net::TcpStream,
    };

    fn snapshot(port: u16, nodes: &[&str]) -> Snapshot {
        let name = Name::new("shop", "web");
        let service = Service {
            name: name.clone(),
            external_policy: ExternalPolicy::Local,
            health_check_node_port: Some(port),
            ..Service::default()
        };
        let endpoint = |node: &&str| Endpoint {
            address: Ipv4Addr::new(10, 0, 0, 1).into(),
            ready: true,
            draining: false,
            node: (*node).to_owned(),
            zone: String::new(),
            workload: None,
            hostname: None,
            mesh: Mesh::Plain,
            ports: vec![],
        };
        let endpoints = nodes.iter().map(endpoint).collect();
        let set = EndpointSet { name, endpoints };
        Snapshot::new(Revision(1), [Resource::Service(service), Resource::EndpointSet(set)])
    }

    fn get(port: u16) -> io::Result<String> {
        let mut c = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        c.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        c.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Of the endpoints here those that are ready count; those that only serve until they are gone do not.
    #[test]
    fn ready_endpoints_of_the_node_count() {
        /// Node, ready with the fallback applied, draining.
        type Row<'a> = (&'a str, bool, bool);
        let table: [(&[Row<'_>], usize); 6] = [
            (&[("n1", true, false), ("n1", true, false), ("n2", true, false)], 2),
            (&[("n1", false, false), ("n2", true, false)], 0),
            (&[("n1", true, true), ("n2", true, true)], 0),
            (&[("n1", true, true)], 0),
            (&[("n1", true, false), ("n1", false, true)], 1),
            (&[("n1", false, true), ("n2", true, false)], 0),
        ];
        for (endpoints, wanted) in table {
            let nodes: Vec<&str> = endpoints.iter().map(|(node, ..)| *node).collect();
            let mut resources: Vec<Resource> = vec![];
            let before = snapshot(30_900, &nodes);
            resources.extend(before.services().cloned().map(Resource::Service));
            let mut set = before.endpoint_set(&Name::new("shop", "web")).expect("a set").clone();
            for (endpoint, (_, ready, draining)) in set.endpoints.iter_mut().zip(endpoints) {
                (endpoint.ready, endpoint.draining) = (*ready, *draining);
            }
            resources.push(Resource::EndpointSet(set));
            let asked = asked(&Snapshot::new(Revision(2), resources), "n1");
            assert_eq!(asked[&30_900].endpoints, wanted, "{endpoints:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_node_says_whether_it_has_an_endpoint() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address").port();
        let view = |s: Snapshot| View { snapshot: s.into(), ..View::default() };
        let (tx, rx) = watch::channel(view(snapshot(free, &["n1", "n1", "n2"])));
        tokio::spawn(serve("n1".into(), rx));
        let until = |wanted: &'static str| async move {
            let deadline = std::time::Instant::now() + Duration::from_secs(10);
            loop {
                let said = tokio::task::spawn_blocking(move || get(free)).await.expect("joined");
                let said = said.unwrap_or_else(|e| e.to_string());
                if said.contains(wanted) {
                    return said;
                }
                assert!(std::time::Instant::now() < deadline, "not {wanted}: {said}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let said = until("\"localEndpoints\":2").await;
        assert!(said.starts_with("HTTP/1.1 200") && said.contains("\"name\":\"web\""), "{said}");
        tx.send_replace(view(snapshot(free, &["n2"])));
        assert!(until("\"localEndpoints\":0").await.starts_with("HTTP/1.1 503"));
        tx.send_replace(view(Snapshot::default()));
        until("refused").await;
    }
}
