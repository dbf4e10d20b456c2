//! Kubernetes quantities (`100m`, `1.5Gi`, `2e3`) as exact integers, as far as scheduling and validation need them.
//!
//! PURE. It keeps nobody's text: objects hold the text as the user wrote it.

/// A quantity in thousandths, rounded up; `None` if the text is none. Saturates at the ends of `i128`.
pub fn parse_milli(text: &str) -> Option<i128> {
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '+' || c == '-')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let (digits, negative) = match number.as_bytes().first()? {
        b'-' => (&number[1..], true),
        b'+' => (&number[1..], false),
        _ => (number, false),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let valid = |part: &str| part.len() <= 27 && part.bytes().all(|b| b.is_ascii_digit());
    if !valid(whole) || !valid(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let (multiply, divide) = scale(suffix)?;
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let divisor = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?.checked_mul(divide)?;
    let product = mantissa.saturating_mul(multiply).saturating_mul(1_000);
    let value = product / divisor + i128::from(product % divisor != 0);
    Some(if negative { -value } else { value })
}

/// Whole units, rounded up (bytes, pods).
pub fn parse_units(text: &str) -> Option<i64> {
    let milli = parse_milli(text)?;
    i64::try_from(milli.div_euclid(1_000) + i128::from(milli.rem_euclid(1_000) != 0)).ok()
}

/// The suffix as (multiplier, divisor).
fn scale(suffix: &str) -> Option<(i128, i128)> {
    let exponent = |text: &str| -> Option<(i128, i128)> {
        let power: i32 = text.parse().ok()?;
        let factor = 10_i128.checked_pow(power.unsigned_abs()).filter(|_| power.abs() <= 18)?;
        Some(if power >= 0 { (factor, 1) } else { (1, factor) })
    };
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        other => return other.strip_prefix(['e', 'E']).and_then(exponent),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_exact() {
        let cases = [
            ("1", Some(1_000)),
            ("100m", Some(100)),
            ("0.5", Some(500)),
            ("1.5Gi", Some(1_610_612_736_000)),
            ("2e3", Some(2_000_000)),
            ("1E", Some(1_000_000_000_000_000_000_000)),
            ("-1", Some(-1_000)),
            ("1u", Some(1)),
            (".5", Some(500)),
            ("", None),
            ("x", None),
            ("1Q", None),
            ("1.2.3", None),
            ("--1", None),
        ];
        for (text, want) in cases {
            assert_eq!(parse_milli(text), want, "{text}");
        }
        assert_eq!(parse_units("64Mi"), Some(64 << 20));
        assert_eq!(parse_units("1500m"), Some(2));
    }
}
