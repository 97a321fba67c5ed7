//! Federation (SPIFFE Federation sections 4 and 5): we publish our bundle and follow those of other trust domains.
//!
//! - [`accept`]: which document takes the place of the one held, and when to ask again. Pure.
//! - [`fetch`]: one HTTPS request, authenticated as the profile says, bounded in size and time.
//! - [`poll`]: asks when it is time to; the last good bundle stays, whatever comes.
//! - [`web`]: our bundle under the operator's own certificate (https_web). Our own port serves https_spiffe.
//! - [`commands`]: `meshd-pki federation`.

pub(crate) mod accept;
pub mod commands;
mod fetch;
pub(crate) mod poll;
pub(crate) mod share;
mod tls;
pub mod web;
