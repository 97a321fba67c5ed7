//! What Envoy is given for the names it asks for, which are SPIRE's. Pure.

use data_encoding::BASE64;
use meshd_identity::Bundle;
use meshd_pki_client::Svid;
use meshd_workload_api::envoy::spiffe_cert_validator_config::TrustDomain;
use meshd_workload_api::envoy::{
    Any, CertificateValidationContext, DataSource, Secret, SpiffeCertValidatorConfig, TlsCertificate,
    TypedExtensionConfig, data_source::Specifier, secret,
};
use prost::Message;

use super::refused::Refused;
use super::session::Holding;

pub(super) const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
const VALIDATOR: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";
/// The caller's certificate, under a name that does not depend on who it is.
const DEFAULT: &str = "default";
/// Whom to believe: our trust domain, and all we have dealings with.
const OWN_ROOTS: &str = "ROOTCA";
const ALL_ROOTS: &str = "ALL";

/// One secret per name; all there are if no name is given.
pub(super) fn secrets(names: &[String], holding: &Holding) -> Result<Vec<Any>, Refused> {
    let (svid, bundle) = (&holding.svid, &holding.credentials.bundle);
    let own = svid.id.to_string();
    let mut all: Vec<&Bundle> = holding.credentials.federation.of(&svid.id).chain([bundle]).collect();
    all.sort_by(|one, other| one.trust_domain.cmp(&other.trust_domain));
    let of_name = |name: &str| match name {
        _ if name == DEFAULT || name == own => Some(certificate(name, svid)),
        OWN_ROOTS => Some(validation(name, &[bundle])),
        ALL_ROOTS => Some(validation(name, &all)),
        _ => all.iter().find(|bundle| name == resource(bundle)).map(|bundle| validation(name, &[*bundle])),
    };
    let domains: Vec<String> = all.iter().map(|bundle| resource(bundle)).collect();
    if names.iter().all(String::is_empty) {
        return Ok(domains.iter().chain([&own]).filter_map(|name| of_name(name)).collect());
    }
    let unknown = |name: &String| {
        let name: String = name.chars().take(200).flat_map(char::escape_debug).collect();
        Refused::Invalid(format!(
            "`{name}` is no secret of {own}; it has `default`, `ROOTCA`, `ALL`, its own SPIFFE ID and `{}`",
            domains.join("`, `")
        ))
    };
    names.iter().filter(|name| !name.is_empty()).map(|name| of_name(name).ok_or_else(|| unknown(name))).collect()
}

fn resource(bundle: &Bundle) -> String {
    format!("spiffe://{}", bundle.trust_domain)
}

fn certificate(name: &str, svid: &Svid) -> Any {
    let chain: String = svid.chain.iter().map(|certificate| pem("CERTIFICATE", certificate)).collect();
    let key = pem("PRIVATE KEY", svid.key.secret_der());
    let certificate = TlsCertificate { certificate_chain: inline(chain), private_key: inline(key) };
    packed(name, secret::Type::TlsCertificate(certificate))
}

/// Envoy's own SPIFFE validator (since 1.18): it verifies a peer under the bundle of the trust domain it claims.
fn validation(name: &str, bundles: &[&Bundle]) -> Any {
    let domain = |bundle: &&Bundle| {
        let roots: String = bundle.roots.iter().map(|root| pem("CERTIFICATE", root)).collect();
        TrustDomain { name: bundle.trust_domain.to_string(), trust_bundle: inline(roots) }
    };
    let validator = SpiffeCertValidatorConfig { trust_domains: bundles.iter().map(domain).collect() };
    let typed_config = Some(Any { type_url: VALIDATOR.to_owned(), value: validator.encode_to_vec() });
    let validator = TypedExtensionConfig { name: "envoy.tls.cert_validator.spiffe".to_owned(), typed_config };
    let context = CertificateValidationContext { custom_validator_config: Some(validator) };
    packed(name, secret::Type::ValidationContext(context))
}

fn packed(name: &str, secret: secret::Type) -> Any {
    let secret = Secret { name: name.to_owned(), r#type: Some(secret) };
    Any { type_url: SECRET.to_owned(), value: secret.encode_to_vec() }
}

fn inline(text: String) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineBytes(text.into_bytes())) })
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = BASE64.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem + &format!("-----END {label}-----\n")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use meshd_identity::SpiffeId;
    use meshd_pki_client::fake::FakeCa;
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;

    use super::*;

    fn holding() -> Holding {
        let domain: meshd_identity::TrustDomain = "mesh.example".parse().unwrap();
        let id = SpiffeId::workload(&domain, "shop", "web").unwrap();
        let credentials = FakeCa::new(&domain).credentials("host", std::slice::from_ref(&id));
        Holding { svid: credentials.workloads[&id].clone(), credentials: Arc::new(credentials) }
    }

    fn asked(holding: &Holding, names: &[&str]) -> Result<Vec<Secret>, Refused> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let found = secrets(&names, holding)?;
        assert!(found.iter().all(|any| any.type_url == SECRET));
        Ok(found.iter().map(|any| Secret::decode(&any.value[..]).unwrap()).collect())
    }

    fn text(source: &Option<DataSource>) -> &[u8] {
        let Some(Specifier::InlineBytes(bytes)) = &source.as_ref().unwrap().specifier else { panic!("not inline") };
        bytes
    }

    #[test]
    fn every_name_of_spires_means_a_secret() {
        let holding = holding();
        for name in ["default", "spiffe://mesh.example/ns/shop/sa/web"] {
            let [Secret { name: told, r#type: Some(secret::Type::TlsCertificate(tls)) }] =
                &asked(&holding, &[name]).unwrap()[..]
            else {
                panic!("{name} is no certificate");
            };
            assert_eq!(told, name);
            let chain: Vec<_> = CertificateDer::pem_slice_iter(text(&tls.certificate_chain)).flatten().collect();
            assert_eq!(chain, holding.svid.chain);
            assert!(text(&tls.private_key).starts_with(b"-----BEGIN PRIVATE KEY-----\n"));
        }
        for name in ["ROOTCA", "ALL", "spiffe://mesh.example"] {
            let [Secret { name: told, r#type: Some(secret::Type::ValidationContext(context)) }] =
                &asked(&holding, &[name]).unwrap()[..]
            else {
                panic!("{name} is no validation context");
            };
            assert_eq!(told, name);
            let config = context.custom_validator_config.as_ref().unwrap().typed_config.as_ref().unwrap();
            let config = SpiffeCertValidatorConfig::decode(&config.value[..]).unwrap();
            let roots = CertificateDer::from_pem_slice(text(&config.trust_domains[0].trust_bundle)).unwrap();
            assert_eq!(roots.as_ref(), holding.credentials.bundle.roots[0]);
        }
        assert_eq!(asked(&holding, &[]).unwrap().len(), 2);
        assert_eq!(asked(&holding, &["default", "ROOTCA"]).unwrap().len(), 2);
    }

    #[test]
    fn each_federated_domain_has_a_context_and_all_have_one_together() {
        let mut holding = holding();
        let other: meshd_identity::TrustDomain = "other.example".parse().unwrap();
        let foreign = FakeCa::new(&other);
        let mut credentials = (*holding.credentials).clone();
        credentials.federation = foreign.federated_for(std::slice::from_ref(&holding.svid.id));
        holding.credentials = Arc::new(credentials);
        let domains_of = |name: &str| -> Vec<(String, CertificateDer<'static>)> {
            let [Secret { r#type: Some(secret::Type::ValidationContext(context)), .. }] =
                &asked(&holding, &[name]).unwrap()[..]
            else {
                panic!("{name} is no validation context");
            };
            let config = context.custom_validator_config.as_ref().unwrap().typed_config.as_ref().unwrap();
            let config = SpiffeCertValidatorConfig::decode(&config.value[..]).unwrap();
            let root = |domain: &TrustDomain| CertificateDer::from_pem_slice(text(&domain.trust_bundle)).unwrap();
            config.trust_domains.iter().map(|domain| (domain.name.clone(), root(domain))).collect()
        };
        let ours = ("mesh.example".to_owned(), holding.credentials.bundle.roots[0].clone().into());
        let theirs = ("other.example".to_owned(), foreign.bundle().roots[0].clone().into());
        assert_eq!(domains_of("spiffe://other.example"), std::slice::from_ref(&theirs));
        assert_eq!(domains_of("ROOTCA"), std::slice::from_ref(&ours));
        assert_eq!(domains_of("ALL"), [ours, theirs]);
        assert_eq!(asked(&holding, &[]).unwrap().len(), 3);
    }

    #[test]
    fn nobody_elses_certificate_is_given_out() {
        for name in ["spiffe://mesh.example/ns/shop/sa/other", "spiffe://other.example", "x"] {
            assert!(matches!(asked(&holding(), &["default", name]), Err(Refused::Invalid(_))), "{name}");
        }
    }
}
