//! The `Status` objects an API server answers failures with, with Kubernetes' own texts.

use http::StatusCode;
use serde_json::{Value, json};

use super::resource::{Kind, Target};

/// A failure: HTTP status code and the `Status` body.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// The HTTP status.
    pub(super) code: StatusCode,
    /// The JSON body.
    pub(super) body: Value,
}

impl Failure {
    /// A failure without details.
    pub(super) fn new(code: StatusCode, reason: &str, message: &str) -> Self {
        Self {
            code,
            body: status(code, reason, message, None),
        }
    }

    /// 429: come back in so many seconds (`apimachinery:pkg/api/errors/errors.go`, NewTooManyRequests).
    pub(super) fn busy(seconds: u64) -> Self {
        let code = StatusCode::TOO_MANY_REQUESTS;
        let message = "too many requests, please try again later";
        let details = json!({"retryAfterSeconds": seconds});
        Self {
            code,
            body: status(code, "TooManyRequests", message, Some(&details)),
        }
    }

    /// How many seconds the client is asked to wait.
    pub(super) fn retry_after(&self) -> Option<u64> {
        self.body["details"]["retryAfterSeconds"].as_u64()
    }

    /// 401: no credentials, or credentials that are not known (any more).
    pub(super) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized")
    }

    /// 403 as the RBAC authorizer words it (`apiserver:pkg/endpoints/handlers/responsewriters/errors.go`).
    pub(super) fn forbidden(user: &str, target: &Target) -> Self {
        let place = match &target.namespace {
            Some(namespace) => format!("in the namespace \"{namespace}\""),
            None => "at the cluster scope".to_owned(),
        };
        let object = match &target.name {
            Some(name) => format!("{} \"{name}\"", target.kind.qualified()),
            None => target.kind.qualified(),
        };
        let message = format!(
            "{object} is forbidden: User \"{user}\" cannot {} resource \"{}\" in API group \"{}\" {place}",
            target.verb,
            target.rbac_resource(),
            target.kind.group(),
        );
        let details = details(target.kind, target.name.as_deref());
        let code = StatusCode::FORBIDDEN;
        Self {
            code,
            body: status(code, "Forbidden", &message, Some(&details)),
        }
    }

    /// 404 for a missing object.
    pub(super) fn not_found(kind: Kind, name: &str) -> Self {
        let message = format!("{} \"{name}\" not found", kind.qualified());
        let code = StatusCode::NOT_FOUND;
        Self {
            code,
            body: status(code, "NotFound", &message, Some(&details(kind, Some(name)))),
        }
    }

    /// 404 for a path nobody serves.
    pub(super) fn no_such_path() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NotFound",
            "the server could not find the requested resource",
        )
    }

    /// 400 with a message.
    pub(super) fn bad_request(message: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    /// 405 for a verb the double does not implement.
    pub(super) fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message)
    }

    /// 410 for a watch from a version whose history is gone.
    pub(super) fn expired(asked: u64, oldest: u64) -> Self {
        Self::new(
            StatusCode::GONE,
            "Expired",
            &format!("too old resource version: {asked} ({oldest})"),
        )
    }

    /// 422 as servers without the WatchList feature answer `sendInitialEvents`.
    pub(super) fn no_watch_list() -> Self {
        let message = "ListOptions.meta.k8s.io \"\" is invalid: sendInitialEvents: Forbidden: sendInitialEvents is \
                       forbidden for watch unless the WatchList feature gate is enabled";
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message)
    }
}

fn details(kind: Kind, name: Option<&str>) -> Value {
    let mut details = json!({"kind": kind.plural()});
    if let Some(name) = name {
        details["name"] = name.into();
    }
    if !kind.group().is_empty() {
        details["group"] = kind.group().into();
    }
    details
}

fn status(code: StatusCode, reason: &str, message: &str, details: Option<&Value>) -> Value {
    let mut status = json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code.as_u16(),
    });
    if let Some(details) = details {
        status["details"] = details.clone();
    }
    status
}
