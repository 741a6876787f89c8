//! Makes the types of the Container Storage Interface from its definition, without `protoc`.

use std::error::Error;

const DEFINITION: &str = "src/csi/csi.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={DEFINITION}");
    let definition = protox::compile([DEFINITION], ["src/csi"])?;
    tonic_prost_build::configure().compile_fds(definition)?;
    Ok(())
}
