//! Starts the measured server as a child process, and asks it for figures.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Instant,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::tls::Identity;

/// The argument that makes this program the server.
pub(crate) const ROLE: &str = "--server";

/// The kind of server. [`name`](Form::name) is its name in the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Plain axum.
    Plain,
    /// axum with a layer that does nothing: the cost of any layer.
    Passed,
    /// axum with a layer that wraps the body and does nothing else: the cost of any layer that
    /// follows a response to its end.
    Wrapped,
    /// axum with tower-http's counter.
    Counted,
    /// axum with `GracefulLayer`.
    Layer,
    /// axum with the tracked listener and the drain, without the layer.
    Tracked,
    /// axum with the layer, the tracked listener and the drain.
    Listener,
    /// `Graceful::serve`, with the layer.
    Serve,
    /// axum-server.
    AxumServer,
    /// axum with a listener that performs TLS handshakes.
    TlsPlain,
    /// As `Listener`, with TLS by `handshakes`.
    TlsListener,
    /// As `Serve`, with TLS by `handshakes`.
    TlsServe,
    /// axum-server with its own TLS.
    TlsAxumServer,
}

impl Form {
    const ALL: [Self; 13] = [
        Self::Plain,
        Self::Passed,
        Self::Wrapped,
        Self::Counted,
        Self::Layer,
        Self::Tracked,
        Self::Listener,
        Self::Serve,
        Self::AxumServer,
        Self::TlsPlain,
        Self::TlsListener,
        Self::TlsServe,
        Self::TlsAxumServer,
    ];

    /// The forms whose memory is measured.
    pub(crate) const MEMORY: [Self; 8] = [
        Self::Plain,
        Self::Passed,
        Self::Wrapped,
        Self::Counted,
        Self::Layer,
        Self::Tracked,
        Self::Listener,
        Self::Serve,
    ];

    pub(crate) fn of(name: &str) -> Self {
        let form = Self::ALL.into_iter().find(|form| form.name() == name);
        form.expect("the name of a form")
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "axum",
            Self::Passed => "a layer that does nothing",
            Self::Wrapped => "a wrapped body",
            Self::Counted => "tower-http",
            Self::Layer => "layer",
            Self::Tracked => "listener alone",
            Self::Listener => "listener",
            Self::Serve => "serve",
            Self::AxumServer => "axum-server",
            Self::TlsPlain => "axum with TLS",
            Self::TlsListener => "listener with TLS",
            Self::TlsServe => "serve with TLS",
            Self::TlsAxumServer => "axum-server with TLS",
        }
    }

    pub(crate) fn is_tls(self) -> bool {
        matches!(
            self,
            Self::TlsPlain | Self::TlsListener | Self::TlsServe | Self::TlsAxumServer
        )
    }
}

/// The child process. Dropping this kills it.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    child: Child,
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    pub(crate) fn start(form: Form, workers: usize) -> Self {
        Self::start_with(form, workers, "")
    }

    /// Starts a server with TLS.
    pub(crate) fn start_tls(form: Form, identity: &Identity) -> Self {
        Self::start_with(form, 0, &identity.to_text())
    }

    fn start_with(form: Form, workers: usize, identity: &str) -> Self {
        Self::spawn(&[ROLE, form.name(), &workers.to_string(), identity])
    }

    /// Starts this program with these arguments. It prints its address.
    pub(crate) fn spawn(args: &[&str]) -> Self {
        let mut child = Command::new(env::current_exe().expect("this program"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a server");
        let questions = child.stdin.take();
        let mut answers = BufReader::new(child.stdout.take().expect("its output"));
        let address = read_line(&mut answers).parse().expect("its address");
        Self {
            address,
            child,
            questions,
            answers,
        }
    }

    /// Asks the server a question of `server::answer`, and returns its answer.
    pub(crate) fn ask(&mut self, question: &str) -> u32 {
        let questions = self.questions.as_mut().expect("its input");
        writeln!(questions, "{question}").expect("a server that listens");
        read_line(&mut self.answers).parse().expect("a figure")
    }

    /// The next line that the server prints.
    pub(crate) fn line(&mut self) -> String {
        read_line(&mut self.answers)
    }

    /// Waits for the end of the process, and returns when it ended.
    pub(crate) fn wait(&mut self) -> Instant {
        let status = self.child.wait().expect("a child");
        let end = Instant::now();
        assert!(status.success(), "{status}");
        end
    }

    /// Nanoseconds of CPU time that the main thread of the server has used.
    pub(crate) fn cpu_time(&self) -> f64 {
        // `stat` counts in hundredths of a second, `schedstat` in nanoseconds.
        let path = format!("/proc/{}/schedstat", self.child.id());
        let text = fs::read_to_string(path).expect("the schedstat of the server");
        let time = text.split(' ').next().expect("a figure");
        time.parse().expect("a figure")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.questions = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).expect("a line");
    line.trim_end().to_owned()
}

/// The value of a field of `/proc/self/status`.
pub(crate) fn status(field: &str) -> u32 {
    let status = fs::read_to_string("/proc/self/status").expect("a status");
    let value = status.lines().find_map(|line| line.strip_prefix(field));
    let figure = value.and_then(|value| value.split_whitespace().next());
    figure.expect("the field").parse().expect("a figure")
}

/// Raises the limit of open files of this process as far as allowed, and returns the limit.
pub(crate) fn allow_files() -> u64 {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    let files = most.min(1_000_000);
    setrlimit(Resource::RLIMIT_NOFILE, files, most).expect("a new limit");
    files
}
