//! Stops and kills the example `ordered_stop` under load. Every accepted job must be in its database.

#![cfg(unix)]

use std::{
    collections::HashSet,
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sqlx::{SqlitePool, sqlite::SqliteConnectOptions};

const BOUND: Duration = Duration::from_secs(20);

/// The path of the example, in the folder above the test program. Cargo builds it together with the tests,
/// unless only some targets are selected.
fn example() -> PathBuf {
    let tests = env::current_exe().unwrap();
    let profile = tests.ancestors().nth(2).unwrap();
    let example = profile.join("examples/ordered_stop");
    if !example.exists() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--example", "ordered_stop"]);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success());
    }
    example
}

struct Service {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    address: SocketAddr,
    log: PathBuf,
}

impl Service {
    fn start(database: &Path) -> Self {
        let mut child = Command::new(example())
            .arg("127.0.0.1:0")
            .arg(database)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap();
        let address = address.parse().unwrap();
        let log = env::temp_dir().join(format!("ordered_stop.{}.log", child.id()));
        Self {
            child,
            output,
            address,
            log,
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap());
        kill(pid, signal).unwrap();
    }

    /// Waits until the process has ended. Returns the exit code, the report, and the log.
    fn end(mut self) -> (Option<i32>, String, String) {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begun.elapsed() < BOUND, "it does not end");
            thread::sleep(Duration::from_millis(2));
        };
        let mut report = String::new();
        self.output.read_to_string(&mut report).unwrap();
        let log = fs::read_to_string(&self.log).unwrap();
        fs::remove_file(&self.log).unwrap();
        (status.code(), report, log)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Submits a job. Returns whether it was accepted, or `None` without a response.
fn post(address: SocketAddr, job: &str) -> Option<bool> {
    let mut stream = TcpStream::connect_timeout(&address, BOUND).ok()?;
    stream.set_read_timeout(Some(BOUND)).unwrap();
    let request = format!(
        "POST /jobs HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{job}",
        job.len()
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    match answer.get(..12)? {
        "HTTP/1.1 202" => Some(true),
        "HTTP/1.1 503" => Some(false),
        _ => panic!("{answer}"),
    }
}

/// Submits jobs until the service does not answer any more. Returns the accepted jobs.
fn load(address: SocketAddr, client: usize, begun: &AtomicBool) -> Vec<String> {
    let mut accepted = Vec::new();
    for job in 0.. {
        let job = format!("job {job} of client {client}");
        match post(address, &job) {
            Some(true) => {
                accepted.push(job);
                begun.store(true, Relaxed);
            }
            Some(false) => thread::sleep(Duration::from_millis(1)),
            None => break,
        }
    }
    accepted
}

fn stored(database: &Path) -> HashSet<String> {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let options = SqliteConnectOptions::new().filename(database);
        let pool = SqlitePool::connect_with(options).await.unwrap();
        let jobs = sqlx::query_scalar("SELECT job FROM jobs");
        let jobs: Vec<String> = jobs.fetch_all(&pool).await.unwrap();
        pool.close().await;
        let count = jobs.len();
        let jobs: HashSet<_> = jobs.into_iter().collect();
        assert_eq!(jobs.len(), count, "a job is stored twice");
        jobs
    })
}

#[test]
fn accepted_jobs_are_stored() {
    example();
    let kills = |first| move || (first..20).step_by(4).for_each(accepted_is_stored);
    let killers: Vec<_> = (0..4).map(|first| thread::spawn(kills(first))).collect();
    for killer in killers {
        if let Err(lost) = killer.join() {
            std::panic::resume_unwind(lost);
        }
    }
}

fn accepted_is_stored(kill: u64) {
    let folder = env::temp_dir().join(format!("ordered-stop-{}-{kill}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let database = folder.join("jobs.db");
    let service = Service::start(&database);
    let address = service.address;
    let begun = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|client| {
            let begun = Arc::clone(&begun);
            thread::spawn(move || load(address, client, &begun))
        })
        .collect();
    let waited = Instant::now();
    while !begun.load(Relaxed) && waited.elapsed() < BOUND {
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(17 * kill));
    // Ctrl-C ends the delay that SIGTERM has started.
    if kill % 2 == 0 {
        service.signal(Signal::SIGINT);
    } else {
        service.signal(Signal::SIGTERM);
        thread::sleep(Duration::from_millis(30));
        service.signal(Signal::SIGINT);
    }
    let (code, report, log) = service.end();
    let accepted = clients.into_iter().flat_map(|it| it.join().unwrap());
    let accepted: HashSet<_> = accepted.collect();
    let stored = stored(&database);
    assert!(!accepted.is_empty(), "kill {kill}: {report}");
    let lost: Vec<_> = accepted.difference(&stored).collect();
    assert!(
        lost.is_empty(),
        "kill {kill}: {lost:?} of {}\n{report}",
        accepted.len()
    );
    assert_eq!(code, Some(0), "kill {kill}: {report}\n{log}");
    for row in ["writer 1", "writer 2", "counter", "database"] {
        let row = report.lines().find(|line| line.trim().starts_with(row));
        assert!(row.unwrap().ends_with("done"), "{report}");
    }
    assert!(log.contains(report.trim()), "the log is not flushed: {log}");
    fs::remove_dir_all(&folder).unwrap();
}

/// Runs a statement on the database of a running service.
fn execute(database: &Path, statement: &'static str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let options = SqliteConnectOptions::new().filename(database);
        let pool = SqlitePool::connect_with(options).await.unwrap();
        sqlx::query(statement).execute(&pool).await.unwrap();
        pool.close().await;
    });
}

#[test]
fn a_database_that_fails_for_a_while_costs_no_accepted_job_and_no_worker() {
    let folder = env::temp_dir().join(format!("ordered-stop-{}-fails", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let database = folder.join("jobs.db");
    let service = Service::start(&database);
    execute(&database, "ALTER TABLE jobs RENAME TO away");
    let mut accepted = HashSet::new();
    // The queue has room for a hundred jobs. When it is full, the answer comes at once.
    loop {
        assert!(accepted.len() < 200, "the queue has no end");
        let job = format!("job {}", accepted.len());
        match post(service.address, &job) {
            Some(true) => accepted.insert(job),
            Some(false) => break,
            None => panic!("no answer after {} jobs", accepted.len()),
        };
    }
    let begun = Instant::now();
    let log = || fs::read_to_string(&service.log).unwrap();
    while !log().contains("not counted") {
        assert!(begun.elapsed() < BOUND, "{}", log());
        thread::sleep(Duration::from_millis(10));
    }
    execute(&database, "ALTER TABLE away RENAME TO jobs");
    service.signal(Signal::SIGINT);
    let (code, report, log) = service.end();
    assert_eq!(code, Some(0), "{report}\n{log}");
    assert_eq!(stored(&database), accepted);
    fs::remove_dir_all(&folder).unwrap();
}
