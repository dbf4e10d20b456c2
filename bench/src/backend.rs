//! A bare HTTP/1.1 server in a thread, for tests and benches: as little work per request as possible, and paths on
//! which it misbehaves in ways that a well-made server does not. It ends when it is dropped.
//!
//! `/head` answers with the request's head as received, `/chunked` in chunks, `/close` and `/garbage` not at all or
//! not in HTTP, `/die` answers and closes without saying so, `/slow` after 300 ms, anything else with `ok`.

use std::{
    cell::Cell,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

/// Longest request head.
const MAX_HEAD: usize = 64 * 1024;

pub struct Backend {
    pub address: SocketAddr,
    /// Requests seen.
    pub requests: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// Serves on a free port of `127.0.0.1`, answering as `version`.
    pub fn start(version: &str) -> io::Result<Self> {
        Self::start_at(version, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub fn start_at(version: &str, address: SocketAddr) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let requests = Arc::new(AtomicU64::new(0));
        let (counter, version) = (requests.clone(), version.to_owned());
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default());
            if let Ok(runtime) = runtime {
                runtime.block_on(serve(listener, version, counter, stopped));
            }
        };
        let thread = std::thread::Builder::new().name("backend".into()).spawn(run)?;
        Ok(Self { address, requests, stop: Some(stop), thread: Some(thread) })
    }

    pub fn seen(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Backend {
    /// Connections end with it, in whatever state they are.
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(
    listener: std::net::TcpListener,
    version: String,
    requests: Arc<AtomicU64>,
    stopped: oneshot::Receiver<()>,
) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let version: Rc<str> = version.into();
    let connections = Rc::new(Cell::new(0u64));
    let accept = async {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            connections.set(connections.get() + 1);
            let (version, requests) = (version.clone(), requests.clone());
            tokio::task::spawn_local(async move {
                // Tests look at what the client saw.
                let _ = connection(stream, &version, &requests).await;
            });
        }
    };
    tokio::select! {
        () = accept => {}
        _ = stopped => {}
    }
}

async fn connection(mut stream: TcpStream, version: &str, requests: &AtomicU64) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let plain = answer(version, "ok");
    let mut buffer: Vec<u8> = Vec::with_capacity(8192);
    loop {
        let head = loop {
            if let Some(at) = find(&buffer, b"\r\n\r\n") {
                break at + 4;
            }
            if buffer.len() > MAX_HEAD || stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        requests.fetch_add(1, Ordering::Relaxed);
        let text = String::from_utf8_lossy(&buffer[..head]).into_owned();
        buffer.drain(..head);
        skip_body(&mut stream, &mut buffer, &text).await?;
        match text.split(' ').nth(1).unwrap_or_default() {
            "/head" => stream.write_all(&answer(version, &text)).await?,
            "/chunked" => {
                let head = format!("HTTP/1.1 200 OK\r\nx-version: {version}\r\ntransfer-encoding: chunked\r\n\r\n");
                stream.write_all(format!("{head}3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n").as_bytes()).await?;
            }
            "/close" => return Ok(()),
            "/garbage" => stream.write_all(b"220 mail.example ESMTP\r\n").await?,
            "/die" => return stream.write_all(&plain).await,
            "/slow" => {
                tokio::time::sleep(Duration::from_millis(300)).await;
                stream.write_all(&plain).await?;
            }
            _ => stream.write_all(&plain).await?,
        }
        if text.to_ascii_lowercase().contains("\r\nconnection: close\r\n") {
            return Ok(());
        }
    }
}

fn answer(version: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nx-version: {version}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// Reads past the body that the head announces.
async fn skip_body(stream: &mut TcpStream, buffer: &mut Vec<u8>, head: &str) -> io::Result<()> {
    let head = head.to_ascii_lowercase();
    if head.contains("\r\ntransfer-encoding: chunked\r\n") {
        while find(buffer, b"0\r\n\r\n").is_none() {
            if stream.read_buf(buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        buffer.clear();
        return Ok(());
    }
    let length = head.split("\r\ncontent-length: ").nth(1).and_then(|l| l.split("\r\n").next()?.parse().ok());
    let mut left: usize = length.unwrap_or(0);
    loop {
        let n = left.min(buffer.len());
        buffer.drain(..n);
        left -= n;
        if left == 0 {
            return Ok(());
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
