//! A small number for each thread, used to spread threads over shards.

use std::{
    cell::Cell,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

const NOT_KNOWN: usize = usize::MAX;

/// Not from `sync`, because no model depends on it: the shards are correct with any index.
static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    // No destructor and a constant initial value, so that a read is one instruction.
    static INDEX: Cell<usize> = const { Cell::new(NOT_KNOWN) };
}

/// The index of the calling thread. Threads that ask for the first time one after another, as the
/// workers of a runtime do, get consecutive indices, and so different shards.
#[inline]
pub(crate) fn thread_index() -> usize {
    match INDEX.get() {
        NOT_KNOWN => assign(),
        index => index,
    }
}

#[cold]
fn assign() -> usize {
    let index = THREADS.fetch_add(1, Relaxed) % NOT_KNOWN;
    INDEX.set(index);
    index
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::thread_index;

    #[test]
    fn a_thread_keeps_its_index_and_no_other_thread_has_it() {
        let mine = thread_index();
        assert_eq!(thread_index(), mine);
        let others = thread::spawn(|| (thread_index(), thread_index()))
            .join()
            .unwrap();
        assert_eq!(others.0, others.1);
        assert_ne!(others.0, mine);
    }
}
