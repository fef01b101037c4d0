//! What must hold for whatever bytes a client sends: one module for each fuzz target, with a `check` that panics when it does
//! not.
//!
//! `fuzz/` runs the checks under libFuzzer; the test below runs them on the inputs that are kept in `fuzz/corpus`, with
//! every bug that was found among them. A new target is a module here, its name in `TARGETS`, a file in
//! `fuzz/fuzz_targets`, a `[[bin]]` in `fuzz/Cargo.toml` and a folder of seeds.

pub mod authority;
pub mod client_hello;
pub mod detect;
mod double;
pub mod http1;
mod message;
pub mod spdy;
pub mod tunnel;
pub mod upgrade;

/// The check of one target; it panics when the input shows a bug.
pub type Check = fn(&[u8]);

/// Every target, by the name of its fuzz target and of its corpus.
pub const TARGETS: &[(&str, Check)] = &[
    ("authority", authority::check),
    ("client_hello", client_hello::check),
    ("detect", detect::check),
    ("http1", http1::check),
    ("spdy", spdy::check),
    ("tunnel", tunnel::check),
    ("upgrade", upgrade::check),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::panic;
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::TARGETS;

    fn folder(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name)
    }

    fn names(folder: &Path) -> BTreeSet<String> {
        let entries = fs::read_dir(folder).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths
            .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn every_target_is_fuzzed_and_has_seeds() {
        let targets: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(names(&folder("fuzz_targets")), targets);
        assert_eq!(names(&folder("corpus")), targets);
    }

    #[test]
    fn every_input_of_the_corpora_passes() {
        // A panic in a task of the runtime ends that task only, so the hook has to remember it.
        static PANICKED: AtomicBool = AtomicBool::new(false);
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            PANICKED.store(true, Ordering::SeqCst);
            print(panic);
        }));
        let mut failed = Vec::new();
        for (target, check) in TARGETS {
            let mut inputs: Vec<_> = fs::read_dir(folder("corpus").join(target))
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect();
            inputs.sort();
            assert!(!inputs.is_empty(), "{target} has no seeds");
            for path in inputs {
                let input = fs::read(&path).unwrap();
                let returned = panic::catch_unwind(|| check(&input));
                if PANICKED.swap(false, Ordering::SeqCst) || returned.is_err() {
                    failed.push(path);
                }
            }
        }
        assert!(failed.is_empty(), "{failed:#?}");
    }
}
