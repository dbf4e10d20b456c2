//! Open-loop load by datagrams: requests are due, counted and reported as those of `load`. A connected socket that the
//! kernel closes is connected again at once, and what is without an answer is sent again over it; nothing else is repeated.

use crate::{
    load::{LoadArgs, TIMEOUT},
    load_report::Report,
};
use anyhow::Context;
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::Duration,
};
use tokio::{net::UdpSocket, sync::Notify, time::Instant};

struct Run {
    target: SocketAddr,
    prefix: String,
    connected: bool,
    socket: RefCell<Rc<UdpSocket>>,
    renewed: Notify,
    renewals: Cell<u64>,
    /// Requests without an answer, and when they were due.
    open: RefCell<BTreeMap<u64, Instant>>,
    report: RefCell<Report>,
}

/// Runs to the end. The report, with how often the socket was connected again.
pub async fn run(args: &LoadArgs, target: SocketAddr) -> anyhow::Result<serde_json::Value> {
    let connected = !args.unconnected;
    let socket = open(target, connected, &[]).with_context(|| format!("open a socket to {target}"))?;
    let run = Rc::new(Run {
        target,
        prefix: args.id_prefix.clone(),
        connected,
        socket: RefCell::new(Rc::new(socket)),
        renewed: Notify::new(),
        renewals: Cell::new(0),
        open: RefCell::default(),
        report: RefCell::default(),
    });
    let reader = tokio::task::spawn_local(run.clone().read());
    let start = Instant::now();
    for number in 0..(args.rps * args.duration).round() as u64 {
        let due = start + Duration::from_secs_f64(number as f64 / args.rps);
        tokio::time::sleep_until(due).await;
        run.report.borrow_mut().sent();
        run.open.borrow_mut().insert(number, due);
        tokio::task::spawn_local(run.clone().ask(number, due));
    }
    while !run.open.borrow().is_empty() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    reader.abort();
    let mut report = serde_json::to_value(run.report.borrow().summary())?;
    report["renewals"] = run.renewals.get().into();
    Ok(report)
}

/// Sends `first` before anybody waits for it.
fn open(target: SocketAddr, connected: bool, first: &[String]) -> io::Result<UdpSocket> {
    let any = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = std::net::UdpSocket::bind(SocketAddr::new(any, 0))?;
    if connected {
        socket.connect(target)?;
        first.iter().try_for_each(|text| socket.send(text.as_bytes()).map(drop))?;
    }
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

impl Run {
    async fn ask(self: Rc<Self>, number: u64, due: Instant) {
        let text = self.text(number);
        let socket = self.socket.borrow().clone();
        let sent = match self.connected {
            true => socket.send(text.as_bytes()).await,
            false => socket.send_to(text.as_bytes(), self.target).await,
        };
        if let Err(e) = sent {
            self.lost(&socket, &e);
        }
        tokio::time::sleep_until(due + TIMEOUT).await;
        if self.open.borrow_mut().remove(&number).is_some() {
            self.report.borrow_mut().failed(number, "timeout");
        }
    }

    fn text(&self, number: u64) -> String {
        format!("{}{number}", self.prefix)
    }

    async fn read(self: Rc<Self>) {
        let mut buffer = [0; 2048];
        loop {
            let socket = self.socket.borrow().clone();
            tokio::select! {
                got = socket.recv_from(&mut buffer) => match got {
                    Ok((n, from)) => self.answered(&buffer[..n], from),
                    Err(e) => self.lost(&socket, &e),
                },
                () = self.renewed.notified() => {}
            }
        }
    }

    /// `<version> <pod> <text>`, from the address that was asked.
    fn answered(&self, answer: &[u8], from: SocketAddr) {
        let answer = String::from_utf8_lossy(answer);
        let mut words = answer.split_whitespace();
        let (version, text) = (words.next().unwrap_or_default(), words.last().unwrap_or_default());
        let number = text.strip_prefix(&self.prefix).and_then(|n| n.parse().ok());
        let Some(number) = number else { return };
        // A second answer to what was sent twice is none.
        let Some(due) = self.open.borrow_mut().remove(&number) else { return };
        let mut report = self.report.borrow_mut();
        match from == self.target {
            true => report.answered(version, due.elapsed().as_micros() as u64),
            false => report.failed(number, "answered by another address"),
        }
    }

    /// An unconnected socket goes on; what was refused fails by itself.
    fn lost(&self, socket: &Rc<UdpSocket>, error: &io::Error) {
        let current = Rc::ptr_eq(socket, &self.socket.borrow());
        if !self.connected || !current || error.kind() == io::ErrorKind::WouldBlock {
            return;
        }
        let again: Vec<String> = self.open.borrow().keys().map(|n| self.text(*n)).collect();
        match open(self.target, true, &again) {
            Ok(socket) => {
                self.renewals.set(self.renewals.get() + 1);
                self.socket.replace(Rc::new(socket));
                self.renewed.notify_one();
            }
            Err(e) => eprintln!("connect again to {}: {e}", self.target),
        }
    }
}
