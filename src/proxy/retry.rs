//! What is tried again, how often, and after which pause: pure decisions.

use std::time::Duration;

use http::Method;

use crate::proxy::error::Error;

/// No pause is longer than this (seed: "capped at 5s").
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Settings of retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// How often a request is tried again after a pause; 0 turns retries off, those on another endpoint too.
    pub max_retries: u32,
    /// The first pause; each further one is twice as long.
    pub base_delay: Duration,
}

impl RetryPolicy {
    /// Decides whether a request may be sent again after `error`. `untouched`: no byte of it was written. `replayable`: its
    /// whole body can be sent once more.
    #[must_use]
    pub fn permits(&self, method: &Method, error: &Error, untouched: bool, replayable: bool) -> bool {
        // Idempotent methods: RFC 9110 section 9.2.2. Others only if no byte of them reached the application.
        let harmless = method.is_idempotent() || untouched || error.is_before_send();
        self.max_retries > 0 && replayable && harmless && error.is_retryable()
    }

    /// Returns the pause before retry number `retry` (from 0), without jitter: base x 2^n, capped.
    #[must_use]
    pub fn delay(&self, retry: u32) -> Duration {
        let factor = 1u32.checked_shl(retry).unwrap_or(u32::MAX);
        self.base_delay.saturating_mul(factor).min(LONGEST_PAUSE)
    }

    /// Returns that pause shortened by a random part of up to a quarter, so that clients that failed together do not come
    /// back together. `random` lies between 0 and 1.
    #[must_use]
    pub fn jittered(&self, retry: u32, random: f64) -> Duration {
        self.delay(retry).mul_f64(1.0 - random.clamp(0.0, 1.0) / 4.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::PodRef;
    use crate::transport::Target;
    use proptest::prelude::*;

    const POLICY: RetryPolicy = RetryPolicy {
        max_retries: 3,
        base_delay: Duration::from_millis(200),
    };

    fn target() -> Target {
        let pod = PodRef {
            namespace: "default".into(),
            name: "web-1".into(),
            uid: "u".into(),
        };
        Target { pod, port: 8080 }
    }

    #[test]
    fn pauses_double_up_to_five_seconds() {
        let delays: Vec<_> = (0..7).map(|retry| POLICY.delay(retry).as_millis()).collect();
        assert_eq!(delays, [200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(POLICY.delay(u32::MAX), LONGEST_PAUSE);
    }

    #[test]
    fn an_unsafe_request_is_sent_again_only_if_nothing_arrived() {
        let refused = Error::Refused(target(), "refused".into());
        let reset = Error::Reset(target(), "reset".into());
        assert!(POLICY.permits(&Method::GET, &reset, false, true));
        assert!(POLICY.permits(&Method::POST, &refused, false, true));
        assert!(!POLICY.permits(&Method::POST, &reset, false, true));
        assert!(
            POLICY.permits(&Method::POST, &reset, true, true),
            "no byte of it was written"
        );
        assert!(
            !POLICY.permits(&Method::GET, &reset, false, false),
            "its body is gone"
        );
        assert!(!POLICY.permits(&Method::GET, &Error::ClientGone, false, true));
    }

    #[test]
    fn zero_turns_retries_off() {
        let off = RetryPolicy {
            max_retries: 0,
            ..POLICY
        };
        assert!(!off.permits(
            &Method::GET,
            &Error::Refused(target(), "refused".into()),
            false,
            true
        ));
    }

    proptest! {
        #[test]
        fn jitter_shortens_by_a_quarter_at_most(retry in 0u32..40, random in 0.0f64..=1.0) {
            let (pause, full) = (POLICY.jittered(retry, random), POLICY.delay(retry));
            prop_assert!(pause <= full && pause >= full.mul_f64(0.7499));
        }
    }
}
