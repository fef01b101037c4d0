//! The command line: Go and GNU syntax alike, one flag for each setting, and the subcommands.

#[cfg(feature = "testing")]
mod demo;
mod run;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgMatches, Command};
use tracing::warn;

use crate::config::setting::{self, Kind, Setting};
use crate::config::{self, Config, Layers};
use crate::privileges::{Account, Privileges};
use crate::telemetry;

/// Exit code of a mistake in the command line, the environment or the configuration file.
const USAGE: u8 = 2;

/// Runs the program; `arguments` starts with its name. Results go to stdout, everything else to stderr.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let matches = match command().try_get_matches_from(arguments.into_iter().map(gnu_syntax)) {
        Ok(matches) => matches,
        Err(error) => return refuse(&error),
    };
    let (name, matches) = matches.subcommand().unwrap_or(("run", &matches));
    // Before anything is read: the files are the user's who called sudo, and so are the rights to read them.
    let privileges = match Privileges::assume(|name| std::env::var(name).ok()) {
        Ok(privileges) => privileges,
        Err(error) => {
            complain(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
    let account = privileges.account();
    let loaded = layers(matches, account).and_then(|layers| Ok((Config::new(&layers, account)?, layers)));
    let (config, layers) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            complain(&format!("{error}; see kube-tunnel --help"));
            return ExitCode::from(USAGE);
        }
    };
    if name == "config" {
        for warning in layers.warnings() {
            complain(warning);
        }
        return print(&config::show(&layers));
    }
    let log = telemetry::init(&config.telemetry);
    for warning in layers.warnings() {
        warn!("{warning}");
    }
    let done = match name {
        #[cfg(feature = "testing")]
        "demo" => demo::run(config, &layers, privileges),
        _ => run::run(&config, privileges),
    };
    drop(log);
    match done {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Describes the command line to clap; parser, help and errors all come from here.
#[must_use]
pub fn command() -> Command {
    let command = Command::new("kube-tunnel")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Reach every service.namespace.svc.cluster.local of a Kubernetes cluster through one local port")
        .after_help(
            "Flags may be written as -port=8080, -port 8080 or --port=8080. Each is also a variable (KUBE_TUNNEL_PORT) and a key\n\
             of the configuration file. Example: kube-tunnel -port=8080, then\n\
             curl -H 'Host: web.default.svc.cluster.local' http://localhost:8080/",
        )
        .args_override_self(true)
        .subcommand_negates_reqs(true)
        .arg(
            Arg::new("config-file")
                .long("config")
                .value_name("PATH")
                .help("Configuration file [default: kube-tunnel/config.toml in the user's configuration folder]")
                .global(true),
        )
        .args(setting::ALL.iter().map(|setting| flag(setting)))
        .subcommand(Command::new("run").about("Run the proxy (the default)"))
        .subcommand(Command::new("config").about("Print the configuration in force and where each value came from"));
    #[cfg(feature = "testing")]
    let command = command
        .subcommand(Command::new("demo").about("Show everything on a miniature cluster inside this program"));
    command
}

fn flag(setting: &Setting) -> Arg {
    let variables: Vec<_> = setting.variables().collect();
    let default = setting
        .default
        .map_or_else(String::new, |default| format!(", default: {default}"));
    let arg = Arg::new(setting.key).long(setting.key).global(true).help(format!(
        "{} [env: {}{default}]",
        setting.help,
        variables.join(", ")
    ));
    match setting.kind {
        Kind::Switch => arg
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_name("BOOL"),
        Kind::Number { .. } => arg.value_name("N"),
        Kind::Duration => arg.value_name("DURATION"),
        Kind::Choice(words) => arg.value_name(words.join("|")),
        Kind::Text(_) => arg.value_name("VALUE"),
    }
}

/// Turns Go's `-name` into `--name`. There are no clusters of short flags, so one dash and several letters mean one name.
fn gnu_syntax(argument: OsString) -> OsString {
    match argument.to_str() {
        Some(text) if text.len() > 2 && text.starts_with('-') && text.as_bytes()[1].is_ascii_alphabetic() => {
            format!("-{text}").into()
        }
        _ => argument,
    }
}

fn layers(matches: &ArgMatches, account: &Account) -> Result<Layers, config::Error> {
    let flags: Vec<_> = setting::ALL
        .iter()
        .filter_map(|setting| Some((*setting, matches.get_one::<String>(setting.key)?.clone())))
        .collect();
    let file = matches.get_one::<String>("config-file").map(PathBuf::from);
    Layers::load(&flags, file, |name| match name {
        "HOME" => Some(account.home.as_ref()?.to_str()?.to_owned()),
        _ => std::env::var(name).ok(),
    })
}

/// Ends for a command line that asks for help or makes no sense.
fn refuse(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return print(&error.render().to_string());
    }
    let text = error.render().to_string();
    let first = text.lines().next().unwrap_or_default();
    let mut line = first.trim_start_matches("error: ").to_owned();
    if let Some(ContextValue::String(similar)) = error.get(ContextKind::SuggestedArg) {
        line.push_str(&format!("; did you mean {similar}?"));
    }
    complain(&format!("{line}; see kube-tunnel --help"));
    ExitCode::from(USAGE)
}

/// Prints a result. A reader that has gone away is no failure.
fn print(text: &str) -> ExitCode {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(&error.to_string());
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Says on stderr, in one line, why the program ends.
fn complain(text: &str) {
    // Nothing is left to tell it to when stderr is closed.
    let _ = writeln!(io::stderr().lock(), "kube-tunnel: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Config, String> {
        let arguments = std::iter::once("kube-tunnel")
            .chain(arguments.iter().copied())
            .map(OsString::from);
        let matches = command()
            .try_get_matches_from(arguments.map(gnu_syntax))
            .map_err(|error| error.to_string())?;
        let (_, matches) = matches.subcommand().unwrap_or(("run", &matches));
        let account = Account::default();
        let layers = layers(matches, &account).map_err(|error| error.to_string())?;
        Config::new(&layers, &account).map_err(|error| error.to_string())
    }

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn go_and_gnu_syntax_mean_the_same() {
        for arguments in [
            &["-port", "8080"][..],
            &["-port=8080"],
            &["--port", "8080"],
            &["--port=8080"],
            &["run", "-port=8080"],
            &["-port=8080", "run"],
            &["-port=1", "-port=8080"],
        ] {
            assert_eq!(parse(arguments).unwrap().proxy.port, 8080, "{arguments:?}");
        }
    }

    #[test]
    fn a_switch_takes_gos_truth_values() {
        for (argument, expected) in [
            ("-cleanup", true),
            ("--cleanup", true),
            ("-cleanup=true", true),
            ("-cleanup=1", true),
            ("-cleanup=false", false),
            ("--cleanup=F", false),
        ] {
            assert_eq!(parse(&[argument]).unwrap().cleanup, expected, "{argument}");
        }
        assert!(parse(&["-cleanup=maybe"]).is_err());
    }

    #[test]
    fn unknown_flags_and_bad_values_are_refused() {
        for arguments in [
            &["-prot=1"][..],
            &["--port=http"],
            &["-port"],
            &["serve"],
            &["-idle-timeout=0"],
            &["-namespace=Shop"],
        ] {
            assert!(parse(arguments).is_err(), "{arguments:?}");
        }
    }
}
