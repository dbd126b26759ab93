//! Ten thousand connections, and half a minute of mixed clients. They leave no memory and no count behind.

use std::{
    env, io,
    net::{Shutdown, SocketAddr},
    ops::Range,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    Test,
    client::{
        Connection,
        frames::{END_HEADERS, END_STREAM, HEADERS, Method, PREFACE, SETTINGS, frame, request},
    },
    long_lived::peer::{CLOSE, close, handshake, masked},
    process::{Server, wait_for},
    server::{Form, allow_files},
};

pub(crate) const ALONE: &[Test] = &[
    (
        "many::ten_thousand_connections_leave_nothing_behind",
        Form::CUTTING,
        leave_nothing,
    ),
    (
        "many::ten_thousand_clients_that_do_not_close_leave_nothing_behind",
        Form::CUTTING,
        linger,
    ),
    (
        "many::ten_thousand_clients_in_the_middle_of_an_upload_do_not_hold_the_stop",
        Form::CUTTING,
        linger_while_stopping,
    ),
    (
        "many::a_thousand_slow_uploads_above_the_limit_are_refused_at_once",
        Form::CUTTING,
        refused_uploads,
    ),
    (
        "many::ten_thousand_stuck_connections_are_cut_in_time",
        Form::CUTTING,
        cut,
    ),
    (
        "many::ten_thousand_websockets_are_closed",
        Form::CUTTING,
        websockets,
    ),
];

/// These run before a release and not in every test run, because they take minutes.
pub(crate) const SOAK: &[Test] = &[
    (
        "many::ten_thousand_consecutive_connections_leave_no_memory_behind",
        Form::CUTTING,
        leave_no_memory,
    ),
    (
        "many::mixed_clients_leave_nothing_behind",
        Form::CUTTING,
        soak,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;
const MANY: usize = 10_000;
/// Open files of the test and of the server besides the connections.
const OTHER_FILES: usize = 200;
const ALL_FILES: &str = "files=1000000";

/// The number of connections that can be open at once, in the test and in the server.
fn wave() -> usize {
    let files = usize::try_from(allow_files(1_000_000)).unwrap();
    let wave = MANY.min(files.saturating_sub(OTHER_FILES));
    assert!(wave >= 500, "too few files may be open: {files}");
    wave
}

/// The resources of a process. Zero where the system does not report them.
#[derive(Clone, Copy, Debug)]
struct Held {
    files: usize,
    /// Resident memory, in KiB.
    memory: usize,
}

#[cfg(target_os = "linux")]
fn held(server: &Server) -> Held {
    let files = format!("/proc/{}/fd", server.pid());
    Held {
        files: std::fs::read_dir(files).unwrap().count(),
        memory: memory(server.pid()).unwrap(),
    }
}

/// Resident memory of a process in KiB, or `None` if the process has ended.
#[cfg(target_os = "linux")]
fn memory(pid: u32) -> Option<usize> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let memory = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    memory.split_whitespace().next()?.parse().ok()
}

#[cfg(not(target_os = "linux"))]
fn held(_: &Server) -> Held {
    Held {
        files: 0,
        memory: 0,
    }
}

#[cfg(not(target_os = "linux"))]
fn memory(_: u32) -> Option<usize> {
    None
}

fn ask(observer: &mut Connection, path: &str) -> usize {
    observer.get(path).text().parse().unwrap()
}

fn wait_for_connections(observer: &mut Connection, count: usize) -> Duration {
    let what = format!("{count} connections");
    wait_for(&what, || ask(observer, "/connections") == count)
}

/// Opens and closes ten thousand connections, `wave` of them at once.
fn ten_thousand(server: &Server, observer: &mut Connection, wave: usize) -> Held {
    let mut left = MANY;
    let mut most = held(server);
    while left > 0 {
        // One after another, so that the accept queue does not overflow, which would delay the connect.
        let connect = |_| {
            let mut connection = server.connect();
            connection.get("/").assert_ok();
            connection
        };
        let connections: Vec<_> = (0..wave.min(left)).map(connect).collect();
        left -= connections.len();
        let now = held(server);
        most.files = most.files.max(now.files);
        most.memory = most.memory.max(now.memory);
        assert_eq!(ask(observer, "/connections"), connections.len() + 1);
        drop(connections);
        wait_for_connections(observer, 1);
    }
    most
}

fn leave_nothing(form: Form) {
    let at_once = wave();
    let mut server = Server::start(form, &["delay=0", ALL_FILES]);
    let mut observer = server.connect();
    observer.get("/").assert_ok();
    let fresh = held(&server);
    let most = ten_thousand(&server, &mut observer, at_once);
    let warm = held(&server);
    ten_thousand(&server, &mut observer, at_once);
    let after = held(&server);
    println!("fresh {fresh:?}, at most {most:?}, warm {warm:?}, after {after:?}");
    wait_for("the files to close", || held(&server).files == fresh.files);
    // The allocator returns no memory, and uses about a third more in the second wave, also without this
    // crate. If connections had stayed, the memory would double.
    let most = warm.memory / 4 * 7;
    assert!(after.memory <= most, "{warm:?}, then {after:?}");
    assert_eq!(ask(&mut observer, "/count"), 0);
    server.terminate();
    server.exit().assert_clean();
}

/// Each client is answered in the middle of its upload, so that the server closes its writing side. From
/// then on the client neither sends nor closes.
fn linger(form: Form) {
    const UPLOAD: &str = "content-length: 5000\r\n\r\nhalf";
    let clients = wave();
    let mut server = Server::start(form, &["delay=0", ALL_FILES]);
    let mut observer = server.connect();
    observer.get("/").assert_ok();
    let fresh = held(&server);
    let (mut stays, mut most) = (Vec::new(), 0);
    for _ in 0..clients {
        let mut client = server.connect();
        client.send(&format!(
            "POST /bytes/0/1 HTTP/1.1\r\nhost: test\r\n{UPLOAD}"
        ));
        client.response("POST").assert_ok();
        most = most.max(held(&server).files);
        stays.push(client);
    }
    wait_for_connections(&mut observer, 1);
    wait_for("the files to close", || held(&server).files == fresh.files);
    println!("at most {most} files, of {clients} clients");
    assert_eq!(stays.len(), clients);
    server.terminate();
    server.exit().assert_clean();
}

/// All clients are answered at once, when draining starts.
fn linger_while_stopping(form: Form) {
    let wave = wave();
    let mut server = Server::start(form, &["delay=0", "drain=20000", ALL_FILES]);
    let mut observer = server.connect();
    let mut clients = Vec::new();
    for i in 0..wave {
        let mut client = server.connect();
        client.send(
            "POST /after_stop/0/1 HTTP/1.1\r\nhost: test\r\ncontent-length: 5000\r\n\r\nhalf",
        );
        clients.push(client);
        // Waits for the server, so that the accept queue does not overflow.
        if i % 500 == 0 {
            wait_for_connections(&mut observer, i + 2);
        }
    }
    wait_for("the requests", || ask(&mut observer, "/count") == wave);
    drop(observer);
    server.terminate();
    let exit = server.exit();
    println!("{} clients: {:?}", wave, exit.after);
    exit.assert_clean();
    exit.assert_within(MS(0), MS(12_000));
    // The clients have received their responses.
    for client in clients.iter_mut().step_by(100) {
        client.response("POST").assert_ok();
    }
}

/// Each client sends a part of its upload, reads its refusal, and goes on to send single bytes.
fn refused_uploads(form: Form) {
    const CLIENTS: usize = 1000;
    const SIZE: usize = 8 * 1024 * 1024;
    const PART: usize = 64 * 1024;
    // In KiB. If the server kept what it has read, it would keep 64 MiB.
    const MOST: usize = 30_000;
    assert!(wave() >= CLIENTS);
    let mut server = Server::start(form, &["delay=0", "limit=1", ALL_FILES]);
    let mut observer = server.connect();
    observer.get("/").assert_ok();
    let mut busy = server.connect();
    busy.send("GET /never HTTP/1.1\r\nhost: test\r\n\r\n");
    wait_for("the busy request", || ask(&mut observer, "/count") == 1);
    let fresh = held(&server);
    let head = format!("POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: {SIZE}\r\n\r\n");
    let request = [head.as_bytes(), &vec![b'x'; PART]].concat();
    let (mut clients, mut most, mut slowest) = (Vec::new(), fresh, Duration::ZERO);
    let start = Instant::now();
    for i in 0..CLIENTS {
        let mut client = server.connect();
        client.try_send(&request).unwrap();
        let sent = Instant::now();
        assert_eq!(client.response("POST").status, 429);
        slowest = slowest.max(sent.elapsed());
        // It takes a second. If the server waited for each of these silent clients, it would take a quarter of an hour.
        assert!(start.elapsed() < MS(60_000), "{i} clients, {slowest:?}");
        clients.push(client);
        if i % 50 == 0 || i == CLIENTS - 1 {
            let now = held(&server);
            most.files = most.files.max(now.files);
            most.memory = most.memory.max(now.memory);
        }
    }
    let closed = Instant::now();
    wait_for("the connections to close", || {
        for client in &mut clients {
            // The server may have closed the connection.
            let _ = client.try_send(b"x");
        }
        ask(&mut observer, "/connections") == 2
    });
    println!(
        "slowest {slowest:?}, closed after {:?}, {fresh:?}, at most {most:?}",
        closed.elapsed()
    );
    assert!(slowest < MS(5000), "{slowest:?}");
    assert!(
        most.memory < fresh.memory + MOST,
        "{fresh:?}, then {most:?}"
    );
    wait_for("the files to close", || held(&server).files == fresh.files);
    drop(busy);
    wait_for("no request", || ask(&mut observer, "/count") == 0);
    observer.get("/").assert_ok();
    server.terminate();
    server.exit().assert_clean();
}

/// A hundred connections at a time, so that the allocator has little influence.
fn leave_no_memory(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let mut observer = server.connect();
    ten_thousand(&server, &mut observer, 100);
    let mut resident = vec![held(&server).memory];
    // If each connection left memory behind, every round would grow by the same amount. The allocator
    // grows only at first, and on a busy machine that may take a second round.
    let grows = (0..3).all(|_| {
        ten_thousand(&server, &mut observer, 100);
        resident.push(held(&server).memory);
        // 200 bytes for each connection.
        resident[resident.len() - 1] > resident[resident.len() - 2] + 2_000
    });
    println!("resident memory in KiB: {resident:?}");
    assert!(!grows, "{resident:?}");
    server.terminate();
    server.exit().assert_clean();
}

/// What the stuck connections send, in equal parts: half a request head, a request whose handler never
/// resolves, a request whose response body never continues, half an upload, and the preface of an HTTP/2
/// client that then stays silent.
const STUCK: [&[u8]; 5] = [
    b"GET / HTTP/1.1\r\nx-half: ",
    b"GET /never HTTP/1.1\r\nhost: test\r\n\r\n",
    b"GET /silent HTTP/1.1\r\nhost: test\r\n\r\n",
    b"POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 8\r\n\r\nhalf",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
];

fn cut(form: Form) {
    let wave = wave() / 5 * 5;
    let (mut left, mut slowest) = (MANY, Duration::ZERO);
    while left > 0 {
        // Connecting all of them may take longer than the head timeout.
        const PATIENT: &str = "header_read_timeout=max";
        let mut server = Server::start(form, &["delay=200", "drain=800", ALL_FILES, PATIENT]);
        let mut observer = server.connect();
        let stuck = STUCK
            .iter()
            .cycle()
            .take(wave.min(left).next_multiple_of(5));
        let mut connect = |(i, sends): (usize, &&[u8])| {
            let mut connection = server.connect();
            connection.try_send(sends).unwrap();
            // Waits for the server, so that the accept queue does not overflow.
            if i % 500 == 0 {
                wait_for_connections(&mut observer, i + 2);
            }
            connection
        };
        let stuck: Vec<_> = stuck.enumerate().map(&mut connect).collect();
        wait_for_connections(&mut observer, stuck.len() + 1);
        let requests = stuck.len() / 5 * 3;
        wait_for("the requests", || ask(&mut observer, "/count") == requests);
        drop(observer);
        wait_for("the observer to leave", || {
            server.connections() == stuck.len() + 1
        });
        server.terminate();
        let exit = server.exit();
        assert_eq!(exit.status.code(), Some(1), "{exit:?}");
        let given_up = format!("given up: {requests} requests, {} connections", stuck.len());
        assert!(exit.report.contains(&given_up), "{given_up}: {exit:?}");
        exit.assert_within(MS(1000), MS(5000));
        slowest = slowest.max(exit.after.saturating_sub(MS(1000)));
        left = left.saturating_sub(stuck.len());
    }
    println!("at most {slowest:?} from the deadline to the end of the process");
}

fn websockets(form: Form) {
    const DELAY: Duration = Duration::from_millis(200);
    let sockets = wave();
    // Closing all of them takes a second or two, so the spread has to be longer.
    for (knob, spread) in [("drain_spread=0", 0), ("drain_spread=4000", 4000)] {
        let mut server = Server::start(form, &["delay=200", "drain=8000", knob, ALL_FILES]);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let address = server.address;
        let peers = runtime.block_on(async {
            let mut peers = Vec::new();
            // One after another, so that the accept queue does not overflow.
            for _ in 0..sockets {
                peers.push(open_websocket(address).await.unwrap());
            }
            peers
        });
        server.wait_for_in_flight(sockets);
        let open = held(&server).memory;
        let pid = server.pid();
        let peak = thread::spawn(move || {
            let samples = std::iter::from_fn(|| {
                thread::sleep(MS(2));
                memory(pid)
            });
            samples.max().unwrap_or_default()
        });
        server.terminate();
        let draining = Instant::now() + DELAY;
        let closing_times = thread::spawn(move || {
            let closed_at = runtime.block_on(async {
                let peers = peers.into_iter().map(answer_close).map(tokio::spawn);
                let mut closed_at = Vec::new();
                for peer in peers.collect::<Vec<_>>() {
                    closed_at.push(peer.await.unwrap().unwrap());
                }
                closed_at
            });
            let mut closed_at: Vec<_> = closed_at
                .into_iter()
                .map(|at| at.saturating_duration_since(draining))
                .collect();
            closed_at.sort();
            closed_at
        });
        let exit = server.exit();
        let closed_at = closing_times.join().unwrap();
        let peak = peak.join().unwrap();
        let [first, half, last] = [0, sockets / 2, sockets - 1].map(|n| closed_at[n]);
        let ended = exit.after.saturating_sub(DELAY);
        println!(
            "{form:?}, {knob}: {sockets} WebSockets are closed from {first:?} on, half by {half:?}, \
             all by {last:?}; the end of the process {ended:?}; resident {open} KiB, {} each, \
             at most {peak} KiB",
            open / sockets
        );
        exit.assert_clean();
        exit.assert_within(DELAY + MS(spread * 9 / 10), DELAY + MS(8000));
        if spread > 0 {
            for (quarter, share) in [(1, 10..=40), (2, 35..=65), (3, 60..=90)] {
                let time = MS(spread) * quarter / 4;
                let by = closed_at.partition_point(|at| *at <= time) * 100 / sockets;
                assert!(share.contains(&by), "{by} % by {time:?}");
            }
        }
    }
}

async fn open_websocket(address: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(handshake("/ws").as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "));
    Ok(stream)
}

/// Waits for the server's close frame, and answers it. Returns when it arrived.
async fn answer_close(mut stream: TcpStream) -> io::Result<Instant> {
    let close_frame = [&[0x88, 8], &*close(1001, "deploy")].concat();
    let mut frame = vec![0; close_frame.len()];
    stream.read_exact(&mut frame).await?;
    let at = Instant::now();
    assert_eq!(frame, close_frame);
    stream.write_all(&masked(CLOSE, &close(1001, ""))).await?;
    assert_eq!(stream.read(&mut frame).await?, 0, "the server closes");
    Ok(at)
}

/// Longer if the environment has a `FULL`.
const SHORT: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_secs(120);
/// The time until the allocator has enough memory and stops growing.
const WARM: Duration = Duration::from_secs(10);

fn soak(form: Form) {
    wave();
    let mut server = Server::start(form, &["delay=0", ALL_FILES]);
    let mut observer = server.connect();
    observer.get("/").assert_ok();
    let fresh = held(&server);
    let address = server.address;
    let over = AtomicBool::new(false);
    let [visits, failures] = [const { AtomicU64::new(0) }; 2];
    let mut memory = Vec::new();
    thread::scope(|scope| {
        for seed in 1..=6 {
            let (over, visits, failures) = (&over, &visits, &failures);
            scope.spawn(move || {
                let mut chance = Chance(seed);
                while !over.load(Ordering::Relaxed) {
                    let visited = visit(address, &mut chance);
                    let count = if visited.is_ok() { visits } else { failures };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let length = if env::var_os("FULL").is_some() {
            LONG
        } else {
            SHORT
        };
        let begun = Instant::now();
        while begun.elapsed() < length {
            thread::sleep(MS(250));
            if begun.elapsed() > WARM {
                memory.push(held(&server).memory);
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    let counts = [visits, failures].map(AtomicU64::into_inner);
    wait_for_connections(&mut observer, 1);
    wait_for("the last request", || ask(&mut observer, "/count") == 0);
    wait_for("the files to close", || held(&server).files == fresh.files);
    let after = held(&server);
    let half = memory.len() / 2;
    let (first, second) = memory.split_at_mut(half);
    let [first, second] = [median(first), median(second)];
    println!(
        "visits and failures {counts:?}, fresh {fresh:?}, after {after:?}, medians {first} and {second} KiB"
    );
    assert!(
        counts[0] > 5_000 && counts[1] < counts[0] / 100,
        "{counts:?}"
    );
    assert!(second <= first + 1_000, "{first} KiB, then {second} KiB");
    server.terminate();
    server.exit().assert_clean();
}

fn median(values: &mut [usize]) -> usize {
    values.sort_unstable();
    values[values.len() / 2]
}

/// A random generator with the same sequence in every run (the constants of Knuth's MMIX).
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        let mut chance = Self(seed);
        // Seeds that are close to each other begin with close numbers.
        for _ in 0..3 {
            chance.within(0..1);
        }
        chance
    }

    pub(crate) fn within(&mut self, range: Range<u64>) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        range.start + (self.0 >> 33) % (range.end - range.start)
    }
}

/// One client: it connects, acts at random, and disconnects.
fn visit(address: SocketAddr, chance: &mut Chance) -> io::Result<()> {
    let mut connection = Connection::try_open(address)?;
    match chance.within(0..9) {
        0 => {}
        1 => {
            for _ in 0..chance.within(1..5) {
                connection.try_request("GET", "/")?;
            }
        }
        2 => connection.try_send(b"GET / HTTP/1.1\r\nx-half: ")?,
        3 => connection.try_send(STUCK[3])?,
        4 => connection.try_send(b"GET /stream/1000000/1 HTTP/1.1\r\nhost: test\r\n\r\n")?,
        5 => connection.try_send(b"GET /large HTTP/1.1\r\nhost: test\r\n\r\n")?,
        6 => connection.try_send(b"GET /never HTTP/1.1\r\nhost: test\r\n\r\n")?,
        7 => {
            connection.try_send(b"GET /upgrade HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")?;
            connection.try_response("GET")?;
        }
        _ => {
            let mut frames = [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[])].concat();
            for (stream, path) in [(1, "/"), (3, "/never"), (5, "/stream/10/1")] {
                let head = request(Method::Get, path);
                frames.extend(frame(HEADERS, END_STREAM | END_HEADERS, stream, &head));
            }
            connection.try_send(&frames)?;
        }
    }
    thread::sleep(MS(chance.within(0..5)));
    match chance.within(0..3) {
        0 => connection
            .stream()
            .shutdown(Shutdown::Both)
            .or_else(|error| {
                // The server has closed the connection before.
                if error.kind() == io::ErrorKind::NotConnected {
                    Ok(())
                } else {
                    Err(error)
                }
            }),
        // Closes by RST, so that no port stays in TIME_WAIT.
        _ => socket2::SockRef::from(connection.stream()).set_linger(Some(Duration::ZERO)),
    }
}
