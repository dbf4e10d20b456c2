//! Who calls and what they may. Callers are known by a client certificate of the cluster's authority (user = CN,
//! groups = O) or by a token of a static file. Administrators (`system:masters`) may all; a node may what its agent
//! needs; nobody else may anything but ask for the version and health.
//!
//! Deciding is PURE; where a node's right depends on an object, the caller looks it up.

use std::collections::HashMap;
use std::path::Path;

use x509_parser::prelude::{FromDer, X509Certificate};

use super::kinds::Kind;
use super::status::ApiError;

const MASTERS: &str = "system:masters";
const NODES: &str = "system:nodes";
const NODE_PREFIX: &str = "system:node:";

/// A caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Name.
    pub name: String,
    /// Groups.
    pub groups: Vec<String>,
}

impl User {
    /// Not known.
    pub fn anonymous() -> Self {
        User { name: "system:anonymous".to_owned(), groups: vec!["system:unauthenticated".to_owned()] }
    }

    /// Whether the caller has shown who they are.
    pub fn authenticated(&self) -> bool {
        self.name != "system:anonymous"
    }

    /// Whether the caller may do everything.
    pub fn is_admin(&self) -> bool {
        self.groups.iter().any(|group| group == MASTERS)
    }

    /// The node, if the caller is one.
    pub fn node(&self) -> Option<&str> {
        let member = self.groups.iter().any(|group| group == NODES);
        self.name.strip_prefix(NODE_PREFIX).filter(|node| member && !node.is_empty())
    }
}

/// The user of a verified client certificate; `None` if it names none (a workload's, for example).
pub fn from_certificate(der: &[u8]) -> Option<User> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject.iter_organization().filter_map(|o| o.as_str().ok()).map(str::to_owned).collect();
    (!name.is_empty()).then_some(User { name, groups })
}

/// Static tokens: lines `token,user,uid,"group1,group2"` as Kubernetes has them.
#[derive(Debug, Default)]
pub struct Tokens {
    users: HashMap<String, User>,
}

impl Tokens {
    /// Reads the file.
    pub fn load(path: &Path) -> std::io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string(path)?))
    }

    fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let mut parts = line.splitn(4, ',').map(str::trim);
            let (token, name) = (parts.next()?.to_owned(), parts.next()?.to_owned());
            let groups = parts.nth(1).unwrap_or_default().trim_matches('"');
            let groups = groups.split(',').filter(|group| !group.is_empty()).map(str::to_owned).collect();
            (!token.is_empty() && !name.is_empty() && !token.starts_with('#')).then_some((token, User { name, groups }))
        };
        Tokens { users: text.lines().filter_map(line).collect() }
    }

    /// The user of a token. Tokens are long and random; a hash table's timing tells nothing useful of them.
    pub fn user(&self, token: &str) -> Option<User> {
        self.users.get(token).cloned()
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a> {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verb: &'a str,
    /// Of what.
    pub kind: &'a Kind,
    /// Empty for the object itself.
    pub subresource: &'a str,
    /// Empty for all.
    pub namespace: &'a str,
    /// Empty for collections.
    pub name: &'a str,
}

/// The verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Go ahead.
    Allow,
    /// Go ahead if the pod is bound to the calling node.
    IfPodIsOnNode,
    /// Go ahead if a pod on the calling node uses the secret.
    IfPodOnNodeUsesSecret,
    /// No.
    Deny,
}

/// Decides.
pub fn decide(user: &User, access: &Access<'_>) -> Verdict {
    if user.is_admin() {
        return Verdict::Allow;
    }
    match user.node() {
        Some(node) => decide_node(node, access),
        None => Verdict::Deny,
    }
}

fn decide_node(node: &str, access: &Access<'_>) -> Verdict {
    let Access { verb, subresource, name, namespace, .. } = *access;
    let reads = matches!(verb, "get" | "list" | "watch");
    let writes = matches!(verb, "create" | "update" | "patch");
    let allow = |yes: bool| if yes { Verdict::Allow } else { Verdict::Deny };
    match (access.kind.plural, subresource) {
        ("secrets", "") if verb == "get" => Verdict::IfPodOnNodeUsesSecret,
        ("secrets", _) => Verdict::Deny,
        (_, "") if reads => Verdict::Allow,
        // A node that registers does not give its name in the path; it is checked again with the body.
        ("nodes", "") => allow(verb == "create" || (writes && name == node)),
        ("nodes", "status") => allow((reads || writes) && name == node),
        ("leases", "") => allow(namespace == "kube-node-lease" && (verb == "create" || (writes && name == node))),
        ("events", "") => allow(writes),
        ("pods", "") if verb == "delete" => Verdict::IfPodIsOnNode,
        ("pods", "status") if matches!(verb, "get" | "update" | "patch") => Verdict::IfPodIsOnNode,
        _ => Verdict::Deny,
    }
}

/// The refusal, in Kubernetes' words.
pub fn refusal(user: &User, access: &Access<'_>) -> ApiError {
    let Access { verb, kind, subresource, namespace, name } = *access;
    let quoted = if name.is_empty() { String::new() } else { format!(" \"{name}\"") };
    let slash = if subresource.is_empty() { String::new() } else { format!("/{subresource}") };
    let scope = match namespace {
        "" => " at the cluster scope".to_owned(),
        namespace => format!(" in the namespace \"{namespace}\""),
    };
    ApiError::forbidden(format!(
        "{}{quoted} is forbidden: User \"{}\" cannot {verb} resource \"{}{slash}\" in API group \"{}\"{scope}",
        kind.resource(),
        user.name,
        kind.plural,
        kind.group
    ))
}

/// Whether the pod's spec names the secret.
pub fn uses_secret(pod: &serde_json::Value, secret: &str) -> bool {
    use super::value::{list, text};
    let spec = &pod["spec"];
    let in_volume = |volume: &serde_json::Value| {
        text(volume, "secret.secretName") == secret
            || list(volume, "projected.sources").iter().any(|source| text(source, "secret.name") == secret)
    };
    let in_container = |container: &serde_json::Value| {
        list(container, "envFrom").iter().any(|from| text(from, "secretRef.name") == secret)
            || list(container, "env").iter().any(|env| text(env, "valueFrom.secretKeyRef.name") == secret)
    };
    list(spec, "volumes").iter().any(in_volume)
        || list(spec, "imagePullSecrets").iter().any(|pull| text(pull, "name") == secret)
        || ["containers", "initContainers"].iter().any(|group| list(spec, group).iter().any(in_container))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::kinds;

    #[test]
    fn a_node_may_what_its_agent_needs() {
        let node = User { name: "system:node:n1".to_owned(), groups: vec![NODES.to_owned()] };
        let ask = |verb, plural: &'static str, subresource, namespace, name| {
            let group = if plural == "leases" { "coordination.k8s.io" } else { "" };
            let kind = kinds::find(group, "v1", plural).expect(plural);
            decide(&node, &Access { verb, kind, subresource, namespace, name })
        };
        assert_eq!(ask("list", "pods", "", "", ""), Verdict::Allow);
        assert_eq!(ask("patch", "nodes", "status", "", "n1"), Verdict::Allow);
        assert_eq!(ask("patch", "nodes", "status", "", "n2"), Verdict::Deny);
        assert_eq!(ask("delete", "nodes", "", "", "n1"), Verdict::Deny);
        assert_eq!(ask("get", "nodes", "proxy/flows", "", "n1"), Verdict::Deny);
        assert_eq!(ask("update", "leases", "", "kube-node-lease", "n1"), Verdict::Allow);
        assert_eq!(ask("update", "leases", "", "kube-system", "n1"), Verdict::Deny);
        assert_eq!(ask("patch", "pods", "status", "default", "p"), Verdict::IfPodIsOnNode);
        assert_eq!(ask("create", "pods", "", "default", ""), Verdict::Deny);
        assert_eq!(ask("list", "secrets", "", "default", ""), Verdict::Deny);
        assert_eq!(ask("get", "secrets", "", "default", "s"), Verdict::IfPodOnNodeUsesSecret);
    }

    #[test]
    fn tokens_parse() {
        let tokens = Tokens::parse("abc,admin,1,\"system:masters,x\"\n# c,d\nbad\n");
        assert!(tokens.user("abc").expect("known").is_admin());
        assert_eq!(tokens.user("bad"), None);
        assert_eq!(tokens.user("# c"), None);
    }
}
