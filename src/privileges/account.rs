//! Whom the program works for, and how sudo and doas say who that is.

use std::path::PathBuf;

use crate::privileges::Error;

/// The person that the program works for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    /// The home folder, if there is one.
    pub home: Option<PathBuf>,
    /// What a program that is started for this person must find in its environment, where ours is another's.
    pub environment: Vec<(&'static str, String)>,
}

impl Account {
    /// The person whose environment this process has.
    #[must_use]
    pub fn own() -> Self {
        Self {
            home: std::env::home_dir(),
            environment: Vec::new(),
        }
    }
}

/// The user who had root start the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Invoker {
    /// As sudo says it: the user's id, and their group's.
    Ids { uid: u32, gid: Option<u32> },
    /// As doas says it.
    Name(String),
}

impl Invoker {
    /// Reads what sudo and doas leave in the environment (sudo(8), doas(1)). A user who is root already is no other user.
    pub(super) fn find(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Error> {
        if let Some(uid) = id("SUDO_UID", &variable)? {
            let gid = id("SUDO_GID", &variable)?;
            return Ok((uid != 0).then_some(Self::Ids { uid, gid }));
        }
        let name = variable("DOAS_USER").filter(|name| name != "root");
        Ok(name.map(Self::Name))
    }
}

/// Reads a user's or group's id. The highest number means "leave as it is" to the kernel and is nobody's.
fn id(name: &'static str, variable: impl Fn(&str) -> Option<String>) -> Result<Option<u32>, Error> {
    let Some(value) = variable(name) else {
        return Ok(None);
    };
    match value.parse() {
        Ok(id) if id != u32::MAX => Ok(Some(id)),
        _ => Err(Error::BadVariable {
            variable: name,
            value,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(environment: &[(&str, &str)]) -> Result<Option<Invoker>, Error> {
        Invoker::find(|name| {
            let found = environment.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn sudo_and_doas_say_who_called_them() {
        let sudo = |uid, gid| Some(Invoker::Ids { uid, gid });
        let rows = [
            (&[][..], None),
            (
                &[("SUDO_UID", "1000"), ("SUDO_GID", "100")],
                sudo(1000, Some(100)),
            ),
            (&[("SUDO_UID", "1000")], sudo(1000, None)),
            (&[("SUDO_UID", "0"), ("SUDO_GID", "0")], None),
            (&[("SUDO_USER", "alice")], None),
            (&[("DOAS_USER", "alice")], Some(Invoker::Name("alice".into()))),
            (&[("DOAS_USER", "root")], None),
        ];
        for (environment, expected) in rows {
            assert_eq!(find(environment).unwrap(), expected, "{environment:?}");
        }
    }

    #[test]
    fn a_value_that_names_nobody_is_not_taken_for_root() {
        for environment in [
            &[("SUDO_UID", "")][..],
            &[("SUDO_UID", "alice")],
            &[("SUDO_UID", "-1")],
            &[("SUDO_UID", "4294967295")],
            &[("SUDO_UID", "1000"), ("SUDO_GID", "4294967295")],
        ] {
            assert!(find(environment).is_err(), "{environment:?}");
        }
    }
}
