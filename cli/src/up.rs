//! `sluice up`: a local cluster of simulated machines with the canary example in it. Repeating it is harmless.

use crate::{
    cluster::{CNI_NAMES, CONTROL_HOST, Cluster, DEFAULT, node_host},
    down, kubeconfig, kubectl, preflight, status, token, wiring,
};
use anyhow::{Context, Result, bail};
use k8s_openapi::jiff::SignedDuration;
use rand::random;
use sluice_wire::join::JoinToken;
use std::{
    fs,
    io::{IsTerminal, Write},
    net::TcpListener,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, Instant},
};

const DEPLOYMENT: &str = include_str!("../../examples/deployment.yaml");
const CANARY: &str = include_str!("../../examples/canary/canary.yaml");

pub struct Options {
    pub cluster: Cluster,
    /// As many as were asked for, if any number was.
    pub nodes: Option<u8>,
    /// Apply the examples and wait for them.
    pub examples: bool,
    /// Also where the user's kubeconfig is.
    pub write_kubeconfig: bool,
}

pub fn run(o: &Options) -> Result<()> {
    let began = Instant::now();
    let lock = Cluster::lock(&o.cluster.name)?;
    let c = match Cluster::load(&o.cluster.name)? {
        Some(running) if running.control().pid().is_some() => complete(running, o.nodes)?,
        leftover => {
            // Of a machine that was switched off without `sluice down`.
            if let Some(old) = leftover {
                down::tear_down(&old)?;
            }
            let socket = step("checking this machine", || {
                preflight::check(o.cluster.api_port, &o.cluster.families, &o.cluster.bin, &o.cluster.images)
            })?;
            if let Err(e) = start(&o.cluster, socket) {
                let _ = down::tear_down(&o.cluster);
                return Err(e);
            }
            o.cluster.clone()
        }
    };
    // All machines run; the rest only waits and may be repeated beside others.
    drop(lock);
    let config = c.kubeconfig();
    step("waiting for the API", || wait_api(&config, &c))?;
    if o.write_kubeconfig {
        kubeconfig::add(&kubeconfig::path(), &c.context(), &fs::read_to_string(&config)?)?;
    }
    step("waiting for the nodes", || {
        kubectl::run(&config, &["wait", "--for=condition=Ready", "node", "--all", "--timeout=120s"])
    })?;
    if o.examples {
        examples(&config)?;
        println!("up in {:.0} s\n", began.elapsed().as_secs_f64());
        next_steps(&c)?;
    }
    Ok(())
}

/// A running cluster with this many nodes: those that are not there yet, or are off, are started.
fn complete(running: Cluster, nodes: Option<u8>) -> Result<Cluster> {
    let nodes = nodes.unwrap_or(running.nodes);
    if running.nodes > nodes {
        bail!(
            "cluster {:?} already runs with {} nodes; `sluice down` first to have fewer",
            running.name,
            running.nodes
        );
    }
    let c = Cluster { nodes, ..running };
    let off: Vec<u8> = (0..nodes).filter(|i| c.node(*i).pid().is_none()).collect();
    if !off.is_empty() {
        // First the plan, so that `down` knows of every machine.
        c.save()?;
        step(&format!("starting {}", nodes_of(off.len())), || off.into_iter().try_for_each(|i| start_node(&c, i)))?;
    }
    Ok(c)
}

fn nodes_of(n: usize) -> String {
    format!("{n} node{}", if n == 1 { "" } else { "s" })
}

/// Shows what is being done, and that it was.
fn step<T>(what: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let terminal = std::io::stdout().is_terminal();
    if terminal {
        print!("… {what}");
        let _ = std::io::stdout().flush();
    }
    let began = Instant::now();
    let r = f();
    let mark = if r.is_ok() { "✓" } else { "✗" };
    let start = if terminal { "\r" } else { "" };
    println!("{start}{mark} {what} ({:.1} s)", began.elapsed().as_secs_f64());
    r
}

fn start(c: &Cluster, socket: TcpListener) -> Result<()> {
    c.save()?;
    step("starting control", || {
        let control = c.control();
        write_private(&c.ca_passphrase(), &format!("{:032x}{:032x}\n", random::<u128>(), random::<u128>()))?;
        control.start(Some(socket))?;
        wiring::underlay(&control, &c.families, CONTROL_HOST).context("make the underlay network")?;
        wait_file(&c.kubeconfig(), &control.log("control"))
    })?;
    step(&format!("starting {}", nodes_of(usize::from(c.nodes))), || {
        for i in 0..c.nodes {
            start_node(c, i)?;
        }
        Ok(())
    })
}

/// Starts (or, after a loss, starts again) one node.
pub fn start_node(c: &Cluster, i: u8) -> Result<()> {
    let control = c.control().disk().join("control");
    let node = c.node(i);
    let join = node.disk().join("join");
    fs::create_dir_all(&join)?;
    fs::copy(control.join("ca.crt"), join.join("ca.crt")).context("copy the cluster's CA")?;
    // A node that has its certificate needs no token any more.
    if !node.disk().join("agent/identity/node.json").exists() {
        let token = join_token(c, &node.name).with_context(|| format!("make a join token for {}", node.name))?;
        write_private(&join.join("token"), &format!("{token}\n"))?;
    }
    fs::write(node.disk().join("containerd.toml"), c.containerd_toml())?;
    let plugins = node.disk().join("cni-bin");
    fs::create_dir_all(&plugins)?;
    for name in CNI_NAMES {
        let link = plugins.join(name);
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(c.bin.join("sluice-cni"), &link)
            .with_context(|| format!("link {}", link.display()))?;
    }
    node.start(None)?;
    wiring::connect(&c.control(), &node, i, &c.families, node_host(i)).with_context(|| format!("connect {}", node.name))
}

/// A token for one machine. Control writes its kubeconfig a moment before it answers.
fn join_token(c: &Cluster, node: &str) -> Result<JoinToken> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match token::create(&c.kubeconfig(), Some(node), SignedDuration::from_hours(1)) {
            Err(e) if Instant::now() < until && !matches!(e.downcast_ref(), Some(kube::Error::Api(_))) => {
                std::thread::sleep(Duration::from_millis(50));
            }
            other => return other,
        }
    }
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    let failed = || format!("write {}", path.display());
    fs::create_dir_all(path.parent().unwrap_or(path)).with_context(failed)?;
    let mut f = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    f.write_all(text.as_bytes()).with_context(failed)
}

fn wait_file(path: &Path, log: &Path) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(20);
    while !path.exists() {
        if Instant::now() > until {
            let text = fs::read_to_string(log).unwrap_or_default();
            let tail: Vec<_> = text.lines().rev().take(5).collect();
            bail!(
                "control did not start; the end of {}:\n{}",
                log.display(),
                tail.into_iter().rev().collect::<Vec<_>>().join("\n")
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn wait_api(config: &Path, c: &Cluster) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        // Nodes appear by themselves; until all have, waiting for "all" would mean fewer.
        let out = kubectl::command(config).args(["get", "nodes", "-o", "name"]).output()?;
        let names = String::from_utf8_lossy(&out.stdout).lines().count();
        if out.status.success() && names >= usize::from(c.nodes) {
            return Ok(());
        }
        if Instant::now() > until {
            let err = String::from_utf8_lossy(&out.stderr).trim().to_owned();
            bail!("{names} of {} nodes joined within 30 s {err}; logs are in {}", c.nodes, c.dir().display());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn examples(config: &Path) -> Result<()> {
    step("applying examples/deployment.yaml and examples/canary", || {
        kubectl::apply(config, DEPLOYMENT)?;
        // A canary that is there may have been shifted since: its weights are the operator's now.
        if kubectl::run(config, &["-n", "canary", "get", "httproute", "echo"]).is_ok() {
            return Ok(());
        }
        kubectl::apply(config, CANARY)
    })?;
    step("waiting for the rollouts", || {
        kubectl::run(config, &["rollout", "status", "deployment/nginx-deployment", "--timeout=180s"])?;
        for d in ["echo-v1", "echo-v2", "client"] {
            kubectl::run(config, &["-n", "canary", "rollout", "status", &format!("deployment/{d}"), "--timeout=180s"])?;
        }
        Ok(())
    })?;
    step("waiting for the first traffic", || {
        status::wait_for_traffic(config, "canary/echo", 200, Duration::from_secs(60))
    })
}

fn next_steps(c: &Cluster) -> Result<()> {
    status::run(&c.kubeconfig(), true)?;
    let context = c.context();
    let sluice = invocation(c);
    println!(
        "
Try next:
  kubectl --context {context} get pods -A -o wide
  kubectl --context {context} -n canary logs deploy/client -c client --tail 3
  # shift the traffic; waits until it is in force everywhere
  {sluice} split echo -n canary v1=50 v2=50
  # what runs where, and the split as the sidecars measured it since they started
  {sluice} status
  # leaves nothing behind
  {sluice} down
"
    );
    Ok(())
}

/// How to call this program again, for this cluster.
fn invocation(c: &Cluster) -> String {
    let program = std::env::args().next().unwrap_or_else(|| "sluice".to_owned());
    if c.name == DEFAULT { program } else { format!("{program} --cluster {}", c.name) }
}
