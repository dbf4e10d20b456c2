//! What the fuzz targets share: routes and requests made of any bytes, from so few words that they often meet.

pub mod reference;

use arbitrary::{Result, Unstructured};
use sluice_model::{Backend, HeaderMatch, Match, Name, PathMatch, Route, RouteKind, Rule, StringMatch};
use sluice_traffic::route::Headers;

pub const PORT: u16 = 80;

const HOSTS: [&str; 9] = ["a", "A", "b.a", "c.b.a", "*.a", "*.b.a", "*", "", "*.B.A"];
const PATHS: [&str; 12] = ["/", "", "/x", "/x/", "/x/y", "/x//", "/xy", "x", "/x/y/z", "//", "/X", "/x%2fy"];
const METHODS: [&str; 4] = ["GET", "POST", "get", "HEAD"];
const NAMES: [&str; 3] = ["h", "i", "host"];
const VALUES: [&str; 4] = ["1", "2", "", "one"];

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
        kind: if u.ratio(1, 5)? { RouteKind::Tcp } else { RouteKind::Http },
        parent: if u.ratio(1, 8)? { Name::new("shop", "other") } else { parent() },
        parent_port: if u.ratio(1, 4)? { Some(*u.choose(&[PORT, 81])?) } else { None },
        created_s: u.int_in_range(0..=2)?,
        generation: 1,
        rules: list(u, 4, rule)?,
    })
}

fn rule(u: &mut Unstructured<'_>) -> Result<Rule> {
    let backend = |u: &mut Unstructured<'_>| Ok(Backend { service: parent(), port: PORT, weight: u.arbitrary()? });
    Ok(Rule { matches: list(u, 3, a_match)?, backends: list(u, 2, backend)? })
}

fn a_match(u: &mut Unstructured<'_>) -> Result<Match> {
    let path = word(u, &PATHS)?;
    let header = |u: &mut Unstructured<'_>| {
        Ok(HeaderMatch { name: word(u, &NAMES)?, value: StringMatch::Exact(word(u, &VALUES)?) })
    };
    Ok(Match {
        hosts: list(u, 2, |u| word(u, &HOSTS))?,
        path: if u.arbitrary()? { PathMatch::Exact(path) } else { PathMatch::Prefix(path) },
        method: if u.ratio(1, 3)? { Some(word(u, &METHODS)?) } else { None },
        headers: list(u, 2, header)?,
    })
}

/// A request as routes see it.
#[derive(Debug)]
pub struct Asked {
    pub host: String,
    pub path: String,
    pub method: String,
    pub headers: Vec<(String, String)>,
}

impl Headers for Asked {
    fn has(&self, name: &str, value: &str) -> bool {
        self.headers.iter().any(|(n, v)| n == name && v == value)
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
        method: word(u, &METHODS)?,
        headers: list(u, 3, |u| Ok((word(u, &NAMES)?, word(u, &VALUES)?)))?,
    })
}
