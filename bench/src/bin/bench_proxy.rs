//! `make bench-proxy`: the sidecar beside Envoy, nginx and HAProxy. Each proxy is alone on one core, client and backend are
//! on another; CPU time of the proxy's processes per request, connection or gigabyte; rounds interleaved, medians compared.
//! The sidecar routes, splits, balances and counts; the peers pass on. A pair of sidecars with mTLS is measured as one.

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use sluice_bench::{
    backend::Backend,
    closed::{self, Plan},
    contender::{Contender, contender, loopback, peer, pin, start},
    stats::median,
};
use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// HTTP/1.1 over kept connections, as fast as may be
    H1,
    /// HTTP/1.1 at 2,000 requests a second over 16 connections
    Paced,
    /// A connection for each request
    Churn,
    /// HTTP/2 with prior knowledge, 16 connections of 32 streams (h2load)
    H2,
    /// Bytes of one TCP connection
    Tcp,
    /// Memory: idle, and with 1,000 and 10,000 connections that are silent
    Idle,
}

#[derive(Parser)]
struct Args {
    /// Requests per proxy and round
    #[arg(long, default_value_t = 100_000)]
    requests: u64,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Only these
    #[arg(long, value_enum)]
    only: Vec<Scenario>,
    /// Measure the sidecar alone
    #[arg(long)]
    alone: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let dir = tempfile::tempdir()?;
    pin(0)?;
    let all = Scenario::value_variants().iter().filter(|s| args.only.is_empty() || args.only.contains(s));
    for scenario in all {
        match scenario {
            Scenario::H1 => h1(&args, dir.path())?,
            Scenario::Paced => paced(&args, dir.path())?,
            Scenario::Churn => churn(&args, dir.path())?,
            Scenario::H2 => h2(&args, dir.path())?,
            Scenario::Tcp => tcp(&args, dir.path())?,
            Scenario::Idle => idle(&args, dir.path())?,
        }
    }
    Ok(())
}

/// The sidecar and its peers in front of an HTTP backend.
fn of_http(args: &Args, dir: &Path, port: u16) -> anyhow::Result<Vec<Contender>> {
    let mut all = vec![sluice(dir, port, include_str!("../../peers/sluice.json"), "10.96.0.1:80")?];
    if !args.alone {
        all.extend(peer("envoy", "envoy", include_str!("../../peers/envoy.yaml"), &ENVOY, dir, port)?);
        all.extend(peer("nginx", "nginx", include_str!("../../peers/nginx.conf"), &["-c"], dir, port)?);
        all.extend(peer("haproxy", "haproxy", include_str!("../../peers/haproxy.cfg"), &["-db", "-f"], dir, port)?);
    }
    Ok(all)
}

fn sluice(dir: &Path, backend: u16, view: &str, to: &str) -> anyhow::Result<Contender> {
    let listen = loopback()?;
    let config = dir.join(format!("sluice-{}.json", listen.port()));
    fs::write(&config, view.replace("@BACKEND@", &backend.to_string()))?;
    let mut command = Command::new(std::env::current_exe()?.with_file_name("sluice-proxy"));
    command.arg("--static-config").arg(config).args(["--outbound-to", to, "--workers", "1"]);
    command.args(["--outbound-listen", &listen.to_string(), "--admin", "127.0.0.1:0"]).env("SLUICE_LOG", "warn");
    contender("sluice", listen, vec![start(command)?])
}

/// A client's sidecar and a server's, with mTLS between them.
fn mtls_pair(dir: &Path, backend: u16) -> anyhow::Result<Contender> {
    let (near, far) = (dir.join("client"), dir.join("server"));
    let listens = [loopback()?, loopback()?];
    let [outbound, inbound] = listens.map(|a| a.to_string());
    let view = include_str!("../../peers/sluice-mtls.json").replace("@SERVER@", &listens[1].port().to_string());
    let app = format!("127.0.0.1:{backend}");
    let mut children = Vec::new();
    for (folder, flags) in [
        (&far, ["--inbound-listen", &inbound, "--inbound-to", &app]),
        (&near, ["--outbound-listen", &outbound, "--outbound-to", "10.96.0.1:80"]),
    ] {
        let config = folder.join("view.json");
        fs::write(&config, &view)?;
        let mut command = Command::new(std::env::current_exe()?.with_file_name("sluice-proxy"));
        command.arg("--static-config").arg(config).arg("--static-tls").arg(folder).args(flags);
        command.args(["--workers", "1", "--admin", "127.0.0.1:0"]).env("SLUICE_LOG", "warn");
        children.push(start(command)?);
    }
    serving(contender("mtls pair", listens[0], children)?)
}

/// The one behind may not listen yet.
fn serving(pair: Contender) -> anyhow::Result<Contender> {
    let until = Instant::now() + Duration::from_secs(10);
    while let Err(error) = closed::run(plan(&pair, 1, 1)) {
        ensure!(Instant::now() < until, "{} does not serve: {error}", pair.name);
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(pair)
}

const ENVOY: [&str; 6] = ["--concurrency", "1", "--log-level", "error", "--disable-hot-restart", "-c"];

/// The same of the peers: TLS 1.3, both sides prove who they are, connections are kept.
fn peers_pairs(dir: &Path, backend: u16) -> anyhow::Result<Vec<Contender>> {
    let of_haproxy = |at: &str, role: &str| {
        let tls = format!(
            "{at} ssl crt @DIR@/{role}/both.pem ca-file @DIR@/{role}/bundle.pem verify required ssl-min-ver TLSv1.3"
        );
        include_str!("../../peers/haproxy.cfg").replace(at, &tls)
    };
    let of_nginx = |at: &str, tls: &str| include_str!("../../peers/nginx.conf").replace(at, tls);
    let nginx_near = of_nginx(
        "proxy_pass http://web;",
        "proxy_pass https://web; proxy_ssl_protocols TLSv1.3; proxy_ssl_certificate @DIR@/client/certificate.pem; \
         proxy_ssl_certificate_key @DIR@/client/key.pem; proxy_ssl_trusted_certificate @DIR@/client/bundle.pem; \
         proxy_ssl_verify on; proxy_ssl_name server;",
    );
    let nginx_far = of_nginx(
        "@LISTEN@;",
        "@LISTEN@ ssl; ssl_protocols TLSv1.3; ssl_certificate @DIR@/server/certificate.pem; ssl_certificate_key \
         @DIR@/server/key.pem; ssl_client_certificate @DIR@/server/bundle.pem; ssl_verify_client on;",
    );
    let envoy_near = include_str!("../../peers/envoy-mtls-client.yaml").to_owned();
    let envoy_far = include_str!("../../peers/envoy-mtls-server.yaml").to_owned();
    let pairs: [(_, _, &[&str], _, _); 3] = [
        ("envoy pair", "envoy", &ENVOY, envoy_near, envoy_far),
        ("nginx pair", "nginx", &["-c"], nginx_near, nginx_far),
        (
            "haproxy pair",
            "haproxy",
            &["-db", "-f"],
            of_haproxy("@BACKEND@", "client"),
            of_haproxy("@LISTEN@", "server"),
        ),
    ];
    let mut all = Vec::new();
    for (name, program, flags, near, far) in pairs {
        let Some(mut behind) = peer(name, program, &far, flags, dir, backend)? else { continue };
        let Some(mut pair) = peer(name, program, &near, flags, dir, behind.address.port())? else { continue };
        pair.children.append(&mut behind.children);
        all.push(serving(pair)?);
    }
    Ok(all)
}

/// For each folder a certificate of that service account, all of one authority.
fn make_certificates(accounts: &[(&Path, &str)]) -> anyhow::Result<()> {
    let (key, mut params) = (KeyPair::generate()?, CertificateParams::default());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let bundle = params.self_signed(&key)?.pem();
    let authority = Issuer::new(params, key);
    for (folder, account) in accounts {
        let (key, mut params) = (KeyPair::generate()?, CertificateParams::default());
        // Another than the authority's: a certificate of its own issuer would count as one that signed itself.
        params.distinguished_name.push(DnType::CommonName, *account);
        params.subject_alt_names =
            // The name is for nginx, which knows servers by theirs alone.
            vec![
                SanType::URI(format!("spiffe://cluster.local/ns/shop/sa/{account}").try_into()?),
                SanType::DnsName((*account).try_into()?),
            ];
        let (certificate, key) = (params.signed_by(&key, &authority)?.pem(), key.serialize_pem());
        fs::create_dir(folder)?;
        // As HAProxy wants them.
        fs::write(folder.join("both.pem"), format!("{certificate}{key}"))?;
        fs::write(folder.join("certificate.pem"), certificate)?;
        fs::write(folder.join("key.pem"), key)?;
        fs::write(folder.join("bundle.pem"), &bundle)?;
    }
    Ok(())
}

fn plan(c: &Contender, connections: usize, requests: u64) -> Plan {
    Plan { to: c.address, connections, requests, fresh: false, every: None }
}

fn h1(args: &Args, dir: &Path) -> anyhow::Result<()> {
    let backend = Backend::start_at("v1", "0.0.0.0:0".parse()?)?;
    let mut all = of_http(args, dir, backend.address.port())?;
    make_certificates(&[(&dir.join("client"), "client"), (&dir.join("server"), "server")])?;
    all.push(mtls_pair(dir, backend.address.port())?);
    if !args.alone {
        all.extend(peers_pairs(dir, backend.address.port())?);
    }
    rounds(&mut all, args.rounds, |c| plan(c, args.connections, args.requests))?;
    table(&format!("HTTP/1.1, {} kept connections", args.connections), "us/request", &all);
    results("h1_cpu_us_per_request_vs", &all);
    for peer in ["envoy", "nginx", "haproxy"] {
        let name = format!("mtls_pair_cpu_us_per_request_vs_{peer}");
        result(&name, of(&all, "mtls pair"), of(&all, &format!("{peer} pair")), "us");
    }
    Ok(())
}

/// The latency that a proxy adds at a sidecar's usual rate.
fn paced(args: &Args, dir: &Path) -> anyhow::Result<()> {
    let backend = Backend::start_at("v1", "0.0.0.0:0".parse()?)?;
    let mut all = of_http(args, dir, backend.address.port())?;
    let to = SocketAddr::from(([127, 0, 0, 1], backend.address.port()));
    all.push(contender("direct", to, vec![])?);
    let every = Some(Duration::from_millis(8));
    rounds(&mut all, args.rounds, |c| Plan { every, ..plan(c, 16, args.requests / 10) })?;
    table("HTTP/1.1, 2,000 requests a second over 16 connections", "us/request", &all);
    let direct = all.iter().find(|c| c.name == "direct").context("the direct arm")?;
    let (p50, p99) = (median(&direct.p50_us), median(&direct.p99_us));
    let added = |name: &str, of: fn(&Contender) -> &Vec<f64>, less: f64| {
        all.iter().find(|c| c.name == name).map_or(0.0, |c| median(of(c)) - less)
    };
    for (name, of, less) in [("p50", (|c| &c.p50_us) as fn(&Contender) -> &Vec<f64>, p50), ("p99", |c| &c.p99_us, p99)]
    {
        let name = format!("{name}_added_us_at_2000rps_vs_envoy");
        result(&name, added("sluice", of, less), added("envoy", of, less), "us");
    }
    Ok(())
}

fn churn(args: &Args, dir: &Path) -> anyhow::Result<()> {
    let backend = Backend::start_at("v1", "0.0.0.0:0".parse()?)?;
    let mut all = of_http(args, dir, backend.address.port())?;
    rounds(&mut all, args.rounds, |c| Plan { fresh: true, ..plan(c, args.connections, args.requests / 10) })?;
    table("HTTP/1.1, a connection for each request", "us/connection", &all);
    results("churn_cpu_us_per_request_vs", &all);
    Ok(())
}

fn h2(args: &Args, dir: &Path) -> anyhow::Result<()> {
    if !Path::new("/usr/bin/h2load").exists() {
        println!("h2load is not installed (nghttp2-client); HTTP/2 is not measured");
        return Ok(());
    }
    let port = loopback()?.port();
    let mut command = Command::new(std::env::current_exe()?.with_file_name("echo"));
    command.args(["serve", "--quiet", "--address", "0.0.0.0", "--http", &port.to_string()]);
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let child = command.stdout(std::process::Stdio::null()).spawn().context("start echo")?;
    let backend = contender("backend", at, vec![child])?;
    let mut all = vec![sluice(dir, port, include_str!("../../peers/sluice.json"), "10.96.0.1:80")?];
    if !args.alone {
        all.extend(peer("envoy", "envoy", include_str!("../../peers/envoy-h2.yaml"), &ENVOY, dir, port)?);
        let nginx = include_str!("../../peers/nginx.conf").replace("@LISTEN@;", "@LISTEN@ http2;");
        all.extend(peer("nginx", "nginx", &nginx, &["-c"], dir, port)?);
        let haproxy = include_str!("../../peers/haproxy.cfg").replace("@LISTEN@", "@LISTEN@ proto h2");
        let haproxy = haproxy.replace("@BACKEND@", "@BACKEND@ proto h2");
        all.extend(peer("haproxy", "haproxy", &haproxy, &["-db", "-f"], dir, port)?);
    }
    for _ in 0..args.rounds {
        for c in &mut all {
            let before = c.cpu_ns()?;
            let requests = args.requests.to_string();
            let url = format!("http://{}/", c.address);
            let out =
                Command::new("h2load").args(["-n", &requests, "-c", "16", "-m", "32", "-t", "1", &url]).output()?;
            let said = String::from_utf8_lossy(&out.stdout);
            ensure!(said.contains(&format!("{requests} succeeded")), "{}: {said}", c.name);
            c.cpu_us.push((c.cpu_ns()? - before) as f64 / 1000.0 / args.requests as f64);
        }
    }
    drop(backend);
    table("HTTP/2, 16 connections of 32 streams", "us/request", &all);
    results("h2_cpu_us_per_request_vs", &all);
    Ok(())
}

fn tcp(args: &Args, dir: &Path) -> anyhow::Result<()> {
    const GIGABYTES: u64 = 1;
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || listener.incoming().flatten().for_each(swallow));
    let mut all = vec![sluice(dir, port, include_str!("../../peers/sluice-tcp.json"), "10.96.0.1:80")?];
    if !args.alone {
        all.extend(peer("envoy", "envoy", include_str!("../../peers/envoy-tcp.yaml"), &ENVOY, dir, port)?);
        let haproxy = include_str!("../../peers/haproxy.cfg").replace("mode http", "mode tcp");
        let haproxy = haproxy.replace("    option http-keep-alive\n    http-reuse always\n", "");
        all.extend(peer("haproxy", "haproxy", &haproxy, &["-db", "-f"], dir, port)?);
    }
    for _ in 0..args.rounds {
        for c in &mut all {
            let before = c.cpu_ns()?;
            pour(c.address, GIGABYTES << 30).with_context(|| c.name)?;
            // Seconds per gigabyte, in the table's unit.
            c.cpu_us.push((c.cpu_ns()? - before) as f64 / 1e9 / GIGABYTES as f64);
        }
    }
    table("TCP, one connection", "s/GB", &all);
    result("tcp_cpu_s_per_gb_vs_envoy", of(&all, "sluice"), of(&all, "envoy"), "s/GB");
    Ok(())
}

/// Reads to the end, and answers with how many bytes there were.
fn swallow(mut stream: TcpStream) {
    std::thread::spawn(move || {
        let (mut buffer, mut sum) = (vec![0; 256 * 1024], 0u64);
        while let Ok(n) = stream.read(&mut buffer) {
            if n == 0 {
                // The client may have gone.
                let _ = stream.write_all(&sum.to_be_bytes());
                return;
            }
            sum += n as u64;
        }
    });
}

fn pour(to: SocketAddr, bytes: u64) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    let buffer = vec![7; 256 * 1024];
    let mut left = bytes;
    while left > 0 {
        let n = left.min(buffer.len() as u64) as usize;
        stream.write_all(&buffer[..n])?;
        left -= n as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut arrived = [0; 8];
    stream.read_exact(&mut arrived)?;
    ensure!(u64::from_be_bytes(arrived) == bytes, "{} of {bytes} bytes arrived", u64::from_be_bytes(arrived));
    Ok(())
}

fn idle(args: &Args, dir: &Path) -> anyhow::Result<()> {
    let backend = Backend::start_at("v1", "0.0.0.0:0".parse()?)?;
    let all = of_http(args, dir, backend.address.port())?;
    println!("{:10} {:>14} {:>22} {:>23}", "proxy", "idle RSS, KiB", "with 1,000, KiB each", "with 10,000, KiB each");
    for c in &all {
        let alone = c.private_kib();
        let mut each = [0.0; 2];
        for (count, each) in [1_000, 10_000].into_iter().zip(&mut each) {
            match closed::idle(c.address, count) {
                Ok(held) => *each = c.private_kib().saturating_sub(alone) as f64 / held.len() as f64,
                Err(error) => println!("{}: {count} connections: {error}", c.name),
            }
        }
        println!("{:10} {alone:>14} {:>22.2} {:>23.2}", c.name, each[0], each[1]);
        if c.name == "sluice" {
            result("idle_rss_mb", alone as f64 / 1024.0, 0.0, "MB");
            result("idle_connection_kib", each[1], 0.0, "KiB");
        }
    }
    Ok(())
}

/// Interleaved, after one round that fills pools and warms code.
fn rounds(all: &mut [Contender], count: usize, plan: impl Fn(&Contender) -> Plan) -> anyhow::Result<()> {
    for c in all.iter() {
        let plan = plan(c);
        closed::run(Plan { requests: plan.requests / 5, ..plan }).with_context(|| c.name)?;
    }
    for _ in 0..count {
        for c in all.iter_mut() {
            let plan = plan(c);
            let before = c.cpu_ns()?;
            let mut times = closed::run(plan).with_context(|| c.name)?;
            c.cpu_us.push((c.cpu_ns()? - before) as f64 / 1000.0 / plan.requests as f64);
            times.sort_unstable();
            let at = |share: f64| times[(times.len() as f64 * share) as usize].as_secs_f64() * 1e6;
            c.p50_us.push(at(0.5));
            c.p99_us.push(at(0.99));
        }
    }
    Ok(())
}

fn of(all: &[Contender], name: &str) -> f64 {
    all.iter().find(|c| c.name == name).map_or(0.0, |c| median(&c.cpu_us))
}

fn table(title: &str, unit: &str, all: &[Contender]) {
    println!(
        "{title}\n{:12} {:>18} {:>18} {:>8} {:>8}",
        "proxy",
        format!("CPU {unit}"),
        "(least to most)",
        "p50 us",
        "p99 us"
    );
    for c in all {
        let spread = c.cpu_us.iter().fold((f64::MAX, 0.0f64), |(a, b), v| (a.min(*v), b.max(*v)));
        let spread = format!("({:.2}-{:.2})", spread.0, spread.1);
        let (cpu, p50, p99) = (median(&c.cpu_us), median(&c.p50_us), median(&c.p99_us));
        println!("{:12} {cpu:>18.2} {spread:>18} {p50:>8.0} {p99:>8.0}", c.name);
    }
}

fn results(prefix: &str, all: &[Contender]) {
    for peer in ["envoy", "nginx", "haproxy"] {
        result(&format!("{prefix}_{peer}"), of(all, "sluice"), of(all, peer), "us");
    }
}

fn result(name: &str, ours: f64, peer: f64, unit: &str) {
    println!("RESULT {name} ours={ours:.2} peer={peer:.2} unit={unit}");
}
