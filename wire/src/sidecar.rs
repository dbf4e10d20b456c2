//! What operators ask a sidecar through its node: the path at the node's server, and the question as its query. PURE.

/// Path at the agents' servers.
pub const PATH: &str = "/sidecar";

/// What may be asked: paths of the sidecar's admin server.
pub const SUBJECTS: [&str; 6] = ["tap", "config", "compiled", "pools", "certificates", "metrics"];

/// A pod's sidecar, what is asked of it, and the query that goes on to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub namespace: String,
    pub pod: String,
    /// One of [`SUBJECTS`].
    pub subject: String,
    /// Encoded pairs.
    pub query: String,
}

impl Question {
    /// From `pod=<namespace>/<name>&subject=<subject>&…`, the slash as it is or encoded.
    pub fn parse(query: &str) -> Result<Self, String> {
        let (mut pod, mut subject, mut rest) = (None, None, Vec::new());
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            match pair.split_once('=') {
                Some(("pod", value)) => pod = Some(value.replace("%2F", "/").replace("%2f", "/")),
                Some(("subject", value)) => subject = Some(value.to_owned()),
                _ => rest.push(pair),
            }
        }
        let subject = subject.ok_or("subject is missing")?;
        if !SUBJECTS.contains(&subject.as_str()) {
            return Err(format!("subject {subject:?} is none of {}", SUBJECTS.join(", ")));
        }
        let pod = pod.ok_or("pod is missing")?;
        let named = |n: &&str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
        let parts = pod.split_once('/').filter(|(namespace, name)| named(namespace) && named(name));
        let (namespace, name) = parts.ok_or_else(|| format!("pod {pod:?} is not namespace/name"))?;
        Ok(Self { namespace: namespace.to_owned(), pod: name.to_owned(), subject, query: rest.join("&") })
    }

    /// The target at the sidecar.
    pub fn target(&self) -> String {
        if self.query.is_empty() { format!("/{}", self.subject) } else { format!("/{}?{}", self.subject, self.query) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_name_a_pod_and_a_subject_that_is_known() {
        let q = Question::parse("status=5xx&pod=shop%2Fweb-1&subject=tap&path=%2Fa").expect("a question");
        assert_eq!((q.namespace.as_str(), q.pod.as_str()), ("shop", "web-1"));
        assert_eq!(q.target(), "/tap?status=5xx&path=%2Fa");
        assert_eq!(Question::parse("pod=a/b&subject=pools").expect("a question").target(), "/pools");
        for wrong in
            ["", "pod=a/b", "subject=tap", "pod=a&subject=tap", "pod=a/b&subject=ready/x", "pod=a/../b&subject=tap"]
        {
            assert!(Question::parse(wrong).is_err(), "{wrong}");
        }
    }
}
