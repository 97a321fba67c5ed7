//! `meshd endpoints`: where services run, and who says so.

use std::process::ExitCode;

use anyhow::ensure;
use meshd::admin::{self, AcceptOrder, EndpointView, StatusView};
use meshd::config::Config;

use super::{Output, on_runtime};

#[derive(clap::Args)]
pub(crate) struct Endpoints {
    /// Only this service, for example payments.shop.
    service: Option<String>,
    /// Only what this source says.
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// What this source no longer says is gone indeed: drop it now, not after a minute. For root, audited.
    #[arg(long, value_name = "SOURCE", conflicts_with_all = ["service", "source"])]
    accept: Option<String>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

pub(crate) fn run(config: &Config, args: &Endpoints) -> anyhow::Result<ExitCode> {
    let socket = config.admin_socket();
    if let Some(source) = &args.accept {
        let order = AcceptOrder { source: source.clone() };
        on_runtime(async { Ok(admin::order(&socket, "/endpoints/accept", &order).await?) })?;
        println!("what {source} no longer says is gone");
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(source) = &args.source {
        let status: StatusView = on_runtime(async { Ok(admin::fetch(&socket, "/status").await?) })?;
        let names: Vec<&str> = status.sources.iter().filter_map(|known| known["name"].as_str()).collect();
        ensure!(names.contains(&source.as_str()), "there is no source `{source}`; there are: {}", names.join(", "));
    }
    let mut rows: Vec<EndpointView> = on_runtime(async { Ok(admin::fetch(&socket, "/endpoints").await?) })?;
    if let Some(service) = &args.service {
        rows.retain(|row| row.service == *service);
        ensure!(
            !rows.is_empty(),
            "no endpoint of {service} is known; `meshd status` lists services, sources and errors"
        );
    }
    rows.retain(|row| args.source.as_ref().is_none_or(|source| row.source == *source));
    match args.output {
        Output::Table => print!("{}", admin::endpoints(&rows)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&rows)?),
    }
    Ok(ExitCode::SUCCESS)
}
