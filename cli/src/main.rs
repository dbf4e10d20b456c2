//! `sluice`: starts and stops a local cluster, shifts traffic, and shows what is going on.

mod check;
mod client;
mod cluster;
mod down;
mod kubeconfig;
mod kubectl;
mod machine;
mod preflight;
mod split;
mod status;
mod token;
mod up;
mod wiring;

use clap::{Parser, Subcommand};
use cluster::Cluster;
use std::path::PathBuf;

#[derive(Parser)]
#[command(name = "sluice", version, about = "The network of a container cluster", disable_help_subcommand = true)]
struct Args {
    /// Which local cluster
    #[arg(long, global = true, default_value = "sluice", env = "SLUICE_CLUSTER")]
    cluster: String,
    /// Kubeconfig to use instead of the local cluster's
    #[arg(long, global = true)]
    kubeconfig: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a local cluster with a canary release in it
    Up {
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=50))]
        nodes: u8,
        /// Port of the API on 127.0.0.1
        #[arg(long, default_value_t = cluster::API_PORT)]
        api_port: u16,
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
    let config = || args.kubeconfig.clone().unwrap_or_else(|| local_config(&args.cluster));
    match args.command {
        Command::Up {
            nodes,
            api_port,
            images,
            node_cpus,
            node_memory_mib,
            no_examples,
            no_kubeconfig,
            control_args,
            agent_args,
        } => {
            let exe = std::env::current_exe()?;
            let bin = exe.parent().map(PathBuf::from).unwrap_or_default();
            let images = images.unwrap_or_else(|| bin.join("../images"));
            let images = images.canonicalize().unwrap_or(images);
            let cluster = Cluster {
                name: args.cluster,
                nodes,
                api_port,
                bin,
                images,
                node_cpus,
                node_memory_mib,
                control_args,
                agent_args,
            };
            up::run(&up::Options { cluster, examples: !no_examples, write_kubeconfig: !no_kubeconfig })
        }
        Command::Down => down::run(&args.cluster),
        Command::Status => status::run(&config(), false),
        Command::Check => check::run(&config(), Cluster::load(&args.cluster).ok().flatten()),
        Command::Split { ref service, ref weights, ref namespace, timeout } => {
            split::run(&config(), namespace, service, weights, timeout)
        }
        Command::Token { ref command } => token::run(&config(), command),
        Command::NodeKill { node } => {
            require(&args.cluster)?.node(node).kill();
            Ok(())
        }
        Command::NodeStart { node } => up::start_node(&require(&args.cluster)?, node),
        Command::MachineStart { spec } => machine::enter(&spec),
        Command::MachineInit { spec } => machine::init(&spec),
    }
}

fn require(name: &str) -> anyhow::Result<Cluster> {
    Cluster::load(name)?
        .ok_or_else(|| anyhow::anyhow!("no local cluster {name:?} is there; start one with `sluice up`"))
}

/// The local cluster's own kubeconfig, else the user's.
fn local_config(name: &str) -> PathBuf {
    match Cluster::load(name) {
        Ok(Some(c)) => c.kubeconfig(),
        _ => kubeconfig::path(),
    }
}
