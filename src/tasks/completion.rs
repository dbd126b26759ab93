//! The output of the futures that this crate runs for its user: how it becomes an outcome or the
//! text of an error, and how a panic is caught.

use std::{
    any::Any,
    error::Error,
    iter,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    task::Poll,
};

use crate::{background::drop_payload, report::TaskOutcome};

/// The output of a future that is a server, a worker, a hook or a cleanup step: `()`, or a `Result<(), E>`
/// whose error appears in the report.
///
/// The report contains the text of the error and of its [sources](Error::source), joined by `": "`.
///
/// This trait is sealed. It is implemented for these two types only.
#[diagnostic::on_unimplemented(
    message = "the future must end with `()` or a `Result<(), E>`, but its output is `{Self}`",
    label = "the output of this future is `{Self}`",
    note = "a future that only loops has the output `!`, and could not be stopped: leave the loop \
            when the service stops, as with `() = &mut stop => break` in `tokio::select!`",
    note = "the error `E` must convert into `Box<dyn Error + Send + Sync>`"
)]
pub trait Completion: sealed::Sealed {}

impl Completion for () {}
impl<E: Into<Box<dyn Error + Send + Sync>>> Completion for Result<(), E> {}

mod sealed {
    use std::error::Error;

    #[allow(unreachable_pub)]
    pub trait Sealed {
        fn error(self) -> Option<String>;
    }

    impl Sealed for () {
        fn error(self) -> Option<String> {
            None
        }
    }

    impl<E: Into<Box<dyn Error + Send + Sync>>> Sealed for Result<(), E> {
        fn error(self) -> Option<String> {
            self.err().map(|error| super::with_sources(&*error.into()))
        }
    }
}

/// The error of a completed future, if it has one.
pub(crate) fn error(completion: impl Completion) -> Option<String> {
    sealed::Sealed::error(completion)
}

/// The text of an error and of its sources. Sources whose text is already contained are omitted.
pub(crate) fn with_sources(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let sources = iter::successors(error.source(), |&error| error.source());
    // Limited, because an error may return itself as its source.
    for source in sources.take(MOST_SOURCES) {
        let source = source.to_string();
        if !text.contains(&source) {
            text.push_str(": ");
            text.push_str(&source);
        }
    }
    text
}

/// How many sources of an error its text includes.
const MOST_SOURCES: usize = 32;

/// Runs a future to its end, and catches its panic.
pub(crate) async fn outcome<F: Future<Output: Completion>>(future: F) -> TaskOutcome {
    // The block drops the future within the last poll, where a panic of its destructor is caught.
    let mut future = pin!(async move { error(future.await) });
    std::future::poll_fn(|cx| {
        // A future that has panicked is not polled again.
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx)));
        match polled {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(None)) => Poll::Ready(TaskOutcome::Done),
            Ok(Poll::Ready(Some(error))) => Poll::Ready(TaskOutcome::Failed(error)),
            Err(payload) => {
                let outcome = TaskOutcome::Panicked(message(&*payload));
                drop_payload(payload);
                Poll::Ready(outcome)
            }
        }
    })
    .await
}

/// The message of a panic.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("the payload is not text").to_owned()
}
