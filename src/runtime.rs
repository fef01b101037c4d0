//! The runtime that carries everything, and how many threads it has.

use std::io;
use std::num::NonZero;
use std::thread;

use tokio::runtime::{Builder, Runtime};

/// After how many tasks a thread looks for what has come. A transfer keeps its tasks ready to run, and each moves half a megabyte
/// at a time: sixty of them, as is usual, were 60 ms and more for everybody who had just said something.
const LOOKS: u32 = 8;

/// Makes the program's runtime with `threads` threads that carry requests; nothing stands for half of the processors that the
/// process may use, and one at least.
///
/// What a connection says passes several tasks, and what many say at the same time leaves in one write. Both suffer where the
/// tasks are spread over more threads than they need: on two processors two threads, which wake each other and write each a part
/// of what one writes together, took two fifths more processor time for a request than one. The other half is for the rest of the
/// way, much of which is often on the same machine.
///
/// # Errors
/// The operating system refuses a thread or what it waits with.
pub fn build(threads: Option<NonZero<usize>>) -> io::Result<Runtime> {
    let threads = threads.map_or_else(|| half(available()), NonZero::get);
    Builder::new_multi_thread()
        .worker_threads(threads)
        .event_interval(LOOKS)
        .enable_all()
        .build()
}

/// Returns how many processors the process may use, by affinity and quota.
fn available() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

fn half(processors: usize) -> usize {
    (processors / 2).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_threads_as_asked_for_else_half_of_the_processors() {
        let threads = |given: Option<usize>| {
            let runtime = build(given.map(|given| given.try_into().unwrap())).unwrap();
            runtime.metrics().num_workers()
        };
        assert_eq!((threads(Some(1)), threads(Some(3))), (1, 3));
        assert_eq!(threads(None), half(available()));
        assert_eq!([1, 2, 3, 8].map(half), [1, 1, 1, 4]);
    }
}
