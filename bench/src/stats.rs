//! PURE: what repeated measurements say.

/// Of several values the middle one; of none 0.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// The median between the order statistics that hold it 95 times of 100; of no values all are NaN.
pub fn interval(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let (n, last) = (sorted.len() as f64, sorted.len().saturating_sub(1));
    let reach = 0.98 * n.sqrt();
    let at = |x: f64| sorted.get((x.max(0.0) as usize).min(last)).copied().unwrap_or(f64::NAN);
    (at((n - 1.0) / 2.0 - reach), at((n - 1.0) / 2.0), at((n - 1.0) / 2.0 + reach + 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_what_holds_it() {
        assert_eq!((median(&[]), median(&[3.0, 1.0, 2.0])), (0.0, 2.0));
        assert_eq!(interval((1..=25).map(f64::from)), (8.0, 13.0, 18.0));
        assert_eq!(interval([5.0].into_iter()), (5.0, 5.0, 5.0));
        assert!(interval(std::iter::empty()).1.is_nan());
    }
}
