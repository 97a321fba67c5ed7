//! Compiles the proto files with protox, so that no protoc binary is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "proto/meshd/pki/v1/pki.proto";
    println!("cargo:rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["proto"])?;
    // No transport: callers bring their own TLS connections.
    // Default stubs: a server that lacks a method answers Unimplemented.
    tonic_prost_build::configure().build_transport(false).generate_default_stubs(true).compile_fds(descriptors)?;
    Ok(())
}
