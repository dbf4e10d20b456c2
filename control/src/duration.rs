//! Durations as the Gateway API writes them (GEP-2257): `1h`, `10s`, `500ms`, `1m30s`. PURE.

/// At most four parts, each a number of at most five digits with its unit, no unit twice and larger ones first.
pub fn parse_ms(text: &str) -> Option<u64> {
    let (mut rest, mut total, mut last) = (text, 0u64, u64::MAX);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        let units = after.bytes().take_while(u8::is_ascii_lowercase).count();
        let (unit, after) = after.split_at(units);
        let ms = match unit {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1_000,
            "ms" => 1,
            _ => return None,
        };
        if digits > 5 || ms >= last {
            return None;
        }
        total += number.parse::<u64>().ok()? * ms;
        (rest, last) = (after, ms);
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_of_gep_2257() {
        let table = [
            ("0s", Some(0)),
            ("10s", Some(10_000)),
            ("500ms", Some(500)),
            ("1h30m10s20ms", Some(5_410_020)),
            ("99999h", Some(359_996_400_000)),
            ("", None),
            ("10", None),
            ("1.5s", None),
            ("-1s", None),
            ("1s1m", None),
            ("1s1s", None),
            ("100000s", None),
            ("s", None),
            ("10 s", None),
            ("1µs", None),
        ];
        for (text, wanted) in table {
            assert_eq!(parse_ms(text), wanted, "{text}");
        }
    }
}
