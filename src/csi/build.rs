//! Makes the types of the Container Storage Interface from its definition, without `protoc`.

use std::error::Error;

const DEFINITION: &str = "src/csi/csi.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={DEFINITION}");
    let definition = protox::compile([DEFINITION], ["src/csi"])?;
    // Services of the specification have more calls than any driver answers: the rest are UNIMPLEMENTED.
    tonic_prost_build::configure().generate_default_stubs(true).compile_fds(definition)?;
    Ok(())
}
