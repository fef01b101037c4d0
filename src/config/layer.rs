//! Merges the places that a value can come from: flags over environment over file over defaults.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::config::setting::{self, Setting};
use crate::config::{Error, file};

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nobody set it.
    Default,
    /// The configuration file.
    File(PathBuf),
    /// This variable of the environment.
    Environment(String),
    /// The command line.
    Flag,
}

impl Source {
    /// Names the place for messages.
    #[must_use]
    pub fn origin(&self, setting: &Setting) -> String {
        match self {
            Self::Default => "default".into(),
            Self::File(path) => format!("{} in {}", setting.key, path.display()),
            Self::Environment(variable) => variable.clone(),
            Self::Flag => format!("--{}", setting.key),
        }
    }
}

/// A value and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// The value as text; nothing when there is no default either.
    pub text: Option<String>,
    /// Where it came from.
    pub source: Source,
}

/// The merged values of all settings.
#[derive(Debug, Default)]
pub struct Layers {
    /// What was set, by key.
    values: BTreeMap<&'static str, Value>,
    /// What was passed over, to be logged once there is a log.
    warnings: Vec<String>,
}

impl Layers {
    /// Merges everything. `flags` holds what the command line set, `file` the configuration file that was named, and
    /// `variable` reads the environment.
    ///
    /// # Errors
    /// The first mistake in the file or the environment.
    pub fn load(
        flags: &[(&'static Setting, String)],
        file: Option<PathBuf>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, Error> {
        let mut layers = Self::default();
        if let Some((path, entries)) = file::read(file, &variable)? {
            for (setting, text) in entries {
                layers.set(setting, text, Source::File(path.clone()))?;
            }
        }
        for setting in setting::ALL {
            layers.read_environment(setting, &variable)?;
        }
        for (setting, text) in flags {
            layers.set(setting, text.clone(), Source::Flag)?;
        }
        Ok(layers)
    }

    fn read_environment(
        &mut self,
        setting: &'static Setting,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<(), Error> {
        for name in setting.variables() {
            let meant = |text: &String| !text.is_empty() && !is_service_link(setting, text);
            let Some(text) = variable(&name).filter(meant) else {
                continue;
            };
            match check(setting, &text) {
                Err(reason) if setting.lenient => {
                    let warning = format!("{name}={text:?} is passed over: {reason}");
                    self.warnings.push(warning);
                }
                _ => return self.set(setting, text, Source::Environment(name)),
            }
        }
        Ok(())
    }

    fn set(&mut self, setting: &'static Setting, text: String, source: Source) -> Result<(), Error> {
        if let Err(reason) = check(setting, &text) {
            return Err(Error::BadValue {
                origin: source.origin(setting),
                value: text,
                reason,
            });
        }
        self.values.insert(
            setting.key,
            Value {
                text: Some(text),
                source,
            },
        );
        Ok(())
    }

    /// Returns the value of a setting.
    #[must_use]
    pub fn value(&self, setting: &Setting) -> Value {
        let default = || Value {
            text: setting.default.map(str::to_owned),
            source: Source::Default,
        };
        self.values.get(setting.key).cloned().unwrap_or_else(default)
    }

    /// Returns what was passed over while merging.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns the text of a setting, or nothing when it has no value or an empty one.
    pub(super) fn text(&self, setting: &Setting) -> Option<String> {
        self.value(setting).text.filter(|text| !text.is_empty())
    }

    /// Parses a setting that may have no value.
    pub(super) fn optional<T>(&self, setting: &Setting) -> Result<Option<T>, Error>
    where
        T: FromStr,
        T::Err: Display,
    {
        match self.text(setting) {
            Some(_) => self.parse(setting).map(Some),
            None => Ok(None),
        }
    }

    /// Parses a setting that always has a value.
    pub(super) fn parse<T>(&self, setting: &Setting) -> Result<T, Error>
    where
        T: FromStr,
        T::Err: Display,
    {
        let Value { text, source } = self.value(setting);
        let text = text.unwrap_or_default();
        text.parse().map_err(|reason: T::Err| Error::BadValue {
            origin: source.origin(setting),
            value: text.clone(),
            reason: reason.to_string(),
        })
    }

    pub(super) fn duration(&self, setting: &Setting) -> Result<Duration, Error> {
        self.read(setting, setting::duration)
    }

    pub(super) fn switch(&self, setting: &Setting) -> Result<bool, Error> {
        self.read(setting, setting::switch)
    }

    fn read<T>(&self, setting: &Setting, parse: impl Fn(&str) -> Option<T>) -> Result<T, Error> {
        let Value { text, source } = self.value(setting);
        let text = text.unwrap_or_default();
        parse(&text).ok_or_else(|| Error::BadValue {
            origin: source.origin(setting),
            reason: setting.kind.check(&text).err().unwrap_or_default(),
            value: text,
        })
    }
}

/// Whether a variable is Kubernetes' own: it puts the address of every Service of the namespace into a pod's environment (Kubernetes
/// documentation, "Service", environment variables), that of one called `kube-tunnel` into `KUBE_TUNNEL_PORT`.
fn is_service_link(setting: &Setting, text: &str) -> bool {
    let schemes = ["tcp://", "udp://", "sctp://"];
    setting.key == setting::PORT.key && schemes.iter().any(|scheme| text.starts_with(scheme))
}

/// Checks a value as far as it can be at its place; the log's filter is checked here too, because a bad one in the
/// environment must not stop the program.
fn check(setting: &Setting, text: &str) -> Result<(), String> {
    setting.kind.check(text)?;
    if setting.key == setting::LOG_LEVEL.key {
        text.parse::<crate::telemetry::Filter>().map(drop)?;
    }
    Ok(())
}
