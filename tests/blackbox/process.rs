//! The server process of a test. It is killed when the test drops it.

use std::{
    fs,
    io::{self, BufRead, BufReader},
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    panic,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};

use crate::{
    client::{Connection, Response},
    server::Form,
};

/// The timeout of everything that is not itself measured.
pub(crate) const BOUND: Duration = Duration::from_secs(20);

/// A time that the machine may exceed if other programs keep it busy: 100 ms more for each program beyond
/// the first that waits for a processor.
pub(crate) fn soon(time: Duration) -> Duration {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load
        .split(' ')
        .next()
        .and_then(|load| load.parse::<f64>().ok());
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let waiting = load.unwrap_or(0.0) / f64::from(u32::try_from(processors).unwrap()) - 1.0;
    time + Duration::from_millis(100).mul_f64(waiting.max(0.0))
}

/// The result of a thread. Its panic goes on in this one.
pub(crate) fn join<T>(thread: thread::JoinHandle<T>) -> T {
    let result = thread.join();
    result.unwrap_or_else(|failed| panic::resume_unwind(failed))
}

/// A request in the background. [`join`](Self::join) returns its response or its error.
pub(crate) struct Background(thread::JoinHandle<io::Result<Response>>);

impl Background {
    pub(crate) fn join(self) -> io::Result<Response> {
        self.0.join().expect("reading a response does not panic")
    }

    /// Whether the response or an error has arrived.
    pub(crate) fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

pub(crate) struct Server {
    child: Child,
    lines: Receiver<String>,
    log: Option<thread::JoinHandle<String>>,
    pub(crate) address: SocketAddr,
    signalled: Option<Instant>,
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct Exit {
    pub(crate) status: ExitStatus,
    /// The time from the first signal to the end of the process.
    pub(crate) after: Duration,
    /// The last line that the process printed: the report.
    pub(crate) report: String,
    /// The lines of its standard output that the test has not consumed, the report last.
    pub(crate) output: Vec<String>,
    pub(crate) log: String,
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The time of day in this line of the server's log.
fn time_of_day(line: &str) -> Option<Duration> {
    let (_, time) = line.split_once('T')?;
    let (time, _) = time.split_once('Z')?;
    let mut parts = time.splitn(3, ':');
    let [hours, minutes] = [parts.next()?, parts.next()?].map(str::parse::<u64>);
    let whole = Duration::from_secs((hours.ok()? * 60 + minutes.ok()?) * 60);
    let seconds: f64 = parts.next()?.parse().ok()?;
    Some(whole + Duration::from_secs_f64(seconds))
}

/// The time at which a phase began, if this log line is about the beginning of a phase.
fn seconds_of(line: &str) -> Option<Duration> {
    let (_, fields) = line.split_once(", because ")?;
    let (_, seconds) = fields.split_once(" seconds=")?;
    let seconds = seconds.split(' ').next()?.parse().ok()?;
    Some(Duration::from_secs_f64(seconds))
}

/// The time between two times of day, or zero if two threads logged in the other order.
fn between(earlier: Duration, later: Duration) -> Duration {
    let (before, after) = (
        later.checked_sub(earlier),
        (later + DAY).saturating_sub(earlier),
    );
    // Midnight may be between them.
    before.unwrap_or(if after < DAY / 2 {
        after
    } else {
        Duration::ZERO
    })
}

impl Exit {
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.status.code(), Some(0), "{self:?}");
    }

    /// The time from the start of the stop to the start of a phase, from the server's log.
    #[track_caller]
    pub(crate) fn logged_after(&self, text: &str) -> Duration {
        let line = self.log.lines().find(|line| line.contains(text));
        let line = line.unwrap_or_else(|| panic!("{text:?} is not in the log: {self:?}"));
        seconds_of(line).unwrap_or_else(|| panic!("no phase begins in {line:?}"))
    }

    /// The time from the start of the stop to the log line with this text, from the server's log.
    #[track_caller]
    pub(crate) fn written_after(&self, text: &str) -> Duration {
        let at = |text: &str| {
            let line = self.log.lines().find(|line| line.contains(text));
            let line = line.unwrap_or_else(|| panic!("{text:?} is not in the log: {self:?}"));
            time_of_day(line).unwrap_or_else(|| panic!("no time of day in {line:?}"))
        };
        let (begun, written) = (at("lame duck, because"), at(text));
        between(begun, written)
    }

    /// What each SIGINT after the first signal did, from the server's log.
    pub(crate) fn effects_of_sigint(&self) -> Vec<&str> {
        let lines = self.log.lines().filter_map(|line| {
            let (_, effect) = line.split_once("shutdown: a further SIGINT ")?;
            effect.split(" signal=").next()
        });
        lines.collect()
    }

    /// Asserts that the process ended at least `least` after the first signal, and at most `most` after
    /// the server received the signal.
    ///
    /// The second time comes from the server's log. On a busy machine the signal may reach the server
    /// late, and the test may learn late that the process has ended. So the test's own clock has only a
    /// generous bound.
    #[track_caller]
    pub(crate) fn assert_within(&self, least: Duration, most: Duration) {
        assert!(self.after >= least, "too early: {self:?}");
        let (took, most) = (self.took(), soon(most));
        assert!(took <= most, "too late, after {took:?}: {self:?}");
        assert!(self.after <= most + BOUND, "far too late: {self:?}");
    }

    /// The time from the start of the stop to the end of the process, from the server's log. If the log
    /// does not contain the end, the time to its last line about the stop.
    pub(crate) fn took(&self) -> Duration {
        let time_of = |text: &str| {
            let line = self.log.lines().find(|line| line.contains(text))?;
            time_of_day(line)
        };
        let ended = time_of("the process ends")
            .zip(time_of("shutdown: lame duck, because"))
            .map(|(ended, begun)| between(begun, ended));
        let phases = self.log.lines().filter_map(seconds_of);
        // The smallest form may end before its log has been written.
        let last = phases.chain(self.reported()).chain(ended).max();
        last.unwrap_or(self.after)
    }

    /// The duration of the stop, from the report.
    fn reported(&self) -> Option<Duration> {
        let first = self
            .report
            .strip_prefix("report shutdown")?
            .split(" |")
            .next()?;
        let (_, seconds) = first.strip_suffix(" s")?.rsplit_once(", ")?;
        seconds.parse().ok().map(Duration::from_secs_f64)
    }
}

impl Server {
    /// Starts a server and waits until it listens.
    pub(crate) fn start(form: Form, knobs: &[&str]) -> Self {
        let mut server = Self::spawn(form, knobs);
        server.expect_line("listening");
        server
    }

    /// Starts a server and waits until it handles signals, which is before it listens.
    pub(crate) fn spawn(form: Form, knobs: &[&str]) -> Self {
        let mut server = Self::launch(form, knobs);
        let starting = server.expect_line("starting");
        server.address = starting.parse().unwrap();
        server
    }

    /// Starts a server on this socket, which is passed by socket activation (`sd_listen_fds(3)`), and waits
    /// until it listens. The socket is descriptor 3. The server listens on a duplicate of it, as with
    /// some libraries.
    pub(crate) fn start_on(shared: &TcpListener, form: Form, knobs: &[&str]) -> Self {
        Self::start_on_socket(
            OwnedFd::from(shared.try_clone().unwrap()),
            form,
            &[knobs, &["listener=stdin"]].concat(),
        )
    }

    /// As [`start_on`](Self::start_on), with a listening socket of any kind.
    pub(crate) fn start_on_socket(socket: OwnedFd, form: Form, knobs: &[&str]) -> Self {
        const PASS_ON: &str = r#"export LISTEN_FDS=1 LISTEN_PID=$$; exec "$0" "$@" 3<&0"#;

        Self::start_with(PASS_ON, socket, form, knobs)
    }

    /// Starts a server by the shell script `words`, with this socket as its standard input, and waits until
    /// it listens.
    pub(crate) fn start_by(words: &str, shared: &TcpListener, form: Form, knobs: &[&str]) -> Self {
        let socket = OwnedFd::from(shared.try_clone().unwrap());
        Self::start_with(words, socket, form, &[knobs, &["listener=stdin"]].concat())
    }

    fn start_with(words: &str, socket: OwnedFd, form: Form, knobs: &[&str]) -> Self {
        let mut command = Command::new("sh");
        command
            .args(["-c", words])
            .arg(std::env::current_exe().unwrap())
            .stdin(socket);
        let mut server = Self::run(command, form, knobs);
        server.expect_line("starting");
        let listening = server.expect_line("listening");
        server.address = listening.parse().unwrap();
        server
    }

    /// Starts a server, and waits for nothing.
    pub(crate) fn launch(form: Form, knobs: &[&str]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.stdin(Stdio::null());
        Self::run(command, form, knobs)
    }

    pub(crate) fn run(mut command: Command, form: Form, knobs: &[&str]) -> Self {
        let mut child = command
            .arg("--server")
            .arg(format!("form={form:?}"))
            .args(knobs)
            // Backtraces take long, and some tests panic intentionally.
            .env("RUST_BACKTRACE", "0")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = thread::spawn(move || {
            let lines = stderr.split(b'\n').map_while(Result::ok);
            lines.fold(String::new(), |log, line| {
                log + &String::from_utf8_lossy(&line) + "\n"
            })
        });
        Self {
            child,
            lines,
            log: Some(log),
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            signalled: None,
        }
    }

    /// Waits for an output line with this prefix, and returns the rest of the line.
    #[track_caller]
    pub(crate) fn expect_line(&mut self, begins: &str) -> String {
        let line = self
            .lines
            .recv_timeout(BOUND)
            .unwrap_or_else(|error| panic!("no line {begins:?}: {error}"));
        let rest = line.strip_prefix(begins);
        rest.unwrap_or_else(|| panic!("expected {begins:?}, got {line:?}"))
            .trim()
            .to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&mut self, signal: Signal) {
        self.signalled.get_or_insert_with(Instant::now);
        let pid = Pid::from_raw(self.pid().try_into().unwrap());
        signal::kill(pid, signal).unwrap();
    }

    pub(crate) fn terminate(&mut self) {
        self.signal(Signal::SIGTERM);
    }

    /// Records that the stop was triggered now, without a signal.
    pub(crate) fn mark_triggered(&mut self) {
        self.signalled.get_or_insert_with(Instant::now);
    }

    /// The time since the first signal.
    pub(crate) fn elapsed(&self) -> Duration {
        self.signalled.expect("no signal was sent").elapsed()
    }

    /// Sleeps until `after` has passed since the first signal. Only for scenarios about a point in time.
    pub(crate) fn until(&self, after: Duration) {
        thread::sleep(after.saturating_sub(self.elapsed()));
    }

    pub(crate) fn connect(&self) -> Connection {
        Connection::open(self.address)
    }

    /// Sends one request on a new connection.
    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> Response {
        self.connect().get(path)
    }

    /// Sends a request on a new connection before it returns, and reads the response in the background.
    pub(crate) fn get_in_background(&self, path: &str) -> Background {
        let in_flight = self.in_flight();
        let mut connection = self.connect();
        connection.send(&format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"));
        self.wait_for_in_flight(in_flight + 1);
        Background(thread::spawn(move || connection.try_response("GET")))
    }

    #[track_caller]
    pub(crate) fn in_flight(&self) -> usize {
        self.get("/count").text().parse().unwrap()
    }

    /// The number of open connections, including the one that asks for it.
    #[track_caller]
    pub(crate) fn connections(&self) -> usize {
        self.get("/connections").text().parse().unwrap()
    }

    #[track_caller]
    pub(crate) fn wait_for_in_flight(&self, count: usize) -> Duration {
        wait_for(&format!("{count} in flight"), || self.in_flight() == count)
    }

    /// Waits until readiness fails, which shows that the server has received the signal.
    #[track_caller]
    pub(crate) fn wait_for_unready(&self) -> Duration {
        wait_for("readiness to fail", || self.get("/readyz").status != 200)
    }

    #[track_caller]
    pub(crate) fn wait_for_draining(&self) -> Duration {
        wait_for("draining", || self.get("/livez").text() == "draining\n")
    }

    /// Waits until the observer thread of the server prints a phase. Returns the time since the first
    /// phase of the stop, as the observer printed it.
    #[track_caller]
    pub(crate) fn expect_phase(&mut self, phase: &str) -> Duration {
        let after = self.expect_line(&format!("phase {phase}, ready false, after"));
        let after = after.trim_end_matches(" ms");
        Duration::from_millis(after.parse().unwrap())
    }

    /// Waits for the end of the process.
    #[track_caller]
    pub(crate) fn exit(mut self) -> Exit {
        let deadline = Instant::now() + BOUND;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the process does not end");
            thread::sleep(Duration::from_millis(1));
        };
        let after = self.signalled.map_or(Duration::ZERO, |at| at.elapsed());
        let output: Vec<_> = self.lines.iter().collect();
        let log = self.log.take().unwrap().join().unwrap();
        Exit {
            after,
            status,
            report: output.last().cloned().unwrap_or_default(),
            output,
            log,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a condition, and returns how long it took.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < BOUND, "waited too long for {what}");
        thread::sleep(Duration::from_millis(1));
    }
    start.elapsed()
}
