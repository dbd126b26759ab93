//! The server that is measured, from outside.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What this program is told to be the server.
pub(crate) const ROLE: &str = "--server";

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// axum, and nothing of ours.
    Plain,
    /// axum with a layer that does nothing: what any layer costs.
    Passed,
    /// axum with a layer that wraps the body and does nothing: what any layer costs that follows a
    /// response to its end.
    Wrapped,
    /// axum with tower-http's counter.
    Counted,
    /// axum with the layer.
    Layer,
    /// axum with the listener and the drain, and no layer.
    Tracked,
    /// axum with the layer, the listener and the drain.
    Listener,
    /// Our own server, with the layer.
    Serve,
}

impl Form {
    pub(crate) const ALL: [Self; 8] = [
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
        }
    }
}

/// A server that ends with this.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    child: Child,
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    pub(crate) fn start(form: Form, workers: usize) -> Self {
        let mut child = Command::new(env::current_exe().expect("this program"))
            .args([ROLE, form.name(), &workers.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a server");
        let questions = child.stdin.take();
        let mut answers = BufReader::new(child.stdout.take().expect("its output"));
        let address = line(&mut answers).parse().expect("its address");
        Self {
            address,
            child,
            questions,
            answers,
        }
    }

    /// A figure that only the server knows.
    pub(crate) fn ask(&mut self, question: &str) -> u32 {
        let questions = self.questions.as_mut().expect("its input");
        writeln!(questions, "{question}").expect("a server that listens");
        line(&mut self.answers).parse().expect("a figure")
    }

    /// For how long, in nanoseconds, its main thread has run so far.
    pub(crate) fn cpu_time(&self) -> f64 {
        // Its statistics are in hundredths of a second, and these are exact.
        let path = format!("/proc/{}/schedstat", self.child.id());
        let text = fs::read_to_string(path).expect("what it has run");
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

fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).expect("a line");
    line.trim_end().to_owned()
}

/// A figure of `/proc/self/status`.
pub(crate) fn status(field: &str) -> u32 {
    let status = fs::read_to_string("/proc/self/status").expect("a status");
    let value = status.lines().find_map(|line| line.strip_prefix(field));
    let figure = value.and_then(|value| value.split_whitespace().next());
    figure.expect("the field").parse().expect("a figure")
}

/// Has this process open as many files as it may. Says how many.
pub(crate) fn allow_files() -> u64 {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    let files = most.min(1_000_000);
    setrlimit(Resource::RLIMIT_NOFILE, files, most).expect("a new limit");
    files
}
