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

/// How many idle connections may prove dead before that counts as a failure of the endpoint.
const STALE_CONNECTIONS: u32 = 8;

/// One attempt that failed.
#[derive(Debug)]
pub(crate) struct Attempt<'a> {
    /// The request's method.
    pub(crate) method: &'a Method,
    /// Why it failed.
    pub(crate) error: &'a Error,
    /// Whether no byte of the request was written.
    pub(crate) untouched: bool,
    /// Whether the connection had been used before.
    pub(crate) reused: bool,
    /// Whether the whole request can be sent again.
    pub(crate) replayable: bool,
    /// Whether the pod might speak the other version of HTTP: nobody knows yet which, and the request allows either.
    pub(crate) undecided: bool,
    /// Whether the version was a guess, without a word of the Service's about it.
    pub(crate) guessed: bool,
    /// Whether the answer proves that the pod did not understand the request.
    pub(crate) misunderstood: bool,
}

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Send it to an endpoint in the same way; the connection was at fault.
    Repeat,
    /// Send it again over a new connection.
    Reconnect,
    /// Send it to the same endpoint in the other version of HTTP.
    Switch,
    /// Send it to an endpoint that has not failed, after the policy's pause if there is none.
    MoveOn,
    /// Tell the client.
    GiveUp,
}

/// Counts what was tried for one request.
#[derive(Debug)]
pub(crate) struct Attempts {
    policy: RetryPolicy,
    /// Idle connections that proved dead.
    stale: u32,
    /// How often a request was sent again that may have arrived.
    resent: u32,
    /// Whether a new connection was asked for.
    reconnected: bool,
    /// Whether the other version of HTTP was tried.
    switched: bool,
}

impl Attempts {
    /// Starts to count.
    #[must_use]
    pub(crate) fn new(policy: RetryPolicy) -> Self {
        Self {
            policy,
            stale: 0,
            resent: 0,
            reconnected: false,
            switched: false,
        }
    }

    /// Decides what to do about an attempt that failed.
    pub(crate) fn judge(&mut self, attempt: &Attempt<'_>) -> Verdict {
        let &Attempt {
            method,
            error,
            untouched,
            reused,
            replayable,
            undecided,
            guessed,
            misunderstood,
        } = attempt;
        if reused && replayable && untouched && self.stale < STALE_CONNECTIONS {
            // An idle connection had died. That says nothing about the endpoint, and the request never left.
            self.stale += 1;
            return Verdict::Repeat;
        }
        let permitted = self.policy.permits(method, error, untouched, replayable);
        if undecided && replayable && !reused && !self.switched {
            // An answer in the right version that cannot be taken, such as one with too many fields, does not mean that the
            // application did not act on the request.
            let harmless = misunderstood || untouched || method.is_idempotent();
            if matches!(error, Error::Protocol(..)) && harmless {
                self.switched = true;
                return Verdict::Switch;
            }
            // Some servers of the other version just hang up. It may be a crash as well, so it counts.
            if guessed
                && permitted
                && matches!(error, Error::Reset(..))
                && self.resent < self.policy.max_retries
            {
                self.switched = true;
                self.resent += 1;
                return Verdict::Switch;
            }
        }
        if !permitted {
            return Verdict::GiveUp;
        }
        if !untouched && !error.is_before_send() {
            if self.resent == self.policy.max_retries {
                return Verdict::GiveUp;
            }
            self.resent += 1;
            if reused && !self.reconnected {
                // The connection may have died while it was idle, so the endpoint gets one more chance on a new one.
                self.reconnected = true;
                return Verdict::Reconnect;
            }
        }
        Verdict::MoveOn
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

    /// A GET that was sent over a new connection and can be sent again.
    fn sent(error: &Error) -> Attempt<'_> {
        Attempt {
            method: &Method::GET,
            error,
            untouched: false,
            reused: false,
            replayable: true,
            undecided: false,
            guessed: false,
            misunderstood: false,
        }
    }

    #[test]
    fn a_request_that_may_have_arrived_is_sent_again_as_often_as_the_policy_says() {
        let reset = Error::Reset(target(), "reset".into());
        let mut attempts = Attempts::new(POLICY);
        let verdicts: Vec<_> = (0..4).map(|_| attempts.judge(&sent(&reset))).collect();
        assert_eq!(
            verdicts,
            [Verdict::MoveOn, Verdict::MoveOn, Verdict::MoveOn, Verdict::GiveUp]
        );
    }

    #[test]
    fn a_dead_idle_connection_costs_nothing_and_a_broken_one_gets_a_new_one_once() {
        let reset = Error::Reset(target(), "reset".into());
        let mut attempts = Attempts::new(RetryPolicy {
            max_retries: 0,
            ..POLICY
        });
        let stale = Attempt {
            untouched: true,
            reused: true,
            method: &Method::POST,
            ..sent(&reset)
        };
        assert_eq!(
            attempts.judge(&stale),
            Verdict::Repeat,
            "even without retries: nothing was sent"
        );
        let mut attempts = Attempts::new(POLICY);
        let broken = Attempt {
            reused: true,
            ..sent(&reset)
        };
        assert_eq!(attempts.judge(&broken), Verdict::Reconnect);
        assert_eq!(attempts.judge(&broken), Verdict::MoveOn);
    }

    #[test]
    fn the_other_version_of_http_is_tried_once_and_without_counting_as_a_retry() {
        let protocol = Error::Protocol(target(), "HTTP/1.1", "no HTTP".into());
        let mut attempts = Attempts::new(RetryPolicy {
            max_retries: 0,
            ..POLICY
        });
        let undecided = Attempt {
            undecided: true,
            misunderstood: true,
            method: &Method::POST,
            ..sent(&protocol)
        };
        assert_eq!(attempts.judge(&undecided), Verdict::Switch);
        assert_eq!(attempts.judge(&undecided), Verdict::GiveUp);
        assert_eq!(
            Attempts::new(POLICY).judge(&sent(&protocol)),
            Verdict::GiveUp,
            "the version is known"
        );
    }

    #[test]
    fn an_unsafe_request_that_may_have_been_understood_is_not_sent_in_the_other_version() {
        let protocol = Error::Protocol(target(), "HTTP/1.1", "too many fields".into());
        for (method, verdict) in [(&Method::GET, Verdict::Switch), (&Method::POST, Verdict::GiveUp)] {
            let attempt = Attempt {
                undecided: true,
                method,
                ..sent(&protocol)
            };
            assert_eq!(Attempts::new(POLICY).judge(&attempt), verdict, "{method}");
        }
    }

    proptest! {
        #[test]
        fn jitter_shortens_by_a_quarter_at_most(retry in 0u32..40, random in 0.0f64..=1.0) {
            let (pause, full) = (POLICY.jittered(retry, random), POLICY.delay(retry));
            prop_assert!(pause <= full && pause >= full.mul_f64(0.7499));
        }
    }
}
