//! Work beside a measurement, in a thread of its own, so that the measuring client waits for nothing but answers.

use std::thread::JoinHandle;

use anyhow::Result;
use tokio::sync::oneshot;

/// Running work; dropping this cuts it and waits for its end.
#[derive(Debug)]
pub(crate) struct Aside {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Aside {
    /// Starts what `work` makes on a runtime of its own.
    pub(crate) fn start<F>(work: impl FnOnce() -> F + Send + 'static) -> Result<Self>
    where
        F: Future<Output = ()>,
    {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = work() => {}
                    _ = stopped => {}
                }
            });
        });
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Fails only after a panic, which has been printed.
            drop(thread.join());
        }
    }
}
