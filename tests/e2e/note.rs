//! What a test says besides whether it passed; `--show-output` shows it.

/// Says something for information.
#[expect(clippy::print_stderr, reason = "the test harness collects it")]
pub(crate) fn note(text: &str) {
    eprintln!("{text}");
}
