//! A regular expression that takes a whole text: parsed once, where it enters, so that nothing behind has to deal with a
//! wrong one. Its size is bounded, and matching takes time linear in the text (crate `regex`), so neither a route nor a
//! request can stall a worker.

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use std::{cmp::Ordering, fmt, hash, str::FromStr};

/// Bytes a compiled expression may take.
const SIZE_LIMIT: usize = 256 * 1024;
/// Longest text of an expression (Gateway API's bound for values).
const MAX_LEN: usize = 4096;

/// Compared, ordered and stored by its text.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    text: String,
    whole: Regex,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("regular expression {text:?}: {cause}")]
pub struct PatternError {
    text: String,
    cause: String,
}

impl Pattern {
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn matches(&self, text: &str) -> bool {
        self.whole.is_match(text)
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let wrong = |cause: String| PatternError { text: text.chars().take(200).collect(), cause };
        if text.len() > MAX_LEN {
            return Err(wrong(format!("longer than {MAX_LEN} bytes")));
        }
        // Alone first: `a)(b` would become right inside the group.
        let alone = RegexBuilder::new(text).size_limit(SIZE_LIMIT).build();
        let whole = alone.and_then(|_| RegexBuilder::new(&format!("^(?:{text})$")).size_limit(SIZE_LIMIT).build());
        let whole = whole.map_err(|e| wrong(e.to_string().lines().last().unwrap_or_default().to_owned()))?;
        Ok(Self { text: text.to_owned(), whole })
    }
}

impl TryFrom<String> for Pattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, PatternError> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.text
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl PartialOrd for Pattern {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Pattern {
    fn cmp(&self, other: &Self) -> Ordering {
        self.text.cmp(&other.text)
    }
}

impl hash::Hash for Pattern {
    fn hash<H: hash::Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_takes_the_whole_text_or_nothing() {
        let table = [
            ("/v[0-9]+/x", "/v12/x", true),
            ("/v[0-9]+", "/v12/x", false),
            ("a|b", "b", true),
            ("a|b", "ab", false),
            ("(?i)abc", "ABC", true),
            ("", "", true),
        ];
        for (pattern, text, wanted) in table {
            assert_eq!(pattern.parse::<Pattern>().expect(pattern).matches(text), wanted, "{pattern} on {text}");
        }
    }

    #[test]
    fn what_is_no_expression_or_too_large_is_refused() {
        for wrong in ["(", "a)(b", "[z-a]", "(?P<>x)", &"x".repeat(5000), "(\\w{100}){100}"] {
            assert!(wrong.parse::<Pattern>().is_err(), "{wrong}");
        }
    }
}
