//! SPIFFE identities: `spiffe://<trust-domain>/ns/<namespace>/sa/<service account>`.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Who a workload is. The text form is the URI SAN of its certificate (SPIFFE-ID §2, X.509-SVID §2).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identity {
    pub trust_domain: String,
    pub namespace: String,
    pub service_account: String,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("identity {0:?} is not spiffe://<trust-domain>/ns/<namespace>/sa/<account>")]
pub struct IdentityError(pub String);

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(s: &str) -> Result<Self, IdentityError> {
        let bad = || IdentityError(s.to_owned());
        let rest = s.strip_prefix("spiffe://").ok_or_else(bad)?;
        match rest.split('/').collect::<Vec<_>>()[..] {
            [td, "ns", ns, "sa", sa] if ![td, ns, sa].contains(&"") => {
                Ok(Self { trust_domain: td.to_owned(), namespace: ns.to_owned(), service_account: sa.to_owned() })
            }
            _ => Err(bad()),
        }
    }
}

impl TryFrom<String> for Identity {
    type Error = IdentityError;

    fn try_from(s: String) -> Result<Self, IdentityError> {
        s.parse()
    }
}

impl From<Identity> for String {
    fn from(i: Identity) -> String {
        i.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_parse_as_they_print() {
        let s = "spiffe://cluster.local/ns/shop/sa/web";
        assert_eq!(s.parse::<Identity>().expect(s).to_string(), s);
        for s in ["", "spiffe://x", "spiffe://x/ns//sa/y", "http://x/ns/a/sa/b", "spiffe://x/ns/a/sa/b/c"] {
            assert!(s.parse::<Identity>().is_err(), "{s}");
        }
    }
}
