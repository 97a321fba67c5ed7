//! The command line of `meshd enrol` and `unenrol`, and what it says about a workload.

use std::net::SocketAddr;
use std::str::FromStr;

use anyhow::bail;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use ipnet::IpNet;
use meshd::enrol::{ClientAddress, Mode, Selector, ServeEntry, WorkloadEntry};
use meshd_identity::SpiffeId;

use super::super::Output;

#[derive(Args)]
pub(crate) struct Who {
    /// A systemd unit, like `checkout.service`; `docker-3f*.scope` means every scope of such a name.
    #[arg(required_unless_present_any = ["uid", "port", "list"], conflicts_with_all = ["uid", "port"])]
    pub(super) unit: Option<String>,
    /// A user, by number, where units cannot tell workloads apart.
    #[arg(long, value_name = "UID", conflicts_with = "port")]
    pub(super) uid: Option<u32>,
    /// Whoever listens on this TCP port.
    #[arg(long, value_name = "PORT")]
    pub(super) port: Option<u16>,
}

#[derive(Args)]
pub(crate) struct EnrolArgs {
    #[command(flatten)]
    pub(super) who: Who,
    /// Its identity, like `ns/shop/sa/checkout`; the PKI must permit this host to hold it.
    #[arg(long = "as", value_name = "ns/NAMESPACE/sa/NAME", required_unless_present = "list")]
    pub(super) identity: Option<String>,
    /// What it serves to the mesh, and where it listens: `payments.shop:80=127.0.0.1:8080`. With --port the
    /// address may be left out. May be given more than once.
    #[arg(long, value_name = "SERVICE:PORT[=ADDRESS:PORT]")]
    pub(super) serve: Vec<Served>,
    /// Refuse plaintext callers of the ports of --serve in the kernel.
    #[arg(long, requires = "serve")]
    pub(super) strict: bool,
    /// With --strict: a uid that may still call them on this host. May be given more than once.
    #[arg(long, value_name = "UID", requires = "strict")]
    pub(super) local_ok: Vec<u32>,
    /// With --strict: a network that may still call them in clear. May be given more than once.
    #[arg(long, value_name = "CIDR", requires = "strict")]
    pub(super) plaintext_from: Vec<IpNet>,
    /// What the applications of --serve learn of their callers; `proxy-v2` takes --strict, too.
    #[arg(long, value_name = "HOW", default_value = "none", value_parser = client_address(), requires = "serve")]
    pub(super) client_address: ClientAddress,
    /// With --port: also when a login session listens there.
    #[arg(long, requires = "port")]
    pub(super) user_sessions: bool,
    /// Show what is enrolled, by which file, instead.
    #[arg(long, conflicts_with_all = ["identity", "serve", "unit", "uid", "port"])]
    pub(super) list: bool,
    #[arg(short, long, value_enum, default_value_t, requires = "list")]
    pub(super) output: Output,
}

fn client_address() -> impl TypedValueParser<Value = ClientAddress> {
    PossibleValuesParser::new(["none", "proxy-v2", "transparent"]).map(|word| match word.as_str() {
        "proxy-v2" => ClientAddress::ProxyV2,
        "transparent" => ClientAddress::Transparent,
        _ => ClientAddress::None,
    })
}

#[derive(Args)]
pub(crate) struct UnenrolArgs {
    /// The unit (or pattern) as it was enrolled.
    #[arg(required_unless_present_any = ["uid", "port"], conflicts_with_all = ["uid", "port"])]
    pub(super) unit: Option<String>,
    #[arg(long, value_name = "UID", conflicts_with = "port")]
    pub(super) uid: Option<u32>,
    #[arg(long, value_name = "PORT")]
    pub(super) port: Option<u16>,
}

/// `payments.shop:80=127.0.0.1:8080`
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Served {
    pub(super) service: String,
    pub(super) port: u16,
    pub(super) deliver: Option<SocketAddr>,
}

impl FromStr for Served {
    type Err = String;

    fn from_str(text: &str) -> Result<Served, String> {
        let (target, deliver) = match text.split_once('=') {
            Some((target, deliver)) => (target, Some(deliver)),
            None => (text, None),
        };
        let (service, port) = target.rsplit_once(':').ok_or("say the service's port, too, like payments.shop:80")?;
        let port = port.parse().map_err(|_| format!("`{port}` is no port; give 1..65535"))?;
        let deliver = deliver
            .map(|deliver| deliver.parse().map_err(|_| format!("`{deliver}` is no address; write like 127.0.0.1:8080")))
            .transpose()?;
        Ok(Served { service: service.to_owned(), port, deliver })
    }
}

pub(super) fn selector(unit: Option<&str>, uid: Option<u32>, port: Option<u16>) -> anyhow::Result<Selector> {
    Ok(match (unit, uid, port) {
        (Some(unit), None, None) => Selector::unit(unit)?,
        (None, Some(uid), None) => Selector::Uid(uid),
        (None, None, Some(port)) => Selector::port(port)?,
        _ => bail!("say whom: a unit, --uid or --port"),
    })
}

pub(super) fn entry(selector: &Selector, identity: &SpiffeId, args: &EnrolArgs) -> WorkloadEntry {
    let serve = args.serve.iter().map(|served| ServeEntry {
        service: served.service.clone(),
        port: served.port,
        deliver: served.deliver,
        mode: if args.strict { Mode::Strict } else { Mode::Permissive },
        local_ok: args.local_ok.clone(),
        plaintext_from: args.plaintext_from.clone(),
        client_address: args.client_address,
        ..ServeEntry::default()
    });
    WorkloadEntry {
        user_sessions: args.user_sessions,
        namespace: identity.namespace().to_owned(),
        name: identity.name().to_owned(),
        serve: serve.map(|serve| toml::Spanned::new(0..0, serve)).collect(),
        ..WorkloadEntry::of(selector)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: EnrolArgs,
    }

    #[test]
    fn how_callers_are_shown_is_written_like_in_the_files() {
        let words = ["enrol", "web.service", "--as", "ns/shop/sa/web", "--serve", "web.shop:80=127.0.0.1:8080"];
        let parsed = |more: &[&str]| Command::try_parse_from([&words[..], more].concat());
        for (word, meant) in [
            ("none", ClientAddress::None),
            ("proxy-v2", ClientAddress::ProxyV2),
            ("transparent", ClientAddress::Transparent),
        ] {
            let command = parsed(&["--client-address", word]).unwrap();
            assert_eq!(command.args.client_address, meant);
            let selector = Selector::unit("web.service").unwrap();
            let identity = "spiffe://shop.test/ns/shop/sa/web".parse().unwrap();
            let entry = entry(&selector, &identity, &command.args);
            assert_eq!(entry.serve[0].get_ref().client_address, meant);
        }
        assert_eq!(parsed(&[]).unwrap().args.client_address, ClientAddress::None);
        let wrong = parsed(&["--client-address", "proxy"]).err().unwrap().to_string();
        assert!(wrong.contains("[possible values: none, proxy-v2, transparent]"), "{wrong}");
        let nothing_served = ["enrol", "web.service", "--as", "ns/shop/sa/web", "--client-address", "transparent"];
        assert!(Command::try_parse_from(nothing_served).is_err());
    }

    #[test]
    fn what_is_served_may_leave_the_address_out() {
        let served: Served = "payments.shop:80=127.0.0.1:8080".parse().unwrap();
        assert_eq!((served.service.as_str(), served.port), ("payments.shop", 80));
        assert_eq!(served.deliver, Some("127.0.0.1:8080".parse().unwrap()));
        assert_eq!("db.shop:5432".parse::<Served>().unwrap().deliver, None);
        let v6: Served = "db.shop:5432=[::1]:5432".parse().unwrap();
        assert_eq!(v6.deliver, Some("[::1]:5432".parse().unwrap()));
        for wrong in ["payments.shop", "payments.shop:http", "payments.shop:80=8080"] {
            assert!(wrong.parse::<Served>().is_err(), "{wrong}");
        }
    }
}
