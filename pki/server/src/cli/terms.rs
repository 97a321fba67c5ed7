//! The terms of an entry, as they are given.

use std::time::Duration;

use clap::Args;
use meshd_pki::times::parse_duration;
use meshd_pki_api::admin::EntryAdd;

#[derive(Args)]
pub(crate) struct Terms {
    /// Which processes of the host: systemd:unit:NAME.service, unix:uid:NUMBER, unix:gid:NUMBER, unix:path:/PROGRAM,
    /// unix:sha256:HEX. With several all must hold. Without one the host decides.
    #[arg(long)]
    selector: Vec<String>,
    /// Life of the certificates, if shorter than that of others.
    #[arg(long, value_parser = parse_duration)]
    ttl: Option<Duration>,
    /// Life of tokens (JWT-SVIDs), if not 15m; at most 1h.
    #[arg(long, value_parser = parse_duration)]
    jwt_ttl: Option<Duration>,
    /// A name of DNS in the certificates, beside the SPIFFE ID. May be repeated.
    #[arg(long)]
    dns: Vec<String>,
    /// What programs are told of the identity at the Workload API.
    #[arg(long, default_value = "")]
    hint: String,
    /// How long the entry permits anything; certificates and tokens end with it.
    #[arg(long, value_parser = parse_duration)]
    expires_in: Option<Duration>,
}

impl Terms {
    pub(crate) fn of(self, entry: EntryAdd) -> EntryAdd {
        let seconds = |life: Option<Duration>| life.map(|life| life.as_secs());
        EntryAdd {
            selectors: self.selector,
            ttl_s: seconds(self.ttl),
            jwt_ttl_s: seconds(self.jwt_ttl),
            dns_names: self.dns,
            hint: self.hint,
            expires_in_s: seconds(self.expires_in),
            ..entry
        }
    }
}
