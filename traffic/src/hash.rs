//! The one hash by which requests are told apart: stable over programs, versions and machines, so that all sidecars agree
//! on where a key belongs. Not for anything that an attacker must not predict.

/// FNV-1a over the bytes, then SplitMix64's finish, which spreads what FNV leaves in the low bits.
pub fn hash(bytes: &[u8], salt: u64) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325 ^ salt;
    for b in bytes {
        h = (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
    }
    mix(h)
}

pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_changes() {
        // Sidecars of two versions serve the same users: another value here would move them all.
        assert_eq!(hash(b"", 0), 0xf52a_15e9_a9b5_e89b);
        assert_eq!(hash(b"user-1", 0), hash(b"user-1", 0));
        assert_ne!(hash(b"user-1", 0), hash(b"user-1", 1));
    }

    #[test]
    fn keys_that_look_alike_are_spread() {
        let mut counts = [0u32; 16];
        for i in 0..16_000 {
            counts[(hash(format!("user-{i}").as_bytes(), 7) >> 60) as usize] += 1;
        }
        assert!(counts.iter().all(|c| (900..1100).contains(c)), "{counts:?}");
    }
}
