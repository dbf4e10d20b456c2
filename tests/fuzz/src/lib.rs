//! What the fuzz targets share: routes and requests made of any bytes, from so few words that they often meet.

pub mod reference;

use arbitrary::{Result, Unstructured};
use sluice_model::{Backend, HeaderMatch, Match, Name, PathMatch, QueryMatch, Route, RouteKind, Rule, StringMatch};
use sluice_traffic::route::Headers;

pub const PORT: u16 = 80;

const HOSTS: [&str; 9] = ["a", "A", "b.a", "c.b.a", "*.a", "*.b.a", "*", "", "*.B.A"];
const PATHS: [&str; 12] = ["/", "", "/x", "/x/", "/x/y", "/x//", "/xy", "x", "/x/y/z", "//", "/X", "/x%2fy"];
const METHODS: [&str; 4] = ["GET", "POST", "get", "HEAD"];
const NAMES: [&str; 3] = ["h", "i", "host"];
const VALUES: [&str; 4] = ["1", "2", "", "one"];
/// Expressions; the reference matches them by the same library, so only their place is in question.
const PATTERNS: [&str; 5] = ["1|2", ".*", "/x(/.*)?", "one", "/[a-z]+"];
const QUERIES: [&str; 6] = ["", "h=1", "h=2&i=1", "i=1&i=2", "h", "h=%31"];

/// Whose routes are looked at.
pub fn parent() -> Name {
    Name::new("shop", "web")
}

fn word(u: &mut Unstructured<'_>, words: &[&str]) -> Result<String> {
    // Mostly one of those; sometimes anything.
    if u.ratio(1, 16)? { u.arbitrary() } else { Ok((*u.choose(words)?).to_owned()) }
}

fn list<T>(
    u: &mut Unstructured<'_>,
    most: usize,
    mut one: impl FnMut(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    (0..u.int_in_range(0..=most)?).map(|_| one(u)).collect()
}

/// Up to four routes, each with a name of its own.
pub fn routes(u: &mut Unstructured<'_>) -> Result<Vec<Route>> {
    let mut routes = list(u, 4, route)?;
    for (i, route) in routes.iter_mut().enumerate() {
        // Names are unique in a snapshot; they need not come in order.
        route.name = Name::new("shop", format!("{}{i}", ["r", "q"][i % 2]));
    }
    Ok(routes)
}

fn route(u: &mut Unstructured<'_>) -> Result<Route> {
    Ok(Route {
        name: parent(),
        kind: *u.choose(&[RouteKind::Http, RouteKind::Http, RouteKind::Grpc, RouteKind::Tcp, RouteKind::Tls])?,
        parent: if u.ratio(1, 8)? { Name::new("shop", "other") } else { parent() },
        parent_port: if u.ratio(1, 4)? { Some(*u.choose(&[PORT, 81])?) } else { None },
        created_s: u.int_in_range(0..=2)?,
        generation: 1,
        rules: list(u, 4, rule)?,
    })
}

fn rule(u: &mut Unstructured<'_>) -> Result<Rule> {
    let backend = |u: &mut Unstructured<'_>| {
        Ok(Backend { service: parent(), port: PORT, weight: u.arbitrary()?, ..Backend::default() })
    };
    Ok(Rule { matches: list(u, 3, a_match)?, backends: list(u, 2, backend)?, ..Rule::default() })
}

fn a_match(u: &mut Unstructured<'_>) -> Result<Match> {
    let path = word(u, &PATHS)?;
    let pattern = |u: &mut Unstructured<'_>| Ok(u.choose(&PATTERNS)?.parse().expect("a pattern"));
    let value = |u: &mut Unstructured<'_>| {
        Ok(if u.ratio(1, 4)? { StringMatch::Regex(pattern(u)?) } else { StringMatch::Exact(word(u, &VALUES)?) })
    };
    let header = |u: &mut Unstructured<'_>| Ok(HeaderMatch { name: word(u, &NAMES)?, value: value(u)? });
    let query = |u: &mut Unstructured<'_>| Ok(QueryMatch { name: word(u, &NAMES)?, value: value(u)? });
    Ok(Match {
        hosts: list(u, 2, |u| word(u, &HOSTS))?,
        path: match u.int_in_range(0..=4)? {
            0 => PathMatch::Regex(pattern(u)?),
            1 | 2 => PathMatch::Exact(path),
            _ => PathMatch::Prefix(path),
        },
        method: if u.ratio(1, 3)? { Some(word(u, &METHODS)?) } else { None },
        headers: list(u, 2, header)?,
        query: list(u, 1, query)?,
    })
}

/// A request as routes see it.
#[derive(Debug)]
pub struct Asked {
    pub host: String,
    pub path: String,
    pub query: String,
    pub method: String,
    pub headers: Vec<(String, String)>,
}

impl Headers for Asked {
    fn any(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.headers.iter().any(|(n, v)| n == name && test(v.as_bytes()))
    }
}

/// Fails when the bytes are used up.
pub fn request(u: &mut Unstructured<'_>) -> Result<Asked> {
    if u.is_empty() {
        return Err(arbitrary::Error::NotEnoughData);
    }
    Ok(Asked {
        host: word(u, &HOSTS)?,
        path: word(u, &PATHS)?,
        query: word(u, &QUERIES)?,
        method: word(u, &METHODS)?,
        headers: list(u, 3, |u| Ok((word(u, &NAMES)?, word(u, &VALUES)?)))?,
    })
}
