//! Which form of port-forward works in a cluster: found out once, remembered, doubted when something speaks against it, and
//! looked into again where a better form was refused.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::k8s::portforward::carrier::{Carrier, Carriers};

/// When better forms are tried again, where they were refused for good: a role may be granted, a proxy be taken away.
const LATER: Duration = Duration::from_mins(10);

/// The same where the refusals may have been a moment's trouble. Each further time is twice as far away.
const SOON: Duration = Duration::from_secs(30);

/// So many answers in a row that may be trouble, or may mean that the form does not get through any more, cast doubt on it.
const TROUBLES: u32 = 8;

/// What is known of a cluster's forms.
#[derive(Debug)]
pub(super) struct Memory {
    wanted: Carriers,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    known: Option<Known>,
    /// Counts the changes of the known form.
    changes: u64,
}

/// The form that worked last.
#[derive(Debug, Clone, Copy)]
struct Known {
    carrier: Carrier,
    /// Whether nothing has spoken against it since.
    sure: bool,
    /// How many doubtful answers it has met in a row.
    troubles: u32,
    /// When better forms are tried again, and how long after that once more.
    again_at: Instant,
    pause: Duration,
}

impl Memory {
    pub(super) fn new(wanted: Carriers) -> Self {
        Self {
            wanted,
            inner: Mutex::default(),
        }
    }

    /// Returns what the user wants.
    pub(super) fn wanted(&self) -> Carriers {
        self.wanted
    }

    /// Returns the forms to try, the one that worked last before the others.
    pub(super) fn order(&self) -> Vec<Carrier> {
        let last = self.lock().known.map(|known| known.carrier);
        let rest = self.wanted.order().iter().copied();
        let rest = rest.filter(|&carrier| Some(carrier) != last);
        last.into_iter().chain(rest).collect()
    }

    /// Tells whether any form has worked.
    pub(super) fn is_known(&self) -> bool {
        self.lock().known.is_some()
    }

    /// Tells whether a form is sure to work.
    pub(super) fn works(&self, carrier: Carrier) -> bool {
        let known = self.lock().known;
        known.is_some_and(|known| known.carrier == carrier && known.sure)
    }

    /// Returns a number that changes when another form turns out to work.
    pub(super) fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// Remembers that a form works. `doubtful`: better ones were refused in a way that may be a moment's trouble. `since`: the
    /// count of changes when it was tried; a better form that was found meanwhile stays.
    pub(super) fn note(&self, carrier: Carrier, doubtful: bool, since: u64, now: Instant) {
        let rank = |form| self.wanted.order().iter().position(|&other| other == form);
        let mut inner = self.lock();
        if let Some(known) = inner.known
            && inner.changes != since
            && rank(known.carrier) < rank(carrier)
        {
            return;
        }
        if let Some(known) = &mut inner.known
            && known.carrier == carrier
        {
            (known.sure, known.troubles) = (true, 0);
            return;
        }
        let pause = if doubtful { SOON } else { LATER };
        inner.changes += 1;
        inner.known = Some(Known {
            carrier,
            sure: true,
            troubles: 0,
            again_at: now + pause,
            pause,
        });
    }

    /// Returns the better forms when it is time to try them again; whoever asks first is to do it.
    pub(super) fn better(&self, now: Instant) -> &'static [Carrier] {
        let wanted = self.wanted.order();
        let mut inner = self.lock();
        let Some(known) = inner.known.as_mut().filter(|known| known.again_at <= now) else {
            return &[];
        };
        known.pause = (2 * known.pause).min(LATER);
        known.again_at = now + known.pause;
        let worse = wanted.iter().position(|&carrier| carrier == known.carrier);
        wanted.split_at(worse.unwrap_or_default()).0
    }

    /// Notes an answer to the form that worked last that may be trouble of the server's.
    pub(super) fn troubled(&self) {
        if let Some(known) = &mut self.lock().known {
            known.troubles += 1;
            known.sure &= known.troubles < TROUBLES;
        }
    }

    /// Has the form that worked last prove itself again: the way to the server may be another one now.
    pub(super) fn doubt(&self) {
        if let Some(known) = &mut self.lock().known {
            known.sure = false;
        }
    }

    /// Begins again with the best form, if this one is what worked last: another one works elsewhere.
    pub(super) fn forget(&self, carrier: Carrier) {
        let mut inner = self.lock();
        if inner.known.take_if(|known| known.carrier == carrier).is_some() {
            inner.changes += 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn better_forms_are_tried_again_by_one_and_less_often_each_time() {
        let (memory, mut now) = (Memory::new(Carriers::Auto), Instant::now());
        memory.note(Carrier::Channel, true, memory.changes(), now);
        for pause in [SOON, 2 * SOON, 4 * SOON] {
            assert!(memory.better(now + pause / 2).is_empty());
            now += pause;
            assert_eq!(memory.better(now), [Carrier::Spdy, Carrier::Tunnel]);
            assert!(memory.better(now).is_empty(), "somebody does it");
        }
    }

    #[test]
    fn a_form_that_works_again_and_again_does_not_put_off_the_better_ones() {
        let (memory, now) = (Memory::new(Carriers::Auto), Instant::now());
        for round in 0..=10 {
            memory.note(Carrier::Tunnel, false, memory.changes(), now + round * LATER / 10);
        }
        assert_eq!(memory.better(now + LATER), [Carrier::Spdy]);
    }

    #[test]
    fn a_worse_form_that_was_tried_before_a_better_one_was_found_does_not_replace_it() {
        let (memory, now) = (Memory::new(Carriers::Auto), Instant::now());
        memory.note(Carrier::Channel, false, memory.changes(), now);
        let since = memory.changes();
        memory.note(Carrier::Spdy, false, memory.changes(), now);
        memory.note(Carrier::Channel, false, since, now);
        assert!(memory.works(Carrier::Spdy));
        memory.note(Carrier::Channel, false, memory.changes(), now);
        assert!(memory.works(Carrier::Channel), "the better one has failed since");
    }

    #[test]
    fn nothing_is_better_than_the_best_or_than_what_is_wanted() {
        let now = Instant::now();
        for (wanted, carrier) in [
            (Carriers::Auto, Carrier::Spdy),
            (Carriers::Channel, Carrier::Channel),
        ] {
            let memory = Memory::new(wanted);
            memory.note(carrier, false, memory.changes(), now);
            assert!(memory.better(now + 2 * LATER).is_empty(), "{wanted:?}");
        }
    }

    #[test]
    fn what_is_refused_in_one_place_is_not_forgotten_for_others() {
        let (memory, now) = (Memory::new(Carriers::Auto), Instant::now());
        memory.note(Carrier::Spdy, false, memory.changes(), now);
        memory.forget(Carrier::Channel);
        assert!(memory.works(Carrier::Spdy));
        memory.note(Carrier::Channel, false, memory.changes(), now);
        memory.forget(Carrier::Channel);
        assert!(!memory.is_known());
    }

    #[test]
    fn trouble_that_does_not_end_casts_doubt_and_one_success_ends_it() {
        let (memory, now) = (Memory::new(Carriers::Auto), Instant::now());
        memory.note(Carrier::Spdy, false, memory.changes(), now);
        for _ in 1..TROUBLES {
            memory.troubled();
        }
        assert!(memory.works(Carrier::Spdy));
        memory.note(Carrier::Spdy, false, memory.changes(), now);
        for _ in 0..TROUBLES {
            assert!(memory.works(Carrier::Spdy));
            memory.troubled();
        }
        assert!(!memory.works(Carrier::Spdy));
    }
}
