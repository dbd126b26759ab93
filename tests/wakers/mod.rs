//! A waker that panics, for several test programs.

use std::{
    panic::resume_unwind,
    sync::Arc,
    task::{Wake, Waker},
};

struct Panicking;

impl Wake for Panicking {
    fn wake(self: Arc<Self>) {
        // Without the panic hook, which would print a backtrace.
        resume_unwind(Box::new("a waker that panics"));
    }
}

pub(crate) fn panicking() -> Waker {
    Waker::from(Arc::new(Panicking))
}
