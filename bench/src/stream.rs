//! One long TCP stream, from its first byte until the other end says that it has the last, and what it costs all who work
//! for it: both ends' threads and the kernel's threads for packets. What the kernel does for packets in between is done
//! in the name of whoever runs then, which are these, as long as nothing else runs on their CPUs.

use anyhow::{Context, ensure};
use std::{
    fs,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// First byte of a connection that is a stream.
pub const MARK: u8 = b's';
const CHUNK: usize = 256 * 1024;

/// Sends so many bytes; what it took once the connection was there.
pub fn send(to: SocketAddr, bytes: usize) -> anyhow::Result<Duration> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
    let chunk = vec![MARK; CHUNK.min(bytes)];
    let began = Instant::now();
    let mut left = bytes;
    while left > 0 {
        left -= stream.write(&chunk[..left.min(CHUNK)])?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut taken = [0; 8];
    stream.read_exact(&mut taken)?;
    let took = began.elapsed();
    ensure!(u64::from_be_bytes(taken) == bytes as u64, "the other end took another number of bytes than {bytes}");
    Ok(took)
}

/// The other end: takes all there is, of which the first byte was read, and says how much it was.
pub fn take(stream: &mut TcpStream) -> io::Result<()> {
    let mut room = vec![0; CHUNK];
    let mut taken = 1_u64;
    loop {
        match stream.read(&mut room)? {
            0 => break stream.write_all(&taken.to_be_bytes()),
            n => taken += n as u64,
        }
    }
}

/// Threads by what the scheduler writes about them.
pub struct Tasks(Vec<PathBuf>);

impl Tasks {
    /// A thread of this process, and those of the kernel that work off what waits for a CPU.
    pub fn with_kernel(thread: i32) -> anyhow::Result<Self> {
        let mut all = vec![PathBuf::from(format!("/proc/self/task/{thread}/schedstat"))];
        for entry in fs::read_dir("/proc").context("list /proc")?.flatten() {
            if fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/")) {
                all.push(entry.path().join("schedstat"));
            }
        }
        Ok(Self(all))
    }

    /// CPU time that they have had.
    pub fn cpu_ns(&self) -> anyhow::Result<u64> {
        self.0.iter().map(|path| cpu_ns(path)).sum()
    }
}

/// From the scheduler's own clock.
pub fn cpu_ns(schedstat: &Path) -> anyhow::Result<u64> {
    let text = fs::read_to_string(schedstat).with_context(|| format!("read {}", schedstat.display()))?;
    let first = text.split(' ').next().and_then(|n| n.parse().ok());
    first.with_context(|| format!("understand {}", schedstat.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn the_end_comes_after_the_last_byte() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("bind");
        let to = listener.local_addr().expect("address");
        let server = std::thread::spawn(move || {
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().expect("accept");
                stream.read_exact(&mut [0]).expect("mark");
                take(&mut stream).expect("take");
            }
        });
        assert!(send(to, 3 * CHUNK + 7).expect("send") > Duration::ZERO);
        send(to, 1).expect("send the mark alone");
        server.join().expect("server");
    }
}
