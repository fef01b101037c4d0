//! Which session a new connection goes to. What one connection does not read stops its whole session, so within one nothing
//! protects it from a neighbour whose reader is slow; keeping them apart is done here.
//!
//! Connections share by evidence: where those to a port have been small, the next one joins others of the kind, which is
//! what makes many short connections cheap. Any other may turn out to be a transfer that stalls, and gets a session of its
//! own. Only a crowd of them shares, among itself: those of one moment that have not moved much yet share few sessions, those
//! that move much share more.

use std::cmp::Reverse;
use std::time::Duration;

use tokio::time::Instant;

use crate::k8s::portforward::spdy::{Load, WORKERS};

/// How many sessions connections that share are spread over. Measured on a real cluster, two carry the most requests: what
/// many connections say at the same time then leaves in few writes. Eight carry half as many.
const SHARED: usize = 2;

/// How many sessions that take newcomers a pod may have, those that are being opened included.
const MAX_OPEN: usize = 8;

/// Over how many sessions the transfers of one moment are spread. Each more has server and node divide their processors
/// between more, and everybody else wait for longer; two on one let one wait for the other's reader.
const TRANSFERS: usize = 32;

/// How many it may have in all, those with bulk transfers and stuck readers included.
const MAX: usize = 64;

/// Where a session can be opened within this, the way to the server is short enough to wait for one.
const NEAR: Duration = Duration::from_millis(200);

/// How long connections count as newcomers themselves.
const NEW: Duration = Duration::from_secs(1);

/// What is to be placed, and what the pool does for it already.
#[derive(Debug, Clone, Copy)]
pub(super) struct Newcomer {
    /// The pod's port.
    pub(super) port: u16,
    /// Whether it is expected to be small, as those before it were.
    pub(super) small: bool,
    /// How many sessions are being opened.
    pub(super) dialing: usize,
    /// How many connections wait for one.
    pub(super) waiting: usize,
    /// How long one takes to open at best, if any was.
    pub(super) dialed_in: Option<Duration>,
}

/// Where a new connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placement {
    /// The session, by index; without one the connection waits for a new one.
    pub(super) session: Option<usize>,
    /// How many sessions to open.
    pub(super) dial: usize,
}

/// Places one connection.
pub(super) fn place(sessions: &[Load], newcomer: Newcomer, now: Instant) -> Placement {
    let open: Vec<(usize, &Load)> = sessions
        .iter()
        .enumerate()
        .filter(|(_, load)| load.open)
        .collect();
    let Newcomer { dialing, waiting, .. } = newcomer;
    let room = MAX_OPEN
        .saturating_sub(open.len() + dialing)
        .min(MAX.saturating_sub(sessions.len() + dialing));
    let may_wait = room + dialing > 0;
    let burst: Vec<(usize, &Load)> = open
        .iter()
        .copied()
        .filter(|(_, load)| load.apart == Some(newcomer.port) && is_young(load, now))
        .collect();
    let transfers: Vec<(usize, &Load)> = sessions
        .iter()
        .enumerate()
        .filter(|(_, load)| load.bulk && load.apart == Some(newcomer.port) && is_young(load, now))
        .collect();
    let session = if newcomer.small {
        among_its_kind(&open, newcomer, may_wait)
    } else if transfers.is_empty() {
        apart(&open, &burst, newcomer, may_wait, now)
    } else {
        // Transfers are alike, too, and each takes what it can get: as many as are spread make no room for more.
        let enough = transfers.len() >= TRANSFERS || !is_near(newcomer);
        idle(&open).or_else(|| least(transfers.iter().copied()).filter(|_| enough))
    };
    // Beyond all bounds, and when there is nothing to wait for.
    let forced = || crowd(&open).or_else(|| least(sessions.iter().enumerate()));
    let session = if may_wait {
        session
    } else {
        session.or_else(forced)
    };
    let wanted = match session {
        // While the first one is being opened it is not known whether any can be, nor how.
        None if newcomer.dialed_in.is_none() => 1,
        None if newcomer.small || transfers.is_empty() => {
            (waiting + 2).min(SHARED.saturating_sub(burst.len()).max(1))
        }
        None => (waiting + 1).min(TRANSFERS.saturating_sub(transfers.len()).max(1)),
        // One is kept ready.
        Some(chosen) => {
            let ready = |(index, load): &(usize, &Load)| load.live == 0 && *index != chosen;
            usize::from(!open.iter().any(ready))
        }
    };
    Placement {
        session,
        dial: wanted.saturating_sub(dialing).min(room),
    }
}

/// Finds a session for a connection that is expected to be small. Its kind fills a session up to as many as have a worker of
/// the peer each, before the next is taken.
fn among_its_kind(open: &[(usize, &Load)], newcomer: Newcomer, may_wait: bool) -> Option<usize> {
    let kind = || {
        open.iter()
            .copied()
            .filter(|(_, load)| load.live > 0 && load.apart.is_none())
    };
    let fewest = kind().min_by_key(|(_, load)| load.live);
    if let Some((index, load)) = fewest
        && (load.live < WORKERS || kind().count() >= SHARED)
    {
        return Some(index);
    }
    // It does no harm to one that is kept apart, which might do harm to it; still better than a long way.
    let any = || least(open.iter().copied()).filter(|_| !may_wait || !is_near(newcomer));
    idle(open).or(fewest.map(|(index, _)| index)).or_else(any)
}

/// Finds a session for a connection that may turn out to be anything. `burst`: what others of its kind have just got.
fn apart(
    open: &[(usize, &Load)],
    burst: &[(usize, &Load)],
    newcomer: Newcomer,
    may_wait: bool,
    now: Instant,
) -> Option<usize> {
    // Many to one port at the same moment are one client's, and alike.
    if burst.len() >= SHARED {
        return least(burst.iter().copied());
    }
    // Where the way is long, those that come at the same time share rather than wait for three round trips; those that were
    // there before are left alone.
    let young = || open.iter().copied().filter(|(_, load)| is_young(load, now));
    let together = || least(young()).filter(|_| may_wait && !is_near(newcomer));
    idle(open).or_else(together)
}

/// Finds a session when there may be no more. The oldest are left to those who had them first.
fn crowd(open: &[(usize, &Load)]) -> Option<usize> {
    let mut youngest = open.to_vec();
    youngest.sort_by_key(|(_, load)| Reverse(load.busy_since));
    least(youngest.into_iter().take(SHARED))
}

fn idle(open: &[(usize, &Load)]) -> Option<usize> {
    open.iter()
        .find(|(_, load)| load.live == 0)
        .map(|(index, _)| *index)
}

fn least<'a>(candidates: impl Iterator<Item = (usize, &'a Load)>) -> Option<usize> {
    candidates
        .min_by_key(|(_, load)| load.live)
        .map(|(index, _)| index)
}

fn is_near(newcomer: Newcomer) -> bool {
    newcomer.dialed_in.is_some_and(|time| time < NEAR)
}

fn is_young(load: &Load, now: Instant) -> bool {
    load.busy_since
        .is_some_and(|since| now.duration_since(since) < NEW)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: u16 = 80;
    const SMALL: Newcomer = Newcomer {
        port: PORT,
        small: true,
        dialing: 0,
        waiting: 0,
        dialed_in: Some(Duration::from_millis(10)),
    };
    const UNKNOWN: Newcomer = Newcomer {
        small: false,
        ..SMALL
    };
    const FAR: Duration = Duration::from_millis(300);

    /// A session with so many connections that are expected to be small.
    fn shared(live: usize, now: Instant) -> Load {
        Load {
            live,
            open: true,
            bulk: false,
            worn: false,
            apart: None,
            busy_since: (live > 0).then_some(now),
            active_at: now,
        }
    }

    /// A session with a connection of its own.
    fn private(since: Instant) -> Load {
        Load {
            apart: Some(PORT),
            ..shared(1, since)
        }
    }

    fn bulk(now: Instant) -> Load {
        Load {
            open: false,
            bulk: true,
            ..private(now)
        }
    }

    fn placed(session: Option<usize>, dial: usize) -> Placement {
        Placement { session, dial }
    }

    fn long_before(now: Instant) -> Instant {
        now.checked_sub(2 * NEW).unwrap()
    }

    #[test]
    fn the_first_connection_waits_for_one_session() {
        let (now, first) = (
            Instant::now(),
            Newcomer {
                dialed_in: None,
                ..UNKNOWN
            },
        );
        assert_eq!(place(&[], first, now), placed(None, 1));
        let second = Newcomer {
            dialing: 1,
            waiting: 1,
            ..first
        };
        assert_eq!(
            place(&[], second, now),
            placed(None, 0),
            "it is not known yet what works"
        );
    }

    #[test]
    fn a_connection_takes_an_idle_session_and_has_another_made_ready() {
        let now = Instant::now();
        let sessions = [private(long_before(now)), shared(0, now)];
        for newcomer in [UNKNOWN, SMALL] {
            assert_eq!(place(&sessions, newcomer, now), placed(Some(1), 1));
            let dialing = Newcomer {
                dialing: 1,
                ..newcomer
            };
            assert_eq!(place(&sessions, dialing, now).dial, 0, "one is on its way");
        }
    }

    #[test]
    fn connections_that_nothing_is_known_of_wait_for_sessions_of_their_own_where_the_way_is_short() {
        let now = Instant::now();
        let sessions = [private(now), shared(3, now)];
        assert_eq!(place(&sessions, UNKNOWN, now), placed(None, 1));
        let third = Newcomer {
            dialing: 1,
            waiting: 1,
            ..UNKNOWN
        };
        assert_eq!(
            place(&sessions, third, now),
            placed(None, 0),
            "a burst gets no more of them"
        );
    }

    #[test]
    fn where_the_way_is_long_those_of_one_moment_share() {
        let (now, far) = (
            Instant::now(),
            Newcomer {
                dialed_in: Some(FAR),
                ..UNKNOWN
            },
        );
        let (young, old) = (private(now), private(long_before(now)));
        assert_eq!(place(&[old, young], far, now).session, Some(1));
        assert_eq!(
            place(&[old, old], far, now).session,
            None,
            "those that have come to stay are left alone"
        );
    }

    #[test]
    fn a_burst_shares_after_the_first_few() {
        let now = Instant::now();
        let more = [private(now), private(now), shared(0, now)];
        assert_eq!(place(&more, UNKNOWN, now), placed(Some(0), 0));
        let other = Newcomer { port: 81, ..UNKNOWN };
        assert_eq!(
            place(&more, other, now),
            placed(Some(2), 1),
            "what comes to another port is of another kind"
        );
        let later = now + 2 * NEW;
        assert_eq!(place(&more, UNKNOWN, later), placed(Some(2), 1));
    }

    #[test]
    fn the_transfers_of_one_moment_are_spread_over_more_which_open_together() {
        let now = Instant::now();
        let waiting = |dialing| Newcomer {
            dialing,
            waiting: 10,
            ..UNKNOWN
        };
        let own = private(long_before(now));
        let few = [own, bulk(now), private(now)];
        assert_eq!(
            place(&few, waiting(0), now),
            placed(None, 6),
            "a young one that is not bulk yet is about to be"
        );
        assert_eq!(place(&few, waiting(6), now), placed(None, 0));
        let ready = [own, bulk(now), shared(0, now)];
        assert_eq!(place(&ready, waiting(0), now).session, Some(2));
        let mut enough = [bulk(now); 1 + TRANSFERS];
        enough[0] = own;
        enough[1].live = 2;
        assert_eq!(
            place(&enough, waiting(0), now),
            placed(Some(2), 1),
            "the others share them, and leave those of others alone"
        );
        let far = Newcomer {
            dialed_in: Some(FAR),
            ..waiting(0)
        };
        assert_eq!(place(&few, far, now).session, Some(1), "rather than wait");
        let other = Newcomer { port: 81, ..UNKNOWN };
        assert_eq!(place(&enough, other, now), placed(None, 2));
    }

    #[test]
    fn small_connections_share_few_sessions_and_leave_those_of_others_alone() {
        let now = Instant::now();
        let own = private(now);
        assert_eq!(
            place(&[own, shared(2, now), shared(0, now)], SMALL, now),
            placed(Some(1), 0)
        );
        assert_eq!(
            place(&[own, shared(WORKERS, now), shared(0, now)], SMALL, now),
            placed(Some(2), 1),
            "each has a worker of the peer for itself as long as that is possible"
        );
        let full = [shared(40, now), shared(41, now), shared(42, now), shared(43, now)];
        let sessions = [&full[..], &[shared(0, now)]].concat();
        assert_eq!(
            place(&sessions, SMALL, now),
            placed(Some(0), 0),
            "the spare is for others"
        );
    }

    #[test]
    fn small_connections_wait_a_moment_but_not_for_long() {
        let now = Instant::now();
        let far = Newcomer {
            dialed_in: Some(FAR),
            ..SMALL
        };
        assert_eq!(place(&[private(now)], SMALL, now).session, None);
        assert_eq!(place(&[private(now)], far, now), placed(Some(0), 1));
    }

    #[test]
    fn a_crowd_shares_and_leaves_the_first_alone() {
        let now = Instant::now();
        let mut sessions: Vec<Load> = (0..MAX_OPEN as u32)
            .map(|older| private(now.checked_sub(NEW * older).unwrap()))
            .collect();
        for _ in 0..100 {
            let placed = place(&sessions, UNKNOWN, now);
            assert_eq!(placed.dial, 0);
            sessions[placed.session.unwrap()].live += 1;
        }
        let counts: Vec<usize> = sessions.iter().map(|load| load.live).collect();
        assert_eq!(counts, [51, 51, 1, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn sessions_that_are_closed_to_newcomers_get_none_and_do_not_count() {
        let now = Instant::now();
        let closed = Load {
            open: false,
            ..private(now)
        };
        let sessions = [closed; 2 * MAX_OPEN];
        assert_eq!(place(&sessions, UNKNOWN, now), placed(None, 2));
        assert_eq!(
            place(&[closed; MAX], UNKNOWN, now),
            placed(Some(0), 0),
            "there is a bound"
        );
    }
}
