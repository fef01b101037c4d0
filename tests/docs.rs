//! Keeps generated pages true.
#![expect(
    clippy::unwrap_used,
    reason = "a failed step fails the test, and the panic says where"
)]

use std::fs;
use std::path::Path;

/// Compares a page with what it is generated from; `UPDATE_DOCS=1` writes it anew.
fn check(page: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, expected).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "{page} is stale; run UPDATE_DOCS=1 cargo test --test docs"
    );
}

#[test]
fn the_reference_of_settings_matches_their_definitions() {
    check("docs/configuration.md", &kube_tunnel::config::reference());
}
