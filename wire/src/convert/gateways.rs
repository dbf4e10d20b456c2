//! Gateways and their listeners.

use super::{Malformed, invalid, name, port};
use crate::v1;
use sluice_model as m;

impl std::fmt::Debug for v1::Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate").field("chain_pem", &self.chain_pem).finish_non_exhaustive()
    }
}

impl From<&m::Gateway> for v1::Gateway {
    fn from(g: &m::Gateway) -> Self {
        Self { name: Some((&g.name).into()), listeners: g.listeners.iter().map(Into::into).collect() }
    }
}

impl TryFrom<v1::Gateway> for m::Gateway {
    type Error = Malformed;

    fn try_from(g: v1::Gateway) -> Result<Self, Malformed> {
        let listeners = g.listeners.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        Ok(Self { name: name(g.name)?, listeners })
    }
}

impl From<&m::Listener> for v1::Listener {
    fn from(l: &m::Listener) -> Self {
        Self {
            name: l.name.clone(),
            port: l.port.into(),
            mode: match l.mode {
                m::ListenerMode::Http => v1::ListenerMode::ListenerHttp,
                m::ListenerMode::Https => v1::ListenerMode::ListenerHttps,
                m::ListenerMode::Passthrough => v1::ListenerMode::ListenerPassthrough,
            }
            .into(),
            hostname: l.hostname.clone().unwrap_or_default(),
            certificates: l
                .certificates
                .iter()
                .map(|c| v1::Certificate { chain_pem: c.chain_pem.clone(), key_pem: c.key_pem.0.clone() })
                .collect(),
            routes: l.routes.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Listener> for m::Listener {
    type Error = Malformed;

    fn try_from(l: v1::Listener) -> Result<Self, Malformed> {
        Ok(Self {
            name: l.name,
            port: port("listener port", l.port)?,
            mode: match v1::ListenerMode::try_from(l.mode) {
                Ok(v1::ListenerMode::ListenerHttp) => m::ListenerMode::Http,
                Ok(v1::ListenerMode::ListenerHttps) => m::ListenerMode::Https,
                Ok(v1::ListenerMode::ListenerPassthrough) => m::ListenerMode::Passthrough,
                Err(_) => return Err(invalid("listener mode", l.mode)),
            },
            hostname: Some(l.hostname).filter(|h| !h.is_empty()),
            certificates: l
                .certificates
                .into_iter()
                .map(|c| m::Certificate { chain_pem: c.chain_pem, key_pem: m::Secret(c.key_pem) })
                .collect(),
            routes: l.routes.into_iter().map(|n| name(Some(n))).collect::<Result<_, _>>()?,
        })
    }
}
