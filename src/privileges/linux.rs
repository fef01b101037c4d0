//! User and group ids on Linux. The C library's wrappers change them for all threads of the process at once (nptl(7)),
//! the kernel's own calls would do so for one.

use std::ffi::CString;
use std::io;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, User, getresuid, initgroups, setgroups, setresgid, setresuid};
use tracing::info;

use crate::privileges::Error;
use crate::privileges::account::{Account, Invoker};

/// Leaves one of the three ids as it is (setresuid(2)).
const KEEP: Uid = Uid::from_raw(u32::MAX);
const ROOT: Uid = Uid::from_raw(0);

/// Root's rights, which lie in the saved user id while the user's own is the real and the effective one.
#[derive(Debug)]
pub(super) struct Held {
    uid: Uid,
    /// For messages.
    user: String,
}

impl Held {
    /// Takes on the invoker's groups and ids. Groups first: afterwards there is no right to change them.
    pub(super) fn assume(invoker: &Invoker) -> Result<(Account, Self), Error> {
        let Person { uid, gid, name, home } = Person::find(invoker)?;
        let user = name.clone().unwrap_or_else(|| uid.to_string());
        let held = Self { uid, user };
        let groups = match name.map(CString::new) {
            Some(Ok(name)) => initgroups(&name, gid),
            _ => setgroups(&[gid]),
        };
        groups
            .and_then(|()| setresgid(gid, gid, gid))
            .and_then(|()| setresuid(uid, uid, ROOT))
            .map_err(|errno| held.refused(errno))?;
        let folder = home.as_deref().unwrap_or_else(|| "/".as_ref());
        let account = Account {
            environment: vec![
                ("HOME", folder.to_string_lossy().into_owned()),
                ("USER", held.user.clone()),
                ("LOGNAME", held.user.clone()),
            ],
            home,
        };
        Ok((account, held))
    }

    pub(super) fn raised<T>(&self, action: impl FnOnce() -> T) -> Result<T, Error> {
        setresuid(KEEP, ROOT, KEEP).map_err(|errno| self.refused(errno))?;
        let done = action();
        setresuid(KEEP, self.uid, KEEP).map_err(|errno| self.refused(errno))?;
        Ok(done)
    }

    pub(super) fn give_up(self) -> Result<(), Error> {
        let uid = self.uid;
        setresuid(uid, uid, uid).map_err(|errno| self.refused(errno))?;
        let ids = getresuid().map_err(|errno| self.refused(errno))?;
        let all_given = [ids.real, ids.effective, ids.saved].iter().all(|id| *id == uid);
        // A process that had kept the capability CAP_SETUID, by whatever securebits, could go back (capabilities(7)).
        if !all_given || setresuid(KEEP, ROOT, KEEP).is_ok() {
            return Err(Error::Regained);
        }
        info!(
            user = self.user,
            "root's rights are given up for those of the user who called sudo"
        );
        Ok(())
    }

    fn refused(&self, errno: Errno) -> Error {
        Error::Refused {
            user: self.user.clone(),
            source: errno.into(),
        }
    }
}

/// What the user database knows of the invoker. It need not know them: sudo takes bare numbers too.
struct Person {
    uid: Uid,
    gid: Gid,
    name: Option<String>,
    home: Option<PathBuf>,
}

impl Person {
    fn find(invoker: &Invoker) -> Result<Self, Error> {
        let lookup = |errno: Errno| Error::Lookup(io::Error::from(errno));
        match invoker {
            Invoker::Ids { uid, gid } => {
                let uid = Uid::from_raw(*uid);
                let known = User::from_uid(uid).map_err(lookup)?;
                let gid = gid.map(Gid::from_raw).or(known.as_ref().map(|user| user.gid));
                let Some(gid) = gid else {
                    return Err(bad("SUDO_UID", &uid.to_string()));
                };
                let (name, home) = known.map_or((None, None), |user| (Some(user.name), home(user.dir)));
                Ok(Self { uid, gid, name, home })
            }
            Invoker::Name(name) => {
                let user = User::from_name(name).map_err(lookup)?;
                let user = user.filter(|user| !user.uid.is_root());
                let user = user.ok_or_else(|| bad("DOAS_USER", name))?;
                Ok(Self {
                    uid: user.uid,
                    gid: user.gid,
                    name: Some(user.name),
                    home: home(user.dir),
                })
            }
        }
    }
}

fn home(folder: PathBuf) -> Option<PathBuf> {
    Some(folder).filter(|folder| folder.is_absolute())
}

fn bad(variable: &'static str, value: &str) -> Error {
    Error::BadVariable {
        variable,
        value: value.to_owned(),
    }
}
