//! The conversation with a running host: it reports, the PKI tells what the host does not have yet.

use meshd_identity::inspect_svid;
use meshd_pki_api::v1;

use crate::audit::Event;
use crate::enrol::excerpt;
use crate::issue::{Caller, offset_ms};
use crate::pki::{Pki, trust_bundle};
use crate::refused::Refused;
use crate::rotation::{Root, RootState, Trust};
use crate::store::hosts::{self, HostState, Sighting};
use crate::store::{DbError, settings, tainted};
use crate::times::{seconds, unix, unix_ms};

/// Two minutes, unless leaves live for less than 200 s.
const LOOKS_PER_NOTE: u32 = 12;

/// What a host had when it last reported, so that it is told nothing twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Had {
    pub(crate) bundle: u64,
    pub(crate) deny: u64,
    pub(crate) federation: u64,
}

impl Had {
    /// After this reply to whoever was told all there is.
    pub(crate) fn and(self, told: Had, reply: &v1::SyncReply) -> Had {
        // Of federation each host has its own, that it was told last.
        let federation = reply.federation.as_ref().map_or(self.federation, |told| told.revision);
        Had { bundle: self.bundle.max(told.bundle), deny: self.deny.max(told.deny), federation }
    }
}

/// What there is; changes wake every conversation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Current {
    pub(crate) newest: Had,
    pub(crate) tainted: Vec<String>,
}

impl Pki {
    /// Judges the host anew, notes its report, and answers. The certificate may have ended and the host may have been
    /// banned since the connection was made.
    pub fn sync_report(
        &self,
        certificate: Option<&[u8]>,
        report: &v1::SyncRequest,
        remote: &str,
    ) -> Result<v1::SyncReply, Refused> {
        let now = self.now();
        let caller = match self.state.database.read_latest(|view| self.caller(view, certificate)) {
            Err(refused) => return self.last_word(certificate, report).ok_or(refused),
            Ok(caller) => caller,
        };
        self.watch_for_clones(&caller.host.id, &report.instance, remote);
        let sighting = Sighting {
            now: unix(now),
            acked_sequence: report.bundle_sequence,
            clock_offset_ms: offset_ms(report.host_time_unix_ms, unix_ms(now)),
            roots_in_use: report.inventory.as_ref().map(|inventory| inventory.roots.as_slice()),
        };
        // Most reports tell what the one before told, and a fleet reports all the time.
        if !caller.host.is_known(&sighting, &caller.key_id, self.note_every_s()) {
            self.note_sighting(&caller, &sighting);
        }
        self.heard_of_bundle(&caller.host.id, report.bundle_sequence);
        if !report.deny_set.is_empty()
            && let Err(error) = self.learn_deny(&report.deny_set)
        {
            tracing::error!(%error, "a newer deny set came from a host, but cannot be stored");
        }
        let had =
            Had { bundle: report.bundle_sequence, deny: report.deny_sequence, federation: report.federation_revision };
        self.sync_news(&caller.host.id, had)
    }

    /// That a host lives is put on record as often as this, or whenever it tells something else: rarely beside ten
    /// minutes, after which it counts as silent.
    fn note_every_s(&self) -> i64 {
        seconds(self.lifetimes.look_every() * LOOKS_PER_NOTE)
    }

    fn note_sighting(&self, caller: &Caller, sighting: &Sighting<'_>) {
        let noted = self.state.database.transaction(|records| {
            let Some(mut host) = hosts::host(records, &caller.host.id)? else { return Ok(()) };
            if host.adopted_until.is_some() {
                settings::note_return(records, sighting.now)?;
            }
            host.saw(sighting);
            host.used_key(&caller.key_id);
            hosts::put_host(records, &host)
        });
        if let Err::<(), DbError>(error) = noted {
            self.metrics.note_failures.inc();
            tracing::error!(%error, host = %caller.host.id, "a report is not on record");
        }
    }

    /// What a host lacks that has this.
    pub(crate) fn sync_news(&self, host: &str, had: Had) -> Result<v1::SyncReply, Refused> {
        let signer = self.signer();
        let deny = self.deny();
        let (recovery, federation) = self.state.database.read(|view| -> Result<_, Refused> {
            let permitted = hosts::permitted(view, host)?;
            let federation = self.federation_for(view, &permitted)?;
            Ok((settings::recovery_statements(view)?.pop(), federation))
        })?;
        Ok(v1::SyncReply {
            server_time_unix_ms: self.now_ms(),
            bundle: (signer.bundle.sequence > had.bundle).then(|| trust_bundle(&signer)),
            deny_set: if deny.sequence > had.deny { deny.jws.clone() } else { String::new() },
            want_deny_set: had.deny > deny.sequence,
            tainted_roots: signer.tainted.clone(),
            tainted_intermediates: self.tainted_intermediates(),
            pki_addresses: self.addresses(),
            recovery: recovery.unwrap_or_default(),
            federation: federation.unless_known(had.federation),
            federation_freshness: federation.freshness,
        })
    }

    /// A host that is told of none for once renews a little later.
    pub(crate) fn tainted_intermediates(&self) -> Vec<String> {
        self.state.database.read(tainted::intermediates).unwrap_or_else(|error| {
            tracing::error!(%error, "hosts are not told which intermediates are tainted");
            Vec::new()
        })
    }

    fn is_banned(&self, certificate: Option<&[u8]>) -> bool {
        let Some(Ok(info)) = certificate.map(inspect_svid) else { return false };
        let host = self.state.database.read_latest(|view| hosts::host(view, info.id.name()));
        info.id.is_system() && host.ok().flatten().is_some_and(|host| host.state == HostState::Banned)
    }

    /// To a banned host, that is told nothing else: it is to stop being its workloads, and believes only what is signed.
    pub(crate) fn last_word(&self, certificate: Option<&[u8]>, report: &v1::SyncRequest) -> Option<v1::SyncReply> {
        if self.deny().sequence <= report.deny_sequence || !self.is_banned(certificate) {
            return None;
        }
        Some(v1::SyncReply {
            server_time_unix_ms: self.now_ms(),
            deny_set: self.deny().jws.clone(),
            ..v1::SyncReply::default()
        })
    }

    fn watch_for_clones(&self, host: &str, instance: &str, remote: &str) {
        let instance = excerpt(instance);
        if instance.is_empty() || !self.instances().report(host, &instance, self.now()) {
            return;
        }
        self.metrics.clones_seen.inc();
        self.note_clone(host, remote);
        tracing::error!(host, remote, "two machines use the key of one host; one of them is a cloned image");
        _ = self.record(&[Event {
            event: "clone",
            result: "alarm",
            host: Some(host.to_owned()),
            remote: Some(remote.to_owned()),
            detail: Some(format!("process {instance} alternates with another under one host key")),
            ..Event::default()
        }]);
    }
}

/// Roots whose key may be known to others, that somebody may still depend on. Not the one that signs: whoever replaced
/// its certificates now would get others under it.
pub(crate) fn tainted(trust: &Trust) -> Vec<String> {
    let given_up = |root: &&Root| root.tainted_at.is_some() && root.state != RootState::Active;
    trust.roots.iter().filter(given_up).map(|root| root.id.clone()).collect()
}
