//! `sluice flows`: what flows and what is dropped, live, of all nodes in one stream. Each node's agent is asked through the
//! API; a stream that breaks is opened again. What a record looks like, in which order records come and what a drop means
//! is decided in plain code below this.

mod explain;
mod line;
mod merge;

use crate::client::{block_on, connect};
use anyhow::{Context, Result, bail};
use clap::Args;
use futures::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client, ResourceExt, api::ListParams};
use line::Columns;
use merge::Merge;
use sluice_wire::flows::{Filter, IDLE_S, MAX_LINE_BYTES, PATH, Record};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    path::Path,
    time::{Duration, Instant},
};
use tokio::{
    sync::mpsc,
    task::AbortHandle,
    time::{interval, sleep, sleep_until, timeout},
};

/// Records on their way from the nodes' streams: a stream waits when they are not printed as fast as they come.
const IN_FLIGHT: usize = 1024;
/// How often nodes that came or went are looked for.
const NODES_EVERY: Duration = Duration::from_secs(10);
/// Before a node's stream is opened again.
const RETRY: Duration = Duration::from_secs(1);
/// A stream that has been silent for so long is broken: agents give a sign of life every [`IDLE_S`] seconds.
const SILENT: Duration = Duration::from_secs(4 * IDLE_S);

#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Only what is dropped or refused
    #[arg(long)]
    drops: bool,
    /// Only flows from or to this pod: `namespace/name`, or a name in the namespace default
    #[arg(long, value_parser = full_name)]
    pod: Option<String>,
    /// Only flows of this namespace's pods and services
    #[arg(long, short)]
    namespace: Option<String>,
    /// Only flows to this service: `namespace/name`, or a name in the namespace default
    #[arg(long, value_parser = full_name)]
    service: Option<String>,
    /// Only what this node sees; may be given several times
    #[arg(long)]
    node: Vec<String>,
    /// One JSON object per line
    #[arg(long)]
    json: bool,
    /// End after so many flows
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after this time: 30s, 5m, 1h
    #[arg(long, value_name = "TIME", value_parser = duration)]
    last: Option<Duration>,
}

fn full_name(text: &str) -> Result<String, String> {
    Ok(if text.contains('/') { text.to_owned() } else { format!("default/{text}") })
}

fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is not a time such as 30s, 5m or 1h");
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(bad)?;
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(bad()),
    };
    // Longer than a year is for ever; the clock's own bound is far away.
    let seconds =
        number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).filter(|n| (1..=31_536_000).contains(n));
    seconds.map(Duration::from_secs).ok_or_else(bad)
}

impl Options {
    fn filter(&self) -> Result<Filter> {
        let (pod, namespace, service) = (self.pod.clone(), self.namespace.clone(), self.service.clone());
        Ok(Filter { drops: self.drops, pod, namespace, service }.checked()?)
    }
}

/// Until Ctrl-C, the end that was asked for, or nobody reads the output any more.
pub fn run(kubeconfig: &Path, options: &Options) -> Result<()> {
    let filter = options.filter()?;
    block_on(async {
        let client = connect(kubeconfig).await?;
        let follow = follow(client, options, filter);
        tokio::select! {
            ended = follow => ended,
            pressed = tokio::signal::ctrl_c() => pressed.context("wait for Ctrl-C"),
        }
    })
}

/// What a node's stream says.
enum News {
    Record(String, Record),
    /// For the error output.
    Remark(String),
    /// Nothing that is tried again will help.
    Refused(anyhow::Error),
}

async fn follow(client: Client, options: &Options, filter: Filter) -> Result<()> {
    let (sender, mut news) = mpsc::channel(IN_FLIGHT);
    let mut streams =
        Streams { client, path: filter.query(), wanted: options.node.clone(), sender, running: BTreeMap::new() };
    streams.update().await.context("list nodes")?;
    let mut nodes = interval(NODES_EVERY);
    nodes.reset();
    let mut merge = Merge::default();
    let mut printer = Printer::new(options);
    let end = options.last.map(|last| Instant::now() + last);
    loop {
        let due = merge.due().into_iter().chain(end).min().unwrap_or_else(|| Instant::now() + NODES_EVERY);
        tokio::select! {
            () = sleep_until(due.into()) => {}
            _ = nodes.tick() => {
                if let Err(error) = streams.update().await {
                    eprintln!("nodes not listed, trying again: {error:#}");
                }
            }
            news = news.recv() => match news.context("a sender is kept")? {
                News::Record(line, record) => {
                    let time = record.time().to_owned();
                    merge.push(&time, Instant::now(), (line, record));
                }
                News::Remark(text) => eprintln!("{text}"),
                News::Refused(error) => return Err(error),
            },
        }
        let now = Instant::now();
        let over = end.is_some_and(|end| end <= now);
        while let Some((line, record)) = if over { merge.pop_any() } else { merge.pop(now) } {
            if printer.print(&line, &record)? {
                return Ok(());
            }
        }
        if over || !printer.flush()? {
            return Ok(());
        }
    }
}

/// One task for each node.
struct Streams {
    client: Client,
    path: String,
    wanted: Vec<String>,
    sender: mpsc::Sender<News>,
    running: BTreeMap<String, AbortHandle>,
}

impl Streams {
    /// Follows nodes that came, and no longer those that went.
    async fn update(&mut self) -> Result<()> {
        let all = Api::<Node>::all(self.client.clone()).list(&ListParams::default()).await?;
        let there: BTreeSet<String> = all.iter().map(|n| n.name_any()).collect();
        if let Some(missing) = self.wanted.iter().find(|n| !there.contains(*n) && !self.running.contains_key(*n)) {
            let known: Vec<&str> = there.iter().map(String::as_str).collect();
            bail!("there is no node {missing}; the nodes are {}", known.join(", "));
        }
        self.running.retain(|node, task| {
            let stays = there.contains(node);
            if !stays {
                task.abort();
            }
            stays
        });
        for node in there {
            let asked = self.wanted.is_empty() || self.wanted.contains(&node);
            if asked && !self.running.contains_key(&node) {
                let path = format!("/api/v1/nodes/{node}/proxy{PATH}?{}", self.path);
                let task = tokio::spawn(node_stream(self.client.clone(), node.clone(), path, self.sender.clone()));
                self.running.insert(node, task.abort_handle());
            }
        }
        Ok(())
    }
}

/// For ever: one node's records. A trouble is told once, and its end.
async fn node_stream(client: Client, node: String, path: String, news: mpsc::Sender<News>) {
    let mut trouble: Option<String> = None;
    loop {
        let ended = one_stream(&client, &node, &path, &news, &mut trouble).await;
        let text = match ended {
            Err(error) if refused(&error) => {
                let _ = news.send(News::Refused(error.context(format!("follow the flows of node {node}")))).await;
                return;
            }
            Err(error) => format!("{error:#}"),
            Ok(()) => "its agent ended the stream".to_owned(),
        };
        if trouble.as_ref() != Some(&text) {
            let remark = format!("node {node}: {text}; connecting again every second");
            if news.send(News::Remark(remark)).await.is_err() {
                return;
            }
            trouble = Some(text);
        }
        sleep(RETRY).await;
    }
}

/// Not an administrator; or a control or agent that has no flows yet.
fn refused(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<kube::Error>().and_then(|e| match e {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    });
    matches!(code, Some(400 | 401 | 403))
}

async fn one_stream(
    client: &Client,
    node: &str,
    path: &str,
    news: &mpsc::Sender<News>,
    trouble: &mut Option<String>,
) -> Result<()> {
    let request = http::Request::get(path).body(vec![])?;
    let mut body = std::pin::pin!(client.request_stream(request).await?);
    loop {
        let line = timeout(SILENT, next_line(&mut body)).await;
        let Some(line) = line.map_err(|_| anyhow::anyhow!("it says nothing for {} s", SILENT.as_secs()))?? else {
            return Ok(());
        };
        if trouble.take().is_some() && news.send(News::Remark(format!("node {node}: connected again"))).await.is_err() {
            return Ok(());
        }
        let record = match serde_json::from_str::<Record>(&line) {
            Ok(Record::Idle { .. }) => continue,
            Ok(record) => News::Record(line, record),
            Err(error) => News::Remark(format!("node {node}: a line is not understood ({error}): {line}")),
        };
        if news.send(record).await.is_err() {
            return Ok(());
        }
    }
}

/// A line without its end; `None` after the last.
async fn next_line(body: &mut (impl AsyncBufRead + Unpin)) -> Result<Option<String>> {
    let mut line = Vec::new();
    let read = body.take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line).await?;
    match (read, line.pop()) {
        (_, None) => Ok(None),
        (_, Some(b'\n')) => Ok(Some(String::from_utf8(line).context("a line is not text")?)),
        (MAX_LINE_BYTES.., _) => bail!("a line is longer than {MAX_LINE_BYTES} bytes"),
        _ => bail!("the connection broke off within a line"),
    }
}

/// Writes what was asked for, until that is enough.
struct Printer {
    out: io::BufWriter<io::Stdout>,
    json: bool,
    left: Option<u64>,
    columns: Columns,
    explained: BTreeSet<String>,
}

impl Printer {
    fn new(options: &Options) -> Self {
        Self {
            out: io::BufWriter::new(io::stdout()),
            json: options.json,
            left: options.count,
            columns: Columns::default(),
            explained: BTreeSet::new(),
        }
    }

    /// True when no more is wanted, or nobody reads.
    fn print(&mut self, line: &str, record: &Record) -> Result<bool> {
        let text = if self.json { Some(line.to_owned()) } else { self.columns.line(record) };
        let Some(text) = text else { return Ok(false) };
        if !read(writeln!(self.out, "{text}"))? {
            return Ok(true);
        }
        let Record::Flow(flow) = record else { return Ok(false) };
        if flow.verdict.ends()
            && !self.json
            && let Some(sentence) = explain::explain(&flow.reason)
            && self.explained.insert(flow.reason.clone())
        {
            // After the line that it is about.
            if !self.flush()? {
                return Ok(true);
            }
            eprintln!("  {}: {sentence}", flow.reason);
        }
        self.left = self.left.map(|left| left - 1);
        if self.left == Some(0) {
            self.flush()?;
            return Ok(true);
        }
        Ok(false)
    }

    /// False when nobody reads.
    fn flush(&mut self) -> Result<bool> {
        read(self.out.flush())
    }
}

/// A reader that has gone (`| head`) is no failure.
fn read(written: io::Result<()>) -> Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(e).context("write the flows"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::io::Cursor;

    #[test]
    fn times_and_names_are_taken_as_people_write_them() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
        for bad in ["", "s", "0s", "5", "-1s", "5d", "5é", "99999999999999999h", "9000h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert_eq!(full_name("web"), Ok("default/web".to_owned()));
        assert_eq!(full_name("shop/web"), Ok("shop/web".to_owned()));
    }

    #[test]
    fn lines_are_bounded_and_whole() {
        let lines = |text: Vec<u8>| {
            block_on(async move {
                let mut body = Cursor::new(text);
                let mut all = Vec::new();
                while let Some(line) = next_line(&mut body).await? {
                    all.push(line);
                }
                Ok(all)
            })
        };
        assert_eq!(lines(b"a\n\nbc\n".to_vec()).expect("lines"), ["a", "", "bc"]);
        assert!(lines(b"a\nb".to_vec()).expect_err("half a line").to_string().contains("broke off"));
        assert!(lines(vec![b'x'; MAX_LINE_BYTES + 1]).expect_err("too long").to_string().contains("longer"));
        assert!(lines(vec![0xff, b'\n']).is_err());
    }
}
