//! Generates the discovery protocol's types. Needs `protoc` (`make` installs protobuf-compiler).

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = "proto/sluice/discovery/v1/discovery.proto";
    println!("cargo::rerun-if-changed={proto}");
    tonic_prost_build::configure()
        // Keys are printed by nobody.
        .skip_debug([".sluice.discovery.v1.Certificate"])
        .compile_protos(&[proto], &["proto"])?;
    Ok(())
}
