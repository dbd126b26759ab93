//! Requests that arrive together with the signal.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Test,
    client::{Connection, Response},
    process::{Server, join, wait_for},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "edge::requests_in_the_accept_queue_are_answered",
        Form::CUTTING,
        queued,
    ),
    (
        "edge::connection_per_request_clients_lose_nothing",
        Form::CUTTING,
        connection_per_request,
    ),
    (
        "edge::requests_on_idle_connections_are_answered",
        Form::CUTTING,
        idle,
    ),
    (
        "edge::requests_on_silent_connections_are_answered",
        Form::CUTTING,
        silent,
    ),
    (
        "edge::requests_that_wait_while_the_only_thread_is_blocked_are_answered",
        Form::CUTTING,
        blocked,
    ),
];

const GET: &str = "GET / HTTP/1.1\r\nhost: test\r\n\r\n";
const BOTH: [&str; 2] = ["keep_listening=true", "keep_listening=false"];

/// When draining starts, the server closes connections that have been silent for 25 ms. A client that the
/// operating system delays for longer than this may lose its request, and the test does not count it.
const PROMPT: Duration = Duration::from_millis(15);

/// Asserts that there is a response, which may be a refusal.
#[track_caller]
fn assert_answered(answer: &io::Result<Response>, i: usize) {
    let answered = matches!(answer, Ok(answer) if matches!(answer.status, 200 | 503));
    assert!(answered, "{i}: {answer:?}");
}

/// Whether the connection was refused. Between the last `accept` and the close, the kernel may still
/// complete a handshake and then reset it, which is an error of `connect`, before any request.
fn not_connected(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
    )
}

/// Three hundred connections arrive at once, and the signal arrives among them.
fn queued(form: Form) {
    for keep in BOTH {
        let mut server = Server::start(form, &["delay=0", keep]);
        let mut accepted = Vec::new();
        // The clients stay connected, because the report lists clients that leave before the response.
        let mut late = Vec::new();
        for i in 0..300 {
            if i == 150 {
                server.terminate();
            }
            let begun = Instant::now();
            match Connection::try_open(server.address) {
                Ok(mut connection) => {
                    let sent = connection.try_send(GET.as_bytes());
                    if begun.elapsed() < PROMPT {
                        sent.unwrap();
                        accepted.push(connection);
                    } else {
                        late.push(connection);
                    }
                }
                Err(error) => {
                    assert!(i >= 150 && not_connected(&error), "{i}: {error}");
                }
            }
        }
        for (i, mut connection) in accepted.into_iter().enumerate() {
            assert_answered(&connection.try_response("GET"), i);
        }
        server.exit().assert_clean();
        drop(late);
    }
}

/// Sixteen clients open a connection for each request until they are refused.
fn connection_per_request(form: Form) {
    for keep in BOTH {
        let mut server = Server::start(form, &["delay=100", keep]);
        let address = server.address;
        let answered: Arc<[AtomicUsize; 16]> = Arc::default();
        let clients: Vec<_> = (0..16)
            .map(|client| {
                let answered = Arc::clone(&answered);
                thread::spawn(move || {
                    loop {
                        let answers = answered[client].load(Relaxed);
                        let begun = Instant::now();
                        let mut connection = match Connection::try_open(address) {
                            Ok(connection) => connection,
                            Err(error) if not_connected(&error) => return,
                            Err(error) => panic!("after {answers} answers: {error}"),
                        };
                        let sent = connection.try_send(GET.as_bytes());
                        let prompt = begun.elapsed() < PROMPT;
                        let answer = sent.and_then(|()| connection.try_response("GET"));
                        if prompt || answer.is_ok() {
                            assert_answered(&answer, answers);
                            answered[client].fetch_add(1, Relaxed);
                        }
                    }
                })
            })
            .collect();
        wait_for("ten answers of each client", || {
            answered.iter().all(|answers| answers.load(Relaxed) > 10)
        });
        server.terminate();
        for client in clients {
            join(client);
        }
        server.exit().assert_clean();
    }
}

/// Two hundred keep-alive connections, and a request on each just after the signal.
fn idle(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let mut connections: Vec<_> = (0..200).map(|_| server.connect()).collect();
    for connection in &mut connections {
        connection.get("/").assert_ok();
    }
    answered_at_the_signal(&mut server, connections);
    server.exit().assert_clean();
}

/// The same on connections that have not carried a byte before.
fn silent(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let connections: Vec<_> = (0..200).map(|_| server.connect()).collect();
    server.get("/").assert_ok();
    answered_at_the_signal(&mut server, connections);
    server.exit().assert_clean();
}

fn answered_at_the_signal(server: &mut Server, mut connections: Vec<Connection>) {
    server.terminate();
    let mut sent = 0;
    for connection in &mut connections {
        connection.send(GET);
        if server.elapsed() > PROMPT {
            break;
        }
        sent += 1;
    }
    assert!(sent > 0);
    connections.truncate(sent);
    for (i, mut connection) in connections.into_iter().enumerate() {
        assert_answered(&connection.try_response("GET"), i);
    }
}

/// A handler blocks the only thread of the runtime. Meanwhile the stop begins, and requests arrive on
/// connections that were idle. Nothing has read them when the handler ends, and with it the last request
/// that is in flight.
fn blocked(form: Form) {
    let mut server = Server::start(form, &["delay=0", "threads=1"]);
    let mut connections: Vec<_> = (0..40).map(|_| server.connect()).collect();
    for connection in &mut connections {
        connection.get("/").assert_ok();
    }
    let mut blocking = server.connect();
    blocking.send("GET /block/500 HTTP/1.1\r\nhost: test\r\n\r\n");
    thread::sleep(Duration::from_millis(100));
    server.terminate();
    for connection in &mut connections {
        connection.send(GET);
    }
    for (i, mut connection) in connections.into_iter().enumerate() {
        assert_answered(&connection.try_response("GET"), i);
    }
    assert_answered(&blocking.try_response("GET"), 40);
    server.exit().assert_clean();
}
