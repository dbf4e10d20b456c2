//! `sluice`: starts and stops a local cluster, installs nodes, shifts traffic, and shows what is going on.

mod check;
mod client;
mod cluster;
mod down;
mod flows;
mod install;
mod kubeconfig;
mod kubectl;
mod machine;
mod preflight;
mod split;
mod status;
mod tap;
mod token;
mod uninstall;
mod up;
mod wiring;

use clap::{Parser, Subcommand};
use cluster::{Cluster, Family};
use std::path::PathBuf;

#[derive(Parser)]
#[command(name = "sluice", version, about = "The network of a container cluster", disable_help_subcommand = true)]
struct Args {
    /// Which local cluster (default: sluice)
    #[arg(long, global = true, env = "SLUICE_CLUSTER", value_parser = cluster::parse_name)]
    cluster: Option<String>,
    /// Kubeconfig to use instead of the local cluster's; its current context counts
    #[arg(long, global = true)]
    kubeconfig: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a local cluster with a canary release in it
    Up {
        /// How many (default: 3, or those that there are)
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=i64::from(cluster::NODES_MAX)))]
        nodes: Option<u8>,
        /// Port of the API on 127.0.0.1
        #[arg(long, default_value_t = cluster::API_PORT)]
        api_port: u16,
        /// Families of addresses, the primary one first: one, or both with a comma between
        #[arg(long, value_enum, value_delimiter = ',', num_args = 1, default_values_t = Family::ALL)]
        ip_families: Vec<Family>,
        /// Container images to put on every node (default: `images` beside the programs' folder)
        #[arg(long)]
        images: Option<PathBuf>,
        /// CPUs each node offers to pods
        #[arg(long, default_value_t = 4)]
        node_cpus: u32,
        #[arg(long, default_value_t = 4096)]
        node_memory_mib: u64,
        /// Start an empty cluster
        #[arg(long)]
        no_examples: bool,
        /// Leave the kubeconfig alone
        #[arg(long)]
        no_kubeconfig: bool,
        /// Further arguments of sluice-control
        #[arg(long = "control-arg", allow_hyphen_values = true)]
        control_args: Vec<String>,
        /// Further arguments of every sluice-agent
        #[arg(long = "agent-arg", allow_hyphen_values = true)]
        agent_args: Vec<String>,
    },
    /// Stop it; nothing stays behind
    Down,
    /// What runs where, and how traffic is split
    Status,
    /// Verify the cluster; ends with 1 if something is wrong
    Check,
    /// Follow flows and drops live, on all nodes
    Flows(flows::Options),
    /// Follow a pod's requests live, as its sidecar sees them, or show what the sidecar holds
    Tap(tap::Options),
    /// Shift a service's traffic by weight, and wait until every sidecar and node has it in force
    Split {
        service: String,
        /// `v1=90`, where v1 is a backend service, or its name without the leading `<service>-`
        #[arg(required = true)]
        weights: Vec<String>,
        #[arg(long, short, default_value = "default")]
        namespace: String,
        /// Seconds to wait for the last acknowledgement
        #[arg(long, default_value_t = 30)]
        timeout: u64,
    },
    /// Put Sluice on this node, and wait until pods can be added
    Install(install::Options),
    /// Take it from this node; pods that run keep their network
    Uninstall(uninstall::Options),
    /// One-time tokens with which nodes join
    Token {
        #[command(subcommand)]
        command: token::Command,
    },
    /// Switch one machine of the local cluster off, as a power cut would
    #[command(hide = true)]
    NodeKill { node: u8 },
    /// Switch it on again
    #[command(hide = true)]
    NodeStart { node: u8 },
    #[command(hide = true)]
    MachineStart { spec: PathBuf },
    #[command(hide = true)]
    MachineInit { spec: PathBuf },
}

fn main() -> std::process::ExitCode {
    match run(Args::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let name = args.cluster.clone().unwrap_or_else(|| cluster::DEFAULT.to_owned());
    let config = || config(args.kubeconfig.clone(), args.cluster.as_deref());
    match args.command {
        Command::Up {
            nodes,
            api_port,
            ip_families,
            images,
            node_cpus,
            node_memory_mib,
            no_examples,
            no_kubeconfig,
            control_args,
            agent_args,
        } => {
            cluster::check_families(&ip_families)?;
            let exe = std::env::current_exe()?;
            let bin = exe.parent().map(PathBuf::from).unwrap_or_default();
            let images = images.unwrap_or_else(|| bin.join("../images"));
            let images = images.canonicalize().unwrap_or(images);
            let cluster = Cluster {
                name,
                nodes: nodes.unwrap_or(cluster::NODES),
                api_port,
                families: ip_families,
                bin,
                images,
                node_cpus,
                node_memory_mib,
                control_args,
                agent_args,
            };
            up::run(&up::Options { cluster, nodes, examples: !no_examples, write_kubeconfig: !no_kubeconfig })
        }
        Command::Down => down::run(&name),
        Command::Status => status::run(&config()?, false),
        Command::Check => {
            // Whose kubeconfig was named need not be the local cluster, whose machines say nothing of it.
            let local = || Cluster::load(&name).ok().flatten();
            check::run(&config()?, if args.kubeconfig.is_none() { local() } else { None })
        }
        Command::Flows(ref options) => flows::run(&config()?, options),
        Command::Tap(ref options) => tap::run(&config()?, options),
        Command::Split { ref service, ref weights, ref namespace, timeout } => {
            split::run(&config()?, namespace, service, weights, timeout)
        }
        Command::Install(ref options) => install::run(options),
        Command::Uninstall(ref options) => uninstall::run(options),
        Command::Token { ref command } => token::run(&config()?, command),
        Command::NodeKill { node } => {
            require(&name)?.node(node).kill();
            Ok(())
        }
        Command::NodeStart { node } => up::start_node(&require(&name)?, node),
        Command::MachineStart { spec } => machine::enter(&spec),
        Command::MachineInit { spec } => machine::init(&spec),
    }
}

fn require(name: &str) -> anyhow::Result<Cluster> {
    Cluster::load(name)?
        .ok_or_else(|| anyhow::anyhow!("no local cluster {name:?} is there; start one with `sluice up`"))
}

/// The kubeconfig that was named; that of the local cluster that was named; else of the one that is there; else the
/// user's. Whoever names a cluster never reaches another.
fn config(named: Option<PathBuf>, cluster: Option<&str>) -> anyhow::Result<PathBuf> {
    match (named, cluster) {
        (Some(path), _) => Ok(path),
        (None, Some(name)) => require(name).map(|c| c.kubeconfig()),
        (None, None) => Ok(Cluster::load(cluster::DEFAULT)?.map_or_else(kubeconfig::path, |c| c.kubeconfig())),
    }
}
