//! A simulated machine: namespaces of its own (net, mount, pid, uts, ipc, cgroup), a cgroup in every hierarchy, and a
//! first process that mounts what a machine has, starts its programs and keeps them running.
//!
//! `start` runs outside and enters the cgroups and namespaces; `init` is pid 1 inside. Killing that process removes
//! everything but the cgroup folders, which `remove` takes away.

use anyhow::{Context, Result, bail};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change},
    process::{Pid, Signal, WaitOptions, kill_process, setsid, wait},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fs, io,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const CGROUPS: &str = "/sys/fs/cgroup";
const LISTEN_BACKLOG: i32 = 128;
/// A program that ended starts again after this.
const RESTART_AFTER: Duration = Duration::from_millis(200);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    pub name: String,
    /// Prefix of its cgroups: unique on the host.
    pub cgroup: String,
    /// Everything of the machine on the host: logs, disk, pid.
    pub dir: PathBuf,
    pub programs: Vec<Program>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Program {
    pub name: String,
    pub argv: Vec<String>,
    pub env: HashMap<String, String>,
    /// Runs once, before the next one starts; otherwise it is kept running.
    pub once: bool,
    /// The next one starts when this unix socket takes connections.
    pub ready: Option<PathBuf>,
    pub sockets: Sockets,
}

/// What a program gets by the `LISTEN_FDS` protocol. It stays open while the program is started again: what comes
/// meanwhile waits.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Sockets {
    None,
    /// The machine's standard input, a listening socket of the host.
    Host,
    /// A datagram socket and a listener on this address, which the machine need not have yet.
    Bound(SocketAddr),
}

impl Machine {
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    pub fn log(&self, program: &str) -> PathBuf {
        self.dir.join("log").join(format!("{program}.log"))
    }

    fn spec(&self) -> PathBuf {
        self.dir.join("machine.json")
    }

    fn pid_file(&self) -> PathBuf {
        self.dir.join("pid")
    }

    /// Pid of its first process as the host sees it, if that process still is the one that was started.
    pub fn pid(&self) -> Option<i32> {
        let text = fs::read_to_string(self.pid_file()).ok()?;
        let (pid, started) = text.trim().split_once(' ')?;
        let pid: i32 = pid.parse().ok()?;
        (start_time(pid)? == started).then_some(pid)
    }

    pub fn netns(&self) -> Option<PathBuf> {
        self.pid().map(|p| PathBuf::from(format!("/proc/{p}/ns/net")))
    }

    /// Starts it and waits until its first process runs. `socket` becomes its standard input.
    pub fn start(&self, socket: Option<TcpListener>) -> Result<()> {
        for d in [self.disk(), self.dir.join("log")] {
            fs::create_dir_all(&d).with_context(|| format!("make {}", d.display()))?;
        }
        let _ = fs::remove_file(self.pid_file());
        fs::write(self.spec(), serde_json::to_vec_pretty(self)?)?;
        let log = fs::File::create(self.log("init"))?;
        let stdin = socket.map_or_else(Stdio::null, |s| Stdio::from(std::os::fd::OwnedFd::from(s)));
        let exe = std::env::current_exe()?;
        Command::new(exe)
            .arg("machine-start")
            .arg(self.spec())
            .stdin(stdin)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start machine {}", self.name))?;
        let until = Instant::now() + Duration::from_secs(10);
        while self.pid().is_none() {
            if Instant::now() > until {
                let log = fs::read_to_string(self.log("init")).unwrap_or_default();
                bail!("machine {} did not start: {}", self.name, log.trim());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Switches it off at once, as a power cut would. Its disk stays.
    pub fn kill(&self) {
        if let Some(p) = self.pid().and_then(Pid::from_raw) {
            let _ = kill_process(p, Signal::KILL);
        }
        while self.pid().is_some() {
            thread::sleep(Duration::from_millis(5));
        }
        // One that was interrupted while it started has not noted its first process yet.
        let until = Instant::now() + Duration::from_secs(5);
        while Instant::now() < until {
            let left: Vec<_> = hierarchies().iter().flat_map(|h| processes(&h.join(&self.cgroup))).collect();
            if left.is_empty() {
                return;
            }
            for p in left {
                let _ = kill_process(p, Signal::KILL);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Takes its cgroups away; all are tried.
    pub fn remove_cgroups(&self) -> Vec<String> {
        let mut left = vec![];
        for h in hierarchies() {
            let dir = h.join(&self.cgroup);
            if dir.exists()
                && let Err(e) = remove_tree(&dir)
            {
                left.push(format!("{}: {e}", dir.display()));
            }
        }
        left
    }
}

/// Field 22 of /proc/<pid>/stat tells a process from a later one with its number.
fn start_time(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after = stat.rsplit_once(')')?.1;
    if after.trim_start().starts_with('Z') {
        return None;
    }
    after.split_whitespace().nth(19).map(str::to_owned)
}

/// Mounted cgroup hierarchies: the folders of version 1 and hybrid machines, or the one of version 2.
fn hierarchies() -> Vec<PathBuf> {
    let root = PathBuf::from(CGROUPS);
    if root.join("cgroup.controllers").exists() {
        return vec![root];
    }
    let mut all: Vec<_> = fs::read_dir(&root)
        .into_iter()
        .flatten()
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.join("cgroup.procs").exists())
        .collect();
    all.sort();
    all
}

/// Processes in a cgroup and below.
fn processes(cgroup: &Path) -> Vec<Pid> {
    let own = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut all: Vec<Pid> = own.lines().filter_map(|l| Pid::from_raw(l.parse().ok()?)).collect();
    let below = fs::read_dir(cgroup).into_iter().flatten().flatten().filter(|e| e.path().is_dir());
    all.extend(below.flat_map(|e| processes(&e.path())));
    all
}

/// Deepest first; a process that is just ending may hold a folder for a moment.
fn remove_tree(dir: &Path) -> io::Result<()> {
    for e in fs::read_dir(dir)?.flatten() {
        if e.file_type()?.is_dir() {
            remove_tree(&e.path())?;
        }
    }
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        match fs::remove_dir(dir) {
            Err(e) if e.raw_os_error() == Some(16) && Instant::now() < until => {
                thread::sleep(Duration::from_millis(10))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            r => return r,
        }
    }
}

fn load(spec: &Path) -> Result<Machine> {
    let text = fs::read(spec).with_context(|| format!("read {}", spec.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

/// The hidden command that becomes the machine: joins its cgroups, then enters new namespaces.
pub fn enter(spec: &Path) -> Result<()> {
    let m = load(spec)?;
    let pid = std::process::id();
    for h in hierarchies() {
        let dir = h.join(&m.cgroup);
        fs::create_dir_all(&dir).with_context(|| format!("make cgroup {}", dir.display()))?;
        // A new cpuset has neither CPUs nor memory, and takes no process before it has.
        for f in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(v) = fs::read(h.join(f)) {
                let _ = fs::write(dir.join(f), v);
            }
        }
        fs::write(dir.join("cgroup.procs"), pid.to_string()).with_context(|| format!("join {}", dir.display()))?;
    }
    let _ = setsid();
    let err = Command::new("unshare")
        .args(["-m", "-n", "-C", "-u", "-i", "-p", "--fork", "--kill-child", "--propagation", "private", "--"])
        .arg(std::env::current_exe()?)
        .arg("machine-init")
        .arg(spec)
        .exec();
    Err(err).context("run unshare (Debian package util-linux)")
}

/// Pid 1 of the machine.
pub fn init(spec: &Path) -> Result<()> {
    let m = load(spec)?;
    // The old /proc still shows the host's numbers.
    let outer = fs::read_link("/proc/self")?.to_string_lossy().parse::<i32>()?;
    let started = start_time(outer).context("own start time")?;
    set_up(&m)?;
    let tmp = m.pid_file().with_extension("new");
    fs::write(&tmp, format!("{outer} {started}\n"))?;
    fs::rename(tmp, m.pid_file())?;
    run(&m)
}

fn set_up(m: &Machine) -> Result<()> {
    let none = MountFlags::empty();
    let hybrid = Path::new(CGROUPS).join("unified").exists();
    let v1: Vec<_> = hierarchies();
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    fs::create_dir_all("/var/lib/sluice")?;
    mount_bind(m.disk(), "/var/lib/sluice").context("mount the machine's disk")?;
    mount("proc", "/proc", "proc", none, None).context("mount /proc")?;
    rustix::system::sethostname(m.name.as_bytes())?;
    mount("tmpfs", "/run", "tmpfs", none, Some(c"mode=755")).context("mount /run")?;
    for d in ["/run/netns", "/run/sluice", "/run/cni/net.d"] {
        fs::create_dir_all(d)?;
    }
    mount("sysfs", "/sys", "sysfs", none, None).context("mount /sys")?;
    mount_cgroups(&v1, hybrid)?;
    mount("bpf", "/sys/fs/bpf", "bpf", none, None).context("mount /sys/fs/bpf")?;
    for (key, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")] {
        let _ = fs::write(format!("/proc/sys/net/{key}"), value);
    }
    sluice_netlink::lab::loopback_up().context("bring lo up")
}

fn mount_cgroups(hierarchies: &[PathBuf], hybrid: bool) -> Result<()> {
    let none = MountFlags::empty();
    if !hybrid && hierarchies.len() == 1 {
        return mount("cgroup2", CGROUPS, "cgroup2", none, None).context("mount cgroup2");
    }
    mount("cgroup", CGROUPS, "tmpfs", none, Some(c"mode=755")).context("mount the cgroup folder")?;
    for h in hierarchies {
        let name = h.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        fs::create_dir_all(h)?;
        let (kind, options) = match name.as_str() {
            "unified" => ("cgroup2", None),
            "systemd" => ("cgroup", Some("none,name=systemd".to_owned())),
            other => ("cgroup", Some(other.to_owned())),
        };
        let options = options.map(std::ffi::CString::new).transpose()?;
        mount("cgroup", h, kind, none, options.as_deref()).with_context(|| format!("mount cgroup {name}"))?;
    }
    Ok(())
}

/// Starts the programs in order and keeps them running; never returns.
fn run(m: &Machine) -> Result<()> {
    let mut running: HashMap<i32, (&Program, Kept)> = HashMap::new();
    for p in &m.programs {
        let kept = keep(p.sockets).with_context(|| format!("sockets of {}", p.name))?;
        if p.once {
            let status = command(m, p, &kept)?.status().with_context(|| format!("run {}", p.name))?;
            if !status.success() {
                eprintln!("{} ended with {status}; its log is {}", p.name, m.log(&p.name).display());
            }
            continue;
        }
        running.insert(spawn(m, p, &kept)?, (p, kept));
        if let Some(socket) = &p.ready {
            let until = Instant::now() + Duration::from_secs(30);
            while UnixStream::connect(socket).is_err() && Instant::now() < until {
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
    loop {
        let ended = match wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) => pid.as_raw_nonzero().get(),
            _ => {
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if let Some((p, kept)) = running.remove(&ended) {
            eprintln!("{} (pid {ended}) ended, starting it again", p.name);
            thread::sleep(RESTART_AFTER);
            running.insert(spawn(m, p, &kept)?, (p, kept));
        }
    }
}

/// A program's sockets, in the order in which it gets them.
type Kept = Vec<OwnedFd>;

fn keep(sockets: Sockets) -> Result<Kept> {
    Ok(match sockets {
        Sockets::None => vec![],
        Sockets::Host => vec![io::stdin().as_fd().try_clone_to_owned()?],
        Sockets::Bound(address) => {
            let bound = |kind| {
                let s = socket2::Socket::new(socket2::Domain::for_address(address), kind, None)?;
                match address {
                    SocketAddr::V4(_) => s.set_freebind_v4(true)?,
                    SocketAddr::V6(_) => s.set_freebind_v6(true)?,
                }
                s.bind(&address.into())?;
                io::Result::Ok(s)
            };
            let listener = bound(socket2::Type::STREAM)?;
            listener.listen(LISTEN_BACKLOG)?;
            vec![UdpSocket::from(bound(socket2::Type::DGRAM)?).into(), TcpListener::from(listener).into()]
        }
    })
}

fn spawn(m: &Machine, p: &Program, kept: &Kept) -> Result<i32> {
    let child = command(m, p, kept)?.spawn().with_context(|| format!("start {}", p.name))?;
    let pid = i32::try_from(child.id())?;
    // Named so that tests and operators can end exactly this one.
    fs::write(format!("/run/sluice/{}.pid", p.name), format!("{pid}\n"))?;
    Ok(pid)
}

fn command(m: &Machine, p: &Program, kept: &Kept) -> Result<Command> {
    let log = fs::OpenOptions::new().create(true).append(true).open(m.log(&p.name))?;
    let (first, rest) = p.argv.split_first().with_context(|| format!("{} has no command", p.name))?;
    // The shell's pid is the program's, as the LISTEN_FDS protocol asks.
    let through = |script: &str| {
        let mut c = Command::new("/bin/sh");
        c.arg("-c").arg(format!("{script}; LISTEN_FDS={} LISTEN_PID=$$ exec \"$0\" \"$@\"", kept.len())).arg(first);
        c
    };
    let mut c = match kept.as_slice() {
        [] => {
            let mut c = Command::new(first);
            c.stdin(Stdio::null()).stdout(log.try_clone()?);
            c
        }
        [one] => {
            let mut c = through("exec 3<&0 </dev/null");
            c.stdin(one.try_clone()?).stdout(log.try_clone()?);
            c
        }
        [one, two] => {
            let mut c = through("exec 3<&0 4<&1 </dev/null >&2");
            c.stdin(one.try_clone()?).stdout(two.try_clone()?);
            c
        }
        more => bail!("{} cannot be given {} sockets", p.name, more.len()),
    };
    c.args(rest).envs(&p.env).stderr(log);
    Ok(c)
}

/// A command inside the machine, all its namespaces and cgroups joined.
pub fn inside(m: &Machine, argv: &[&str]) -> Result<Command> {
    let pid = m.pid().with_context(|| format!("machine {} is not running", m.name))?;
    let mut c = Command::new("nsenter");
    c.args(["-t", &pid.to_string(), "-m", "-n", "-C", "-u", "-i", "-p", "--"]).args(argv);
    Ok(c)
}
