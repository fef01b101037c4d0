//! Rights beyond those of the person that the program works for. Started through sudo or doas it works as the user who
//! typed that: everything is read, run and written as them, and root's rights serve what needs them and nothing else.
//!
//! Two steps, because the port is known only after the configuration has been read. [`Privileges::assume`] takes on the
//! user's ids and keeps root's aside, for [`Privileges::raised`]; [`Privileges::give_up`] throws those away for good. Already
//! the first step makes the user's id the real one, so that a program started in between could not get root's back.

mod account;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(target_os = "linux"))]
mod other;

use std::io;

pub use account::Account;

use account::Invoker;
#[cfg(target_os = "linux")]
use linux::Held;
#[cfg(not(target_os = "linux"))]
use other::Held;

/// Why the program does not start with the rights it has. Each prints as one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// sudo or doas left a variable that makes no sense; to go on as root would be the wrong guess.
    #[error(
        "{variable}={value:?} does not name a user; to work for root itself, start with `env -u {variable}`"
    )]
    BadVariable {
        /// The variable's name.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// The user database cannot be read.
    #[error("cannot look up the user who called sudo: {0}")]
    Lookup(#[source] io::Error),
    /// The kernel refuses other ids, as in a user namespace that does not know them.
    #[error(
        "cannot work as user {user}, who called sudo: {source}; start without sudo and with -port=8080, or `env -u SUDO_UID -u DOAS_USER`"
    )]
    Refused {
        /// The user's name, or number.
        user: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Root's rights came back although they had been given up.
    #[error("root's rights can be regained after they were given up; start without sudo and with -port=8080")]
    Regained,
    /// This operating system is not supported.
    #[error(
        "this version cannot give root's rights up on this system; start without sudo and with -port=8080"
    )]
    Unsupported,
}

/// The rights of this process.
#[derive(Debug)]
pub struct Privileges {
    account: Account,
    /// Root's rights, set aside; nothing when the process never had rights beyond its account's.
    held: Option<Held>,
}

impl Privileges {
    /// Leaves the process as it was started: it works for whoever it runs as.
    #[must_use]
    pub fn own() -> Self {
        Self {
            account: Account::own(),
            held: None,
        }
    }

    /// Finds out whom the process works for, and takes on their ids if root runs it for another user. `variable` reads the
    /// environment.
    ///
    /// # Errors
    /// An [`Error`]; the process must then end, for it may have any of both users' rights.
    pub fn assume(variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        if !is_root() {
            return Ok(Self::own());
        }
        let Some(invoker) = Invoker::find(variable)? else {
            return Ok(Self::own());
        };
        let (account, held) = Held::assume(&invoker)?;
        Ok(Self {
            account,
            held: Some(held),
        })
    }

    /// Returns whom the process works for.
    #[must_use]
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// Does one thing with all the rights that the process was started with. Ids are the process's: no other
    /// thread may be opening anything.
    ///
    /// # Errors
    /// [`Error::Refused`] when the kernel changes no ids; the process must then end.
    pub fn raised<T>(&self, action: impl FnOnce() -> T) -> Result<T, Error> {
        match &self.held {
            None => Ok(action()),
            Some(held) => held.raised(action),
        }
    }

    /// Gives up what was set aside, for ever, and makes sure of that.
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::Regained`]; the process must then end.
    pub fn give_up(self) -> Result<(), Error> {
        self.held.map_or(Ok(()), Held::give_up)
    }
}

#[cfg(unix)]
fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[cfg(not(unix))]
fn is_root() -> bool {
    false
}
