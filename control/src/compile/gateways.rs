//! Gateways of our class → what their pods listen for, which routes they let in, and what their statuses must say: PURE.
//!
//! A listener that asks for something Sluice does not do is not accepted as a whole and not listened for; the others of
//! its gateway are. Routes are attached by `routes`, which asks [`Gateways::attach`] of each of their parents.

use super::{
    Objects, name_of, port,
    routes::{Reference, Refused, Verdict, granted, kind_name},
    serves_gateway,
};
use crate::{
    api::validate::selects,
    controllers::controller_of,
    gateway::{self, CONTROLLER_NAME},
};
use gateway_api::{
    gatewayclasses::GatewayClass,
    gateways::{
        Gateway as Object, GatewayListeners, GatewayListenersAllowedRoutesNamespacesFrom as From,
        GatewayListenersTlsCertificateRefs as CertificateRef, GatewayListenersTlsMode as Mode,
    },
};
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use rustls::{
    crypto::ring::sign::any_supported_type,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use serde_json::{Value, json};
use sluice_model as m;
use sluice_wire::SIDECAR_ADMIN_PORT;
use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

/// What a class's status says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassStatus {
    pub name: String,
    pub generation: i64,
    pub accepted: Verdict,
}

/// What a gateway's status says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayStatus {
    pub name: m::Name,
    pub generation: i64,
    /// Some of its listeners are not accepted, and others are: a reason and a sentence.
    pub partly: Option<Refused>,
    pub accepted: Verdict,
    pub programmed: Verdict,
    pub addresses: Vec<String>,
    pub listeners: Vec<ListenerStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerStatus {
    pub name: String,
    pub kinds: Vec<&'static str>,
    pub attached: usize,
    pub accepted: Verdict,
    pub resolved: Verdict,
    pub conflicted: Option<Refused>,
    pub programmed: Verdict,
}

/// All gateways of our classes.
pub(super) struct Gateways<'a> {
    all: BTreeMap<m::Name, Gateway<'a>>,
}

struct Gateway<'a> {
    object: &'a Object,
    claim: Claim,
    accepted: Verdict,
    /// What is wrong with it, if anything, is no reason to close its listeners.
    serves: bool,
    listeners: Vec<Listener<'a>>,
}

struct Listener<'a> {
    spec: &'a GatewayListeners,
    hostname: Option<String>,
    /// Of what is accepted.
    mode: m::ListenerMode,
    /// Of routes that it takes.
    kinds: Vec<m::RouteKind>,
    accepted: Verdict,
    resolved: Verdict,
    conflicted: Option<Refused>,
    certificates: Vec<m::Certificate>,
    attached: usize,
    routes: Vec<m::Name>,
}

/// What of a route decides where it is attached.
pub(super) struct Attached<'a> {
    pub namespace: &'a str,
    pub kind: m::RouteKind,
    /// Lower case; empty: every name.
    pub hosts: &'a [String],
}

/// Whose a gateway is, by its class.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// The class is ours, and accepted.
    Ours,
    /// It is gone, or is not accepted any more: pods that serve the gateway serve on, and nothing is said of it.
    Withdrawn,
    Others,
}

fn claim(o: &Objects, class: &str) -> Claim {
    match o.gateway_classes.get(&m::Name::cluster(class)) {
        Some(c) if c.spec.controller_name != CONTROLLER_NAME => Claim::Others,
        Some(c) if class_verdict(c).is_ok() => Claim::Ours,
        _ => Claim::Withdrawn,
    }
}

fn class_verdict(class: &GatewayClass) -> Verdict {
    match &class.spec.parameters_ref {
        None => Ok(()),
        Some(p) => Err(("InvalidParameters", format!("parametersRef {} {}: no parameters are known", p.kind, p.name))),
    }
}

pub(super) fn classes(o: &Objects) -> Vec<ClassStatus> {
    let ours = o.gateway_classes.values().filter(|c| c.spec.controller_name == CONTROLLER_NAME);
    let status = |c: &GatewayClass| ClassStatus {
        name: c.metadata.name.clone().unwrap_or_default(),
        generation: c.metadata.generation.unwrap_or(0),
        accepted: class_verdict(c),
    };
    ours.map(|c| status(c)).collect()
}

impl<'a> Gateways<'a> {
    pub(super) fn new(o: &'a Objects) -> Self {
        let of_pod = |(pod, p): (&m::Name, &Arc<Pod>)| Some(m::Name::new(pod.namespace.clone(), serves_gateway(p)?));
        let with_pods: HashSet<m::Name> = o.pods.iter().filter_map(of_pod).collect();
        let one = |g: &'a Arc<Object>| {
            let name = name_of(&g.metadata)?;
            let claim = claim(o, &g.spec.gateway_class_name);
            let kept = claim == Claim::Ours || claim == Claim::Withdrawn && with_pods.contains(&name);
            kept.then(|| (name, Gateway::new(g, claim, o)))
        };
        Self { all: o.gateways.values().filter_map(one).collect() }
    }

    /// Attaches a route, whose compiled form is called `compiled`, to the listeners that the parent names and that let it
    /// in. `None`: the parent is no gateway of ours.
    pub(super) fn attach(
        &mut self,
        parent: &Reference<'_>,
        route: &Attached<'_>,
        compiled: &m::Name,
        o: &Objects,
    ) -> Option<Verdict> {
        let name = m::Name::new(parent.namespace.unwrap_or(route.namespace), parent.name);
        let gateway = self.all.get_mut(&name)?;
        Some(gateway.choose(parent, route, o).map(|chosen| {
            for at in chosen {
                gateway.listeners[at].attached += 1;
                gateway.listeners[at].routes.push(compiled.clone());
            }
        }))
    }

    /// As [`Self::attach`] would have it, attaching nothing.
    pub(super) fn takes(&self, parent: &Reference<'_>, route: &Attached<'_>, o: &Objects) -> Option<Verdict> {
        let name = m::Name::new(parent.namespace.unwrap_or(route.namespace), parent.name);
        Some(self.all.get(&name)?.choose(parent, route, o).map(drop))
    }

    /// What is wrong with all listeners that a route is attached to, if anything is.
    pub(super) fn unserved(&self, gateway: &m::Name, compiled: &m::Name) -> Option<String> {
        let g = self.all.get(gateway)?;
        let its: Vec<_> = g.listeners.iter().filter(|l| l.routes.contains(compiled)).collect();
        let names: Vec<&str> = its.iter().map(|l| l.spec.name.as_str()).collect();
        let none = !g.serves || !its.iter().any(|l| l.usable());
        none.then(|| format!("gateway {gateway} does not listen for it, see its conditions: {}", names.join(", ")))
    }

    /// For the pods that serve them.
    pub(super) fn resources(&self) -> Vec<m::Gateway> {
        let one = |(name, g): (&m::Name, &Gateway<'_>)| m::Gateway {
            name: name.clone(),
            listeners: g.listeners.iter().filter(|l| g.serves && l.usable()).map(Listener::to_model).collect(),
        };
        self.all.iter().map(one).collect()
    }

    pub(super) fn statuses(&self, o: &Objects) -> Vec<GatewayStatus> {
        let ours = self.all.iter().filter(|(_, g)| g.claim == Claim::Ours);
        ours.map(|(name, g)| g.status(name, o)).collect()
    }
}

impl<'a> Gateway<'a> {
    fn new(object: &'a Object, claim: Claim, o: &Objects) -> Self {
        let name = name_of(&object.metadata).unwrap_or_default();
        let mut listeners: Vec<Listener<'a>> =
            object.spec.listeners.iter().map(|l| Listener::new(l, &name, o)).collect();
        find_conflicts(&mut listeners);
        let refused = refusal(object);
        let serves = refused.is_ok();
        let accepted = refused.and_then(|()| gateway::wishes(object).map(drop).map_err(|text| ("Invalid", text)));
        Self { object, claim, accepted, serves, listeners }
    }

    /// The listeners that the route is attached to.
    fn choose(&self, parent: &Reference<'_>, route: &Attached<'_>, o: &Objects) -> Result<Vec<usize>, Refused> {
        let gateway = name_of(&self.object.metadata).unwrap_or_default();
        let named = |l: &Listener<'_>| {
            parent.section.is_none_or(|s| s == l.spec.name) && parent.port.is_none_or(|p| p == l.spec.port)
        };
        let all: Vec<usize> = (0..self.listeners.len()).filter(|i| named(&self.listeners[*i])).collect();
        if all.is_empty() {
            return Err((
                "NoMatchingParent",
                format!("gateway {gateway} has no listener of that sectionName and port"),
            ));
        }
        let lets_in = |l: &Listener<'_>| {
            l.kinds.contains(&route.kind) && namespaces_allow(l.spec, &gateway.namespace, route.namespace, o)
        };
        let allowed: Vec<usize> = all.into_iter().filter(|i| lets_in(&self.listeners[*i])).collect();
        if allowed.is_empty() {
            let text = format!(
                "no listener of gateway {gateway} takes a {} of namespace {} (allowedRoutes)",
                kind_name(route.kind),
                route.namespace
            );
            return Err(("NotAllowedByListeners", text));
        }
        let common = |l: &Listener<'_>| {
            let shares = |h: &String| m::common_host(l.hostname.as_deref(), Some(h)).is_some();
            route.hosts.is_empty() || route.hosts.iter().any(shares)
        };
        let chosen: Vec<usize> = allowed.into_iter().filter(|i| common(&self.listeners[*i])).collect();
        match chosen.is_empty() {
            false => Ok(chosen),
            true => Err((
                "NoMatchingListenerHostname",
                format!("no listener of gateway {gateway} has a hostname in common with {}", route.hosts.join(", ")),
            )),
        }
    }

    fn status(&self, name: &m::Name, o: &Objects) -> GatewayStatus {
        let bad: Vec<&str> = self.listeners.iter().filter(|l| !l.usable()).map(|l| l.spec.name.as_str()).collect();
        let why = (!bad.is_empty())
            .then(|| ("ListenersNotValid", format!("not listened for, see their conditions: {}", bad.join(", "))));
        let accepted = match (&self.accepted, &why) {
            (Ok(()), Some(why)) if bad.len() == self.listeners.len() => Err(why.clone()),
            (verdict, _) => verdict.clone(),
        };
        let service = m::Name::new(name.namespace.clone(), gateway::made_name(&name.name));
        let there = o.services.get(&service);
        let own = there.filter(|s| {
            controller_of(&***s).is_some_and(|owner| Some(&owner.uid) == self.object.metadata.uid.as_ref())
        });
        let addresses = own.map(|s| addresses(s, o)).unwrap_or_default();
        let programmed = match &accepted {
            Err((_, text)) => Err(("Invalid", text.clone())),
            Ok(()) if own.is_none() && there.is_some() => {
                Err(("AddressNotAssigned", format!("service {service} is not this gateway's; rename one of them")))
            }
            Ok(()) if addresses.is_empty() => {
                Err(("AddressNotAssigned", format!("service {service} has no address that clients reach it by")))
            }
            Ok(()) if !serves(&service, o) => Err(("NoResources", format!("no pod behind service {service} is ready"))),
            Ok(()) => Ok(()),
        };
        GatewayStatus {
            name: name.clone(),
            generation: self.object.metadata.generation.unwrap_or(0),
            partly: why.filter(|_| accepted.is_ok()),
            accepted,
            listeners: self.listeners.iter().map(|l| l.status(&programmed)).collect(),
            programmed,
            addresses,
        }
    }
}

/// What no listener is asked about, and what none may serve with.
fn refusal(g: &Object) -> Verdict {
    let name = g.metadata.name.as_deref().unwrap_or_default();
    if let Some(why) = gateway::unusable_name(name) {
        return Err(("Invalid", why));
    }
    if g.spec.addresses.as_ref().is_some_and(|a| !a.is_empty()) {
        return Err(("UnsupportedAddress", "spec.addresses: addresses cannot be chosen; remove them".into()));
    }
    if g.spec.infrastructure.as_ref().is_some_and(|i| i.parameters_ref.is_some()) {
        return Err(("InvalidParameters", "spec.infrastructure.parametersRef: no parameters are known".into()));
    }
    if g.spec.tls.is_some() {
        let text = "spec.tls: certificates of clients and towards backends are not asked for; remove it";
        return Err(("Invalid", text.into()));
    }
    Ok(())
}

impl<'a> Listener<'a> {
    fn new(spec: &'a GatewayListeners, gateway: &m::Name, o: &Objects) -> Self {
        let tls = spec.tls.as_ref();
        let passthrough = tls.is_some_and(|t| t.mode == Some(Mode::Passthrough));
        let refused = |reason, text: &str| Err((reason, text.to_owned()));
        let (mode, known, mut accepted): (_, &[m::RouteKind], Verdict) = match (spec.protocol.as_str(), passthrough) {
            ("HTTP", _) => (m::ListenerMode::Http, &[m::RouteKind::Http, m::RouteKind::Grpc], Ok(())),
            ("HTTPS", false) => (m::ListenerMode::Https, &[m::RouteKind::Http, m::RouteKind::Grpc], Ok(())),
            ("TLS", true) => (m::ListenerMode::Passthrough, &[m::RouteKind::Tls], Ok(())),
            ("HTTPS", true) => {
                (m::ListenerMode::Https, &[], refused("UnsupportedProtocol", "HTTPS cannot pass through; use TLS"))
            }
            ("TLS", false) => {
                let text = "protocol TLS is only passed through: set tls.mode to Passthrough, or use HTTPS";
                (m::ListenerMode::Passthrough, &[], refused("UnsupportedProtocol", text))
            }
            (other, _) => {
                let text = format!("protocol {other} is not known: HTTP, HTTPS and TLS are");
                (m::ListenerMode::Http, &[], Err(("UnsupportedProtocol", text)))
            }
        };
        if accepted.is_ok() && u16::try_from(spec.port) == Ok(SIDECAR_ADMIN_PORT) {
            let text = format!("port {SIDECAR_ADMIN_PORT} is where the gateway's own metrics are");
            accepted = Err(("PortUnavailable", text));
        }
        if accepted.is_ok()
            && let Some(option) = tls.and_then(|t| t.options.as_ref()?.keys().next())
        {
            accepted = Err(("UnsupportedValue", format!("tls.options {option} is not known; remove it")));
        }
        let (kinds, wrong_kind) = allowed_kinds(spec, known);
        let mut resolved = wrong_kind.map_or(Ok(()), Err);
        let mut certificates = vec![];
        if accepted.is_ok() && mode == m::ListenerMode::Https {
            let refs = tls.and_then(|t| t.certificate_refs.as_deref()).unwrap_or_default();
            let read = refs.iter().map(|r| certificate(r, gateway, o));
            for read in read {
                match read {
                    Ok(certificate) => certificates.push(certificate),
                    Err(why) => resolved = resolved.and(Err(why)),
                }
            }
            if refs.is_empty() {
                resolved = resolved.and(Err(("InvalidCertificateRef", "tls.certificateRefs is empty".into())));
            }
        }
        let hostname = spec.hostname.as_ref().filter(|h| !h.is_empty()).map(|h| h.to_ascii_lowercase());
        Self {
            spec,
            hostname,
            mode,
            kinds,
            accepted,
            resolved,
            conflicted: None,
            certificates,
            attached: 0,
            routes: vec![],
        }
    }

    /// It is listened for.
    fn usable(&self) -> bool {
        let certified = self.mode != m::ListenerMode::Https || !self.certificates.is_empty();
        self.accepted.is_ok() && self.conflicted.is_none() && certified && port(self.spec.port).is_some()
    }

    fn to_model(&self) -> m::Listener {
        m::Listener {
            name: self.spec.name.clone(),
            port: port(self.spec.port).unwrap_or_default(),
            mode: self.mode,
            hostname: self.hostname.clone(),
            certificates: self.certificates.clone(),
            routes: self.routes.clone(),
        }
    }

    fn status(&self, gateway: &Verdict) -> ListenerStatus {
        let invalid = self.conflicted.clone().map_or(Ok(()), Err).and(self.accepted.clone());
        let invalid = if self.usable() { Ok(()) } else { invalid.and(self.resolved.clone()) };
        let programmed = match (invalid, gateway) {
            (Err((_, text)), _) => Err(("Invalid", text)),
            (Ok(()), Err((_, text))) => Err(("Pending", text.clone())),
            (Ok(()), Ok(())) => Ok(()),
        };
        ListenerStatus {
            name: self.spec.name.clone(),
            kinds: self.kinds.iter().map(|k| kind_name(*k)).collect(),
            attached: self.attached,
            accepted: self.accepted.clone(),
            resolved: self.resolved.clone(),
            conflicted: self.conflicted.clone(),
            programmed,
        }
    }
}

/// Those of `known` that the listener takes, and what it asks for that is none of them.
fn allowed_kinds(spec: &GatewayListeners, known: &[m::RouteKind]) -> (Vec<m::RouteKind>, Option<Refused>) {
    let asked = spec.allowed_routes.as_ref().and_then(|a| a.kinds.as_deref()).filter(|k| !k.is_empty());
    let Some(asked) = asked else { return (known.to_vec(), None) };
    let (mut kinds, mut wrong) = (vec![], None);
    for k in asked {
        let ours = k.group.as_deref().unwrap_or("gateway.networking.k8s.io") == "gateway.networking.k8s.io";
        match known.iter().find(|known| ours && kind_name(**known) == k.kind) {
            Some(kind) => kinds.push(*kind),
            None => {
                let text = format!("allowedRoutes.kinds: a listener of protocol {} takes no {}", spec.protocol, k.kind);
                wrong = Some(("InvalidRouteKinds", text));
            }
        }
    }
    (kinds, wrong)
}

fn namespaces_allow(spec: &GatewayListeners, own: &str, route: &str, o: &Objects) -> bool {
    let namespaces = spec.allowed_routes.as_ref().and_then(|a| a.namespaces.as_ref());
    match namespaces.and_then(|n| n.from.as_ref()) {
        None | Some(From::Same) => own == route,
        Some(From::All) => true,
        Some(From::Selector) => {
            let selector = namespaces.and_then(|n| n.selector.as_ref()).map_or(Value::Null, |s| json!(s));
            let namespace = o.namespaces.get(&m::Name::cluster(route));
            selector.is_object() && namespace.is_some_and(|n| selects(&selector, &json!(n.metadata.labels)))
        }
    }
}

/// Listeners of one port must be told apart by what a client says first. Neither of two that cannot be is listened for,
/// so that it does not depend on their order which is.
fn find_conflicts(listeners: &mut [Listener<'_>]) {
    let conflict = |a: &Listener<'_>, b: &Listener<'_>| -> Option<Refused> {
        if a.spec.port != b.spec.port || a.accepted.is_err() || b.accepted.is_err() {
            return None;
        }
        if a.mode.is_tls() != b.mode.is_tls() {
            let text = format!("listener {} of another protocol has port {} too", b.spec.name, b.spec.port);
            return Some(("ProtocolConflict", text));
        }
        let text = || format!("listener {} has the same port and hostname", b.spec.name);
        (a.hostname == b.hostname).then(|| ("HostnameConflict", text()))
    };
    let found: Vec<Option<Refused>> = (0..listeners.len())
        .map(|i| (0..listeners.len()).filter(|j| *j != i).find_map(|j| conflict(&listeners[i], &listeners[j])))
        .collect();
    listeners.iter_mut().zip(found).for_each(|(listener, found)| listener.conflicted = found);
}

fn certificate(r: &CertificateRef, gateway: &m::Name, o: &Objects) -> Result<m::Certificate, Refused> {
    let invalid = |text: String| ("InvalidCertificateRef", text);
    let (group, kind) = (r.group.as_deref().unwrap_or_default(), r.kind.as_deref().unwrap_or("Secret"));
    if !group.is_empty() || kind != "Secret" {
        return Err(invalid(format!("certificate {}: only Secrets can be certificates, not a {kind}", r.name)));
    }
    let name = m::Name::new(r.namespace.clone().unwrap_or_else(|| gateway.namespace.clone()), r.name.clone());
    let from = ("Gateway", gateway.namespace.as_str());
    if name.namespace != gateway.namespace && !granted(o, from, "Secret", &name) {
        let text = format!(
            "secret {name} is in another namespace, and no ReferenceGrant there lets a Gateway of {} name it",
            gateway.namespace
        );
        return Err(("RefNotPermitted", text));
    }
    let Some(secret) = o.secrets.get(&name) else {
        return Err(invalid(format!("secret {name} of type {} does not exist", gateway::SECRET_TYPE)));
    };
    read_certificate(secret).map_err(|why| invalid(format!("secret {name}: {why}")))
}

/// The pair in a Secret, if a server could show it.
fn read_certificate(secret: &Secret) -> Result<m::Certificate, String> {
    let entry = |key: &str| {
        let bytes = secret.data.as_ref().and_then(|d| d.get(key)).ok_or_else(|| format!("data.{key} is missing"))?;
        String::from_utf8(bytes.0.clone()).map_err(|_| format!("data.{key} is no PEM"))
    };
    let (chain_pem, key_pem) = (entry("tls.crt")?, entry("tls.key")?);
    let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|e| format!("data.tls.crt: {e}"))?;
    if chain.is_empty() {
        return Err("data.tls.crt has no certificate".into());
    }
    // What is wrong with a key is said without showing any of it.
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| "data.tls.key is no private key in PEM")?;
    let key = any_supported_type(&key).map_err(|_| "data.tls.key is of a kind that is not known")?;
    match CertifiedKey::new(chain, key).keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
        Err(rustls::Error::InconsistentKeys(_)) => return Err("data.tls.key does not belong to data.tls.crt".into()),
        Err(e) => return Err(format!("data.tls.crt: {e}")),
    }
    Ok(m::Certificate { chain_pem, key_pem: m::Secret(key_pem) })
}

/// By which clients reach a gateway's service.
fn addresses(service: &Service, o: &Objects) -> Vec<String> {
    match service.spec.as_ref().and_then(|s| s.type_.as_deref()) {
        Some("NodePort") => {
            let all = o.nodes.values().filter(|n| super::ready(n)).filter_map(|n| n.status.as_ref());
            let all = all.flat_map(|s| s.addresses.iter().flatten()).filter(|a| a.type_ == "InternalIP");
            // As the API bounds them.
            all.map(|a| a.address.clone()).take(16).collect()
        }
        Some("ClusterIP") => service.spec.iter().filter_map(|s| s.cluster_ip.clone()).collect(),
        _ => {
            let shown = service.status.as_ref().and_then(|s| s.load_balancer.as_ref()?.ingress.as_ref());
            shown.into_iter().flatten().filter_map(|i| i.ip.clone().or_else(|| i.hostname.clone())).collect()
        }
    }
}

/// Some pod is ready behind it.
fn serves(service: &m::Name, o: &Objects) -> bool {
    let from = m::Name::new(service.namespace.clone(), "");
    let slices = o.slices.range(from..).take_while(|(n, _)| n.namespace == service.namespace);
    let own = slices.filter(|(_, s)| super::endpoints::serves(s, &service.name));
    let mut ready = own.flat_map(|(_, s)| &s.endpoints).map(|e| e.conditions.as_ref().and_then(|c| c.ready));
    ready.any(|ready| ready.unwrap_or(true))
}
