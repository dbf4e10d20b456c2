//! A closed-loop client that costs little: a fixed number of kept-alive connections, each sending its next request when
//! the answer has come. Answers must carry a content-length.

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
};

const REQUEST: &[u8] = b"GET /path HTTP/1.1\r\nhost: web.shop\r\nuser-agent: bench\r\naccept: */*\r\n\r\n";

/// Sends `requests` over `connections`; answers with the time of each request in order of their ends.
pub fn run(to: SocketAddr, connections: usize, requests: u64) -> io::Result<Vec<Duration>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(async {
        let left = Rc::new(Cell::new(requests));
        let tasks: Vec<_> = (0..connections).map(|_| tokio::task::spawn_local(connection(to, left.clone()))).collect();
        let mut all = Vec::with_capacity(requests as usize);
        for task in tasks {
            all.extend(task.await.map_err(io::Error::other)??);
        }
        Ok(all)
    })
}

async fn connection(to: SocketAddr, left: Rc<Cell<u64>>) -> io::Result<Vec<Duration>> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(4096);
    let mut times = Vec::new();
    while left.get() > 0 {
        left.set(left.get() - 1);
        let begun = Instant::now();
        stream.write_all(REQUEST).await?;
        buffer.clear();
        while !complete(&buffer)? {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        times.push(begun.elapsed());
    }
    Ok(times)
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
