//! Which session a new connection goes to. Within a session nothing protects a connection from a neighbour whose reader is
//! slow, so keeping them apart is done here.

use std::time::Duration;

use tokio::time::Instant;

use crate::k8s::portforward::spdy::Load;

/// How many sessions share the connections of a pod before isolation gives way to economy. Measured on a real cluster, two to
/// four carry the most requests, and sixteen carry fewer.
const SHARED: usize = 4;

/// How many sessions that take newcomers a pod may have.
const MAX_OPEN: usize = 8;

/// How many it may have in all, those with bulk transfers and stuck readers included.
const MAX: usize = 64;

/// A session whose connections are older than this is left to them: they have shown to be there to stay, and a newcomer may
/// turn out to be a transfer that holds them up.
const SETTLED: Duration = Duration::from_secs(1);

/// Where a new connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placement {
    /// The session, by index; without one the connection waits for a new one.
    pub(super) session: Option<usize>,
    /// Whether to open another session.
    pub(super) dial: bool,
}

/// Places one connection. `dialing`: how many sessions are being opened.
pub(super) fn place(sessions: &[Load], dialing: usize, now: Instant) -> Placement {
    let open = || sessions.iter().enumerate().filter(|(_, load)| load.open);
    let young = |load: &Load| {
        load.busy_since
            .is_none_or(|since| now.duration_since(since) < SETTLED)
    };
    let least = |candidates: &mut dyn Iterator<Item = (usize, &Load)>| {
        candidates
            .min_by_key(|(_, load)| load.live)
            .map(|(index, load)| (index, load.live))
    };
    let (count, idle) = (open().count(), open().filter(|(_, load)| load.live == 0).count());
    let may_dial = dialing == 0 && count < MAX_OPEN && sessions.len() < MAX;
    if let Some((index, live)) = least(&mut open().filter(|(_, load)| young(load))) {
        // One spare is kept; what is used now is none any more.
        let spares = idle - usize::from(live == 0);
        return Placement {
            session: Some(index),
            dial: may_dial && spares == 0 && (live == 0 || count < SHARED),
        };
    }
    if count < MAX_OPEN && sessions.len() < MAX {
        return Placement {
            session: None,
            dial: dialing == 0,
        };
    }
    let any = least(&mut open()).or_else(|| least(&mut sessions.iter().enumerate()));
    Placement {
        session: any.map(|(index, _)| index),
        dial: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(live: usize, open: bool, busy: Option<Instant>) -> Load {
        Load {
            live,
            open,
            worn: false,
            busy_since: busy,
            active_at: Instant::now(),
        }
    }

    #[test]
    fn a_connection_takes_an_idle_session_and_has_another_made_ready() {
        let now = Instant::now();
        let sessions = [load(1, true, Some(now)), load(0, true, None)];
        let placed = place(&sessions, 0, now);
        assert_eq!(
            placed,
            Placement {
                session: Some(1),
                dial: true
            }
        );
        assert!(!place(&sessions, 1, now).dial, "one is on its way");
    }

    #[test]
    fn newcomers_share_with_newcomers_rather_than_wait() {
        let now = Instant::now();
        let sessions = [load(2, true, Some(now)), load(1, true, Some(now))];
        assert_eq!(place(&sessions, 1, now).session, Some(1));
    }

    #[test]
    fn connections_that_stay_are_left_alone_while_there_may_be_more_sessions() {
        let now = Instant::now();
        let settled = load(1, true, Some(now.checked_sub(2 * SETTLED).unwrap()));
        assert_eq!(
            place(&[settled], 0, now),
            Placement {
                session: None,
                dial: true
            }
        );
        assert_eq!(place(&[settled; MAX_OPEN], 0, now).session, Some(0));
    }

    #[test]
    fn sessions_that_are_closed_to_newcomers_get_none_and_do_not_count() {
        let now = Instant::now();
        let bulk = [load(1, false, Some(now)); 2 * MAX_OPEN];
        assert_eq!(
            place(&bulk, 0, now),
            Placement {
                session: None,
                dial: true
            }
        );
        assert!(
            place(&[load(1, false, Some(now)); MAX], 0, now).session.is_some(),
            "there is a bound"
        );
    }

    #[test]
    fn many_connections_share_few_sessions() {
        let now = Instant::now();
        let sessions = [load(9, true, Some(now)); SHARED];
        assert_eq!(
            place(&sessions, 0, now),
            Placement {
                session: Some(0),
                dial: false
            }
        );
    }
}
