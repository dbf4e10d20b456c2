//! Who may call what, and which limits count for a call.

use crate::route::path_matches;
use sluice_model::{AccessRule, Action, Caller, Identity, InboundLimit, Name, Operation};

/// A request or connection that arrived for the app.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Proven by mTLS.
    pub caller: Option<&'a Identity>,
    /// The app's port.
    pub port: u16,
    /// Method and path (without query) of a request; absent for a connection that is not HTTP.
    pub request: Option<(&'a str, &'a str)>,
}

/// What the rules say of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The policy that denied it; an empty name: no policy allows it.
    pub denied: Option<Name>,
    /// Policies in audit mode that would have denied it.
    pub would_deny: Option<Name>,
}

impl Call<'_> {
    fn is_of(&self, from: &[Caller], to: &[Operation]) -> bool {
        (from.is_empty() || from.iter().any(|c| c.is(self.caller)))
            && (to.is_empty() || to.iter().any(|o| self.does(o)))
    }

    fn does(&self, o: &Operation) -> bool {
        let method = |wanted: &[String]| self.request.is_some_and(|(m, _)| wanted.iter().any(|w| w == m));
        let path = || self.request.is_some_and(|(_, p)| o.paths.iter().any(|w| path_matches(w, p)));
        (o.ports.is_empty() || o.ports.contains(&self.port))
            && (o.methods.is_empty() || method(&o.methods))
            && (o.paths.is_empty() || path())
    }
}

/// A path as an app may read it that takes the liberties of RFC 3986 §6.2.2 and more: letters that are written as codes
/// decoded, `\\` as `/`, empty and dot segments gone, parameters of segments (`;…`) cut off. `None` when it reads like `path`.
pub fn normalized(path: &str) -> Option<String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_~/".contains(&b);
    let dotted = path.contains("/.");
    if path.bytes().all(|b| plain(b) || (b == b'.' && !dotted)) && !path.contains("//") {
        return None;
    }
    let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy().replace('\\', "/");
    let mut segments: Vec<&str> = Vec::new();
    for segment in decoded.split('/') {
        match segment.split(';').next().unwrap_or_default() {
            "" | "." => {}
            ".." => drop(segments.pop()),
            name => segments.push(name),
        }
    }
    let end = if decoded.ends_with('/') && !segments.is_empty() { "/" } else { "" };
    let read = format!("/{}{end}", segments.join("/"));
    (read != path).then_some(read)
}

/// Deny beats allow. With any allowing rule, what none of them allows is denied; rules in audit mode only say so.
/// A path that an app could read in another way must be allowed in both, and be denied in neither.
pub fn decide(rules: &[AccessRule], call: &Call<'_>) -> Verdict {
    let of = |call: &Call<'_>| Verdict { denied: denied(rules, call, false), would_deny: denied(rules, call, true) };
    let verdict = of(call);
    let Some((method, Some(path))) = call.request.map(|(method, path)| (method, normalized(path))) else {
        return verdict;
    };
    let other = of(&Call { request: Some((method, &path)), ..*call });
    Verdict { denied: verdict.denied.or(other.denied), would_deny: verdict.would_deny.or(other.would_deny) }
}

fn denied(rules: &[AccessRule], call: &Call<'_>, audit: bool) -> Option<Name> {
    let rules = || rules.iter().filter(|r| r.audit == audit);
    let holds = |r: &&AccessRule| call.is_of(&r.from, &r.to);
    if let Some(deny) = rules().filter(|r| r.action == Action::Deny).find(holds) {
        return Some(deny.policy.clone());
    }
    let mut allowing = rules().filter(|r| r.action == Action::Allow).peekable();
    let first = allowing.peek()?.policy.clone();
    match allowing.any(|r| holds(&r)) {
        true => None,
        // In audit mode the policy that would have denied is worth naming; in force, that none allows is.
        false => Some(if audit { first } else { Name::default() }),
    }
}

/// The limits that count for `call`, also by what an app may read its path as.
pub fn limits<'a>(all: &'a [InboundLimit], call: &Call<'_>) -> impl Iterator<Item = (usize, &'a InboundLimit)> {
    // Where there is none, which is usual, nothing is read.
    let other = call.request.filter(|_| !all.is_empty()).and_then(|(method, path)| Some((method, normalized(path)?)));
    let is_of = move |l: &InboundLimit| {
        let read = other.as_ref().map(|(method, path)| Call { request: Some((method, path)), ..*call });
        call.is_of(&l.from, &l.to) || read.is_some_and(|call| call.is_of(&l.from, &l.to))
    };
    all.iter().enumerate().filter(move |(_, l)| is_of(l))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::PathMatch;

    fn id(namespace: &str, account: &str) -> Identity {
        format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse().expect("an identity")
    }

    fn rule(policy: &str, action: Action, from: Vec<Caller>, to: Vec<Operation>) -> AccessRule {
        AccessRule { policy: Name::new("shop", policy), action, audit: false, from, to }
    }

    fn gets(path: &str) -> Operation {
        Operation { methods: vec!["GET".into()], paths: vec![PathMatch::Prefix(path.into())], ..Operation::default() }
    }

    #[test]
    fn a_limit_counts_however_the_path_is_written() {
        let limit = InboundLimit {
            policy: Name::new("shop", "slow"),
            from: vec![],
            to: vec![gets("/login")],
            limit: sluice_model::RateLimit { requests: 1, per_ms: 1, burst: 1 },
            per_identity: false,
        };
        let counts = |path: &str| {
            let call = Call { caller: None, port: 80, request: Some(("GET", path)) };
            limits(std::slice::from_ref(&limit), &call).count()
        };
        for (path, count) in
            [("/login", 1), ("/%6Cogin", 1), ("//login", 1), ("/x/../login/y", 1), ("/loginx", 0), ("/x%2Flogin", 0)]
        {
            assert_eq!(counts(path), count, "{path}");
        }
    }

    #[test]
    fn deny_beats_allow_and_nobody_else_is_allowed() {
        let web = Caller { identity: Some(id("shop", "web")), namespace: None };
        let team = Caller { identity: None, namespace: Some("shop".into()) };
        let rules = [
            rule("team", Action::Allow, vec![team], vec![gets("/a")]),
            rule("web", Action::Allow, vec![web.clone()], vec![]),
            rule("no-admin", Action::Deny, vec![], vec![gets("/a/admin")]),
            rule("no-db", Action::Deny, vec![web], vec![Operation { ports: vec![5432], ..Operation::default() }]),
        ];
        let table = [
            (Some(id("shop", "web")), 80, Some(("POST", "/x")), None),
            (Some(id("shop", "web")), 80, Some(("GET", "/a/admin/x")), Some("no-admin")),
            (Some(id("shop", "web")), 80, Some(("POST", "/a/admin")), None),
            (Some(id("shop", "web")), 5432, None, Some("no-db")),
            (Some(id("shop", "other")), 80, Some(("GET", "/a")), None),
            (Some(id("shop", "other")), 80, Some(("GET", "/ab")), Some("")),
            (Some(id("shop", "other")), 80, None, Some("")),
            (Some(id("else", "web")), 80, Some(("GET", "/a")), Some("")),
            (None, 80, Some(("GET", "/a")), Some("")),
        ];
        for (caller, port, request, wanted) in table {
            let verdict = decide(&rules, &Call { caller: caller.as_ref(), port, request });
            assert_eq!(verdict.denied.map(|n| n.name), wanted.map(str::to_owned), "{caller:?} {port} {request:?}");
        }
    }

    #[test]
    fn no_spelling_of_a_path_gets_around_a_rule() {
        let rules = [rule("no-admin", Action::Deny, vec![], vec![gets("/admin")])];
        for path in [
            "/admin",
            "/admin/x",
            "//admin",
            "/./admin",
            "/x/../admin",
            "/%61dmin",
            "/x/%2e%2e/admin",
            "/admin;v=1",
            "/x%2f..%2fadmin",
            "\\admin",
            "/x/..\\admin",
            "/admin%2fx",
            "/admin/",
        ] {
            let call = Call { caller: None, port: 80, request: Some(("GET", path)) };
            assert!(decide(&rules, &call).denied.is_some(), "{path}");
        }
        let allowed = [rule("public", Action::Allow, vec![], vec![gets("/public")])];
        for (path, denied) in [("/public/a.b", false), ("/public/../admin", true), ("/public/%2e%2e/admin", true)] {
            let call = Call { caller: None, port: 80, request: Some(("GET", path)) };
            assert_eq!(decide(&allowed, &call).denied.is_some(), denied, "{path}");
        }
        for path in ["/", "/a/b-c_d~e", "/a.b/c", "/a/"] {
            assert_eq!(
                normalized(path).filter(|p| p.trim_end_matches('/') != path.trim_end_matches('/')),
                None,
                "{path}"
            );
        }
    }

    #[test]
    fn without_rules_everybody_may_and_audit_denies_nobody() {
        let call = Call { caller: None, port: 80, request: Some(("GET", "/")) };
        assert_eq!(decide(&[], &call), Verdict::default());
        let audit = |r: AccessRule| AccessRule { audit: true, ..r };
        let nobody = || vec![Caller { identity: Some(id("shop", "web")), namespace: None }];
        let rules = [audit(rule("trial", Action::Allow, nobody(), vec![]))];
        let verdict = decide(&rules, &call);
        assert_eq!(verdict, Verdict { denied: None, would_deny: Some(Name::new("shop", "trial")) });
        let rules = [rules[0].clone(), rule("real", Action::Deny, nobody(), vec![])];
        assert_eq!(decide(&rules, &call).denied, None, "a rule on trial allows nobody and denies nobody");
    }
}
