//! HAProxy as both ends of a TLS 1.3 tunnel with certificates on both sides; its defaults otherwise.

use super::bed::{APP, FAR_PORT, NEAR};
use super::certificates::{Certificates, SERVER_NAME};

const COMMON: &str = "global
  nbthread 2
  maxconn 8000
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode http
  http-reuse always
  timeout connect 5s
  timeout client 1h
  timeout server 1h
";

pub(crate) fn near_config(certificates: &Certificates, far: &str) -> String {
    let (leaf, authority) = (certificates.path("near.both"), certificates.path("ca.pem"));
    format!(
        "{COMMON}frontend near\n  bind {NEAR}\n  default_backend far\nbackend far\n  \
         server far {far}:{FAR_PORT} ssl crt {leaf} ca-file {authority} verify required verifyhost {SERVER_NAME} alpn h2\n"
    )
}

pub(crate) fn far_config(certificates: &Certificates) -> String {
    let (leaf, authority) = (certificates.path("far.both"), certificates.path("ca.pem"));
    format!(
        "{COMMON}frontend far\n  bind :{FAR_PORT} ssl crt {leaf} ca-file {authority} verify required alpn h2\n  \
         default_backend app\nbackend app\n  server app {APP}\n"
    )
}

pub(crate) fn arguments(config: &str) -> Vec<String> {
    ["-db", "-f", config].map(str::to_owned).to_vec()
}
