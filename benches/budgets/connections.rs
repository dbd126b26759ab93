//! Ten thousand connections: their memory while they are idle, and the time to cut them if none of
//! them ends by itself.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use socket2::SockRef;

use super::{
    child::{Form, Server, allow_files},
    figures::Figures,
    rows::{Budget, Rows},
};

const MANY: usize = 10_000;
/// Files that are open besides the connections.
const OTHER_FILES: u64 = 200;
const ROUNDS: usize = 3;

fn many() -> usize {
    let files = allow_files().saturating_sub(OTHER_FILES);
    let many = MANY.min(usize::try_from(files).expect("a number of files"));
    if many < MANY {
        println!("(only {many} connections: the limit of open files is too low)");
    }
    many
}

fn connect(address: SocketAddr, sends: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.write_all(sends).expect("a server that reads");
    // Closes by RST, so that no port stays in TIME_WAIT.
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    stream
}

/// A connection that has made one request, and is idle.
fn idle(address: SocketAddr) -> TcpStream {
    let mut stream = connect(address, b"GET / HTTP/1.1\r\nhost: test\r\n\r\n");
    let mut response = Vec::new();
    while !response.ends_with(b"hello") {
        let mut piece = [0; 1024];
        let length = stream.read(&mut piece).expect("a response");
        assert!(length > 0, "the server closed the connection");
        response.extend_from_slice(&piece[..length]);
    }
    stream
}

/// Resident bytes of the server for each connection.
fn resident(form: Form, count: usize) -> f64 {
    /// Connections before the first reading, so that the server has allocated everything that
    /// connections share.
    const WARM: usize = 100;

    let mut server = Server::start(form, 0);
    let warm: Vec<_> = (0..WARM).map(|_| idle(server.address)).collect();
    let before = server.ask("memory");
    let others: Vec<_> = (0..count).map(|_| idle(server.address)).collect();
    let after = server.ask("memory");
    drop((warm, others));
    let bytes = f64::from(after.saturating_sub(before)) * 1024.0;
    bytes / f64::from(u32::try_from(count).expect("a few thousand"))
}

pub(crate) fn measure_memory(rows: &mut Rows) {
    let count = many();
    let mut all = Form::MEMORY.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for (bytes, form) in all.iter_mut().zip(Form::MEMORY) {
            bytes.push(resident(form, count));
        }
    }
    let [plain, passed, others @ ..] = all.map(|bytes| Figures::new(bytes).median());
    let mut add = |row: String, with: f64, peer: f64, budget| {
        let added = with - peer;
        let ours = format!("{added:.0} bytes on {peer:.0}");
        rows.add(&row, &ours, "256 bytes", added / 256.0, budget);
    };
    add(
        format!("memory, {}", Form::Passed.name()),
        passed,
        plain,
        Budget::None,
    );
    for (form, with) in Form::MEMORY[2..].iter().zip(others) {
        // The budget is for the memory of a tracked connection. A layer makes routes larger, and axum
        // copies the routes for each connection: rows with a layer have their budget over one that
        // does nothing.
        let (over_plain, over_passed) = match form {
            Form::Tracked => (Budget::AtMost(1.0), None),
            Form::Listener => (Budget::None, Some(Budget::AtMost(1.0))),
            Form::Serve => (Budget::AtMost(1.0), Some(Budget::AtMost(1.0))),
            _ => (Budget::None, Some(Budget::None)),
        };
        let row = format!("memory, {}", form.name());
        add(row.clone(), with, plain, over_plain);
        if let Some(budget) = over_passed {
            let over = format!("{row}, over {}", Form::Passed.name());
            add(over, with, passed, budget);
        }
    }
}

/// What the stuck connections send, in equal parts: half a request head, a request whose handler never
/// resolves, a request whose response body never continues, half an upload, and the preface of an
/// HTTP/2 client that then stays silent.
const STUCK: [&[u8]; 5] = [
    b"GET / HTTP/1.1\r\nx-half: ",
    b"GET /never HTTP/1.1\r\nhost: test\r\n\r\n",
    b"GET /silent HTTP/1.1\r\nhost: test\r\n\r\n",
    b"POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 8\r\n\r\nhalf",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
];
/// The middle three of them are in flight.
const IN_FLIGHT: usize = 3;

/// Milliseconds from the drain deadline until all connections are closed.
fn cut(form: Form, count: usize) -> f64 {
    let mut server = Server::start(form, 2);
    let mut stuck = Vec::new();
    for sends in STUCK.iter().cycle().take(count) {
        stuck.push(connect(server.address, sends));
        // Waits for the server, so that the accept queue does not overflow.
        if stuck.len() % 500 == 0 {
            wait_for(&mut server, "connections", stuck.len());
        }
    }
    wait_for(&mut server, "connections", stuck.len());
    wait_for(
        &mut server,
        "in flight",
        stuck.len() / STUCK.len() * IN_FLIGHT,
    );
    f64::from(server.ask("cut")) / 1e3
}

fn wait_for(server: &mut Server, what: &str, count: usize) {
    let start = Instant::now();
    while server.ask(what) as usize != count {
        assert!(start.elapsed().as_secs() < 30, "waited too long: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn measure_cut(rows: &mut Rows) {
    let count = many() / STUCK.len() * STUCK.len();
    for (row, form) in [
        ("cut, listener", Form::Listener),
        ("cut, serve", Form::Serve),
    ] {
        let times: Vec<_> = (0..ROUNDS).map(|_| cut(form, count)).collect();
        let slowest = Figures::new(times).percentile(100);
        let ours = format!("at most {slowest:.0} ms");
        rows.add(row, &ours, "500 ms", slowest / 500.0, Budget::AtMost(1.0));
    }
}
