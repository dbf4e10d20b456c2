//! `sluice install`: puts the plugin, the agent and this program on a node, and has systemd run the agent. Each file is
//! there whole or not at all, in an order in which the node works at every moment; whatever was interrupted is finished by
//! running it again. The network configuration is written by the agent alone, when it is ready: here it is waited for.

mod plan;

pub use plan::{AGENT, PLUGIN, SERVICE, SOCKET};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use plan::Service;
use sluice_cni::CONFLIST;
use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// What older runtimes want beside a network's own plugin; a link to ours where there is none.
pub const LOOPBACK: &str = "loopback";
pub const CLI: &str = "sluice";
/// Behind the name of a configuration that was moved aside: no runtime reads it.
const ASIDE: &str = "sluice-aside";
/// The plugin tries what ADD does, which takes milliseconds; it may wait for a lock.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(100);

/// Where things are on the node.
#[derive(Args, Clone, Debug)]
pub struct Places {
    /// Folder in which the container runtime looks for network plugins
    #[arg(long, default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,
    /// Folder from which it reads network configurations
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub conf_dir: PathBuf,
    /// Folder for sluice-agent and sluice
    #[arg(long, default_value = "/usr/local/bin")]
    pub program_dir: PathBuf,
    /// Folder for the agent's systemd units
    #[arg(long, default_value = "/etc/systemd/system")]
    pub unit_dir: PathBuf,
    /// Something other than systemd runs the agent
    #[arg(long)]
    pub no_service: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Options {
    #[command(flatten)]
    places: Places,
    /// Folder with sluice-cni, sluice-agent and sluice (default: that of this program)
    #[arg(long)]
    from: Option<PathBuf>,
    /// Rename network configurations of others that the runtime would take instead
    #[arg(long)]
    move_aside: bool,
    /// Seconds to wait until pods can be added
    #[arg(long, default_value_t = 120)]
    timeout: u64,
    /// Arguments of sluice-agent; without any, those of an earlier installation stay
    #[arg(last = true)]
    agent_args: Vec<String>,
}

impl Places {
    /// Held by whoever installs or uninstalls; it ends with the process.
    pub fn lock(&self) -> Result<File> {
        let dir = &self.bin_dir;
        let folder = File::open(dir).with_context(|| format!("open {}", dir.display()))?;
        folder.lock().with_context(|| format!("lock {}", dir.display()))?;
        Ok(folder)
    }

    pub fn conflist(&self) -> PathBuf {
        self.conf_dir.join(CONFLIST)
    }

    pub fn service(&self) -> PathBuf {
        self.unit_dir.join(SERVICE)
    }

    pub fn socket(&self) -> PathBuf {
        self.unit_dir.join(SOCKET)
    }
}

pub fn run(o: &Options) -> Result<()> {
    let places = &o.places;
    // Everything that can refuse, before anything is changed.
    let in_the_way = in_the_way(&places.conf_dir)?;
    if !o.move_aside
        && let Some(first) = in_the_way.first()
    {
        bail!(
            "{} is a network configuration of others, and the runtime would take it instead of {CONFLIST}: remove it, or \
             let --move-aside rename it when pods can be served",
            first.display()
        );
    }
    let programs = programs(o)?;
    let agent = places.program_dir.join(AGENT);
    let service = match places.no_service {
        true => None,
        false => Some(
            plan::service(&agent, &o.agent_args, &places.conf_dir, places.service().exists())
                .map_err(anyhow::Error::msg)?,
        ),
    };
    for dir in [&places.bin_dir, &places.program_dir, &places.conf_dir] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    let _lock = places.lock()?;
    for (name, program) in &programs {
        let dir = if *name == PLUGIN { &places.bin_dir } else { &places.program_dir };
        place(&dir.join(name), program, 0o755)?;
    }
    place_loopback(&places.bin_dir)?;
    if let Some(service) = service {
        start_service(places, &service)?;
    }
    wait_until_ready(places, Duration::from_secs(o.timeout))?;
    for path in in_the_way {
        move_aside(&path)?;
    }
    println!("installed: pods can be added, by {}", places.conflist().display());
    Ok(())
}

fn in_the_way(conf_dir: &Path) -> Result<Vec<PathBuf>> {
    let listed = match fs::read_dir(conf_dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(vec![]),
        other => other.with_context(|| format!("list {}", conf_dir.display()))?,
    };
    let file = |e: fs::DirEntry| Some((e.file_name().to_str()?.to_owned(), fs::read(e.path()).unwrap_or_default()));
    let files: Vec<_> = listed.flatten().filter_map(file).collect();
    Ok(plan::in_the_way(&files).into_iter().map(|name| conf_dir.join(name)).collect())
}

/// The programs with their contents.
fn programs(o: &Options) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let own = std::env::current_exe().context("find this program's folder")?;
    let from = o.from.as_deref().or(own.parent()).unwrap_or(Path::new("."));
    let read = |name| {
        let path = from.join(name);
        let program = fs::read(&path);
        Ok((
            name,
            program.with_context(|| format!("read {}; --from names the folder with the programs", path.display()))?,
        ))
    };
    [PLUGIN, AGENT, CLI].into_iter().map(read).collect()
}

/// Puts a file there, whole or not at all, and on the disk when this returns. What runs from the file of before keeps it.
fn place(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let next = next(path);
    let _ = fs::remove_file(&next); // left by one that was killed here
    if fs::read(path).is_ok_and(|there| there == content) {
        return Ok(());
    }
    let failed = || format!("write {}", path.display());
    let mut file = File::options().create_new(true).write(true).mode(mode).open(&next).with_context(failed)?;
    file.write_all(content).and_then(|()| file.sync_all()).with_context(failed)?;
    drop(file);
    fs::rename(&next, path).with_context(failed)?;
    sync(path.parent().unwrap_or(Path::new("/")))
}

/// Where a file is written before it takes its place: always there, so that what was interrupted is found again.
pub fn next(path: &Path) -> PathBuf {
    path.with_file_name(format!(".{}.sluice-next", path.file_name().unwrap_or_default().to_string_lossy()))
}

/// After a rename or a removal in a folder.
pub fn sync(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).with_context(|| format!("sync {}", dir.display()))
}

fn place_loopback(bin_dir: &Path) -> Result<()> {
    let path = bin_dir.join(LOOPBACK);
    match std::os::unix::fs::symlink(PLUGIN, &path) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(e).with_context(|| format!("make {}", path.display())),
        _ => sync(bin_dir),
    }
}

/// Always started again: whether what runs is of these files, nobody has to know, and nothing in the kernel notices.
fn start_service(places: &Places, service: &Service) -> Result<()> {
    if let Service::Write(unit) = service {
        fs::create_dir_all(&places.unit_dir).with_context(|| format!("make {}", places.unit_dir.display()))?;
        place(&places.socket(), plan::SOCKET_UNIT.as_bytes(), 0o644)?;
        place(&places.service(), unit.as_bytes(), 0o644)?;
    }
    systemctl(&["daemon-reload"])?;
    systemctl(&["enable", SERVICE, SOCKET])?;
    systemctl(&["restart", SERVICE])
}

pub fn systemctl(arguments: &[&str]) -> Result<()> {
    let what = format!("systemctl {}", arguments.join(" "));
    let output = Command::new("systemctl").args(arguments).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("run `{what}`; --no-service where something else runs the agent"))?;
    ensure!(output.status.success(), "`{what}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Until the plugin itself says that it can add pods.
fn wait_until_ready(places: &Places, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let Err(why) = status(places) else { return Ok(()) };
        if Instant::now() >= deadline {
            let log = if places.no_service { "the agent's log" } else { "`journalctl -u sluice-agent`" };
            bail!(
                "no pod can be added after {} s: {why}; {log} says more, and install can be run again",
                timeout.as_secs()
            );
        }
        thread::sleep(POLL);
    }
}

fn status(places: &Places) -> Result<(), String> {
    let conflist = places.conflist();
    // A link of an earlier boot leads nowhere.
    let list = fs::read(&conflist).map_err(|_| format!("the agent has not written {} yet", conflist.display()))?;
    let request = plan::status_request(&list).map_err(|e| format!("{}: {e}", conflist.display()))?;
    let plugin = places.bin_dir.join(PLUGIN);
    let failed = |e: std::io::Error| format!("run {}: {e}", plugin.display());
    let mut command = Command::new(&plugin);
    command.env("CNI_COMMAND", "STATUS").env("CNI_PATH", &places.bin_dir);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(request.as_bytes()); // one that has ended has said why
    }
    let deadline = Instant::now() + STATUS_TIMEOUT;
    // Its answer is smaller than a pipe's buffer.
    while child.try_wait().map_err(failed)?.is_none() {
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("{} does not answer STATUS", plugin.display()));
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() { Ok(()) } else { Err(plan::status_error(&output.stdout)) }
}

fn move_aside(path: &Path) -> Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{ASIDE}"));
    let aside = PathBuf::from(aside);
    fs::rename(path, &aside).with_context(|| format!("rename {} to {}", path.display(), aside.display()))?;
    println!("moved aside: {} is {} now", path.display(), aside.display());
    sync(path.parent().unwrap_or(Path::new("/")))
}
