//! Trace context: which trace a request belongs to, and what the next hop is told. W3C Trace Context in and out; B3 (one
//! header or several) is understood where there is no W3C context. PURE.

use http::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// Where a request stands in its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub trace: u128,
    /// The caller's span; 0: none, a trace begins here.
    pub parent: u64,
    /// This hop's own.
    pub span: u64,
    pub sampled: bool,
}

impl Context {
    /// Goes on from what the request says, or begins a trace that is sampled if `random` is below `threshold`. `fresh` has
    /// the numbers for what begins here.
    pub fn of(headers: &HeaderMap, fresh: [u64; 3], random: u64, threshold: u64) -> Self {
        let [high, low, span] = fresh.map(|n| n.max(1));
        let found = w3c(headers).or_else(|| b3(headers)).or_else(|| b3_many(headers));
        match found {
            // B3 may leave the decision open.
            Some((trace, parent, sampled)) => {
                Self { trace, parent, span, sampled: sampled.unwrap_or(random < threshold) }
            }
            None => {
                let trace = (u128::from(high) << 64) | u128::from(low);
                Self { trace, parent: 0, span, sampled: random < threshold }
            }
        }
    }

    /// What the next hop is told: that this one's span is its parent.
    pub fn propagate(&self, headers: &mut HeaderMap) {
        let text = format!("00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.sampled));
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(TRACEPARENT, value);
        }
        // Said twice, it could be said differently.
        for old in [B3, B3_TRACE, B3_SPAN, B3_SAMPLED, B3_FLAGS] {
            headers.remove(old);
        }
    }
}

type Found = (u128, u64, Option<bool>);

/// `version-trace-parent-flags` (W3C Trace Context §3.2). Later versions may have more behind it.
fn w3c(headers: &HeaderMap) -> Option<Found> {
    let text = headers.get(TRACEPARENT)?.to_str().ok()?;
    let mut parts = text.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let right = version.len() == 2 && version != "ff" && trace.len() == 32 && parent.len() == 16 && flags.len() == 2;
    if !right || (version == "00" && parts.next().is_some()) || text.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    u8::from_str_radix(version, 16).ok()?;
    let flags = u8::from_str_radix(flags, 16).ok()?;
    let (trace, parent) = (u128::from_str_radix(trace, 16).ok()?, u64::from_str_radix(parent, 16).ok()?);
    (trace != 0 && parent != 0).then_some((trace, parent, Some(flags & 1 == 1)))
}

/// `trace-span-sampling-parent` or less of it.
fn b3(headers: &HeaderMap) -> Option<Found> {
    let mut parts = headers.get(B3)?.to_str().ok()?.split('-');
    ids(parts.next()?, parts.next()?, sampling(parts.next()))
}

fn b3_many(headers: &HeaderMap) -> Option<Found> {
    let text = |name: &HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
    let sampled = if text(&B3_FLAGS) == Some("1") { Some(true) } else { sampling(text(&B3_SAMPLED)) };
    ids(text(&B3_TRACE)?, text(&B3_SPAN)?, sampled)
}

fn sampling(text: Option<&str>) -> Option<bool> {
    match text? {
        "1" | "d" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

fn ids(trace: &str, span: &str, sampled: Option<bool>) -> Option<Found> {
    if !matches!(trace.len(), 16 | 32) || span.len() != 16 {
        return None;
    }
    let (trace, span) = (u128::from_str_radix(trace, 16).ok()?, u64::from_str_radix(span, 16).ok()?);
    (trace != 0 && span != 0).then_some((trace, span, sampled))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn of(headers: &[(&'static str, String)]) -> Context {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().expect("a value"));
        }
        Context::of(&map, [1, 2, 3], 10, 5)
    }

    #[test]
    fn contexts_are_continued() {
        let wanted = |sampled| Context {
            trace: 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c,
            parent: 0xb7ad_6b71_6920_3331,
            span: 3,
            sampled,
        };
        assert_eq!(of(&[("traceparent", format!("00-{TRACE}-{SPAN}-01"))]), wanted(true));
        assert_eq!(of(&[("traceparent", format!("00-{TRACE}-{SPAN}-00"))]), wanted(false));
        assert_eq!(of(&[("traceparent", format!("cc-{TRACE}-{SPAN}-01-what-comes"))]), wanted(true));
        assert_eq!(of(&[("b3", format!("{TRACE}-{SPAN}-1"))]), wanted(true));
        assert_eq!(of(&[("b3", format!("{TRACE}-{SPAN}"))]), wanted(false), "left open, and not drawn");
        let many = |more: (&'static str, &str)| {
            of(&[("x-b3-traceid", TRACE.into()), ("x-b3-spanid", SPAN.into()), (more.0, more.1.into())])
        };
        assert_eq!(many(("x-b3-sampled", "1")), wanted(true));
        assert_eq!(many(("x-b3-flags", "1")), wanted(true));
    }

    #[test]
    fn what_is_malformed_begins_anew() {
        let fresh = Context { trace: (1 << 64) | 2, parent: 0, span: 3, sampled: false };
        for bad in [
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{TRACE}-{SPAN}"),
            "00".into(),
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-zz".into(),
        ] {
            assert_eq!(of(&[("traceparent", bad.clone())]), fresh, "{bad}");
        }
    }

    #[test]
    fn the_next_hop_sees_this_one_as_its_parent() {
        let mut headers = HeaderMap::new();
        headers.insert("b3", "0".parse().expect("a value"));
        of(&[("traceparent", format!("00-{TRACE}-{SPAN}-01"))]).propagate(&mut headers);
        assert_eq!(headers["traceparent"], format!("00-{TRACE}-0000000000000003-01").as_str());
        assert_eq!(headers.len(), 1);
    }
}
