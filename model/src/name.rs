//! Names and revisions: how one object is told from another, and one state from the next.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// `namespace/name` of a namespaced object; cluster-wide objects (nodes) have an empty namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name {
    pub namespace: String,
    pub name: String,
}

impl Name {
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// A name in no namespace, as nodes have.
    pub fn cluster(name: impl Into<String>) -> Self {
        Self::new("", name)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("name {0:?} is neither `name` nor `namespace/name`")]
pub struct NameError(pub String);

impl FromStr for Name {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        let (namespace, name) = s.split_once('/').unwrap_or(("", s));
        if name.is_empty() {
            return Err(NameError(s.to_owned()));
        }
        Ok(Self::new(namespace, name))
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}

impl From<Name> for String {
    fn from(n: Name) -> String {
        n.to_string()
    }
}

/// The store's revision that a state was computed from. Only grows within one epoch of the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_as_they_print() {
        // What control compiles may have a name with further parts, as a GRPCRoute's has.
        for s in ["web", "shop/web", "shop/web/grpc", "shop/web/grpc/1"] {
            assert_eq!(s.parse::<Name>().expect(s).to_string(), s);
        }
        assert_eq!("shop/web/grpc".parse(), Ok(Name::new("shop", "web/grpc")));
        for s in ["", "shop/"] {
            assert!(s.parse::<Name>().is_err(), "{s}");
        }
    }
}
