//! The cluster under test, and words for talking to it.

use crate::machine::{Seen, Watch};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    fs,
    io::Write,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

pub const NODES: [&str; 3] = ["node-1", "node-2", "node-3"];

#[derive(Clone)]
pub struct Cluster {
    name: String,
    bin: PathBuf,
    /// Programs of the data path in the kernel before this cluster was started.
    pub programs_before: usize,
    /// Made by the test that has this.
    namespaces: Arc<Mutex<Vec<String>>>,
    /// Tests that failed, and why.
    failed: Arc<Mutex<String>>,
}

/// How many programs of the data path the kernel has, whoever loaded them.
pub fn programs() -> usize {
    let ours = |p: &aya::programs::ProgramInfo| matches!(p.name_as_str(), Some("steer_pod" | "connect4" | "sendmsg6"));
    aya::programs::loaded_programs().filter_map(Result::ok).filter(ours).count()
}

/// The folder of the built programs: two above the test's own.
fn bin() -> PathBuf {
    let exe = std::env::current_exe().expect("a test knows its path");
    exe.ancestors().nth(2).map(Path::to_owned).expect("target/<profile>/deps/test")
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

impl Cluster {
    pub fn start() -> Result<Self> {
        Self::start_with("test", &["--nodes=3"])
    }

    /// With these further arguments of `sluice up`.
    pub fn start_with(name: &str, args: &[&str]) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let c = Self {
            name: format!("{name}-{}", std::process::id()),
            bin: bin(),
            programs_before: programs(),
            namespaces: Arc::default(),
            failed: Arc::default(),
        };
        eprintln!("starting cluster {}: {}", c.name, args.join(" "));
        let always = [
            "up",
            "--no-examples",
            "--no-kubeconfig",
            "--control-arg=--node-monitor-grace-s=8",
            "--control-arg=--eviction-s=5",
            // For `policies`; only requests that are marked by their caller are sampled.
            "--control-arg=--otlp-endpoint=http://collector.seen.svc.cluster.local:4318/v1/traces",
            "--control-arg=--trace-sample=0",
            "--agent-arg=--heartbeat-s=2",
        ];
        let out = c.sluice(&always).args(args).arg(format!("--api-port={port}")).output()?;
        if !out.status.success() {
            let logs = c.logs();
            let _ = c.stop();
            bail!("sluice up: {}\n{logs}", text(&out));
        }
        Ok(c)
    }

    /// Ends it and proves that nothing of it is left.
    pub fn stop(&self) -> Result<()> {
        if std::env::var_os("SLUICE_KEEP").is_some() {
            eprintln!("cluster kept: sluice --cluster {} …", self.name);
            return Ok(());
        }
        let out = self.sluice(&["down"]).output()?;
        ensure!(out.status.success(), "sluice down: {}", text(&out));
        Ok(())
    }

    /// One test. If it fails, the logs are shown, and its namespaces are taken away: their pods would be in the next ones' way.
    pub fn run(&self, name: &str, test: fn(&Cluster) -> Result<()>) -> Result<()> {
        let (began, watch) = (Instant::now(), Watch::start());
        let c = Self { namespaces: Arc::default(), ..self.clone() };
        let result = test(&c);
        let (seconds, Seen { late, busy, stolen }) = (began.elapsed().as_secs_f64(), watch.end());
        eprintln!("{name}: {seconds:.1} s; of the CPUs {busy} % busy, {stolen} % stolen; late by at most {late:.1?}");
        if result.is_err() {
            eprintln!("{}", self.try_kubectl(&["get", "pods,services,nodes", "-A", "-o", "wide"]).unwrap_or_default());
            eprintln!("{}", self.try_kubectl(&["get", "events", "-A"]).unwrap_or_default());
            eprintln!("{}", self.logs());
            let namespaces = c.namespaces.lock().expect("no test panics with it");
            let mut delete = vec!["delete", "namespace", "--ignore-not-found", "--timeout=90s"];
            delete.extend(namespaces.iter().map(String::as_str));
            let _ = self.try_kubectl(&delete);
        }
        // Last, so that it is what the end of a log shows.
        result.inspect_err(|e| {
            let failed = format!("{name}: {e:#}\n");
            eprint!("{failed}");
            self.failed.lock().expect("no test panics with it").push_str(&failed);
        })
    }

    /// Leaves behind what failed, and why, for the end of the run (`make test`).
    pub fn note_failures(&self) -> Result<()> {
        let folder = self.bin.parent().context("target/<profile>")?;
        fs::write(folder.join("failed-cluster.log"), &*self.failed.lock().expect("no test panics with it"))
            .context("write the failures")
    }

    fn logs(&self) -> String {
        let mut out = String::new();
        for machine in ["control"].into_iter().chain(NODES) {
            for program in ["control", "agent", "init"] {
                let path = self.dir().join(machine).join("log").join(format!("{program}.log"));
                if let Ok(t) = fs::read_to_string(&path) {
                    let wanted: Vec<_> = t.lines().filter(|l| !l.contains(" INFO audit")).collect();
                    let from = wanted.len().saturating_sub(25);
                    out.push_str(&format!("--- {machine}/{program}\n{}\n", wanted[from..].join("\n")));
                }
            }
        }
        out
    }

    pub fn dir(&self) -> PathBuf {
        Path::new("/var/lib/sluice-local").join(&self.name)
    }

    /// The folder of the programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn sluice(&self, args: &[&str]) -> Command {
        let mut c = Command::new(self.bin.join("sluice"));
        c.args(["--cluster", &self.name]).args(args).stdin(Stdio::null());
        c
    }

    pub fn sluice_ok(&self, args: &[&str]) -> Result<String> {
        let out = self.sluice(args).output()?;
        ensure!(out.status.success(), "sluice {}: {}", args.join(" "), text(&out));
        Ok(text(&out))
    }

    /// What it prints on its standard output.
    pub fn sluice_out(&self, args: &[&str]) -> Result<String> {
        let out = self.sluice(args).output()?;
        ensure!(out.status.success(), "sluice {}: {}", args.join(" "), text(&out));
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    fn kubectl_command(&self, args: &[&str]) -> Command {
        let mut c = Command::new("kubectl");
        c.arg("--kubeconfig").arg(self.dir().join("control/disk/control/admin.kubeconfig")).args(args);
        c
    }

    pub fn try_kubectl(&self, args: &[&str]) -> Result<String> {
        Ok(text(&self.kubectl_command(args).stdin(Stdio::null()).output()?))
    }

    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let out = self.kubectl_command(args).stdin(Stdio::null()).output().context("run kubectl")?;
        ensure!(out.status.success(), "kubectl {}: {}", args.join(" "), text(&out));
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    pub fn apply_text(&self, manifest: &str) -> Result<String> {
        let mut child = self
            .kubectl_command(&["apply", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("kubectl's input")?.write_all(manifest.as_bytes())?;
        let out = child.wait_with_output()?;
        ensure!(out.status.success(), "kubectl apply: {}", text(&out));
        Ok(text(&out))
    }

    pub fn apply(&self, objects: &[Value]) -> Result<String> {
        let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.apply_text(&list.to_string())
    }

    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let mut all = args.to_vec();
        all.extend(["-o", "json"]);
        Ok(serde_json::from_str(&self.kubectl(&all)?)?)
    }

    pub fn wait(&self, what: &str, seconds: u64, mut done: impl FnMut() -> Result<bool>) -> Result<Duration> {
        let began = Instant::now();
        let mut last = String::new();
        while began.elapsed() < Duration::from_secs(seconds) {
            match done() {
                Ok(true) => return Ok(began.elapsed()),
                Ok(false) => {}
                Err(e) => last = format!(" ({e:#})"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("not within {seconds} s: {what}{last}")
    }

    /// [`Cluster::wait`] for something.
    pub fn wait_for<T>(&self, what: &str, seconds: u64, mut find: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let mut found = None;
        self.wait(what, seconds, || {
            found = find()?;
            Ok(found.is_some())
        })?;
        found.context("it was waited for")
    }

    pub fn rollout(&self, namespace: &str, deployment: &str) -> Result<()> {
        self.kubectl(&["-n", namespace, "rollout", "status", &format!("deployment/{deployment}"), "--timeout=90s"])?;
        Ok(())
    }

    pub fn namespace(&self, name: &str, meshed: bool) -> Result<()> {
        let labels = if meshed { serde_json::json!({"sluice.dev/inject": "enabled"}) } else { serde_json::json!({}) };
        self.apply(&[
            serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
        ])?;
        self.namespaces.lock().expect("no test panics with it").push(name.to_owned());
        Ok(())
    }

    pub fn delete_namespace(&self, name: &str) -> Result<()> {
        self.kubectl(&["delete", "namespace", name, "--timeout=90s"])?;
        Ok(())
    }

    /// Of the host: pid of a machine's first process.
    pub fn machine_pid(&self, machine: &str) -> Result<i32> {
        let t = fs::read_to_string(self.dir().join(machine).join("pid"))?;
        Ok(t.split_whitespace().next().context("a pid")?.parse()?)
    }

    /// A shell command inside a machine.
    pub fn inside(&self, machine: &str, script: &str) -> Result<String> {
        let pid = self.machine_pid(machine)?.to_string();
        let out = Command::new("nsenter")
            .args(["-t", &pid, "-m", "-n", "-C", "-u", "-i", "-p", "--", "/bin/sh", "-c", script])
            .stdin(Stdio::null())
            .output()?;
        ensure!(out.status.success(), "in {machine}: {script}: {}", text(&out));
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// The load generator as a process of a machine, outside of all pods. It ends by itself.
    pub fn host_load(&self, machine: &str, args: &[&str]) -> Result<Child> {
        let pid = self.machine_pid(machine)?.to_string();
        // Programs at the machine's cgroup see only processes that are in it.
        let name = format!("sluice-{}-{machine}", self.name);
        let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
        let cgroup = roots.iter().map(|r| Path::new(r).join(&name)).find(|c| c.join("cgroup.procs").exists());
        let mut c = Command::new("/bin/sh");
        c.args(["-c", r#"echo $$ >"$0/cgroup.procs" && exec "$@""#]).arg(cgroup.context("the machine's cgroup")?);
        c.args(["nsenter", "-t", &pid, "-m", "-n", "-C", "-u", "-i", "-p", "--"]).arg(self.bin.join("load")).args(args);
        c.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("start the load generator")
    }

    /// The same, to its end: its report.
    pub fn load_from(&self, machine: &str, args: &str) -> Result<Value> {
        let said = self.inside(machine, &format!("{} {args}", self.bin.join("load").display()))?;
        serde_json::from_str(&said).with_context(|| said)
    }

    /// `kill -9` of a machine's program, by the pid that the machine noted.
    pub fn kill_program(&self, machine: &str, program: &str) -> Result<()> {
        self.inside(machine, &format!("kill -9 $(cat /run/sluice/{program}.pid)")).map(drop)
    }

    /// Pid of a pod's sidecar in the pod's machine, and that machine.
    pub fn sidecar(&self, namespace: &str, pod: &str) -> Result<Option<(String, String)>> {
        let pod = self.json(&["-n", namespace, "get", "pod", pod])?;
        let (Some(node), Some(uid)) = (pod["spec"]["nodeName"].as_str(), pod["metadata"]["uid"].as_str()) else {
            return Ok(None);
        };
        let find =
            format!("for p in $(pgrep -x sluice-proxy); do ! grep -q pods/{uid} /proc/$p/cgroup || echo $p; done");
        Ok(self.inside(node, &find)?.lines().next().map(|pid| (node.to_owned(), pid.to_owned())))
    }

    pub fn node_ready(&self, node: &str) -> Result<bool> {
        let node = self.json(&["get", "node", node])?;
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
    }

    pub fn pods(&self, namespace: &str, selector: &str) -> Result<Vec<Value>> {
        let list = self.json(&["-n", namespace, "get", "pods", "-l", selector])?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }
}

/// The `Ready` condition of a pod that is not being deleted.
pub fn ready(pod: &Value) -> bool {
    pod["metadata"]["deletionTimestamp"].is_null()
        && pod["status"]["conditions"]
            .as_array()
            .is_some_and(|c| c.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
}
