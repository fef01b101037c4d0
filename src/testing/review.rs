//! Answers "may I?" as `kubectl auth can-i` asks it: the SelfSubjectAccessReview.
//!
//! kubectl 1.33 and later ask in protobuf, the only such request the double gets; a JSON answer is accepted.

use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use prost::Message;
use serde::Deserialize;
use serde_json::json;

use super::access::Action;
use super::api::{Body, json_response};
use super::cluster::Cluster;
use super::status::Failure;

/// Largest request body read.
const MAX_REQUEST: usize = 64 * 1024;

/// Starts every protobuf object of Kubernetes (`apimachinery:pkg/runtime/serializer/protobuf/protobuf.go`).
const PROTOBUF_MAGIC: &[u8] = b"k8s\0";

/// Answers a review of the calling user.
pub(super) async fn answer(
    cluster: &Cluster,
    user: &str,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let body = Limited::new(request.into_body(), MAX_REQUEST)
        .collect()
        .await
        .map_err(|error| Failure::bad_request(&error.to_string()))?;
    let asked = parse(&body.to_bytes())
        .map_err(|error| Failure::bad_request(&format!("the object provided is unrecognized: {error}")))?;
    let action = Action {
        verb: asked.verb,
        resource: match asked.subresource.as_str() {
            "" => asked.resource,
            subresource => format!("{}/{subresource}", asked.resource),
        },
        namespace: Some(asked.namespace).filter(|namespace| !namespace.is_empty()),
    };
    let review = json!({
        "kind": "SelfSubjectAccessReview",
        "apiVersion": "authorization.k8s.io/v1",
        "metadata": {},
        "spec": {},
        "status": {"allowed": cluster.access.allows(user, &action)},
    });
    Ok(json_response(StatusCode::CREATED, &review))
}

fn parse(body: &[u8]) -> Result<ResourceAttributes, String> {
    let review = match body.strip_prefix(PROTOBUF_MAGIC) {
        Some(envelope) => {
            let envelope = Unknown::decode(envelope).map_err(|error| error.to_string())?;
            Review::decode(envelope.raw.as_slice()).map_err(|error| error.to_string())?
        }
        None => serde_json::from_slice(body).map_err(|error| error.to_string())?,
    };
    Ok(review
        .spec
        .and_then(|spec| spec.resource_attributes)
        .unwrap_or_default())
}

/// `runtime.Unknown`, the envelope.
#[derive(Clone, PartialEq, Eq, Message)]
struct Unknown {
    /// The encoded object.
    #[prost(bytes = "vec", tag = "2")]
    raw: Vec<u8>,
}

/// `authorization.k8s.io/v1` SelfSubjectAccessReview, as far as it is read.
#[derive(Clone, PartialEq, Eq, Message, Deserialize)]
struct Review {
    /// What is asked.
    #[prost(message, optional, tag = "2")]
    spec: Option<Spec>,
}

/// SelfSubjectAccessReviewSpec
#[derive(Clone, PartialEq, Eq, Message, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    /// Absent in questions about paths.
    #[prost(message, optional, tag = "1")]
    resource_attributes: Option<ResourceAttributes>,
}

/// ResourceAttributes
#[derive(Clone, PartialEq, Eq, Message, Deserialize)]
#[serde(default)]
struct ResourceAttributes {
    /// Empty for all namespaces.
    #[prost(string, tag = "1")]
    namespace: String,
    /// RBAC verb.
    #[prost(string, tag = "2")]
    verb: String,
    /// Plural resource name.
    #[prost(string, tag = "5")]
    resource: String,
    /// Empty for none.
    #[prost(string, tag = "6")]
    subresource: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_encodings_say_the_same() {
        let asked = ResourceAttributes {
            namespace: "shop".to_owned(),
            verb: "create".to_owned(),
            resource: "pods".to_owned(),
            subresource: "portforward".to_owned(),
        };
        let review = Review {
            spec: Some(Spec {
                resource_attributes: Some(asked.clone()),
            }),
        };
        let mut wire = PROTOBUF_MAGIC.to_vec();
        Unknown {
            raw: review.encode_to_vec(),
        }
        .encode(&mut wire)
        .unwrap();
        assert_eq!(parse(&wire).unwrap(), asked);
        let json =
            br#"{"spec": {"resourceAttributes": {"namespace": "shop", "verb": "create", "resource": "pods",
            "subresource": "portforward"}}}"#;
        assert_eq!(parse(json).unwrap(), asked);
        assert!(parse(b"{").is_err());
    }
}
