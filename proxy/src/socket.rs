//! Abstract unix sockets of the pod's network namespace, by which the agent is reached.

use hyper_util::rt::TokioIo;
use std::{
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
};
use tonic::transport::{Channel, Endpoint, Uri};

/// Connects to the abstract socket `name` (without leading NUL).
pub fn connect_abstract(name: &str) -> io::Result<UnixStream> {
    UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)
}

/// A gRPC channel over the abstract socket `name`.
pub async fn channel(name: &str) -> Result<Channel, tonic::transport::Error> {
    let name = name.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let connected = connect_abstract(&name).and_then(|s| {
            s.set_nonblocking(true)?;
            tokio::net::UnixStream::from_std(s)
        });
        std::future::ready(connected.map(TokioIo::new))
    });
    // The address is only a name here; the connector decides.
    Endpoint::from_static("http://agent").connect_with_connector(connector).await
}
