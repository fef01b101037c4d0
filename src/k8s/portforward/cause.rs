//! What the words of container runtimes and kubelets mean for a port-forward (containerd, cri-o, and Windows nodes).

use std::io;

/// Tells what the text on an error stream means for its connection. `ConnectionRefused`: no byte has reached the
/// application. The text may name the pod, so one word is not enough.
pub(super) fn kind(text: &str) -> io::ErrorKind {
    let has = |words: &str| text.contains(words);
    if has("connection reset") || has("broken pipe") {
        io::ErrorKind::ConnectionReset
    } else if has("connection refused")
        || has("actively refused")
        || has("failed to connect")
        || has("failed to dial")
        || is_sandbox_gone(text)
    {
        io::ErrorKind::ConnectionRefused
    } else {
        io::ErrorKind::ConnectionAborted
    }
}

/// Tells whether a text says that the pod's sandbox has ended: nothing can be opened through its session any more
/// (kubernetes/kubernetes#128319 makes the same split).
pub(super) fn is_sandbox_gone(text: &str) -> bool {
    [
        "namespace for sandbox",
        "failed to find sandbox",
        "could not find sandbox",
        "PodSandbox with ID",
    ]
    .iter()
    .any(|words| text.contains(words))
        || text.contains("sandbox ") && text.contains(" is not running")
}

/// Tells whether an upgrade's failure says that the pod has ended although its object is still there.
pub(super) fn is_pod_gone(message: &str) -> bool {
    [
        "pod not found",
        "not running",
        "does not exist",
        "failed to find sandbox",
        "is closed",
    ]
    .iter()
    .any(|words| message.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtimes_texts_are_told_apart() {
        let containerd = "error forwarding port 8080 to pod 1f, uid : failed to execute portforward in network namespace \
             \"/var/run/netns/cni-1\": failed to connect to localhost:8080 inside namespace \"1f\", IPv4: dial tcp4 \
             127.0.0.1:8080: connect: connection refused";
        assert_eq!(kind(containerd), io::ErrorKind::ConnectionRefused);
        let reset = "error forwarding port 9003 to pod 1f, uid : read tcp4 127.0.0.1:1->127.0.0.1:9003: read: connection reset by peer";
        assert_eq!(kind(reset), io::ErrorKind::ConnectionReset);
        let named = "error forwarding port 80 to pod refused-0, uid : exit status 1";
        assert_eq!(kind(named), io::ErrorKind::ConnectionAborted);
        assert_eq!(
            kind("error forwarding port: context deadline exceeded"),
            io::ErrorKind::ConnectionAborted
        );
    }

    #[test]
    fn a_sandbox_that_has_ended_is_recognised() {
        for text in [
            "error forwarding port 80 to pod 1f, uid : network namespace for sandbox \"1f\" is closed",
            "failed to find sandbox \"1f\" in store: not found",
            "sandbox 1f is not running",
            "PodSandbox with ID 1f not found",
        ] {
            assert!(is_sandbox_gone(text), "{text}");
            assert_eq!(kind(text), io::ErrorKind::ConnectionRefused, "{text}");
        }
        assert!(!is_sandbox_gone(
            "failed to connect to localhost:80 inside namespace \"1f\": connection refused"
        ));
    }

    #[test]
    fn an_upgrade_that_fails_because_the_pod_has_ended_is_told_from_trouble_on_the_way() {
        for text in [
            "pod not found (\"web-1_shop\")",
            "pod does not exist",
            "unable to upgrade connection: pod web-1 is not running",
            "failed to find sandbox \"1f\" in store: not found",
            "network namespace for sandbox \"1f\" is closed",
        ] {
            assert!(is_pod_gone(text), "{text}");
        }
        for text in [
            "error dialing backend: dial tcp 10.0.0.7:10250: connect: connection refused",
            "rpc error: code = Unavailable desc = connection error",
            "server is not initialized yet",
        ] {
            assert!(!is_pod_gone(text), "{text}");
        }
    }
}
