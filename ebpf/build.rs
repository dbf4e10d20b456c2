//! Builds `programs/` for bpfel-unknown-none and puts the object at `$OUT_DIR/sluice.bpf.o`.
//!
//! The compiler is the first of these that exists:
//! 1. `$SLUICE_BPF_OBJECT`: a ready object, copied.
//! 2. `$SLUICE_BPF_RUSTC`, or Debian's /usr/bin/rustc: `rustc-web` with `libstd-rust-web-dev-bpf` brings a precompiled
//!    core. The two packages may also be unpacked into a folder (`dpkg -x`), with the variable naming its
//!    `usr/bin/rustc`: where Debian's own `rustc` or `rustup` packages are installed, they conflict.
//! 3. The current toolchain with `rust-src` (`-Z build-std=core`).
//! 4. rustup's nightly with `rust-src`.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

const TARGET: &str = "bpfel-unknown-none";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let object = out.join("sluice.bpf.o");
    for path in ["programs/src", "programs/Cargo.toml", "programs/Cargo.lock", "common/src", "build.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    for var in ["SLUICE_BPF_OBJECT", "SLUICE_BPF_RUSTC"] {
        println!("cargo::rerun-if-env-changed={var}");
    }
    if let Some(ready) = env::var_os("SLUICE_BPF_OBJECT") {
        std::fs::copy(&ready, &object).unwrap_or_else(|e| panic!("copy $SLUICE_BPF_OBJECT {ready:?}: {e}"));
        return;
    }
    let target_dir = out.join("programs");
    build(&target_dir);
    let built = target_dir.join(TARGET).join("release/sluice-ebpf");
    std::fs::copy(&built, &object).unwrap_or_else(|e| panic!("copy {}: {e}", built.display()));
}

fn build(target_dir: &Path) {
    let current = sysroot(Path::new("rustc"), None, None).expect("rustc on PATH says its sysroot");
    let mut libraries = inherited_libraries();
    libraries.push(current.join("lib")); // bpf-linker loads rustc's own libLLVM; a bare cargo does not set this
    let (mut cargo, args) = compiler(&current, &mut libraries);
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let flags =
        [format!("--cfg=bpf_target_arch=\"{arch}\""), "-Cdebuginfo=2".into(), "-Clink-arg=--btf".into()].join("\x1f");
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let status = cargo
        .current_dir(&programs)
        .arg("build")
        .args(args)
        .args(["--release", "--locked", "--bin", "sluice-ebpf", "--target", TARGET, "--target-dir"])
        .arg(target_dir)
        .env("RUSTC_BOOTSTRAP", "1")
        // In many units, functions stay calls, and the verifier refuses what they do with their arguments.
        .env("CARGO_INCREMENTAL", "0")
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .env("LD_LIBRARY_PATH", env::join_paths(libraries).expect("library paths have no colon"))
        .status()
        .expect("cargo runs");
    assert!(
        status.success(),
        "the eBPF build failed; is bpf-linker on PATH? (cargo install bpf-linker --version 0.10.3 --locked)"
    );
}

/// Cargo set up with the compiler, and the arguments it needs for that compiler.
fn compiler(current: &Path, libraries: &mut Vec<PathBuf>) -> (Command, Vec<&'static str>) {
    let mut cargo = clean(Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"))));
    let rustc = PathBuf::from(env::var_os("SLUICE_BPF_RUSTC").unwrap_or_else(|| DEBIAN_RUSTC.into()));
    let unpacked = unpacked_libraries(&rustc);
    if sysroot(&rustc, None, Some(&unpacked)).is_some_and(|s| has_target(&s)) {
        libraries.splice(0..0, unpacked);
        cargo.env("RUSTC", &rustc);
        return (cargo, vec![]);
    }
    let build_std = vec!["-Z", "build-std=core"];
    if has_source(current) {
        return (cargo, build_std);
    }
    if sysroot(Path::new("rustc"), Some("nightly"), None).is_some_and(|s| has_source(&s)) {
        let mut cargo = clean(Command::new("cargo"));
        cargo.arg("+nightly").env_remove("RUSTUP_TOOLCHAIN");
        return (cargo, build_std);
    }
    panic!(
        "no compiler for {TARGET}: `apt-get install rustc-web libstd-rust-web-dev-bpf` (Debian 12 and 13), or unpack \
         both into a folder and set SLUICE_BPF_RUSTC=<folder>/usr/bin/rustc, or `rustup component add rust-src`"
    );
}

/// What this build's own cargo says about compilers and flags must not reach the one for the other target. Incremental
/// code comes in many units, and the verifier refuses what is not inlined across them.
fn clean(mut cargo: Command) -> Command {
    for var in [
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "CARGO_INCREMENTAL",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
    ] {
        cargo.env_remove(var);
    }
    cargo
}

/// Libraries of a compiler that was unpacked rather than installed: the loader does not know its folders.
fn unpacked_libraries(rustc: &Path) -> Vec<PathBuf> {
    if rustc == Path::new(DEBIAN_RUSTC) {
        return vec![];
    }
    let Some(prefix) = rustc.parent().and_then(Path::parent) else { return vec![] };
    let multiarch = format!("lib/{}-linux-gnu", env::consts::ARCH);
    [prefix.join(multiarch), prefix.join("lib")].into_iter().filter(|p| p.is_dir()).collect()
}

fn inherited_libraries() -> Vec<PathBuf> {
    let inherited = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    env::split_paths(&inherited).filter(|p| p.is_dir()).collect()
}

fn sysroot(rustc: &Path, toolchain: Option<&str>, libraries: Option<&[PathBuf]>) -> Option<PathBuf> {
    let mut command = Command::new(rustc);
    if let Some(toolchain) = toolchain {
        command.arg(format!("+{toolchain}")).env_remove("RUSTUP_TOOLCHAIN");
    }
    if let Some(libraries) = libraries.filter(|l| !l.is_empty()) {
        command.env("LD_LIBRARY_PATH", env::join_paths(libraries).ok()?);
    }
    let output = command.args(["--print", "sysroot"]).output().ok()?;
    output.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

fn has_target(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib").join(TARGET).join("lib").is_dir()
}

fn has_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file()
}
