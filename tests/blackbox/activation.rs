//! A listening socket that outlives the process: the successor reads the same accept queue.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::{
    Test,
    process::{Server, wait_for},
    restarts::{Load, RETRIED, Seen},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    #[cfg(target_os = "linux")]
    (
        "activation::a_leftover_filter_does_not_keep_clients_away",
        Form::CUTTING,
        leftover_filter,
    ),
    (
        "activation::measure",
        Form::CUTTING,
        measure,
    ),
];


fn shared_socket() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// What a process leaves behind that was killed while no handshake was to begin.
#[cfg(target_os = "linux")]
fn leftover_filter(form: Form) {
    use socket2::{SockFilter, SockRef};

    const RETURN: u16 = 0x06;
    let (shared, address) = shared_socket();
    let drop_all = [SockFilter::new(RETURN, 0, 0, 0)];
    SockRef::from(&shared).attach_filter(&drop_all).unwrap();
    let mut server = Server::start_on(&shared, form, &["delay=0"]);
    // The server may not have polled its listener yet. Each attempt is too short for a handshake
    // that is tried again.
    wait_for("a connection", || {
        TcpStream::connect_timeout(&address, Duration::from_millis(100)).is_ok()
    });
    server.get("/").assert_ok();
    server.terminate();
    server.exit().assert_clean();
}

/// Ten processes one after another, while clients go on. Returns what those have seen.
fn restart(form: Form, knobs: &[&str], how: How, idle: Duration, clients: usize) -> Seen {
    let (shared, address) = shared_socket();
    let mut server = Server::start_on(&shared, form, knobs);
    let load = Load::begin(address, 4, clients, idle);
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(200));
        let next = (how == How::Beside).then(|| Server::start_on(&shared, form, knobs));
        server.terminate();
        if let How::Killed(after) = how {
            thread::sleep(after);
            server.signal(Signal::SIGKILL);
            server.exit();
        } else {
            server.exit().assert_clean();
        }
        server = next.unwrap_or_else(|| Server::start_on(&shared, form, knobs));
    }
    // A handshake that was dropped is tried again in this time.
    thread::sleep(Duration::from_millis(1100));
    let seen = load.end();
    server.terminate();
    server.exit().assert_clean();
    seen
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    /// The next process is started before the old one is told to stop.
    Beside,
    /// The next process is started when the old one has ended.
    InTurn,
    /// The same, and the old one is killed so long after it was told to stop.
    Killed(Duration),
}

fn measure(form: Form) {
    let idle: u64 = std::env::var("IDLE").unwrap().parse().unwrap();
    let clients = std::env::var("CLIENTS").unwrap().parse().unwrap();
    let delay = std::env::var("DELAY").unwrap();
    for (name, how) in [("beside", How::Beside), ("in turn", How::InTurn)] {
        let begun = Instant::now();
        let seen = restart(form, &[&format!("delay={delay}"), "threads=2"], how, Duration::from_millis(idle), clients);
        eprintln!("{form:?} {name} delay={delay} idle<={idle} clients={clients}: {} requests, {} again, {} moved, {} failed, connect {:?}, slowest {:?}, all {:?}, {:?}", seen.requests, seen.again, seen.moved, seen.failed.len(), seen.slowest_connect, seen.slowest, begun.elapsed(), seen.failed.first());
    }
}
