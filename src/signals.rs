//! The signals that ask a service to stop, as the operating system delivers them.

use std::io;

use crate::report::Trigger;
#[cfg(unix)]
use crate::report::{Outcome, Report};

/// Installed handlers. The operating system's default action, to end the process, is off from
/// the moment this exists and stays off when it is dropped.
#[derive(Debug)]
pub(crate) struct Signals(os::Signals);

impl Signals {
    /// Installs the handlers now. Panics outside a tokio runtime, and in one without IO.
    pub(crate) fn install() -> io::Result<Self> {
        os::Signals::install().map(Self)
    }

    /// The next signal. Cancel safe.
    pub(crate) async fn next(&mut self) -> Trigger {
        self.0.next().await
    }
}

/// Does what the signal would have done if nobody had listened.
pub(crate) fn default_action(trigger: Trigger) {
    os::default_action(trigger);
}

#[cfg(unix)]
impl Report {
    /// Ends the process by the signal that asked for the stop, if it was one and the outcome is
    /// [`Clean`](Outcome::Clean); as [`exit`](Self::exit) otherwise.
    ///
    /// For supervisors that want to see their own signal as the cause of the end: a shell shows
    /// status 143 for SIGTERM and 130 for SIGINT. A process with the id 1, as in most containers,
    /// cannot be ended by a signal of its own, and exits with that status instead.
    pub fn exit_by_signal(self) -> ! {
        if self.outcome == Outcome::Clean {
            // As `exit` would; a signal does not.
            let _ = io::Write::flush(&mut io::stdout());
            default_action(self.trigger);
        }
        self.exit()
    }
}

#[cfg(unix)]
mod os {
    use std::io;

    use signal_hook::{
        consts::{SIGINT, SIGTERM},
        low_level::emulate_default_handler,
    };

    use tokio::signal::unix::{Signal, SignalKind, signal};

    use crate::report::Trigger;

    pub(super) fn default_action(trigger: Trigger) {
        let signal = match trigger {
            Trigger::Terminate => SIGTERM,
            Trigger::Interrupt => SIGINT,
            Trigger::Shutdown | Trigger::Future | Trigger::ServerEnded => return,
        };
        if std::process::id() == 1 {
            // The kernel would not deliver it.
            std::process::exit(128 + signal);
        }
        let _ = emulate_default_handler(signal);
    }

    #[derive(Debug)]
    pub(super) struct Signals {
        terminate: Signal,
        interrupt: Signal,
    }

    impl Signals {
        pub(super) fn install() -> io::Result<Self> {
            Ok(Self {
                terminate: signal(SignalKind::terminate())?,
                interrupt: signal(SignalKind::interrupt())?,
            })
        }

        pub(super) async fn next(&mut self) -> Trigger {
            tokio::select! {
                Some(()) = self.terminate.recv() => Trigger::Terminate,
                Some(()) = self.interrupt.recv() => Trigger::Interrupt,
                else => std::future::pending().await,
            }
        }
    }
}

#[cfg(windows)]
mod os {
    use std::io;

    use tokio::signal::windows::{
        CtrlBreak, CtrlC, CtrlClose, CtrlLogoff, CtrlShutdown, ctrl_break, ctrl_c, ctrl_close,
        ctrl_logoff, ctrl_shutdown,
    };

    use crate::report::Trigger;

    /// There, what a console event does cannot be had again once it is handled.
    pub(super) fn default_action(_: Trigger) {}

    #[derive(Debug)]
    pub(super) struct Signals {
        ctrl_c: CtrlC,
        ctrl_break: CtrlBreak,
        close: CtrlClose,
        logoff: CtrlLogoff,
        shutdown: CtrlShutdown,
    }

    impl Signals {
        pub(super) fn install() -> io::Result<Self> {
            Ok(Self {
                ctrl_c: ctrl_c()?,
                ctrl_break: ctrl_break()?,
                close: ctrl_close()?,
                logoff: ctrl_logoff()?,
                shutdown: ctrl_shutdown()?,
            })
        }

        pub(super) async fn next(&mut self) -> Trigger {
            tokio::select! {
                Some(()) = self.ctrl_c.recv() => Trigger::Interrupt,
                Some(()) = self.ctrl_break.recv() => Trigger::Interrupt,
                Some(()) = self.close.recv() => Trigger::Terminate,
                Some(()) = self.logoff.recv() => Trigger::Terminate,
                Some(()) = self.shutdown.recv() => Trigger::Terminate,
                else => std::future::pending().await,
            }
        }
    }
}

#[cfg(not(any(unix, windows)))]
mod os {
    use std::io;

    use crate::report::Trigger;

    pub(super) fn default_action(_: Trigger) {}

    #[derive(Debug)]
    pub(super) struct Signals;

    impl Signals {
        pub(super) fn install() -> io::Result<Self> {
            Err(io::ErrorKind::Unsupported.into())
        }

        pub(super) async fn next(&mut self) -> Trigger {
            std::future::pending().await
        }
    }
}
