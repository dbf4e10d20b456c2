//! The discovery protocol `sluice.discovery.v1`: generated messages, their conversions to and from `model`, and the
//! names, numbers and texts that two programs must agree on.
//!
//! It opens no socket; see `proto/` for what each message means and `handover` for the one exchange that is not gRPC.

pub mod check;
pub mod convert;
pub mod flows;
pub mod handover;
pub mod join;
pub mod sidecar;
pub mod traffic;

/// Generated from `proto/sluice/discovery/v1/discovery.proto`.
#[allow(clippy::all, clippy::unwrap_used, unreachable_pub, missing_docs)]
pub mod v1 {
    tonic::include_proto!("sluice.discovery.v1");
}

pub use convert::Malformed;

/// Upper bounds of the latency histogram in microseconds; a last bucket takes the rest.
pub const LATENCY_BUCKETS_US: [u64; 14] = [
    250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 10_000_000,
];

/// Abstract unix socket (without the leading NUL) on which the agent serves discovery and certificates inside each
/// meshed pod's network namespace.
pub const DISCOVERY_SOCKET: &str = "sluice";

/// TCP port of the sidecar's own HTTP server: `/ready`, `/metrics`. Never captured.
pub const SIDECAR_ADMIN_PORT: u16 = 15020;
/// Where the sidecar's listeners are bound, on loopback; connections reach them by sk_lookup, not by this port.
pub const SIDECAR_OUTBOUND_PORT: u16 = 15001;
pub const SIDECAR_INBOUND_PORT: u16 = 15006;

/// ALPN between sidecars: multiplexed requests, HTTP/1.1 restored at the other side.
pub const ALPN_H2: &[u8] = b"sluice-h2";
/// ALPN between sidecars: opaque bytes.
pub const ALPN_TCP: &[u8] = b"sluice-tcp";

/// Feature of subscribers that know gateways; the others are sent none.
pub const FEATURE_GATEWAY: &str = "gateway";

/// Most resources in one chunk of an [`v1::Update`].
pub const CHUNK_RESOURCES: usize = 512;
/// Bytes after which a chunk takes no further resource; one resource alone may be larger.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Largest chunk that a subscriber takes: many times the largest resource that the API stores.
pub const MAX_UPDATE: usize = 64 << 20;

/// Resources as chunks of an [`v1::Update`] carry them.
pub fn chunks(resources: impl IntoIterator<Item = v1::Resource>) -> Vec<Vec<v1::Resource>> {
    let (mut all, mut bytes): (Vec<Vec<v1::Resource>>, _) = (Vec::new(), 0);
    for resource in resources {
        let size = prost::Message::encoded_len(&resource);
        match all.last_mut().filter(|last| last.len() < CHUNK_RESOURCES && bytes + size <= CHUNK_BYTES) {
            Some(last) => {
                bytes += size;
                last.push(resource);
            }
            None => {
                bytes = size;
                all.push(vec![resource]);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(bytes: usize) -> v1::Resource {
        let service = v1::Service {
            name: Some(v1::Name { name: "x".repeat(bytes), ..v1::Name::default() }),
            ..v1::Service::default()
        };
        v1::Resource { version: 1, kind: Some(v1::resource::Kind::Service(service)) }
    }

    #[test]
    fn chunks_are_bounded_by_number_and_by_size() {
        let lengths = |sizes: &[usize]| -> Vec<usize> {
            chunks(sizes.iter().map(|n| resource(*n))).iter().map(Vec::len).collect()
        };
        assert!(lengths(&[]).is_empty());
        assert_eq!(lengths(&[10; CHUNK_RESOURCES + 1]), [CHUNK_RESOURCES, 1]);
        assert_eq!(lengths(&[400_000, 400_000, 400_000, 10]), [2, 2]);
        assert_eq!(lengths(&[10, 3_000_000, 10]), [1, 1, 1], "one that is larger goes alone");
    }
}
