//! A warning that is worth saying once, and not a thousand times a second.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long it stays said.
const PERIOD: Duration = Duration::from_mins(1);

/// When the warning was last given, and how often the reason for it came up since.
#[derive(Debug, Default)]
pub(super) struct Notice(Mutex<Option<(Instant, u64)>>);

impl Notice {
    /// Counts the reason. Returns how often it came up if it is time to say so.
    pub(super) fn due(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let times = state.map_or(1, |(_, times)| times + 1);
        match *state {
            Some((since, _)) if now.duration_since(since) < PERIOD => {
                *state = Some((since, times));
                None
            }
            _ => {
                *state = Some((now, 0));
                Some(times)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_said_once_a_period_with_the_number_of_times() {
        let notice = Notice::default();
        assert_eq!(notice.due(), Some(1));
        for _ in 0..99 {
            assert_eq!(notice.due(), None);
        }
        tokio::time::advance(PERIOD).await;
        assert_eq!(notice.due(), Some(100));
        assert_eq!(notice.due(), None);
    }
}
