//! Container logs: the runtime writes one file per run in the CRI format (`time stream F|P text`), this reads them for
//! `kubectl logs`: tail, since, timestamps, previous, follow, byte limit. `rotate` and `prune` keep them from growing for
//! ever.

use bytes::Bytes;
use futures::future::BoxFuture;
use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    fs::File,
    io::{AsyncBufReadExt, AsyncReadExt, AsyncSeekExt, BufReader},
    sync::mpsc,
};

/// How often a followed file is looked at for more.
const FOLLOW_EVERY: Duration = Duration::from_millis(100);
/// Longest line handed on in one piece.
const MAX_LINE: usize = 64 * 1024;

#[derive(Clone, Debug, Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LogQuery {
    pub follow: bool,
    pub previous: bool,
    pub timestamps: bool,
    pub tail_lines: Option<u64>,
    pub since_seconds: Option<i64>,
    pub since_time: Option<String>,
    pub limit_bytes: Option<u64>,
}

/// The newest run's log of a container in the pod's log folder, or the one before it.
pub fn find(pod_log_dir: &Path, container: &str, previous: bool) -> io::Result<PathBuf> {
    if container.contains('/') || container.contains("..") {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "container name"));
    }
    let mut runs: Vec<u32> = std::fs::read_dir(pod_log_dir.join(container))?
        .filter_map(|e| e.ok()?.file_name().to_str()?.strip_suffix(".log")?.parse().ok())
        .collect();
    runs.sort_unstable_by(|a, b| b.cmp(a));
    let run = runs.get(usize::from(previous)).ok_or(io::ErrorKind::NotFound)?;
    Ok(pod_log_dir.join(container).join(format!("{run}.log")))
}

/// The log folders of a pod, by its UID.
pub fn folders_of(logs: &Path, uid: &str) -> Vec<PathBuf> {
    let own = |p: &PathBuf| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.rsplit('_').next() == Some(uid));
    std::fs::read_dir(logs).into_iter().flatten().filter_map(|e| Some(e.ok()?.path())).filter(own).collect()
}

/// A log that is larger is put aside (kubelet's containerLogMaxSize).
const MAX_SIZE: u64 = 10 << 20;
/// Files of one run, the one being written included (kubelet's containerLogMaxFiles).
const MAX_FILES: u32 = 5;
/// Runs of a container whose logs are kept: this one, and the one before for `--previous`.
const KEPT_RUNS: u32 = 2;

/// Removes the logs of runs long before `run`.
pub fn prune(folder: &Path, run: u32) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let of: Option<u32> = entry.file_name().to_str().and_then(|n| n.split_once(".log")?.0.parse().ok());
        if of.is_some_and(|of| of + KEPT_RUNS <= run) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Puts the log of a container's run aside as `<run>.log.1` when it is too large, and removes the oldest put aside.
/// True when the runtime must open the file anew.
pub fn rotate(folder: &Path, run: u32) -> io::Result<bool> {
    let current = folder.join(format!("{run}.log"));
    if std::fs::metadata(&current)?.len() <= MAX_SIZE {
        return Ok(false);
    }
    let aside = |n: u32| folder.join(format!("{run}.log.{n}"));
    for n in (1..MAX_FILES - 1).rev().filter(|n| aside(*n).exists()) {
        std::fs::rename(aside(n), aside(n + 1))?;
    }
    std::fs::rename(current, aside(1))?;
    Ok(true)
}

/// One line of a CRI log file.
#[derive(Debug, PartialEq, Eq)]
pub struct Line<'a> {
    pub time: &'a str,
    /// The text goes on in the next line.
    pub partial: bool,
    pub text: &'a [u8],
}

pub fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut parts = line.splitn(4, |b| *b == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let _stream = parts.next()?;
    let partial = parts.next()? == b"P";
    Some(Line { time, partial, text: parts.next().unwrap_or_default() })
}

/// Sends what `query` asks for, until the end of the file, or, following, until the receiver goes or `ended` says the
/// container is done. A file put aside meanwhile is read to its end, then the new one.
pub async fn stream(
    path: PathBuf,
    query: LogQuery,
    out: mpsc::Sender<Bytes>,
    mut ended: impl FnMut() -> BoxFuture<'static, bool> + Send,
) -> io::Result<()> {
    let since = since(&query);
    let mut file = File::open(&path).await?;
    if let Some(n) = query.tail_lines {
        let from = tail_offset(&mut file, n).await?;
        file.seek(io::SeekFrom::Start(from)).await?;
    }
    let mut reader = BufReader::new(file);
    let mut left = query.limit_bytes.unwrap_or(u64::MAX);
    let mut line = Vec::new();
    let mut starts_line = true;
    let mut put_aside = false;
    loop {
        let n = (&mut reader).take(MAX_LINE as u64).read_until(b'\n', &mut line).await?;
        if !line.ends_with(b"\n") && n < MAX_LINE {
            // The end for now; half a line waits for its rest.
            if !query.follow || left == 0 {
                return Ok(());
            }
            let over = ended().await;
            if n == 0 && put_aside {
                (reader, put_aside) = (BufReader::new(File::open(&path).await?), false);
                line.clear();
                continue;
            }
            // Looked at before the end is seen once more: the runtime writes to the old file until it has the new one.
            put_aside = is_another(&path, reader.get_ref()).await?;
            if over && n == 0 && !put_aside {
                return Ok(());
            }
            tokio::time::sleep(FOLLOW_EVERY).await;
            continue;
        }
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        if let Some(l) = parse(text).filter(|l| since.as_deref().is_none_or(|s| l.time >= s)) {
            let mut piece = Vec::with_capacity(text.len() + 1);
            if query.timestamps && starts_line {
                piece.extend_from_slice(l.time.as_bytes());
                piece.push(b' ');
            }
            piece.extend_from_slice(l.text);
            if !l.partial {
                piece.push(b'\n');
            }
            starts_line = !l.partial;
            piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left -= piece.len() as u64;
            if out.send(piece.into()).await.is_err() || left == 0 {
                return Ok(());
            }
        }
        line.clear();
    }
}

/// Whether at `path` there now is another file than `open`; nothing yet is none.
async fn is_another(path: &Path, open: &File) -> io::Result<bool> {
    let open = open.metadata().await?;
    Ok(tokio::fs::metadata(path).await.is_ok_and(|m| (m.dev(), m.ino()) != (open.dev(), open.ino())))
}

/// The earliest time wanted, in the form in which lines carry theirs (RFC 3339, UTC), so that text compares as time.
fn since(q: &LogQuery) -> Option<String> {
    use k8s_openapi::jiff::{SignedDuration, Timestamp};
    if let Some(s) = q.since_seconds {
        return Timestamp::now().checked_sub(SignedDuration::from_secs(s)).ok().map(|t| t.to_string());
    }
    q.since_time.as_deref()?.parse::<Timestamp>().ok().map(|t| t.to_string())
}

/// Where the last `n` lines begin.
async fn tail_offset(file: &mut File, n: u64) -> io::Result<u64> {
    let len = file.metadata().await?.len();
    let (mut at, mut found) = (len, 0u64);
    let mut buf = vec![0u8; 64 * 1024];
    while at > 0 {
        let from = at.saturating_sub(buf.len() as u64);
        let size = usize::try_from(at - from).unwrap_or(buf.len());
        file.seek(io::SeekFrom::Start(from)).await?;
        file.read_exact(&mut buf[..size]).await?;
        for (i, _) in buf[..size].iter().enumerate().rev().filter(|(_, b)| **b == b'\n') {
            let end = from + i as u64 + 1;
            if end == len {
                continue;
            }
            found += 1;
            if found == n {
                return Ok(end);
            }
        }
        at = from;
    }
    Ok(if n == 0 { len } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(lines: &str, query: LogQuery) -> String {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("0.log");
        std::fs::write(&path, lines).expect("write");
        let (tx, mut rx) = mpsc::channel(64);
        stream(path, query, tx, || Box::pin(async { true })).await.expect("streams");
        let mut out = vec![];
        while let Some(b) = rx.recv().await {
            out.extend_from_slice(&b);
        }
        String::from_utf8(out).expect("text")
    }

    const LINES: &str = "2026-01-01T00:00:01.5Z stdout F one\n2026-01-01T00:00:02Z stderr P tw\n\
        2026-01-01T00:00:02Z stderr F o\n2026-01-01T00:00:03Z stdout F \n";

    #[tokio::test]
    async fn lines_are_joined_cut_and_filtered() {
        assert_eq!(read(LINES, LogQuery::default()).await, "one\ntwo\n\n");
        assert_eq!(read(LINES, LogQuery { tail_lines: Some(1), ..LogQuery::default() }).await, "\n");
        assert_eq!(read(LINES, LogQuery { tail_lines: Some(0), ..LogQuery::default() }).await, "");
        assert_eq!(read(LINES, LogQuery { tail_lines: Some(99), ..LogQuery::default() }).await, "one\ntwo\n\n");
        assert_eq!(read(LINES, LogQuery { limit_bytes: Some(5), ..LogQuery::default() }).await, "one\nt");
        let since = LogQuery { since_time: Some("2026-01-01T00:00:02Z".into()), ..LogQuery::default() };
        assert_eq!(read(LINES, since).await, "two\n\n");
        let stamped = LogQuery { timestamps: true, limit_bytes: Some(27), ..LogQuery::default() };
        assert_eq!(read(LINES, stamped).await, "2026-01-01T00:00:01.5Z one\n");
    }

    #[tokio::test]
    async fn a_follower_goes_on_in_the_new_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let line = |text: &str| format!("2026-01-01T00:00:01Z stdout F {text}\n");
        let (path, aside) = (dir.path().join("0.log"), dir.path().join("0.log.1"));
        std::fs::write(&path, line("one")).expect("write");
        let (tx, mut rx) = mpsc::channel(64);
        let query = LogQuery { follow: true, ..LogQuery::default() };
        let follower = tokio::spawn(stream(path.clone(), query, tx, || Box::pin(async { false })));
        assert_eq!(rx.recv().await.expect("a line"), "one\n");
        std::fs::rename(&path, &aside).expect("put aside");
        // The runtime has not opened the new file yet.
        std::fs::OpenOptions::new()
            .append(true)
            .open(&aside)
            .and_then(|mut f| io::Write::write_all(&mut f, line("two").as_bytes()))
            .expect("write");
        assert_eq!(rx.recv().await.expect("a line"), "two\n");
        std::fs::write(&path, line("three")).expect("write");
        assert_eq!(rx.recv().await.expect("a line"), "three\n");
        follower.abort();
    }

    #[test]
    fn large_logs_are_put_aside_and_old_ones_go() {
        let dir = tempfile::tempdir().expect("a folder");
        let write = |name: &str, size: u64| {
            std::fs::File::create(dir.path().join(name)).and_then(|f| f.set_len(size)).expect("write");
        };
        write("7.log", 3);
        assert!(!rotate(dir.path(), 7).expect("fine"));
        for old in ["5.log", "5.log.1", "6.log"] {
            write(old, 1);
        }
        prune(dir.path(), 7).expect("fine");
        for _ in 0..7 {
            write("7.log", MAX_SIZE + 1);
            assert!(rotate(dir.path(), 7).expect("fine"));
        }
        let mut left: Vec<_> =
            std::fs::read_dir(dir.path()).expect("list").map(|e| e.expect("file").file_name()).collect();
        left.sort();
        assert_eq!(left, ["6.log", "7.log.1", "7.log.2", "7.log.3", "7.log.4"]);
    }

    #[test]
    fn the_newest_run_is_found_and_the_one_before() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(dir.path().join("c")).expect("mkdir");
        for n in ["0.log", "10.log", "9.log"] {
            std::fs::write(dir.path().join("c").join(n), "").expect("write");
        }
        assert!(find(dir.path(), "c", false).expect("found").ends_with("10.log"));
        assert!(find(dir.path(), "c", true).expect("found").ends_with("9.log"));
        assert!(find(dir.path(), "../c", false).is_err());
    }
}
