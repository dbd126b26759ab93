//! The signals that stop a service, as the operating system delivers them.
//!
//! A signal handler may do very little: it sets a flag, and writes a byte to a socket that the
//! control thread waits on. Handlers are installed once and never removed, because other code may
//! have come to rely on them since. Instead, a signal is *given back*: the handler then performs
//! the default action of the operating system. On Linux it does not, if the program handled or
//! ignored the signal before: then the program does so again.
//!
//! This file is long because it contains one implementation for each kind of operating system.

#[cfg(any(unix, windows))]
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
};

#[cfg(unix)]
use crate::report::Outcome;
use crate::report::Report;
#[cfg(any(unix, windows))]
use crate::report::Trigger;

pub(crate) use self::os::{Signals, default_action};

/// Which signals have arrived since they were last taken. A handler sets `last` first.
#[cfg(any(unix, windows))]
#[derive(Clone, Default)]
struct Arrived {
    last: Arc<AtomicUsize>,
    terminate: Arc<AtomicBool>,
    interrupt: Arc<AtomicBool>,
}

#[cfg(any(unix, windows))]
impl Arrived {
    /// The values of `last`.
    const TERMINATE: usize = 1;
    const INTERRUPT: usize = 2;

    #[cfg(any(windows, all(test, not(tower_graceful_loom))))]
    fn add(&self, signal: Trigger) {
        let (number, arrived) = match signal {
            Trigger::Interrupt => (Self::INTERRUPT, &self.interrupt),
            _ => (Self::TERMINATE, &self.terminate),
        };
        self.last.store(number, SeqCst);
        arrived.store(true, SeqCst);
    }

    /// Takes the signals. The one that arrived last comes last: SIGINT ends the delay that a SIGTERM before it
    /// has begun, and SIGTERM changes nothing after a SIGINT. Of three signals the order may be another one.
    fn take(&self) -> Vec<Trigger> {
        let terminate_is_last = || self.last.load(SeqCst) == Self::TERMINATE;
        let was_last = terminate_is_last();
        let arrived = self.flags().into_iter();
        let mut taken: Vec<_> = arrived
            .filter(|(arrived, _)| arrived.swap(false, SeqCst))
            .map(|(_, signal)| signal)
            .collect();
        // One may arrive in between.
        if was_last && terminate_is_last() {
            taken.reverse();
        }
        taken
    }

    /// Forgets the signals for which `keeps` is false.
    #[cfg(unix)]
    fn retain(&self, keeps: impl Fn(Trigger) -> bool) {
        for (arrived, signal) in self.flags() {
            if !keeps(signal) {
                arrived.store(false, SeqCst);
            }
        }
    }

    fn flags(&self) -> [(&AtomicBool, Trigger); 2] {
        [
            (&self.terminate, Trigger::Terminate),
            (&self.interrupt, Trigger::Interrupt),
        ]
    }
}

impl Report {
    /// Ends the process with the signal that triggered the stop, if the trigger was a signal and
    /// the outcome is [`Clean`](crate::Outcome::Clean). Otherwise does the same as [`exit`](Self::exit).
    ///
    /// Use it under supervisors that expect to see their own signal as the cause of the end: a
    /// shell shows status 143 for SIGTERM and 130 for SIGINT. A process with the id 1, as in most
    /// containers, cannot end itself with a signal, and exits with that status instead.
    ///
    /// On systems other than unix it is the same as [`exit`](Self::exit).
    pub fn exit_by_signal(self) -> ! {
        #[cfg(unix)]
        if self.outcome == Outcome::Clean {
            // `exit` flushes standard output; a signal does not.
            let _ = std::io::Write::flush(&mut std::io::stdout());
            default_action(self.trigger);
        }
        self.exit()
    }
}

#[cfg(unix)]
mod os {
    use std::{
        fs,
        io::{self, Read, Write},
        os::unix::net::UnixStream,
        process,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering::SeqCst},
        },
        thread,
        time::Duration,
    };

    use signal_hook::{
        SigId,
        consts::{SIGINT, SIGTERM},
        flag,
        low_level::{self, emulate_default_handler, pipe},
    };

    use super::Arrived;
    use crate::report::Trigger;

    const SIGNALS: [(i32, Trigger); 2] =
        [(SIGTERM, Trigger::Terminate), (SIGINT, Trigger::Interrupt)];

    pub(crate) fn default_action(trigger: Trigger) {
        let Some((signal, _)) = SIGNALS.into_iter().find(|(_, it)| *it == trigger) else {
            return;
        };
        if is_init() {
            // The kernel does not deliver it to process 1.
            std::process::exit(128 + signal);
        }
        let _ = emulate_default_handler(signal);
    }

    /// The bit of a signal in the sets of the kernel.
    fn bit(signal: i32) -> u64 {
        1 << (signal - 1)
    }

    fn is_init() -> bool {
        process::id() == 1
    }

    /// The signals that the program handles or ignores, as a set with one bit for each. Only Linux lists them in a
    /// file. Elsewhere, and where it cannot be read, the set is empty.
    fn without_default_action() -> u64 {
        if !cfg!(any(target_os = "linux", target_os = "android")) {
            return 0;
        }
        // Not always UTF-8: it also contains the name of the program, of which the kernel keeps 15 bytes.
        let status = fs::read("/proc/self/status").unwrap_or_default();
        let status = String::from_utf8_lossy(&status);
        let sets = status.lines().filter_map(|line| {
            let set = line
                .strip_prefix("SigCgt:")
                .or_else(|| line.strip_prefix("SigIgn:"))?;
            u64::from_str_radix(set.trim(), 16).ok()
        });
        sets.fold(0, |all, set| all | set)
    }

    /// The installed handlers, and the socket through which they wake the control thread.
    pub(crate) struct Signals {
        /// Set while signals are given back.
        given_back: Arc<AtomicBool>,
        /// The signals that the program handles or ignores while they are given back, one bit for each.
        without_default: u64,
        arrived: Arrived,
        socket: Socket,
        /// The actions of the handlers that write to the socket.
        writing: Vec<SigId>,
        process: u32,
    }

    struct Socket {
        written: UnixStream,
        read: Arc<UnixStream>,
    }

    /// What the thread waits on.
    pub(crate) struct Alarm(Arc<UnixStream>);

    impl Signals {
        /// Installs the handlers. The signals are given back at first.
        ///
        /// The actions of a signal run in the order of their registration: first the default action
        /// if the signal is given back and had it before, then the flags, then the socket.
        pub(crate) fn install(_: impl Fn() + Send + 'static) -> io::Result<Self> {
            // Before the first registration, after which the signal would count as one that is handled.
            let without_default = without_default_action();
            let (socket, clones) = Socket::open()?;
            let given_back = Arc::new(AtomicBool::new(true));
            let arrived = Arrived::default();
            let flags = [
                (Arrived::TERMINATE, &arrived.terminate),
                (Arrived::INTERRUPT, &arrived.interrupt),
            ];
            let mut writing = Vec::new();
            for (((signal, _), (number, flag)), clone) in SIGNALS.into_iter().zip(flags).zip(clones)
            {
                let context = |error| explain(&format!("no handler for signal {signal}"), &error);
                if without_default & bit(signal) == 0 {
                    let given_back = Arc::clone(&given_back);
                    if is_init() {
                        flag::register_conditional_shutdown(signal, 128 + signal, given_back)
                    } else {
                        flag::register_conditional_default(signal, given_back)
                    }
                    .map_err(context)?;
                }
                let last = Arc::clone(&arrived.last);
                flag::register_usize(signal, last, number).map_err(context)?;
                flag::register(signal, Arc::clone(flag)).map_err(context)?;
                writing.push(pipe::register(signal, clone).map_err(context)?);
            }
            Ok(Self {
                given_back,
                without_default,
                arrived,
                socket,
                writing,
                process: process::id(),
            })
        }

        /// In a forked child: replaces the parent's socket by a new one.
        pub(crate) fn adopt(&mut self) -> io::Result<()> {
            if self.process == process::id() {
                return Ok(());
            }
            let (socket, clones) = Socket::open()?;
            let mut writing = Vec::new();
            for ((signal, _), clone) in SIGNALS.into_iter().zip(clones) {
                writing.push(pipe::register(signal, clone)?);
            }
            for id in std::mem::replace(&mut self.writing, writing) {
                low_level::unregister(id);
            }
            self.socket = socket;
            self.process = process::id();
            Ok(())
        }

        /// From now on signals do not have their default action. One that came while they were given back was
        /// the program's, if the program handles or ignores it. Otherwise it would have ended the process, so one
        /// that is recorded came earlier or later, and counts.
        pub(crate) fn keep(&self) {
            if self.given_back.swap(false, SeqCst) {
                self.arrived.retain(|signal| !self.is_of_program(signal));
            }
        }

        /// From now on signals have their default action, if they had it before.
        pub(crate) fn give_back(&self) {
            self.given_back.store(true, SeqCst);
        }

        /// Takes the signals that have arrived, except those that the program handles itself.
        pub(crate) fn take(&self) -> Vec<Trigger> {
            let mut taken = self.arrived.take();
            if self.given_back.load(SeqCst) {
                taken.retain(|signal| !self.is_of_program(*signal));
            }
            taken
        }

        /// Whether the program handled or ignored this signal before this crate did.
        fn is_of_program(&self, signal: Trigger) -> bool {
            let mut signals = SIGNALS.iter().filter(|(_, it)| *it == signal);
            signals.any(|(number, _)| self.without_default & bit(*number) != 0)
        }

        /// Wakes the thread without a signal.
        pub(crate) fn poke(&self) {
            // If the socket is full, it contains bytes that wake the thread.
            let _ = (&self.socket.written).write(&[0]);
        }

        pub(crate) fn alarm(&self) -> Alarm {
            Alarm(Arc::clone(&self.socket.read))
        }
    }

    impl Socket {
        /// Opens a socket, and clones its written end for the handler of each signal. So no handler is
        /// installed without the descriptors for all of them.
        fn open() -> io::Result<(Self, [UnixStream; 2])> {
            let open = || {
                let (written, read) = UnixStream::pair()?;
                written.set_nonblocking(true)?;
                let clones = [written.try_clone()?, written.try_clone()?];
                let read = Arc::new(read);
                Ok((Self { written, read }, clones))
            };
            open().map_err(|error| explain("no socket for signals", &error))
        }
    }

    impl Alarm {
        /// Waits for a byte, at most for `most`.
        pub(crate) fn wait(&self, most: Duration) {
            // A timeout of zero is an error of `set_read_timeout`.
            let most = most.max(Duration::from_millis(1));
            let set = self.0.set_read_timeout(Some(most));
            let read = set.and_then(|()| (&*self.0).read(&mut [0; 64]));
            match read.map_err(|error| error.kind()) {
                Ok(1..) | Err(io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                // Not expected. The pause keeps such an error from turning into a busy loop.
                Ok(0) | Err(_) => thread::sleep(most.min(Duration::from_millis(10))),
            }
        }
    }

    fn explain(what: &str, error: &io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("{what}: {error}"))
    }

    #[cfg(all(test, not(tower_graceful_loom)))]
    mod tests {
        use super::*;

        /// The handler records a signal in any moment, also between the two steps of `keep`.
        #[test]
        fn only_a_signal_of_the_program_is_forgotten_that_comes_while_signals_are_given_back() {
            for (without_default, taken) in [
                (0, &[Trigger::Terminate][..]),
                (bit(SIGINT), &[Trigger::Terminate]),
                (bit(SIGTERM), &[]),
            ] {
                for begins_to_listen in [false, true] {
                    let signals = Signals {
                        given_back: Arc::new(AtomicBool::new(true)),
                        without_default,
                        arrived: Arrived::default(),
                        socket: Socket::open().unwrap().0,
                        writing: Vec::new(),
                        process: process::id(),
                    };
                    signals.arrived.add(Trigger::Terminate);
                    if begins_to_listen {
                        signals.keep();
                    }
                    assert_eq!(signals.take(), taken);
                }
            }
        }

        /// Otherwise the thread would never sleep again.
        #[test]
        fn an_alarm_reads_what_it_was_woken_by() {
            let (socket, _clones) = Socket::open().unwrap();
            (&socket.written).write_all(&[0; 3]).unwrap();
            Alarm(Arc::clone(&socket.read)).wait(Duration::from_secs(10));
            socket.read.set_nonblocking(true).unwrap();
            let left = (&*socket.read).read(&mut [0]);
            assert_eq!(left.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }
}

#[cfg(windows)]
mod os {
    use std::{
        io,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering::SeqCst},
        },
        thread,
    };

    use tokio::{
        runtime,
        signal::windows::{ctrl_break, ctrl_c, ctrl_close, ctrl_logoff, ctrl_shutdown},
    };

    use super::Arrived;
    use crate::report::Trigger;

    /// On Windows the default action of a console event cannot be restored once it is handled.
    pub(crate) fn default_action(_: Trigger) {}

    /// A thread with a small runtime that waits for console events. Tokio cannot give them back, so
    /// the thread never ends.
    pub(crate) struct Signals {
        /// Set while nothing listens. An event that comes then has no effect on what listens later.
        given_back: Arc<AtomicBool>,
        arrived: Arrived,
    }

    impl Signals {
        pub(crate) fn install(wake: impl Fn() + Send + 'static) -> io::Result<Self> {
            let runtime = runtime::Builder::new_current_thread().build()?;
            let (mut c, mut pause, mut close, mut logoff, mut shutdown) = {
                let _context = runtime.enter();
                (
                    ctrl_c()?,
                    ctrl_break()?,
                    ctrl_close()?,
                    ctrl_logoff()?,
                    ctrl_shutdown()?,
                )
            };
            let given_back = Arc::new(AtomicBool::new(true));
            let arrived = Arrived::default();
            let signals = Self {
                given_back: Arc::clone(&given_back),
                arrived: arrived.clone(),
            };
            let listening = async move {
                loop {
                    let signal = tokio::select! {
                        Some(()) = c.recv() => Trigger::Interrupt,
                        Some(()) = pause.recv() => Trigger::Interrupt,
                        Some(()) = close.recv() => Trigger::Terminate,
                        Some(()) = logoff.recv() => Trigger::Terminate,
                        Some(()) = shutdown.recv() => Trigger::Terminate,
                        else => return,
                    };
                    if !given_back.load(SeqCst) {
                        arrived.add(signal);
                        wake();
                    }
                }
            };
            thread::Builder::new()
                .name("graceful-console".to_owned())
                .spawn(move || runtime.block_on(listening))?;
            Ok(signals)
        }

        #[expect(clippy::unused_self, clippy::unnecessary_wraps)]
        pub(crate) fn adopt(&mut self) -> io::Result<()> {
            Ok(())
        }

        /// From now on events are recorded.
        pub(crate) fn keep(&self) {
            self.given_back.store(false, SeqCst);
        }

        /// From now on events are ignored.
        pub(crate) fn give_back(&self) {
            self.given_back.store(true, SeqCst);
        }

        pub(crate) fn take(&self) -> Vec<Trigger> {
            self.arrived.take()
        }
    }
}

#[cfg(not(any(unix, windows)))]
mod os {
    use std::io;

    use crate::report::Trigger;

    pub(crate) fn default_action(_: Trigger) {}

    pub(crate) struct Signals(std::convert::Infallible);

    impl Signals {
        pub(crate) fn install(_: impl Fn() + Send + 'static) -> io::Result<Self> {
            Err(io::ErrorKind::Unsupported.into())
        }

        pub(crate) fn adopt(&mut self) -> io::Result<()> {
            match self.0 {}
        }

        pub(crate) fn keep(&self) {
            match self.0 {}
        }

        pub(crate) fn give_back(&self) {
            match self.0 {}
        }

        pub(crate) fn take(&self) -> Vec<Trigger> {
            match self.0 {}
        }
    }
}

#[cfg(all(test, any(unix, windows), not(tower_graceful_loom)))]
mod tests {
    use super::{
        Arrived,
        Trigger::{Interrupt, Terminate},
    };

    /// Both may arrive before the thread looks.
    #[test]
    fn the_signal_that_arrived_last_is_handled_last() {
        let arrived = Arrived::default();
        for order in [[Interrupt, Terminate], [Terminate, Interrupt]] {
            for signal in order {
                arrived.add(signal);
            }
            assert_eq!(arrived.take(), order);
            assert_eq!(arrived.take(), []);
        }
        arrived.add(Terminate);
        assert_eq!(arrived.take(), [Terminate]);
    }
}
