//! Keeps the levels of `ARCHITECTURE.md`: a module imports only from lower ones.
#![expect(
    clippy::unwrap_used,
    reason = "a failed step fails the test, and the panic says where"
)]

use std::fs;
use std::path::{Path, PathBuf};

/// Every top-level module and its level. Modules of one level do not know each other, except as [`BESIDE`] allows.
const LEVELS: &[(&str, u8)] = &[
    ("cli", 5),
    ("app", 4),
    ("config", 3),
    ("k8s", 2),
    ("proxy", 2),
    ("registry", 1),
    ("tls", 1),
    ("traffic", 1),
    ("transport", 1),
    ("drain", 0),
    ("files", 0),
    ("name", 0),
    ("privileges", 0),
    ("runtime", 0),
    ("telemetry", 0),
];

/// Imports within one level: who may use whom.
const BESIDE: &[(&str, &str)] = &[("transport", "registry"), ("traffic", "registry")];

/// The double may use everything; besides tests only the command line uses it, for the demo.
const TESTING: &str = "testing";

fn level(module: &str) -> Option<u8> {
    LEVELS
        .iter()
        .find(|(name, _)| *name == module)
        .map(|(_, level)| *level)
}

fn allowed(from: &str, to: &str) -> bool {
    if from == to || from == "lib" || from == TESTING || (to == TESTING && from == "cli") {
        return true;
    }
    match (level(from), level(to)) {
        (Some(from_level), Some(to_level)) if from_level == to_level => BESIDE.contains(&(from, to)),
        (Some(from_level), Some(to_level)) => from_level > to_level,
        _ => false,
    }
}

/// Finds what follows each `crate::` in a line; a brace comes out as an empty name, which nothing allows.
fn imports(line: &str) -> impl Iterator<Item = &str> {
    line.split("crate::").skip(1).map(|rest| {
        let end = rest
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        &rest[..end]
    })
}

fn violations(file: &Path, module: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.contains("super::super") {
            found.push(format!(
                "{}:{}: super::super hides where an import points",
                file.display(),
                number + 1
            ));
        }
        for target in imports(line).filter(|target| !allowed(module, target)) {
            found.push(format!(
                "{}:{}: {module} must not use crate::{target}",
                file.display(),
                number + 1
            ));
        }
    }
    found
}

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// The top-level module of a file below `src`.
fn module(root: &Path, file: &Path) -> String {
    let first = file.strip_prefix(root).unwrap().components().next().unwrap();
    Path::new(first.as_os_str())
        .file_stem()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned()
}

#[test]
fn every_module_imports_only_from_lower_levels() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let found: Vec<String> = files
        .iter()
        .filter(|file| !file.ends_with("src/main.rs"))
        .flat_map(|file| violations(file, &module(&root, file), &fs::read_to_string(file).unwrap()))
        .collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn an_import_upwards_or_sideways_is_found() {
    let caught = |module: &str, line: &str| violations(Path::new("x.rs"), module, line).len();
    assert_eq!(caught("proxy", "use crate::k8s::Cluster;"), 1);
    assert_eq!(caught("registry", "use crate::proxy::Error;"), 1);
    assert_eq!(caught("name", "use crate::{drain, name};"), 1);
    assert_eq!(caught("proxy", "use super::super::app;"), 1);
    assert_eq!(caught("proxy", "use crate::testing::FakeCluster;"), 1);
    assert_eq!(caught("proxy", "use crate::registry::View;"), 0);
}

#[test]
fn no_file_is_longer_than_the_house_allows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    sources(&root.join("tests"), &mut files);
    let long = |file: &PathBuf| fs::read_to_string(file).unwrap().lines().count() > 600;
    let found: Vec<_> = files.into_iter().filter(long).collect();
    assert!(found.is_empty(), "split along an idea: {found:?}");
}
