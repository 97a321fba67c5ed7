//! Compiles the proto files with protox, so that no protoc binary is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files =
        ["proto/meshd/pki/v1/pki.proto", "proto/meshd/pki/admin/v1/admin.proto", "proto/istio/v1/auth/ca.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    // No transport: callers bring their own TLS connections.
    // Default stubs: a server that lacks a method answers Unimplemented.
    tonic_prost_build::configure()
        .build_transport(false)
        .generate_default_stubs(true)
        .codec_path("crate::codec::SmallBuffers")
        // What `-o json` prints.
        .type_attribute(".meshd.pki.admin.v1", "#[derive(serde::Serialize)]")
        .type_attribute(".meshd.pki.admin.v1.Reply.reply", "#[serde(untagged)]")
        .compile_fds(descriptors)?;
    Ok(())
}
