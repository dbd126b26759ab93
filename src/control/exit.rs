//! The end of a process whose grace period is over although its service has not stopped.

use std::{
    io::{self, Write},
    sync::mpsc,
    thread,
    time::Duration,
};

use signal_hook::low_level;

/// How long writing the message to standard error may take.
const MESSAGE_TIMEOUT: Duration = Duration::from_millis(100);

const EXIT_CODE: i32 = 1;

/// Ends the process, after writing the text that `describe` returns if standard error accepts it in
/// time. If `describe` returns `None`, everything has ended, and the process goes on.
pub(crate) fn end(describe: impl Fn() -> Option<String> + Send + 'static) {
    let (send, written) = mpsc::channel();
    // On a separate thread, because standard error may be a pipe that no process reads.
    let writer = thread::Builder::new().spawn(move || {
        let text = describe();
        let is_alive = text.is_some();
        if let Some(text) = text {
            let _ = writeln!(io::stderr(), "{text}");
        }
        let _ = send.send(is_alive);
    });
    let is_alive = match writer {
        Ok(_) => written.recv_timeout(MESSAGE_TIMEOUT),
        Err(_) => Err(mpsc::RecvTimeoutError::Timeout),
    };
    if is_alive != Ok(false) {
        low_level::exit(EXIT_CODE);
    }
}
