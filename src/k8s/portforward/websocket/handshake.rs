//! The opening handshake (RFC 6455 §4.1): what a request must carry and what its 101 must answer.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_EXTENSIONS,
    SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use sha1::{Digest, Sha1};

/// The subprotocol of tunnels as servers know it (`apimachinery:pkg/util/portforward/constants.go`); the KEP's text has another.
pub(in crate::k8s::portforward) const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// That of channels.
pub(in crate::k8s::portforward) const CHANNELS: &str = "v4.channel.k8s.io";

/// The GUID of RFC 6455 §1.3.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// One handshake. The key proves that the server understood, and is used once.
#[derive(Debug)]
pub(in crate::k8s::portforward) struct Handshake {
    key: String,
    protocol: &'static str,
}

/// What is wrong with a 101: whoever answered does not speak the tunnel's protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::k8s::portforward) enum Mismatch {
    /// A header that is missing or has another value than the handshake calls for.
    #[error("the WebSocket upgrade was answered with a wrong {0}")]
    Header(HeaderName),
    /// An extension, although none was offered.
    #[error("the WebSocket upgrade was answered with an extension")]
    Extension,
}

impl Handshake {
    /// Begins a handshake for a subprotocol, with a random key.
    pub(in crate::k8s::portforward) fn new(protocol: &'static str) -> Self {
        let nonce = fastrand::u128(..).to_ne_bytes();
        Self {
            key: STANDARD.encode(nonce),
            protocol,
        }
    }

    /// Sets the headers of the GET request.
    pub(in crate::k8s::portforward) fn request(&self, headers: &mut HeaderMap) {
        let key = HeaderValue::try_from(&self.key).expect("base64 is visible ASCII");
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        headers.insert(SEC_WEBSOCKET_KEY, key);
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(self.protocol));
    }

    /// Checks the headers of a 101 to the request.
    pub(in crate::k8s::portforward) fn check(&self, headers: &HeaderMap) -> Result<(), Mismatch> {
        let value = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let is_websocket = |text: &str| text.eq_ignore_ascii_case("websocket");
        let has_upgrade = |text: &str| {
            text.split(',')
                .any(|token| token.trim().eq_ignore_ascii_case("upgrade"))
        };
        let mut connection = headers.get_all(CONNECTION).iter();
        let checks = [
            (UPGRADE, value(UPGRADE).is_some_and(is_websocket)),
            (
                CONNECTION,
                connection.any(|line| line.to_str().is_ok_and(has_upgrade)),
            ),
            (
                SEC_WEBSOCKET_ACCEPT,
                value(SEC_WEBSOCKET_ACCEPT) == Some(&self.accept()),
            ),
            (
                SEC_WEBSOCKET_PROTOCOL,
                value(SEC_WEBSOCKET_PROTOCOL) == Some(self.protocol),
            ),
        ];
        if let Some((wrong, _)) = checks.into_iter().find(|(_, right)| !right) {
            return Err(Mismatch::Header(wrong));
        }
        if headers.contains_key(SEC_WEBSOCKET_EXTENSIONS) {
            return Err(Mismatch::Extension);
        }
        Ok(())
    }

    /// The `Sec-WebSocket-Accept` that goes with the key (§4.2.2).
    fn accept(&self) -> String {
        STANDARD.encode(Sha1::new().chain_update(&self.key).chain_update(GUID).finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The handshake of RFC 6455 §1.3 and its answer.
    fn example() -> (Handshake, HeaderMap) {
        let handshake = Handshake {
            key: "dGhlIHNhbXBsZSBub25jZQ==".to_owned(),
            protocol: TUNNEL,
        };
        let answer = [
            (UPGRADE, "WebSocket"),
            (CONNECTION, "keep-alive, Upgrade"),
            (SEC_WEBSOCKET_ACCEPT, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
            (SEC_WEBSOCKET_PROTOCOL, TUNNEL),
        ];
        let answer = answer.map(|(name, value)| (name, HeaderValue::from_static(value)));
        (handshake, HeaderMap::from_iter(answer))
    }

    #[test]
    fn the_answer_of_the_specification_is_good() {
        let (handshake, answer) = example();
        assert_eq!(handshake.check(&answer), Ok(()));
    }

    #[test]
    fn a_list_in_two_lines_is_one() {
        let (handshake, mut answer) = example();
        answer.insert(CONNECTION, HeaderValue::from_static("keep-alive"));
        answer.append(CONNECTION, HeaderValue::from_static("Upgrade"));
        assert_eq!(handshake.check(&answer), Ok(()));
    }

    #[test]
    fn an_answer_with_one_header_missing_or_wrong_is_refused() {
        for name in [UPGRADE, CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_PROTOCOL] {
            let (handshake, mut answer) = example();
            answer.insert(&name, HeaderValue::from_static(CHANNELS));
            assert_eq!(handshake.check(&answer), Err(Mismatch::Header(name.clone())));
            answer.remove(&name);
            assert_eq!(handshake.check(&answer), Err(Mismatch::Header(name)));
        }
    }

    #[test]
    fn an_extension_that_nobody_asked_for_is_refused() {
        let (handshake, mut answer) = example();
        answer.insert(
            SEC_WEBSOCKET_EXTENSIONS,
            HeaderValue::from_static("permessage-deflate"),
        );
        assert_eq!(handshake.check(&answer), Err(Mismatch::Extension));
    }

    #[test]
    fn each_request_has_a_key_of_16_bytes_of_its_own() {
        let key = || {
            let mut headers = HeaderMap::new();
            Handshake::new(TUNNEL).request(&mut headers);
            STANDARD.decode(&headers[SEC_WEBSOCKET_KEY]).unwrap()
        };
        let (one, other) = (key(), key());
        assert_eq!(one.len(), 16);
        assert_ne!(one, other);
    }
}
