//! The pod that the program runs in, if it runs in one: a Service that leads there leads back to the program.

use std::sync::LazyLock;

use crate::registry::PodRef;

/// Where each container with a service account finds its pod's namespace.
const NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

static ITSELF: LazyLock<Option<Itself>> = LazyLock::new(|| {
    let variable = |name: &str| std::env::var(name).ok();
    find(variable, || std::fs::read_to_string(NAMESPACE).ok())
});

#[derive(Debug, PartialEq, Eq)]
struct Itself {
    namespace: String,
    name: String,
}

/// Tells whether it is the pod that the program runs in.
pub(super) fn is_itself(pod: &PodRef) -> bool {
    ITSELF
        .as_ref()
        .is_some_and(|itself| *itself.namespace == *pod.namespace && *itself.name == *pod.name)
}

/// The variables are those that manifests fill from the downward API by custom. Without them a container's host name is its
/// pod's name, unless `spec.hostname` or `hostNetwork` says otherwise.
fn find(variable: impl Fn(&str) -> Option<String>, file: impl FnOnce() -> Option<String>) -> Option<Itself> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    Some(Itself {
        namespace: set("POD_NAMESPACE").or_else(file)?.trim().to_owned(),
        name: set("POD_NAME").or_else(|| set("HOSTNAME"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_found_as_far_as_a_container_knows_it() {
        let rows = [
            (&[("HOSTNAME", "laptop")][..], None, None),
            (&[("HOSTNAME", "a-1")], Some("shop\n"), Some(("shop", "a-1"))),
            (
                &[
                    ("HOSTNAME", "node"),
                    ("POD_NAME", "a-1"),
                    ("POD_NAMESPACE", "own"),
                ],
                Some("shop"),
                Some(("own", "a-1")),
            ),
            (
                &[("HOSTNAME", "a-1"), ("POD_NAME", "")],
                Some("shop"),
                Some(("shop", "a-1")),
            ),
            (&[], Some("shop"), None),
        ];
        for (variables, file, expected) in rows {
            let variable = |name: &str| {
                let set = variables.iter().find(|(set, _)| *set == name);
                set.map(|(_, value)| (*value).to_owned())
            };
            let expected = expected.map(|(namespace, name): (&str, &str)| Itself {
                namespace: namespace.into(),
                name: name.into(),
            });
            assert_eq!(find(variable, || file.map(str::to_owned)), expected);
        }
    }
}
