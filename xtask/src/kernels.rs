//! Runs test programs under another kernel: in a machine of QEMU's, by software emulation, whose only disk is an archive in
//! memory with the programs, their libraries and the modules that the kernel has not built in. What the machine prints is
//! passed on; its last word decides.

use crate::image::Image;
use anyhow::{Context, Result, bail, ensure};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// What the tests use: links, filters, closing of sockets, tunnels, a host's firewall to live beside.
const MODULES: [&str; 16] = [
    "veth",
    "bridge",
    "dummy",
    "vxlan",
    "sch_ingress",
    "sch_tbf",
    "cls_bpf",
    "act_bpf",
    "act_gact",
    "act_police",
    "tcp_diag",
    "udp_diag",
    "crc32c_generic",
    "nf_tables",
    "nft_ct",
    "nft_reject_inet",
];
/// Begins the lines that are not a test's own.
const MARK: &str = "sluice-guest:";

/// A program and its arguments.
struct Step {
    name: &'static str,
    /// Folder of the crate that it is a test of.
    package: &'static str,
    arguments: &'static str,
}

/// All are tests of this project's as they run on any kernel; what differs is what they find.
const STEPS: [Step; 4] = [
    Step { name: "loader", package: "ebpf", arguments: "--test-threads 1" },
    Step { name: "packets", package: "ebpf", arguments: "--test-threads 1" },
    Step { name: "datapath", package: "agent", arguments: "--exact outside" },
    Step { name: "datapath", package: "agent", arguments: "--exact refusals" },
];

/// `root` is an unpacked kernel package, with its `modules.dep`; `built` are cargo's messages about the tests.
pub fn test(root: &Path, built: &Path, bin: &Path, patience: Duration) -> Result<()> {
    let modules = only_entry(&root.join("lib/modules"))?;
    let release = modules.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let archive = root.join("initramfs");
    let built = fs::read_to_string(built).with_context(|| format!("read cargo's messages in {}", built.display()))?;
    let image = guest(&modules, &built, bin)?;
    fs::write(&archive, image.initramfs()).with_context(|| format!("write {}", archive.display()))?;
    println!("kernel {release}, emulated:");
    let begun = Instant::now();
    let said = run(&root.join(format!("boot/vmlinuz-{release}")), &archive, patience)?;
    verdict(&said, &release)?;
    println!("kernel {release}: all of {} programs passed in {} s", STEPS.len(), begun.elapsed().as_secs());
    Ok(())
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut all = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?.flatten();
    match (all.next(), all.next()) {
        (Some(one), None) => Ok(one.path()),
        _ => bail!("{}: one kernel is wanted; unpack each package into a folder of its own", folder.display()),
    }
}

fn guest(modules: &Path, built: &str, bin: &Path) -> Result<Image> {
    let mut image = Image::new("guest");
    let busybox = Path::new("/bin/busybox");
    image.program(busybox, "bin/busybox").context("the machine's shell (Debian package busybox-static)")?;
    image.link("bin/sh", "busybox");
    for name in ["loader", "packets", "datapath"] {
        let step = STEPS.iter().find(|s| s.name == name).with_context(|| format!("no step {name}"))?;
        image.program(&test_program(built, step)?, &format!("tests/{name}"))?;
    }
    image.program(&bin.join("sluice-cni"), "tests/sluice-cni")?;
    image.program(Path::new("/usr/sbin/nft"), "usr/sbin/nft")?;
    // The shell's own makes no veth pair by the names asked for, and no neighbours.
    image.program(Path::new("/bin/ip"), "usr/sbin/ip").context("Debian package iproute2")?;
    let table = modules.join("modules.dep");
    let table = fs::read_to_string(&table).with_context(|| format!("read {} (made by depmod)", table.display()))?;
    let files = in_order(&table, &MODULES);
    for file in &files {
        let bytes = fs::read(modules.join(file)).with_context(|| format!("read the kernel's module {file}"))?;
        image.file(&format!("modules/{}", name_of(file)), &bytes, 0o644);
    }
    let order: Vec<_> = files.iter().map(|f| name_of(f)).collect();
    image.file("init", init(&order).as_bytes(), 0o755);
    for dir in ["mnt", "var/lib", "sys", "proc"] {
        image.dir(dir, 0o755);
    }
    Ok(image)
}

/// Where cargo has put a test, by what it said when it built it.
fn test_program(built: &str, step: &Step) -> Result<PathBuf> {
    let found = built.lines().find_map(|line| executable(line, step.package, step.name));
    found.with_context(|| format!("cargo has built no test {} of {}", step.name, step.package))
}

/// PURE.
fn executable(message: &str, package: &str, name: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let target = &message["target"];
    let inside = target["src_path"].as_str()?.contains(&format!("/{package}/tests/"));
    let of_test = inside && target["name"] == name && target["kind"][0] == "test";
    message["executable"].as_str().filter(|_| of_test).map(PathBuf::from)
}

/// PURE. The module's name as the kernel knows it, of `kernel/net/sched/cls_bpf.ko`.
fn name_of(file: &str) -> &str {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split('.').next().unwrap_or(name)
}

/// PURE. The files of those modules that are none built in, each after what it needs, by the text of `modules.dep`.
fn in_order<'a>(table: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let lines = table.lines().filter_map(|l| l.split_once(':'));
    let needs: BTreeMap<&str, (&str, &str)> = lines.map(|(file, needs)| (name_of(file), (file, needs))).collect();
    let mut order = vec![];
    for (file, needed) in wanted.iter().filter_map(|name| needs.get(name)) {
        // `modules.dep` lists all that a module needs, and each before what that needs.
        for file in needed.split_whitespace().rev().chain([*file]) {
            if !order.contains(&file) {
                order.push(file);
            }
        }
    }
    order
}

/// PURE. The machine's first process.
fn init(modules: &[&str]) -> String {
    let loads = modules.iter().map(|m| format!("insmod /modules/{m} || echo '{MARK} module {m} is refused'\n"));
    let step = |(number, s): (usize, &Step)| {
        format!(
            "echo '{MARK} begin {number} {0} {1}'\n/tests/{0} {1} 2>&1\necho \"{MARK} end {number} $?\"\n",
            s.name, s.arguments
        )
    };
    let steps: String = STEPS.iter().enumerate().map(step).collect();
    format!(
        "#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
{}ip link set lo up
export PATH=/usr/sbin:/bin SLUICE_TEST_PLUGIN=/tests/sluice-cni SLUICE_TEST_PATIENCE_S=600 RUST_BACKTRACE=0
echo \"{MARK} kernel $(uname -r)\"
{steps}echo '{MARK} done'
poweroff -f
",
        loads.collect::<String>()
    )
}

/// Boots, passes on what the machine prints, and returns it; a machine that is not through in time is killed.
fn run(kernel: &Path, archive: &Path, patience: Duration) -> Result<Vec<String>> {
    let mut machine = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3G", "-nographic", "-no-reboot"])
        .args(["-nodefaults", "-serial", "stdio", "-net", "none"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(archive)
        .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start qemu-system-x86_64 (Debian package qemu-system-x86)")?;
    let said = listen(&mut machine, patience);
    let _ = machine.kill();
    machine.wait().context("wait for the emulated machine")?;
    said
}

fn listen(machine: &mut Child, patience: Duration) -> Result<Vec<String>> {
    let console = machine.stdout.take().context("the machine's console is a pipe")?;
    let (lines, told) = mpsc::channel();
    thread::spawn(move || {
        let mut all = BufReader::new(console).split(b'\n').map_while(Result::ok);
        let _ = all.try_for_each(|line| lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()));
    });
    let deadline = Instant::now() + patience;
    let mut said = vec![];
    loop {
        match told.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                // Firmware resets the terminal that it thinks it has.
                let line: String = line.chars().filter(|c| !c.is_control()).collect();
                println!("  {line}");
                said.push(line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(said),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("the machine is not through after {} s and was killed", patience.as_secs())
            }
        }
    }
}

/// PURE. The kernel is the one that was meant, every program ended with 0, and the machine got to its end.
fn verdict(said: &[String], release: &str) -> Result<()> {
    let marked: Vec<&str> = said.iter().filter_map(|l| l.split_once(MARK)).map(|(_, words)| words.trim()).collect();
    ensure!(marked.contains(&format!("kernel {release}").as_str()), "the machine did not boot kernel {release}");
    for (number, step) in STEPS.iter().enumerate() {
        let end = format!("end {number} ");
        match marked.iter().find_map(|w| w.strip_prefix(&end)) {
            Some("0") => {}
            Some(code) => bail!("{} {} failed with {code} on kernel {release}", step.name, step.arguments),
            None => bail!("{} {} did not end on kernel {release}", step.name, step.arguments),
        }
    }
    ensure!(marked.contains(&"done"), "kernel {release} ended before its tests");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let table = "kernel/net/802/stp.ko: kernel/net/llc/llc.ko
kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko kernel/net/llc/llc.ko
kernel/net/llc/llc.ko:
kernel/drivers/net/veth.ko.xz:
kernel/net/bridge/br_netfilter.ko: kernel/net/bridge/bridge.ko kernel/net/802/stp.ko kernel/net/llc/llc.ko
";
        let names = |wanted: &[&str]| in_order(table, wanted).into_iter().map(name_of).collect::<Vec<_>>();
        assert_eq!(names(&["bridge", "br_netfilter"]), ["llc", "stp", "bridge", "br_netfilter"]);
        assert_eq!(names(&["veth", "built_in"]), ["veth"]);
    }

    #[test]
    fn only_a_whole_run_passes() {
        let all = || {
            let ends = (0..STEPS.len()).map(|n| format!("{MARK} end {n} 0"));
            [format!("[0.1] noise {MARK} kernel 6.1.0")].into_iter().chain(ends).chain([format!("{MARK} done")])
        };
        let judge = |said: Vec<String>| verdict(&said, "6.1.0").map_err(|e| e.to_string());
        assert_eq!(judge(all().collect()), Ok(()));
        let without = |n: usize| judge(all().enumerate().filter(|(i, _)| *i != n).map(|(_, l)| l).collect());
        assert!((0..STEPS.len() + 2).all(|n| without(n).is_err()));
        let failed = all().map(|l| l.replace("end 1 0", "end 1 101")).collect();
        assert!(judge(failed).expect_err("a test failed").contains("failed with 101"));
        assert!(verdict(&all().collect::<Vec<_>>(), "5.15.0").is_err());
    }

    #[test]
    fn the_tests_program_is_told_from_others() {
        let message = |kind: &str, executable: &str| {
            let target = format!(r#"{{"name":"loader","kind":["{kind}"],"src_path":"/x/ebpf/tests/loader.rs"}}"#);
            format!(r#"{{"reason":"x","target":{target},"executable":{executable}}}"#)
        };
        let of = |m: &str, package: &str| executable(m, package, "loader");
        let ready = message("test", "\"/t/loader-1\"");
        assert_eq!(of(&ready, "ebpf"), Some("/t/loader-1".into()));
        assert_eq!(of(&ready, "agent"), None);
        assert_eq!(of(&message("test", "null"), "ebpf"), None);
        assert_eq!(of(&message("lib", "\"/t/loader-1\""), "ebpf"), None);
        assert_eq!(of("Compiling", "ebpf"), None);
    }
}
