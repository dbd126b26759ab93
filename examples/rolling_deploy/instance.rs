//! One process of the service under test. It leads a process group of its own. As in a container, which ends
//! with its first process, all remaining processes of the group are killed when the leader has ended. They are
//! also killed when the instance is dropped.

use std::{
    collections::BTreeSet,
    fmt,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::{load::How, single};

/// Only the last bytes of a service's output are kept: this many.
const KEPT_OUTPUT: usize = 64 * 1024;

/// Why there is nothing to measure. `Display` is the message for the user.
#[derive(Debug)]
pub(crate) struct Problem(pub(crate) String);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Problem {}

#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) port: u16,
    command: String,
    child: Child,
    group: Pid,
    output: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

/// How an instance ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) signalled: Instant,
    pub(crate) exited: Instant,
    pub(crate) status: ExitStatus,
    /// Whether the process was killed because the grace period was over.
    pub(crate) killed: bool,
    /// Whether other processes of the group were still running, and were killed.
    pub(crate) left_behind: bool,
    pub(crate) output: String,
}

impl Instance {
    /// Starts `command`, with `{port}` replaced in its arguments and `PORT` in its environment.
    pub(crate) fn start(command: &[String], port: u16) -> Result<Self, Problem> {
        let words: Vec<_> = command
            .iter()
            .map(|word| word.replace("{port}", &port.to_string()))
            .collect();
        let (program, args) = words.split_first().expect("checked with the options");
        let text = words.join(" ");
        let mut child = Command::new(program)
            .args(args)
            .env("PORT", port.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Problem(format!("`{text}` does not start: {error}")))?;
        let group = child
            .id()
            .and_then(|id| id.try_into().ok())
            .map(Pid::from_raw);
        let group = group.expect("it has not been waited for");
        let output = Arc::default();
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(tokio::spawn(keep(pipe, Arc::clone(&output))));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(tokio::spawn(keep(pipe, Arc::clone(&output))));
        }
        Ok(Self {
            port,
            command: text,
            child,
            group,
            output,
            readers,
        })
    }

    /// Waits until `path` answers with a success status.
    pub(crate) async fn ready(&mut self, path: &str, bound: Duration) -> Result<(), Problem> {
        let begun = Instant::now();
        loop {
            let answer = single::get(self.port, path).await;
            if answer.as_ref().is_ok_and(hyper::StatusCode::is_success) {
                return Ok(());
            }
            self.must_run("before it was ready").await?;
            if begun.elapsed() >= bound {
                let (command, port) = (&self.command, self.port);
                let why = match answer {
                    Err(How::Refused) => format!(
                        "nothing listens on 127.0.0.1:{port}. Does it take its port from {{port}} \
                         among its arguments, or from PORT in its environment?"
                    ),
                    Err(how) => format!("GET {path} on port {port} was {how}"),
                    Ok(status) => format!(
                        "GET {path} on port {port} is answered with {status}. Is --ready the path \
                         of its readiness probe?"
                    ),
                };
                let output = self.output().await;
                return Err(Problem(format!(
                    "`{command}` was not ready within {bound:?}: {why}{output}"
                )));
            }
            sleep(Duration::from_millis(30)).await;
        }
    }

    /// Returns an error if the process has ended.
    pub(crate) async fn must_run(&mut self, when: &str) -> Result<(), Problem> {
        if let Ok(Some(status)) = self.child.try_wait() {
            let output = self.output().await;
            let command = &self.command;
            return Err(Problem(format!(
                "`{command}` ended {when}: {status}{output}"
            )));
        }
        Ok(())
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) -> Instant {
        // Only to the leader of the group, as container runtimes do.
        let _ = kill(self.group, Signal::SIGTERM);
        Instant::now()
    }

    /// Waits until the process has ended by itself.
    pub(crate) async fn wait(&mut self) -> Result<ExitStatus, Problem> {
        let status = self.child.wait().await;
        let _ = killpg(self.group, Signal::SIGKILL);
        status.map_err(|error| Problem(format!("cannot wait for it: {error}")))
    }

    /// Waits until the process has ended. Kills it when `grace` has passed since `signalled`.
    pub(crate) async fn ended(
        &mut self,
        signalled: Instant,
        grace: Duration,
    ) -> Result<Ended, Problem> {
        let left = grace.saturating_sub(signalled.elapsed());
        let in_time = timeout(left, self.child.wait()).await;
        let killed = in_time.is_err();
        let status = if let Ok(status) = in_time {
            status
        } else {
            let _ = killpg(self.group, Signal::SIGKILL);
            self.child.wait().await
        };
        let exited = Instant::now();
        let left_behind = !killed && killpg(self.group, Signal::SIGKILL).is_ok();
        let status = status.map_err(|error| Problem(format!("cannot wait for it: {error}")))?;
        for reader in self.readers.drain(..) {
            // A process that has left the group may keep the pipe open.
            let _ = timeout(Duration::from_millis(500), reader).await;
        }
        let output = String::from_utf8_lossy(&self.kept()).into_owned();
        Ok(Ended {
            signalled,
            exited,
            status,
            killed,
            left_behind,
            output,
        })
    }

    /// The output of the process, as the end of an error message.
    async fn output(&self) -> String {
        // Gives the reader tasks time to read the last output.
        sleep(Duration::from_millis(50)).await;
        let kept = self.kept();
        let text = String::from_utf8_lossy(&kept);
        let lines: Vec<_> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(10)..];
        if last.is_empty() {
            return "\nIt has written nothing.".into();
        }
        format!("\nIts last output:\n    {}", last.join("\n    "))
    }

    fn kept(&self) -> Vec<u8> {
        self.output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = killpg(self.group, Signal::SIGKILL);
    }
}

async fn keep(mut pipe: impl AsyncRead + Unpin, output: Arc<Mutex<Vec<u8>>>) {
    let mut piece = [0; 4096];
    while let Ok(read @ 1..) = pipe.read(&mut piece).await {
        let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
        output.extend_from_slice(&piece[..read]);
        let surplus = output.len().saturating_sub(KEPT_OUTPUT);
        output.drain(..surplus);
    }
}

/// An unused port below the range that the system gives to clients. In that range, a client of the load
/// could take the port before the service binds it. Each port is returned only once, because the service
/// that is to bind it may not have started yet.
pub(crate) fn free_port() -> u16 {
    use std::{
        hash::{BuildHasher, RandomState},
        net::TcpListener,
    };
    static RETURNED: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut returned = RETURNED.lock().unwrap_or_else(PoisonError::into_inner);
    let random = RandomState::new();
    (0..10_000_u16)
        .map(|attempt| 20_000 + u16::try_from(random.hash_one(attempt) % 10_000).unwrap_or(0))
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok() && returned.insert(*port))
        .expect("a port is free")
}
