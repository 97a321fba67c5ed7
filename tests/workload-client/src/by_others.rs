//! As programs written with the `spiffe` crate do it.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;
use spiffe::{WorkloadApiClient, X509Context};
use tokio_stream::StreamExt;

async fn client(socket: &Path) -> Result<WorkloadApiClient> {
    Ok(WorkloadApiClient::connect_to(format!("unix:{}", socket.display())).await?)
}

pub(crate) async fn fetch(socket: &Path) -> Result<()> {
    let client = client(socket).await?;
    let context = client.fetch_x509_context().await?;
    let bundles = client.fetch_x509_bundles().await?;
    let own = context.default_svid().context("no identity")?;
    let domain = own.spiffe_id().trust_domain();
    let roots = bundles.get(domain).context("no bundle of the own trust domain")?;
    println!(
        "{}",
        json!({
            "id": own.spiffe_id().to_string(),
            "chain": own.cert_chain().len(),
            "roots": roots.authorities().len(),
            "bundles": bundles.len(),
        })
    );
    Ok(())
}

pub(crate) async fn watch(socket: &Path) -> Result<()> {
    let mut contexts = client(socket).await?.stream_x509_contexts().await?;
    while let Some(context) = contexts.next().await {
        match context {
            Ok(context) => println!("{}", ids(&context)),
            Err(error) => println!("ended: {error}"),
        }
    }
    Ok(())
}

fn ids(context: &X509Context) -> String {
    context.svids().iter().map(|svid| svid.spiffe_id().to_string()).collect::<Vec<_>>().join(" ")
}

pub(crate) async fn token(socket: &Path, audience: &str) -> Result<()> {
    let client = client(socket).await?;
    let token = client.fetch_jwt_token([audience], None).await?;
    let valid = client.validate_jwt_token(audience, &token).await?;
    println!("{}", json!({ "token": token, "id": valid.spiffe_id().to_string() }));
    Ok(())
}

pub(crate) async fn judge(socket: &Path, audience: &str, token: &str) -> Result<()> {
    match client(socket).await?.validate_jwt_token(audience, token).await {
        Ok(svid) => println!("valid: {}", svid.spiffe_id()),
        Err(error) => println!("refused: {error}"),
    }
    Ok(())
}
