//! The configuration file: TOML, one key for each setting, unknown keys are errors.

use std::io;
use std::path::PathBuf;

use crate::config::Error;
use crate::config::setting::{self, Setting};

/// The file's place under the user's configuration folder.
const PLACE: &str = "kube-tunnel/config.toml";

type Entries = Vec<(&'static Setting, String)>;

/// Reads the file that was named, or the one at the default place if it exists.
pub(super) fn read(
    named: Option<PathBuf>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<(PathBuf, Entries)>, Error> {
    let must_exist = named.is_some();
    let Some(path) = named.or_else(|| default_place(variable)) else {
        return Ok(None);
    };
    let bad = |reason: String| Error::BadFile {
        path: path.clone(),
        reason,
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let entries = parse(&text).map_err(bad)?;
            Ok(Some((path, entries)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => Ok(None),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// `$XDG_CONFIG_HOME`, or `~/.config` (XDG Base Directory Specification).
fn default_place(variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let configured = variable("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    let folder = configured.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".config")))?;
    Some(folder.join(PLACE))
}

fn parse(text: &str) -> Result<Entries, String> {
    let table: toml::Table = text
        .parse()
        .map_err(|error: toml::de::Error| error.to_string().replace('\n', " "))?;
    table.into_iter().map(|(key, value)| entry(&key, value)).collect()
}

fn entry(key: &str, value: toml::Value) -> Result<(&'static Setting, String), String> {
    let known = setting::ALL.iter().find(|setting| setting.key == key);
    let setting =
        known.ok_or_else(|| format!("unknown key {key:?}; kube-tunnel config shows the keys there are"))?;
    let text = match value {
        toml::Value::String(text) => text,
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Boolean(switch) => switch.to_string(),
        other => {
            return Err(format!(
                "{key}: expected a string, a number or a truth value, not {}",
                other.type_str()
            ));
        }
    };
    Ok((setting, text))
}
