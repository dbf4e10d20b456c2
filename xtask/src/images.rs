//! The images of the local cluster: the sandbox's pause, the sidecar, the echo server with its load generator, and a web
//! server in place of `nginx:1.14.2`, which no registry is asked for.

use crate::image::Image;
use anyhow::{Context, Result};
use std::{fs, path::Path, process::Command};

pub fn build(bin: &Path, out: &Path) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    for (file, image) in [
        ("pause", program("sluice.local/pause:1", &bin.join("pause"), "/pause", "")?),
        ("proxy", program("sluice.local/proxy:dev", &bin.join("sluice-proxy"), "/sluice-proxy", "1337:1337")?),
        ("echo", echo(bin)?),
        ("nginx", nginx()?),
    ] {
        let path = out.join(format!("{file}.tar"));
        image.write(&path)?;
        println!("{}  {}", path.display(), image.name);
    }
    Ok(())
}

fn program(name: &str, from: &Path, at: &str, user: &str) -> Result<Image> {
    let mut image = Image::new(name);
    image.program(from, at.trim_start_matches('/'))?;
    image.entrypoint = vec![at.to_owned()];
    user.clone_into(&mut image.user);
    Ok(image)
}

/// The echo server, the load generator beside it, and a small shell with the usual tools.
fn echo(bin: &Path) -> Result<Image> {
    let mut image = program("sluice.local/echo:1", &bin.join("echo"), "/echo", "")?;
    image.program(&bin.join("load"), "load")?;
    image.program(Path::new("/usr/bin/curl"), "bin/curl").context("Debian package curl")?;
    let busybox = Path::new("/bin/busybox");
    if busybox.exists() {
        image.program(busybox, "bin/busybox")?;
        for tool in [
            "sh", "cat", "ls", "sleep", "wget", "nc", "nslookup", "env", "hostname", "kill", "ps", "true", "false",
            "echo", "test", "touch", "id",
        ] {
            image.link(&format!("bin/{tool}"), "busybox");
        }
    }
    image.cmd = vec!["serve".to_owned()];
    Ok(image)
}

/// Debian's nginx under the name that examples use; its true version is in the label.
fn nginx() -> Result<Image> {
    let mut image = Image::new("docker.io/library/nginx:1.14.2");
    let from = Path::new("/usr/sbin/nginx");
    image.program(from, "usr/sbin/nginx")?;
    let out = Command::new(from).arg("-v").output().context("run nginx -v (Debian package nginx-light)")?;
    let version = String::from_utf8_lossy(&out.stderr).trim().trim_start_matches("nginx version: ").to_owned();
    image.labels.insert("org.opencontainers.image.version".into(), version.clone());
    image
        .labels
        .insert("org.opencontainers.image.description".into(), format!("stand-in for nginx:1.14.2, is {version}"));
    // A listener of IPv6 would end nginx on a machine without it.
    let v6 = if Path::new("/proc/net/if_inet6").exists() { "listen [::]:80;" } else { "" };
    image.file("etc/nginx/nginx.conf", CONF.replace("LISTEN6", v6).as_bytes(), 0o644);
    image.file("usr/share/nginx/html/index.html", b"<!doctype html><title>nginx</title><h1>It works</h1>\n", 0o644);
    for dir in ["var/log/nginx", "var/lib/nginx", "var/cache/nginx"] {
        image.dir(dir, 0o755);
    }
    image.entrypoint = vec!["/usr/sbin/nginx".into()];
    image.cmd = vec!["-c".into(), "/etc/nginx/nginx.conf".into(), "-g".into(), "daemon off;".into()];
    image.labels.insert("org.opencontainers.image.title".into(), "nginx".into());
    Ok(image)
}

const CONF: &str = "worker_processes 1;
pid /run/nginx.pid;
error_log stderr warn;
events { worker_connections 1024; }
http {
    access_log off;
    types { text/html html; }
    server {
        listen 80; LISTEN6
        root /usr/share/nginx/html;
    }
}
";
