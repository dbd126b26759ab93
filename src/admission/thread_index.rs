//! Which thread this is, as a small number: what spreads threads over lanes.

use std::{
    cell::Cell,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

const NOT_KNOWN: usize = usize::MAX;

/// Not through `sync`, because no model has a say in it: whatever the number, the lanes are right.
static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    // Without a destructor and known at compile time, so that to read it is one instruction.
    static HERE: Cell<usize> = const { Cell::new(NOT_KNOWN) };
}

/// The number of this thread. Threads that ask for the first time one after another, as the workers
/// of a runtime do, have numbers that follow one another, and so lanes of their own.
#[inline]
pub(crate) fn here() -> usize {
    match HERE.get() {
        NOT_KNOWN => arrive(),
        here => here,
    }
}

#[cold]
fn arrive() -> usize {
    let here = THREADS.fetch_add(1, Relaxed) % NOT_KNOWN;
    HERE.set(here);
    here
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::here;

    #[test]
    fn a_thread_keeps_its_number_and_no_other_has_it() {
        let mine = here();
        assert_eq!(here(), mine);
        let others = thread::spawn(|| (here(), here())).join().unwrap();
        assert_eq!(others.0, others.1);
        assert_ne!(others.0, mine);
    }
}
