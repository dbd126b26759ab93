//! A listening socket that outlives the process: the successor reads the same accept queue.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Test,
    client::Connection,
    process::{Server, wait_for},
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
        "activation::a_restart_costs_no_client_a_second",
        Form::CUTTING,
        restarts,
    ),
];

/// A client whose handshake was dropped tries again after one second.
const RETRIED: Duration = Duration::from_millis(900);
const BOTH: [&str; 2] = ["keep_listening=true", "keep_listening=false"];

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

/// Eight clients that connect anew for each request, and three processes one after another.
fn restarts(form: Form) {
    for keep in BOTH {
        let knobs = ["delay=100", keep];
        let (shared, address) = shared_socket();
        let mut server = Server::start_on(&shared, form, &knobs);
        let over = Arc::new(AtomicBool::new(false));
        let clients: Vec<_> = (0..8)
            .map(|_| {
                let over = Arc::clone(&over);
                thread::spawn(move || {
                    let mut slowest = Duration::ZERO;
                    while !over.load(Ordering::Relaxed) {
                        let begun = Instant::now();
                        // Lost or refused is the subject of other tests.
                        if let Ok(mut connection) = Connection::try_open(address) {
                            let _ = connection.try_request("GET", "/");
                        }
                        slowest = slowest.max(begun.elapsed());
                    }
                    slowest
                })
            })
            .collect();
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(300));
            server.terminate();
            server.exit().assert_clean();
            server = Server::start_on(&shared, form, &knobs);
        }
        // A handshake that was dropped is tried again in this time.
        thread::sleep(Duration::from_millis(1100));
        over.store(true, Ordering::Relaxed);
        for client in clients {
            let slowest = client.join().unwrap();
            assert!(slowest < RETRIED, "{keep}: {slowest:?}");
        }
        server.terminate();
        server.exit().assert_clean();
    }
}
