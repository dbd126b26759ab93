//! The end of a process whose grace period is over and whose service has not stopped.

use std::{
    io::{self, Write},
    sync::mpsc,
    thread,
    time::Duration,
};

use signal_hook::low_level;

/// How long standard error may take to accept the last words.
const LAST_WORDS: Duration = Duration::from_millis(100);

const EXIT_CODE: i32 = 1;

/// Ends the process, having written what `describe` returns if standard error takes it. If that is
/// nothing, there is nothing left to end.
pub(crate) fn end(describe: impl Fn() -> Option<String> + Send + 'static) {
    let (said, lives) = mpsc::channel();
    // On a thread of its own: standard error may be a pipe that nobody empties.
    let speaker = thread::Builder::new().spawn(move || {
        let text = describe();
        let something = text.is_some();
        if let Some(text) = text {
            let _ = writeln!(io::stderr(), "{text}");
        }
        let _ = said.send(something);
    });
    let something = match speaker {
        Ok(_) => lives.recv_timeout(LAST_WORDS),
        Err(_) => Err(mpsc::RecvTimeoutError::Timeout),
    };
    if something != Ok(false) {
        low_level::exit(EXIT_CODE);
    }
}
