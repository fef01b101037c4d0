use std::collections::BTreeMap;
use std::io::Write as _;

use super::*;

fn load(
    flags: &[(&'static Setting, &str)],
    file: Option<&str>,
    environment: &[(&str, &str)],
) -> Result<Layers, Error> {
    let mut stored = tempfile::NamedTempFile::new().unwrap();
    stored.write_all(file.unwrap_or_default().as_bytes()).unwrap();
    let named = file.map(|_| stored.path().to_owned());
    let environment: BTreeMap<_, _> = environment.iter().copied().collect();
    let flags: Vec<_> = flags
        .iter()
        .map(|(setting, text)| (*setting, (*text).to_owned()))
        .collect();
    Layers::load(&flags, named, |name| {
        environment.get(name).map(|text| (*text).to_owned())
    })
}

fn config(environment: &[(&str, &str)]) -> Config {
    Config::new(&load(&[], None, environment).unwrap(), &Account::default()).unwrap()
}

#[test]
fn every_default_is_a_valid_value() {
    let config = config(&[]);
    assert_eq!(config.proxy.port, 80);
    assert_eq!(config.proxy.idle_timeout, Duration::from_mins(10));
    assert_eq!(config.drain_timeout, Duration::from_secs(30));
    assert_eq!(
        config.proxy.retry,
        RetryPolicy {
            max_retries: 3,
            base_delay: Duration::from_millis(200)
        }
    );
    assert_eq!(config.pending, Vec::<String>::new());
}

#[test]
fn flags_win_over_environment_over_file() {
    let file = Some("port = 1\nnamespace = \"file\"\ncontext = \"file\"\n");
    let environment = [("KUBE_TUNNEL_PORT", "2"), ("KUBE_TUNNEL_NAMESPACE", "env")];
    let layers = load(&[(&setting::PORT, "3")], file, &environment).unwrap();
    let config = Config::new(&layers, &Account::default()).unwrap();
    assert_eq!(config.proxy.port, 3);
    assert_eq!(config.proxy.naming.namespace.as_deref(), Some("env"));
    assert_eq!(config.k8s.context.as_deref(), Some("file"));
}

#[test]
fn the_seeds_variables_are_bounded_and_never_stop_the_program() {
    for (text, expected) in [("0", 0), ("10", 10), ("-1", 3), ("11", 3), ("x", 3)] {
        let layers = load(&[], None, &[("PROXY_MAX_RETRIES", text)]).unwrap();
        assert_eq!(
            Config::new(&layers, &Account::default())
                .unwrap()
                .proxy
                .retry
                .max_retries,
            expected,
            "{text}"
        );
        let warned = layers.warnings().iter().any(|line| {
            line.contains("PROXY_MAX_RETRIES") && line.contains(text) && line.contains("0 to 10")
        });
        assert_eq!(warned, expected == 3, "{:?}", layers.warnings());
    }
    for (text, expected) in [("50", 50), ("5000", 5000), ("49", 200), ("5001", 200)] {
        let delay = config(&[("PROXY_RETRY_DELAY_MS", text)]).proxy.retry.base_delay;
        assert_eq!(delay.as_millis(), expected, "{text}");
    }
    assert_eq!(
        load(&[], None, &[("LOG_LEVEL", "loud")])
            .unwrap()
            .warnings()
            .len(),
        1
    );
}

#[test]
fn the_own_name_of_a_variable_wins_over_the_seeds() {
    let environment = [("PROXY_MAX_RETRIES", "1"), ("KUBE_TUNNEL_MAX_RETRIES", "2")];
    assert_eq!(config(&environment).proxy.retry.max_retries, 2);
}

#[test]
fn an_own_name_that_is_empty_or_bad_leaves_the_word_to_the_seeds() {
    for own in ["", "x", "11"] {
        let environment = [("KUBE_TUNNEL_MAX_RETRIES", own), ("PROXY_MAX_RETRIES", "5")];
        let layers = load(&[], None, &environment).unwrap();
        assert_eq!(
            layers.value(&setting::MAX_RETRIES).text.as_deref(),
            Some("5"),
            "{own:?}"
        );
        assert_eq!(layers.warnings().len(), usize::from(!own.is_empty()), "{own:?}");
    }
    let both_bad = [("KUBE_TUNNEL_LOG_LEVEL", "loud"), ("LOG_LEVEL", "mute")];
    let layers = load(&[], None, &both_bad).unwrap();
    assert_eq!(layers.value(&setting::LOG_LEVEL).source, Source::Default);
    assert_eq!(layers.warnings().len(), 2, "{:?}", layers.warnings());
}

#[test]
fn a_warning_says_nothing_of_the_value_that_counts() {
    let environment = [("PROXY_MAX_RETRIES", "99")];
    let layers = load(&[(&setting::MAX_RETRIES, "5")], None, &environment).unwrap();
    assert_eq!(
        layers.warnings(),
        ["PROXY_MAX_RETRIES=\"99\" is passed over: expected a number from 0 to 10"]
    );
    assert_eq!(layers.value(&setting::MAX_RETRIES).source, Source::Flag);
}

#[test]
fn the_address_of_a_service_of_our_name_is_not_taken_for_our_port() {
    for link in [
        "tcp://10.96.12.34:80",
        "udp://[fd00::1]:53",
        "sctp://10.96.12.34:80",
    ] {
        assert_eq!(config(&[("KUBE_TUNNEL_PORT", link)]).proxy.port, 80, "{link}");
    }
    assert!(load(&[], None, &[("KUBE_TUNNEL_PORT", "http://10.96.12.34:80")]).is_err());
    assert!(load(&[(&setting::PORT, "tcp://10.96.12.34:80")], None, &[]).is_err());
}

#[test]
fn a_namespace_that_no_host_could_have_is_refused() {
    let read = |namespace: &str| {
        let layers = load(&[(&setting::NAMESPACE, namespace)], None, &[]).unwrap();
        Config::new(&layers, &Account::default()).map(|config| config.proxy.naming.namespace)
    };
    assert_eq!(read("shop-2").unwrap().as_deref(), Some("shop-2"));
    assert_eq!(read("").unwrap(), None);
    for bad in ["Shop", "a.b", "shop ", "-shop"] {
        let error = read(bad).unwrap_err().to_string();
        assert!(
            error.contains("--namespace") && error.contains(bad) && error.contains("DNS label"),
            "{error}"
        );
    }
}

#[test]
fn other_bad_values_name_their_place() {
    let error = load(&[], None, &[("KUBE_TUNNEL_PORT", "http")])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("KUBE_TUNNEL_PORT") && error.contains("0 to 65535"),
        "{error}"
    );
    let error = load(&[(&setting::IDLE_TIMEOUT, "0s")], None, &[])
        .unwrap_err()
        .to_string();
    assert!(error.contains("--idle-timeout"), "{error}");
    let layers = load(&[(&setting::BIND, "everywhere")], None, &[]).unwrap();
    assert!(
        Config::new(&layers, &Account::default())
            .unwrap_err()
            .to_string()
            .contains("--bind")
    );
}

#[test]
fn an_unknown_key_or_a_missing_file_is_an_error() {
    let error = load(&[], Some("prot = 8080"), &[]).unwrap_err().to_string();
    assert!(error.contains("unknown key \"prot\""), "{error}");
    let missing = Layers::load(&[], Some("/nowhere/config.toml".into()), |_| None);
    assert!(matches!(missing, Err(Error::BadFile { .. })));
}

#[test]
fn the_file_at_the_default_place_is_read_when_it_exists() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("kube-tunnel");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("config.toml"), "port = 8081").unwrap();
    let variable = |name: &str| (name == "XDG_CONFIG_HOME").then(|| home.path().display().to_string());
    let layers = Layers::load(&[], None, variable).unwrap();
    assert_eq!(
        Config::new(&layers, &Account::default()).unwrap().proxy.port,
        8081
    );
}

#[test]
fn what_is_shown_can_be_read_again() {
    let layers = load(&[(&setting::PORT, "8080"), (&setting::NO_DNS, "T")], None, &[]).unwrap();
    let shown = show(&layers);
    let again = load(&[], Some(&shown), &[]).unwrap();
    let (first, second) = (
        Config::new(&layers, &Account::default()).unwrap(),
        Config::new(&again, &Account::default()).unwrap(),
    );
    assert_eq!(
        Config {
            pending: vec![],
            ..first
        },
        Config {
            pending: vec![],
            ..second
        },
        "{shown}"
    );
}

#[test]
fn settings_of_features_to_come_are_reported() {
    assert_eq!(
        config(&[("KUBE_TUNNEL_NO_DNS", "true")]).pending,
        ["KUBE_TUNNEL_NO_DNS"]
    );
}

#[test]
fn keys_are_unique_and_every_setting_is_listed_with_help() {
    let keys: std::collections::BTreeSet<_> = setting::ALL.iter().map(|setting| setting.key).collect();
    assert_eq!(keys.len(), setting::ALL.len());
    assert!(
        setting::ALL
            .iter()
            .all(|setting| !setting.help.is_empty() && !setting.help.ends_with('.'))
    );
}
