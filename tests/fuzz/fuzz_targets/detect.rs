//! Detection over any bytes in any pieces: no panic, and a verdict that has been given stays.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_traffic::detect::{Detected, MAX_BYTES, at_end, begun, detect};

fuzz_target!(|input: &[u8]| {
    // The first byte says in how many pieces the rest comes, as a caller reads it: never more than the bound.
    let Some((pieces, bytes)) = input.split_first() else { return };
    let bytes = &bytes[..bytes.len().min(MAX_BYTES)];
    let step = bytes.len() / (usize::from(*pieces) % 32 + 1) + 1;
    let whole = detect(bytes);
    let mut end = 0;
    while end < bytes.len() {
        end = (end + step).min(bytes.len());
        let part = &bytes[..end];
        let found = detect(part);
        assert!(found == Detected::NeedMore || found == whole, "{found:?} after {end} bytes, then {whole:?}");
        let given_up = at_end(part);
        assert!(matches!(given_up, Detected::Http1 | Detected::Opaque));
        // What is worth a longer wait is not what was judged opaque, and what ends as HTTP began like it.
        assert!(found != Detected::NeedMore || given_up != Detected::Http1 || begun(part));
    }
    assert!(bytes.len() < MAX_BYTES || whole != Detected::NeedMore, "waits beyond the bound");
});
