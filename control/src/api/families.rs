//! Which address families a service has, in Kubernetes' words: `ipFamilyPolicy`, `ipFamilies` and the addresses of
//! `clusterIPs` go together. What nobody says is filled in, what cannot be is refused, and of what there is only the
//! second family comes and goes.
//!
//! PURE. The addresses themselves are in `addresses`.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::services::NO_ADDRESS;
use super::status::Invalid;
use super::value::{fields, list, text};
use crate::range::{Family, Ranges};

const NONE: &str = "None";
const SINGLE: &str = "SingleStack";
const PREFER: &str = "PreferDualStack";
const REQUIRE: &str = "RequireDualStack";
const FIXED: &str = "may not change once set";

fn external(service: &Value) -> bool {
    text(service, "spec.type") == "ExternalName"
}

fn headless(service: &Value) -> bool {
    text(service, "spec.clusterIP") == NONE
}

/// Leads to endpoints that others write, which may be of any family.
fn selects_nothing(service: &Value) -> bool {
    service["spec"]["selector"].as_object().is_none_or(serde_json::Map::is_empty)
}

fn texts<'v>(service: &'v Value, path: &str) -> Vec<&'v str> {
    list(service, path).iter().map(|value| value.as_str().unwrap_or_default()).collect()
}

/// `clusterIPs`; of a service that has none, its `clusterIP`.
pub fn addresses(service: &Value) -> Vec<&str> {
    let all = texts(service, "spec.clusterIPs");
    let one = Some(text(service, "spec.clusterIP")).filter(|address| !address.is_empty());
    if all.is_empty() { one.into_iter().collect() } else { all }
}

/// Those of `ipFamilies` that are families.
pub fn families(service: &Value) -> Vec<Family> {
    texts(service, "spec.ipFamilies").into_iter().filter_map(Family::named).collect()
}

/// On an update: what a client does not say stays. A client that knows `clusterIP` alone means both by it.
pub fn carry_over(new: &mut Value, old: &Value) {
    if external(new) || external(old) {
        return;
    }
    let spec = fields(&mut new["spec"]);
    let before = &old["spec"];
    let absent =
        |value: Option<&Value>| value.is_none_or(|v| v.is_null() || v.as_array().map_or(v == "", Vec::is_empty));
    if absent(spec.get("clusterIP")) && !absent(before.get("clusterIP")) {
        spec.insert("clusterIP".to_owned(), before["clusterIP"].clone());
    }
    let same = spec.get("clusterIP") == before.get("clusterIP");
    if same && absent(spec.get("clusterIPs")) && !absent(before.get("clusterIPs")) {
        spec.insert("clusterIPs".to_owned(), before["clusterIPs"].clone());
    } else if !same && spec.get("clusterIPs") == before.get("clusterIPs") {
        let one = json!([spec.get("clusterIP")]);
        spec.insert("clusterIPs".to_owned(), one);
    }
    for field in ["ipFamilyPolicy", "ipFamilies"] {
        if absent(spec.get(field)) && !absent(before.get(field)) {
            spec.insert(field.to_owned(), before[field].clone());
        }
    }
    // Who goes back to one family means the first, and need not take the second out by hand.
    if spec.get("ipFamilyPolicy").is_some_and(|policy| policy == SINGLE) && before["ipFamilyPolicy"] != SINGLE {
        for field in ["clusterIPs", "ipFamilies"] {
            let kept = spec.get(field) == before.get(field);
            if let Some(all) = spec.get_mut(field).and_then(Value::as_array_mut).filter(|_| kept) {
                all.truncate(1);
            }
        }
    }
}

/// Checks that need no range.
pub fn validate(new: &Value, old: Option<&Value>) -> Vec<Invalid> {
    if external(new) {
        return vec![];
    }
    let mut errors = well_formed(new);
    if errors.is_empty()
        && let Some(old) = old.filter(|old| !external(old))
    {
        errors.extend(fixed_addresses(new, old));
        errors.extend(fixed_families(new, old));
    }
    errors
}

fn well_formed(new: &Value) -> Vec<Invalid> {
    let mut errors = vec![];
    let all = list(new, "spec.clusterIPs");
    let first = text(new, "spec.clusterIP");
    let refused = |errors: &mut Vec<Invalid>, why: &str| {
        errors.push(Invalid::value("spec.clusterIPs", &json!(all), why));
    };
    if !all.is_empty() && first.is_empty() {
        refused(&mut errors, "must be empty when `clusterIP` is not specified");
    } else if !all.is_empty() && all[0] != first {
        refused(&mut errors, "first value must match `clusterIP`");
    }
    let named = texts(new, "spec.ipFamilies");
    for (index, family) in named.iter().enumerate() {
        let path = format!("spec.ipFamilies[{index}]");
        if Family::named(family).is_none() {
            errors.push(Invalid::unsupported(path, family, &Family::ALL.map(Family::name)));
        } else if named[..index].contains(family) {
            errors.push(Invalid { field: path, message: format!("Duplicate value: \"{family}\"") });
        }
    }
    let policy = text(new, "spec.ipFamilyPolicy");
    if !matches!(policy, "" | SINGLE | PREFER | REQUIRE) {
        errors.push(Invalid::unsupported("spec.ipFamilyPolicy", policy, &[PREFER, REQUIRE, SINGLE]));
    }
    let addresses = addresses(new);
    if addresses.first() == Some(&NONE) {
        if addresses.len() > 1 {
            refused(&mut errors, "'None' must be the first and only value");
        }
        return errors;
    }
    let parsed: Vec<Option<IpAddr>> = addresses.iter().map(|address| address.parse().ok()).collect();
    for (index, _) in parsed.iter().enumerate().filter(|(_, ip)| ip.is_none()) {
        errors.push(Invalid::value(format!("spec.clusterIPs[{index}]"), &json!(addresses[index]), NO_ADDRESS));
    }
    if parsed.len() > 2 {
        refused(&mut errors, "may only hold up to 2 values");
    } else if let [Some(a), Some(b)] = parsed[..]
        && Family::of(a) == Family::of(b)
    {
        refused(&mut errors, "may specify no more than one IP for each IP family");
    }
    for (index, (ip, family)) in parsed.iter().zip(families(new)).enumerate() {
        if ip.is_some_and(|ip| Family::of(ip) != family) {
            let name = family.name();
            let why = format!("expected an {name} value as indicated by `ipFamilies[{index}]`");
            errors.push(Invalid::value(format!("spec.clusterIPs[{index}]"), &json!(addresses[index]), &why));
        }
    }
    errors
}

fn fixed_addresses(new: &Value, old: &Value) -> Vec<Invalid> {
    match headless(new) && headless(old) {
        true => vec![],
        false => fixed(&addresses(new), &addresses(old), ("spec.clusterIPs", "clusterIP"), new),
    }
}

/// Endpoints of headless services follow their families.
fn fixed_families(new: &Value, old: &Value) -> Vec<Invalid> {
    let path = "spec.ipFamilies";
    match headless(new) || headless(old) {
        true => vec![],
        false => fixed(&texts(new, path), &texts(old, path), (path, "ipFamily"), new),
    }
}

/// What is first stays, what is second stays or goes; it goes with the policy.
fn fixed(is: &[&str], was: &[&str], (path, one): (&str, &str), new: &Value) -> Vec<Invalid> {
    let changed = |(index, _): (usize, _)| Invalid::value(format!("{path}[{index}]"), &json!(is), FIXED);
    let pairs = is.iter().zip(was).enumerate().filter(|(_, (is, was))| is != was);
    let mut errors: Vec<Invalid> = pairs.map(changed).collect();
    let policy = text(new, "spec.ipFamilyPolicy");
    if is.is_empty() && !was.is_empty() {
        let why = format!("primary {one} can not be unset");
        errors.push(Invalid::value(format!("{path}[0]"), &json!(is), &why));
    } else if is.len() < was.len() && policy != SINGLE {
        let why = format!("must be set to 'SingleStack' when releasing the secondary {one}");
        errors.push(Invalid::value("spec.ipFamilyPolicy", &json!(policy), &why));
    }
    errors
}

/// Fills in policy and families, by the ranges that the cluster has for services.
pub fn settle(new: &mut Value, old: Option<&Value>, ranges: &Ranges) -> Vec<Invalid> {
    let same = |old: &&Value| {
        ["ipFamilyPolicy", "ipFamilies", "clusterIPs"].iter().all(|f| old["spec"][*f] == new["spec"][*f])
    };
    // What the cluster could give now was not asked for by whoever changes something else.
    if external(new) || (text(new, "spec.ipFamilyPolicy") == PREFER && old.is_some_and(|old| same(&old))) {
        return vec![];
    }
    if list(new, "spec.clusterIPs").is_empty() && !text(new, "spec.clusterIP").is_empty() {
        new["spec"]["clusterIPs"] = json!([new["spec"]["clusterIP"]]);
    }
    let anywhere = headless(new) && selects_nothing(new);
    if text(new, "spec.ipFamilyPolicy").is_empty() {
        new["spec"]["ipFamilyPolicy"] = json!(if anywhere { REQUIRE } else { SINGLE });
    }
    let policy = text(new, "spec.ipFamilyPolicy").to_owned();
    let (mut errors, mut families) = (vec![], families(new));
    for (path, many) in [("clusterIPs", "clusterIPs"), ("ipFamilies", "IP families")] {
        if policy == SINGLE && list(&new["spec"], path).len() > 1 {
            let why = format!("must be RequireDualStack or PreferDualStack when multiple {many} are specified");
            errors.push(Invalid::value("spec.ipFamilyPolicy", &json!(policy), &why));
        }
    }
    let parsed = addresses(new).into_iter().map_while(|address| address.parse::<IpAddr>().ok()).map(Family::of);
    let parsed: Vec<Family> = parsed.collect();
    for (index, family) in parsed.iter().enumerate().skip(families.len()) {
        if ranges.of(*family).is_none() {
            let why = format!("{} is not configured on this cluster", family.name());
            errors.push(Invalid::value(format!("spec.clusterIPs[{index}]"), &new["spec"]["clusterIPs"], &why));
        }
        families.push(*family);
    }
    if !anywhere {
        errors.extend(not_here(&policy, &families[..families.len().min(list(new, "spec.ipFamilies").len())], ranges));
    }
    if !errors.is_empty() {
        return errors;
    }
    if families.is_empty() {
        families.push(ranges.primary().family());
    }
    if policy != SINGLE && families.len() == 1 && (anywhere || ranges.dual()) {
        families.push(families[0].other());
    }
    new["spec"]["ipFamilies"] = json!(families.iter().map(|family| family.name()).collect::<Vec<_>>());
    vec![]
}

/// What this cluster has no addresses for.
fn not_here(policy: &str, named: &[Family], ranges: &Ranges) -> Vec<Invalid> {
    let mut errors = vec![];
    if policy == REQUIRE && !ranges.dual() {
        let why = "this cluster is not configured for dual-stack services";
        errors.push(Invalid::value("spec.ipFamilyPolicy", &json!(policy), why));
    }
    for (index, family) in named.iter().enumerate().filter(|(_, family)| ranges.of(**family).is_none()) {
        let value = json!(family.name());
        errors.push(Invalid::value(format!("spec.ipFamilies[{index}]"), &value, "not configured on this cluster"));
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUAL: &str = "10.96.0.0/16,fd00:96::/112";
    const V4: &str = "10.96.0.0/16";

    fn service(change: Value) -> Value {
        let mut spec = json!({"type": "ClusterIP", "selector": {"a": "b"}});
        spec.as_object_mut().expect("fields").extend(change.as_object().expect("fields").clone());
        json!({"spec": spec})
    }

    fn told(errors: Vec<Invalid>) -> Vec<String> {
        errors.into_iter().map(|e| format!("{}: {}", e.field, e.message)).collect()
    }

    fn settled(ranges: &str, spec: Value) -> Result<(String, Vec<String>), Vec<String>> {
        let mut new = service(spec);
        let errors = settle(&mut new, None, &ranges.parse().expect("ranges"));
        let named = texts(&new, "spec.ipFamilies").into_iter().map(str::to_owned).collect();
        if errors.is_empty() { Ok((text(&new, "spec.ipFamilyPolicy").to_owned(), named)) } else { Err(told(errors)) }
    }

    #[test]
    fn families_that_services_get() {
        let (v4, v6, both, turned): (&[&str], &[&str], &[&str], &[&str]) =
            (&["IPv4"], &["IPv6"], &["IPv4", "IPv6"], &["IPv6", "IPv4"]);
        let policy = |policy: &str| json!({"ipFamilyPolicy": policy});
        let headless = |change: Value| {
            let mut spec = json!({"clusterIP": NONE});
            spec.as_object_mut().expect("fields").extend(change.as_object().expect("fields").clone());
            spec
        };
        let v6_first = "fd00:96::/112,10.96.0.0/16";
        for (ranges, spec, want, families) in [
            (DUAL, json!({}), SINGLE, v4),
            (V4, json!({}), SINGLE, v4),
            (v6_first, json!({}), SINGLE, v6),
            ("fd00:96::/112", json!({}), SINGLE, v6),
            (DUAL, policy(PREFER), PREFER, both),
            (DUAL, policy(REQUIRE), REQUIRE, both),
            (v6_first, policy(REQUIRE), REQUIRE, turned),
            (V4, policy(PREFER), PREFER, v4),
            (DUAL, json!({"ipFamilies": ["IPv6"]}), SINGLE, v6),
            (DUAL, json!({"ipFamilies": ["IPv6"], "ipFamilyPolicy": PREFER}), PREFER, turned),
            (DUAL, json!({"ipFamilies": ["IPv6", "IPv4"], "ipFamilyPolicy": REQUIRE}), REQUIRE, turned),
            (DUAL, json!({"clusterIP": "fd00:96::5"}), SINGLE, v6),
            (DUAL, json!({"clusterIP": "fd00:96::5", "ipFamilyPolicy": PREFER}), PREFER, turned),
            (DUAL, headless(json!({})), SINGLE, v4),
            (DUAL, headless(policy(PREFER)), PREFER, both),
            (DUAL, headless(json!({"selector": {}})), REQUIRE, both),
            (V4, headless(json!({"selector": null})), REQUIRE, both),
            (V4, headless(json!({"selector": null, "ipFamilyPolicy": SINGLE})), SINGLE, v4),
        ] {
            let want = Ok((want.to_owned(), families.iter().map(|f| (*f).to_owned()).collect()));
            assert_eq!(settled(ranges, spec.clone()), want, "{spec} of {ranges}");
        }
    }

    #[test]
    fn families_that_a_cluster_cannot_give() {
        for (ranges, spec, want) in [
            (
                V4,
                json!({"ipFamilyPolicy": REQUIRE}),
                "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack \
                 services",
            ),
            (
                V4,
                json!({"ipFamilies": ["IPv6"]}),
                "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster",
            ),
            (
                V4,
                json!({"clusterIP": "fd00:96::5"}),
                "spec.clusterIPs[0]: Invalid value: [\"fd00:96::5\"]: IPv6 is not configured on this cluster",
            ),
            (
                DUAL,
                json!({"ipFamilies": ["IPv4", "IPv6"]}),
                "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be RequireDualStack or PreferDualStack when \
                 multiple IP families are specified",
            ),
            (
                DUAL,
                json!({"clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "fd00:96::5"]}),
                "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be RequireDualStack or PreferDualStack when \
                 multiple clusterIPs are specified",
            ),
        ] {
            assert_eq!(settled(ranges, spec.clone()), Err(vec![want.to_owned()]), "{spec}");
        }
    }

    #[test]
    fn fields_that_do_not_go_together() {
        for (spec, want) in [
            (json!({"clusterIPs": ["10.96.0.5"]}), "spec.clusterIPs"),
            (json!({"clusterIP": "10.96.0.6", "clusterIPs": ["10.96.0.5"]}), "spec.clusterIPs"),
            (json!({"clusterIP": NONE, "clusterIPs": [NONE, "10.96.0.5"]}), "spec.clusterIPs"),
            (json!({"clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "10.96.0.6"]}), "spec.clusterIPs"),
            (json!({"clusterIP": "web"}), "spec.clusterIPs[0]"),
            (json!({"clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", NONE]}), "spec.clusterIPs[1]"),
            (json!({"clusterIP": "fd00::5", "ipFamilies": ["IPv4"]}), "spec.clusterIPs[0]"),
            (json!({"ipFamilies": ["IPv5"]}), "spec.ipFamilies[0]"),
            (json!({"ipFamilies": ["IPv4", "IPv4"]}), "spec.ipFamilies[1]"),
            (json!({"ipFamilyPolicy": "Both"}), "spec.ipFamilyPolicy"),
        ] {
            let fields: Vec<String> = validate(&service(spec.clone()), None).into_iter().map(|e| e.field).collect();
            assert_eq!(fields, [want], "{spec}");
        }
    }

    fn dual(policy: &str) -> Value {
        service(json!({"ipFamilyPolicy": policy, "ipFamilies": ["IPv4", "IPv6"], "clusterIP": "10.96.0.5",
            "clusterIPs": ["10.96.0.5", "fd00:96::5"]}))
    }

    fn single() -> Value {
        service(json!({"ipFamilyPolicy": SINGLE, "ipFamilies": ["IPv4"], "clusterIP": "10.96.0.5",
            "clusterIPs": ["10.96.0.5"]}))
    }

    /// An update with these fields, and what came of it.
    fn updated(old: &Value, change: Value) -> Result<Value, Vec<String>> {
        let mut new = old.clone();
        new["spec"].as_object_mut().expect("fields").extend(change.as_object().expect("fields").clone());
        carry_over(&mut new, old);
        let mut errors = validate(&new, Some(old));
        if errors.is_empty() {
            errors = settle(&mut new, Some(old), &DUAL.parse().expect("ranges"));
        }
        if errors.is_empty() { Ok(new["spec"].clone()) } else { Err(told(errors)) }
    }

    #[test]
    fn the_second_family_comes_and_goes_and_the_first_stays() {
        for policy in [PREFER, REQUIRE] {
            let up = updated(&single(), json!({"ipFamilyPolicy": policy})).expect("a second one");
            assert_eq!(up["ipFamilies"], json!(["IPv4", "IPv6"]));
            assert_eq!(up["clusterIPs"], json!(["10.96.0.5"]), "its address is given afterwards");
            let down = updated(&dual(policy), json!({"ipFamilyPolicy": SINGLE})).expect("back to one");
            assert_eq!((&down["ipFamilies"], &down["clusterIPs"]), (&json!(["IPv4"]), &json!(["10.96.0.5"])));
        }
        let same =
            updated(&dual(PREFER), json!({"clusterIPs": [], "clusterIP": "", "ipFamilies": null})).expect("kept");
        assert_eq!(same, dual(PREFER)["spec"]);
        // A cluster of one family has become one of two: nobody asked for a second address of this service.
        let mut old = single();
        old["spec"]["ipFamilyPolicy"] = json!(PREFER);
        assert_eq!(updated(&old, json!({})).expect("kept")["ipFamilies"], json!(["IPv4"]));
        for (old, change, want) in [
            (single(), json!({"clusterIP": "10.96.0.6"}), "spec.clusterIPs[0]"),
            (single(), json!({"clusterIP": NONE}), "spec.clusterIPs[0]"),
            (single(), json!({"ipFamilies": ["IPv6"]}), "spec.clusterIPs[0]"),
            (dual(REQUIRE), json!({"clusterIPs": ["10.96.0.5", "fd00:96::6"]}), "spec.clusterIPs[1]"),
            (dual(PREFER), json!({"clusterIPs": ["10.96.0.5"]}), "spec.ipFamilyPolicy"),
            (dual(PREFER), json!({"ipFamilies": ["IPv4"]}), "spec.ipFamilyPolicy"),
        ] {
            let errors = updated(&old, change.clone()).expect_err("refused");
            assert!(errors[0].starts_with(want), "{change}: {errors:?}");
        }
        let headless = service(json!({"clusterIP": NONE, "clusterIPs": [NONE], "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": SINGLE}));
        let turned = updated(&headless, json!({"ipFamilies": ["IPv6"]})).expect("headless services follow their pods");
        assert_eq!(turned["ipFamilies"], json!(["IPv6"]));
    }
}
