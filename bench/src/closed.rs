//! HTTP/1.1 clients that cost little: a fixed number of connections, each sending its next request when the answer has
//! come (or when its turn comes, at a given rate), over kept connections or one for each request; and idle connections.
//! Answers must carry a content-length.

use std::{
    cell::Cell,
    io,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::LocalSet,
};

const REQUEST: &[u8] = b"GET /path HTTP/1.1\r\nhost: web.shop\r\nuser-agent: bench\r\naccept: */*\r\n\r\n";

/// How requests are sent.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub to: SocketAddr,
    pub connections: usize,
    pub requests: u64,
    /// A connection for each request.
    pub fresh: bool,
    /// Between two requests of one connection, from the one's beginning to the other's; as fast as may be without.
    pub every: Option<Duration>,
}

/// Sends them; answers with the time of each request in order of their ends.
pub fn run(plan: Plan) -> io::Result<Vec<Duration>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(async {
        let left = Rc::new(Cell::new(plan.requests));
        let of = |_| tokio::task::spawn_local(connection(plan, left.clone()));
        let tasks: Vec<_> = (0..plan.connections).map(of).collect();
        let mut all = Vec::with_capacity(plan.requests as usize);
        for task in tasks {
            all.extend(task.await.map_err(io::Error::other)??);
        }
        Ok(all)
    })
}

async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn connection(plan: Plan, left: Rc<Cell<u64>>) -> io::Result<Vec<Duration>> {
    let mut stream = connect(plan.to).await?;
    let mut turns = plan.every.map(tokio::time::interval);
    let mut buffer = Vec::with_capacity(4096);
    let mut times = Vec::new();
    while left.get() > 0 {
        left.set(left.get() - 1);
        if let Some(turns) = &mut turns {
            turns.tick().await;
        }
        let begun = Instant::now();
        if plan.fresh && !times.is_empty() {
            stream = connect(plan.to).await?;
        }
        exchange(&mut stream, &mut buffer).await?;
        times.push(begun.elapsed());
    }
    Ok(times)
}

async fn exchange(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<()> {
    stream.write_all(REQUEST).await?;
    buffer.clear();
    while !complete(buffer)? {
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Connections that have had one answer each and are silent since.
pub fn idle(to: SocketAddr, count: usize) -> io::Result<Vec<std::net::TcpStream>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let mut all = Vec::with_capacity(count);
        let mut buffer = Vec::new();
        for _ in 0..count {
            let mut stream = connect(to).await?;
            exchange(&mut stream, &mut buffer).await?;
            all.push(stream.into_std()?);
        }
        Ok(all)
    })
}

/// Whether a whole answer is there; an error when it is none of success.
fn complete(answer: &[u8]) -> io::Result<bool> {
    let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") else { return Ok(false) };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    if !head.starts_with("http/1.1 200") {
        return Err(io::Error::other(head));
    }
    let length =
        head.split("content-length:").nth(1).and_then(|l| l.split("\r\n").next()?.trim().parse::<usize>().ok());
    let length = length.ok_or_else(|| io::Error::other(format!("no content-length: {head}")))?;
    Ok(answer.len() >= end + 4 + length)
}
