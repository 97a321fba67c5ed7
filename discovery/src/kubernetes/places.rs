//! WHERE a Service runs, by its slices. A pod answers as its service account, in the way Istio's own rule says; anything
//! else as the slice's annotations say. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::objects::{Notes, Slice, SliceEndpoint, State};
use super::read::{Known, Problems, Reader, about, refused};
use crate::documents::{DEFAULT_MESH_PORT, DEFAULT_WEIGHT, is_plain_word};
use crate::yaml::printable;
use crate::{Change, Health, Place, PortTarget, Record, Refused, Registration, Transport};

/// What one slice says.
struct Said<'a> {
    slice: &'a Slice,
    /// And whether it takes new connections.
    places: Vec<(Place, State)>,
    problems: Problems,
}

/// Of a pod that several endpoints name, the one that counts.
type Chosen<'a> = HashMap<&'a Arc<str>, &'a SliceEndpoint>;

impl Reader {
    /// A record for each slice.
    pub(super) fn places(&self, known: &Known<'_>, plaintext: bool) -> Vec<Change> {
        let chosen = known.chosen();
        let serves_something = known.slices.iter().any(|slice| !known.served(slice).is_empty());
        let said = known.slices.iter().filter_map(|slice| match known.served(slice) {
            _ if slice.is_of_names => known.is_named.then(|| Said::of_names(slice)),
            served if !served.is_empty() => Some(self.say(slice, known, &served, &chosen, plaintext)),
            // Of ports that the mesh does not carry.
            _ if serves_something || slice.endpoints.is_empty() => None,
            _ => Some(Said::of_other_ports(slice, known)),
        });
        let mut said: Vec<Said<'_>> = said.collect();
        drain(&mut said);
        said.into_iter().flat_map(Said::changes).collect()
    }

    fn say<'a>(
        &self,
        slice: &'a Slice,
        known: &Known<'_>,
        served: &[PortTarget],
        chosen: &Chosen<'_>,
        plaintext: bool,
    ) -> Said<'a> {
        let mut said = Said { slice, places: Vec::new(), problems: Problems::new() };
        // Slices of pods are written by the cluster itself.
        let notes = match known.is_of_pods(slice) {
            true => Some(SliceNotes::none()),
            false => SliceNotes::read(slice, self.is_dead(slice), &mut said.problems),
        };
        let Some(notes) = notes else { return said };
        let mut seen = HashSet::new();
        for endpoint in &slice.endpoints {
            let is_other = |(pod, _): &(Arc<str>, _)| chosen.get(pod).is_some_and(|it| !std::ptr::eq(*it, endpoint));
            if endpoint.pod.as_ref().is_some_and(is_other) {
                continue;
            }
            let Some(registration) = known.registration(endpoint, &notes, served) else { continue };
            if registration.transport == Transport::Plaintext && !plaintext {
                continue;
            }
            match registration.place(&self.trust_domain) {
                Ok(place) if !seen.insert((place.address, place.transport, place.identity.clone())) => {}
                Ok(place) => said.places.push((place, endpoint.state)),
                Err(wrong) => said.problems.extend(wrong),
            }
        }
        said
    }
}

/// New connections go to a place that ends only where there is no other for the same ports.
fn drain(said: &mut [Said<'_>]) {
    let takes_new = |(place, state): &&(Place, State)| *state == State::Ready && place.health == Health::Healthy;
    let ready = said.iter().flat_map(|said| &said.places).filter(takes_new);
    let ports: BTreeSet<u16> = ready.flat_map(|(place, _)| &place.ports).map(|served| served.port).collect();
    for (place, state) in said.iter_mut().flat_map(|said| &mut said.places) {
        if *state == State::Draining && place.ports.iter().all(|served| ports.contains(&served.port)) {
            place.weight = 0;
        }
    }
}

impl<'a> Said<'a> {
    fn wrong(slice: &'a Slice, problem: String) -> Said<'a> {
        Said { slice, places: Vec::new(), problems: vec![problem] }
    }

    fn of_names(slice: &'a Slice) -> Said<'a> {
        Self::wrong(slice, "its endpoints are names; only addresses can be used".to_owned())
    }

    /// As between a change of a Service's ports and that of its slices.
    fn of_other_ports(slice: &'a Slice, known: &Known<'_>) -> Said<'a> {
        let list = |names: Vec<&String>| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let theirs = list(slice.ports.iter().map(|(name, _)| name).collect());
        let ours = list(known.service.ports.iter().map(|port| &port.name).collect());
        Self::wrong(
            slice,
            format!("none of its ports ({theirs}) is one of the Service ({ours}); give them the same names"),
        )
    }

    fn key(&self) -> Arc<str> {
        format!("slice/{}", self.slice.key).into()
    }

    /// What is wrong with all of it leaves it as it was; one endpoint that is wrong, the others as they are.
    fn changes(self) -> Vec<Change> {
        let (key, origin) = (self.key(), format!("EndpointSlice {}", self.slice.key));
        if self.places.is_empty() && !self.problems.is_empty() {
            return vec![refused(key, &origin, self.problems)];
        }
        let problems = (!self.problems.is_empty()).then(|| Refused {
            key: format!("{key}/endpoints").into(),
            problems: self
                .problems
                .iter()
                .map(|problem| format!("{origin}: {problem} (the others are used)"))
                .collect(),
        });
        let record = Record {
            key,
            origin: origin.into(),
            service: self.slice.service.clone(),
            definition: None,
            places: self.places.into_iter().map(|(place, _)| Arc::new(place)).collect(),
        };
        [Change::Set(record)].into_iter().chain(problems.map(Change::Refused)).collect()
    }
}

impl Known<'_> {
    /// Without a selector, whoever wrote the slices says what is there.
    fn has_pods(&self) -> bool {
        !self.service.selector.is_empty()
    }

    /// Beside them, others may have slices of their own.
    fn is_of_pods(&self, slice: &Slice) -> bool {
        self.has_pods() && slice.endpoints.iter().any(|endpoint| endpoint.pod.is_some())
    }

    fn served(&self, slice: &Slice) -> Vec<PortTarget> {
        let target = |name: &str| slice.ports.iter().find(|(served, _)| served == name).map(|(_, target)| *target);
        let ports = self.service.ports.iter();
        // Without a number it serves the Service's own.
        ports
            .filter_map(|port| Some(PortTarget { port: port.port, target: target(&port.name)?.unwrap_or(port.port) }))
            .collect()
    }

    /// A pod is one place, also where it has an address of either family, or is in two slices while it moves: in the
    /// Service's own family, and where it is readiest.
    fn chosen(&self) -> Chosen<'_> {
        let rank = |endpoint: &SliceEndpoint| {
            let is_of_family = endpoint.address.is_some_and(|address| self.service.is_of_family(address));
            (is_of_family, std::cmp::Reverse(endpoint.state))
        };
        let mut chosen = Chosen::new();
        for endpoint in self.slices.iter().flat_map(|slice| &slice.endpoints).filter(|it| self.pod(it).is_some()) {
            let Some((pod, _)) = &endpoint.pod else { continue };
            let best = chosen.entry(pod).or_insert(endpoint);
            if rank(endpoint) > rank(best) {
                *best = endpoint;
            }
        }
        chosen
    }

    /// What an endpoint amounts to. A pod that is not known yet, or no longer, is none.
    fn registration(
        &self,
        endpoint: &SliceEndpoint,
        notes: &SliceNotes,
        served: &[PortTarget],
    ) -> Option<Registration> {
        let of_pod = endpoint.pod.is_some() && self.has_pods();
        let pod = if of_pod { Some(self.pod(endpoint)?) } else { None };
        let (transport, identity) = match pod {
            Some(pod) => {
                let identity = format!("ns/{}/sa/{}", self.service.name.namespace(), pod.account);
                (if pod.takes_hbone { Transport::Hbone } else { Transport::Plaintext }, Some(identity))
            }
            None => (notes.transport, notes.identity.clone()),
        };
        Some(Registration {
            address: endpoint.address?,
            mesh_port: notes.mesh_port,
            ports: served.to_vec(),
            identity,
            transport,
            network: notes.network.clone(),
            zone: if is_plain_word(&endpoint.zone) { endpoint.zone.to_string() } else { String::new() },
            weight: notes.weight,
            health: if endpoint.state == State::Away || notes.is_dead { Health::Unhealthy } else { Health::Healthy },
            epoch: notes.epoch,
            version: String::new(),
        })
    }
}

impl super::objects::Service {
    fn is_of_family(&self, address: IpAddr) -> bool {
        self.is_of_ipv6.is_none_or(|is_of_ipv6| is_of_ipv6 == address.is_ipv6())
    }
}

/// What annotations of a slice say of its endpoints that are no pods.
struct SliceNotes {
    transport: Transport,
    identity: Option<String>,
    mesh_port: u16,
    weight: u32,
    network: String,
    epoch: u64,
    /// The host that wrote it is.
    is_dead: bool,
}

impl SliceNotes {
    fn none() -> SliceNotes {
        SliceNotes {
            // Nothing else says that a mesh is there.
            transport: Transport::Plaintext,
            identity: None,
            mesh_port: DEFAULT_MESH_PORT,
            weight: DEFAULT_WEIGHT,
            network: String::new(),
            epoch: 0,
            is_dead: false,
        }
    }

    /// `None` where some mean nothing.
    fn read(slice: &Slice, is_dead: bool, problems: &mut Problems) -> Option<SliceNotes> {
        let (notes, none) = (&slice.notes, Self::none());
        let transport = notes.get("transport").map(|text| {
            let known = Transport::NAMES.iter().find(|(name, _)| name == text);
            known.map(|(_, transport)| *transport).ok_or("write meshd, hbone or plaintext")
        });
        let read = SliceNotes {
            transport: taken("transport", transport, problems).unwrap_or(none.transport),
            identity: notes.get("identity").cloned(),
            mesh_port: number(notes, "mesh-port", problems).unwrap_or(none.mesh_port),
            weight: number(notes, "weight", problems).unwrap_or(none.weight),
            network: notes.get("network").cloned().unwrap_or_default(),
            epoch: number(notes, "epoch", problems).unwrap_or(none.epoch),
            is_dead,
        };
        problems.is_empty().then_some(read)
    }
}

fn number<T: std::str::FromStr>(notes: &Notes, key: &str, problems: &mut Problems) -> Option<T> {
    let read = notes.get(key).map(|text| text.parse().map_err(|_| format!("`{}` is no such number", printable(text))));
    taken(key, read, problems)
}

fn taken<T, E: AsRef<str>>(key: &str, read: Option<Result<T, E>>, problems: &mut Problems) -> Option<T> {
    match read? {
        Ok(value) => Some(value),
        Err(reason) => {
            problems.push(about(key, reason.as_ref()));
            None
        }
    }
}

#[cfg(test)]
#[path = "places_tests.rs"]
mod tests;
