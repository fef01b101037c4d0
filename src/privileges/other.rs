//! Systems whose ids this version does not change; it refuses to work as root for somebody else there.

use crate::privileges::Error;
use crate::privileges::account::{Account, Invoker};

/// There is none.
#[derive(Debug)]
pub(super) enum Held {}

impl Held {
    pub(super) fn assume(_: &Invoker) -> Result<(Account, Self), Error> {
        Err(Error::Unsupported)
    }

    pub(super) fn raised<T>(&self, _: impl FnOnce() -> T) -> Result<T, Error> {
        match *self {}
    }

    pub(super) fn give_up(self) -> Result<(), Error> {
        match self {}
    }
}
