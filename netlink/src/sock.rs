//! Sockets that depend on a namespace, and what a socket says about its namespace and its peer.

use crate::{Error, Netns, error::Result};
use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
};

const SO_NETNS_COOKIE: i32 = 71;
const SO_PEERPIDFD: i32 = 77;

/// Listens on the abstract name (without the leading NUL) inside a namespace; only sockets of that namespace reach it.
pub fn listen_abstract_in(netns: &Netns, name: &str) -> Result<UnixListener> {
    netns.run(|| {
        let address = SocketAddr::from_abstract_name(name).map_err(|e| Error::io("name a socket", name, e))?;
        UnixListener::bind_addr(&address).map_err(|e| Error::io("listen on abstract socket", name, e))
    })?
}

/// Connects to an abstract name from inside a namespace.
pub fn connect_abstract_in(netns: &Netns, name: &str) -> Result<UnixStream> {
    netns.run(|| {
        let address = SocketAddr::from_abstract_name(name).map_err(|e| Error::io("name a socket", name, e))?;
        UnixStream::connect_addr(&address).map_err(|e| Error::io("connect to abstract socket", name, e))
    })?
}

fn get_option<T: Copy + Default>(socket: BorrowedFd<'_>, option: i32, name: &'static str) -> Result<T> {
    let mut value = T::default();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, which is made of integers in every use below.
    let r =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &mut len) };
    if r != 0 {
        return Err(Error::io("read socket option", name, io::Error::last_os_error()));
    }
    Ok(value)
}

/// The namespace in which a socket was made: said by the socket, whoever passed it on.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> Result<u64> {
    get_option(socket, SO_NETNS_COOKIE, "SO_NETNS_COOKIE")
}

/// A handle on the process that connected a unix stream, which cannot come to mean another process. Before Linux 6.5
/// it is made from the pid, and then means whoever has that pid now.
pub fn peer_pidfd(stream: BorrowedFd<'_>) -> Result<OwnedFd> {
    match get_option::<i32>(stream, SO_PEERPIDFD, "SO_PEERPIDFD") {
        // SAFETY: a descriptor that the kernel has just made for this call.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        Err(e) if e.errno() == Some(libc::ENOPROTOOPT) => pidfd_of(peer_pid(stream)?),
        Err(e) => Err(e),
    }
}

fn pidfd_of(pid: i32) -> Result<OwnedFd> {
    let refused = |e| Error::io("open a pidfd of process", pid, e);
    let raw = rustix::process::Pid::from_raw(pid).ok_or_else(|| refused(io::ErrorKind::InvalidInput.into()))?;
    rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty()).map_err(|e| refused(e.into()))
}

/// Process id of the peer when it connected, as this process's pid namespace numbers it.
pub fn peer_pid(stream: BorrowedFd<'_>) -> Result<i32> {
    let [pid, _uid, _gid] = get_option::<[i32; 3]>(stream, libc::SO_PEERCRED, "SO_PEERCRED")?;
    if pid <= 0 {
        let cause = io::Error::new(io::ErrorKind::NotFound, "the peer is in a pid namespace that is not below ours");
        return Err(Error::io("name the peer of", "a unix stream", cause));
    }
    Ok(pid)
}

/// Lets a listener answer for addresses that are not the host's. Needs CAP_NET_ADMIN in the socket's namespace.
pub fn set_transparent(socket: BorrowedFd<'_>, v6: bool) -> Result<()> {
    let (level, option) =
        if v6 { (libc::SOL_IPV6, libc::IPV6_TRANSPARENT) } else { (libc::SOL_IP, libc::IP_TRANSPARENT) };
    let on = 1i32;
    // SAFETY: an integer option, its size given.
    let r = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), 4) };
    if r != 0 {
        return Err(Error::io("set socket option", "IP_TRANSPARENT", io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_stream_tells_its_peer_and_its_namespace() {
        let home = Netns::current().expect("current");
        let name = format!("sluice-test-{}", std::process::id());
        let listener = listen_abstract_in(&home, &name).expect("listen");
        let client = connect_abstract_in(&home, &name).expect("connect");
        let (accepted, _) = listener.accept().expect("accept");
        assert_eq!(peer_pid(accepted.as_fd()).expect("pid"), std::process::id() as i32);
        peer_pidfd(accepted.as_fd()).expect("pidfd");
        let cookie = home.cookie().expect("cookie");
        assert_eq!(netns_cookie(accepted.as_fd()).expect("cookie"), cookie);
        drop(client);
    }
}
