//! A thread that ends the process when the grace period is over, even if every thread of the runtime
//! is blocked.
//!
//! It waits on a pipe. A byte means that a stop has been asked for, and comes from the timeline or,
//! because the runtime may be blocked already when the signal arrives, from the signal handler.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use signal_hook::{
    SigId,
    consts::{SIGINT, SIGTERM},
    low_level::{self, pipe},
};

use crate::sync::lock;

/// How long standard error may take to accept the last words.
const LAST_WORDS: Duration = Duration::from_millis(100);

const EXIT_CODE: i32 = 1;

#[derive(Debug)]
pub(crate) struct Watchdog {
    pipe: UnixStream,
    /// The other end, so that there is one for as long as somebody may write: a pipe that nobody
    /// reads would be the end of a process that does not ignore SIGPIPE.
    _alarm: UnixStream,
    /// What the signals have been told to do.
    actions: Mutex<Vec<SigId>>,
    /// Nothing is to be watched any more.
    called_off: Arc<Mutex<bool>>,
}

impl Watchdog {
    /// Starts the thread. `after` a stop was asked for it ends the process, having said what
    /// `describe` returns. If that is nothing, there is nothing left to end.
    pub(crate) fn start<F>(after: Duration, describe: F) -> io::Result<Self>
    where
        F: Fn() -> Option<String> + Send + 'static,
    {
        let (pipe, alarm) = UnixStream::pair()?;
        let called_off = Arc::new(Mutex::new(false));
        let watch = Watch {
            alarm: alarm.try_clone()?,
            called_off: Arc::clone(&called_off),
            after,
        };
        thread::Builder::new()
            .name("graceful-watchdog".to_owned())
            .spawn(move || watch.run(describe))?;
        Ok(Self {
            pipe,
            _alarm: alarm,
            actions: Mutex::default(),
            called_off,
        })
    }

    /// The time runs from now on, if it does not already.
    pub(crate) fn arm(&self) {
        // A byte that does not fit finds others there.
        let _ = (&self.pipe).write(&[1]);
    }

    /// Has the signals arm it.
    pub(crate) fn watch_signals(&self) {
        for signal in [SIGTERM, SIGINT] {
            let pipe = self.pipe.try_clone();
            let action = pipe.and_then(|pipe| pipe::register(signal, pipe));
            lock!(self.actions).extend(action);
        }
    }

    /// The end has come by itself.
    pub(crate) fn call_off(&self) {
        *lock!(self.called_off) = true;
        for action in std::mem::take(&mut *lock!(self.actions)) {
            low_level::unregister(action);
        }
        self.arm();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.call_off();
    }
}

struct Watch {
    alarm: UnixStream,
    called_off: Arc<Mutex<bool>>,
    after: Duration,
}

impl Watch {
    fn run(mut self, describe: impl Fn() -> Option<String> + Send + 'static) {
        let mut deadline = None;
        loop {
            let left = deadline.map(|deadline: Instant| {
                let left = deadline.saturating_duration_since(Instant::now());
                // Zero would mean for ever.
                left.max(Duration::from_millis(1))
            });
            if self.alarm.set_read_timeout(left).is_err() {
                return;
            }
            let read = self.alarm.read(&mut [0; 64]);
            if *lock!(self.called_off) {
                return;
            }
            match read {
                Ok(0) => return,
                Err(error) if deadline.is_none() => match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    _ => return,
                },
                Ok(_) | Err(_) => {}
            }
            let now = Instant::now();
            let deadline = match deadline {
                Some(deadline) => deadline,
                // Longer than an `Instant` can hold is never.
                None => match now.checked_add(self.after) {
                    Some(first) => *deadline.insert(first),
                    None => return,
                },
            };
            if now >= deadline {
                return end(describe);
            }
        }
    }
}

/// Says what there is to say, and ends the process whether anybody listens or not.
fn end(describe: impl Fn() -> Option<String> + Send + 'static) {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A watchdog whose lifecycle is gone, and a channel that hears when it looked for it.
    fn watchdog(after: Duration) -> (Watchdog, mpsc::Receiver<()>) {
        let (looked, looks) = mpsc::channel();
        let describe = move || {
            let _ = looked.send(());
            None
        };
        (Watchdog::start(after, describe).unwrap(), looks)
    }

    #[test]
    fn it_looks_when_the_time_is_over_that_began_with_the_first_alarm() {
        let (watchdog, looks) = watchdog(Duration::from_millis(300));
        let unarmed = looks.recv_timeout(Duration::from_millis(400));
        assert_eq!(unarmed, Err(mpsc::RecvTimeoutError::Timeout));
        let begun = Instant::now();
        watchdog.arm();
        thread::sleep(Duration::from_millis(250));
        watchdog.arm();
        looks.recv_timeout(Duration::from_secs(10)).unwrap();
        let after = begun.elapsed();
        assert!(after >= Duration::from_millis(300), "{after:?}");
        assert!(after < Duration::from_millis(500), "{after:?}");
    }

    #[test]
    fn it_goes_when_it_is_called_off_or_dropped() {
        for drops in [false, true] {
            let (watchdog, looks) = watchdog(Duration::from_millis(50));
            watchdog.arm();
            if drops {
                drop(watchdog);
            } else {
                watchdog.call_off();
            }
            let gone = looks.recv_timeout(Duration::from_secs(10));
            assert_eq!(gone, Err(mpsc::RecvTimeoutError::Disconnected));
        }
    }

    #[test]
    fn a_time_without_end_is_waited_for_without_end() {
        let (watchdog, looks) = watchdog(Duration::MAX);
        watchdog.arm();
        let gone = looks.recv_timeout(Duration::from_secs(10));
        assert_eq!(gone, Err(mpsc::RecvTimeoutError::Disconnected));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn it_leaves_no_descriptor_and_no_action_behind() {
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let (first, _) = watchdog(Duration::MAX);
        first.watch_signals();
        drop(first);
        let before = open();
        for _ in 0..100 {
            let (watchdog, looks) = watchdog(Duration::MAX);
            watchdog.watch_signals();
            drop(watchdog);
            // The thread has gone, and its end of the pipe with it.
            let gone = looks.recv_timeout(Duration::from_secs(10));
            assert_eq!(gone, Err(mpsc::RecvTimeoutError::Disconnected));
        }
        // Other tests open some too.
        assert!(open() < before + 50, "{before} before, {} after", open());
    }
}
