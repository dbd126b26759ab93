//! Mistakes in the setup that the report names, and setups that it does not report.

use std::{convert::Infallible, future::ready};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tower::{Service, ServiceExt};
use tower_graceful::{Graceful, GracefulIo, Outcome, Report, Warning};

use crate::support::{
    DELAY, graceful, ms, pass, plan, quick_request, request, s, serve, server, without_delay,
};

const OK: &str = "HTTP/1.1 200 OK\r\n\r\n";
const UPGRADE: &str = "GET /ws/7?a=b HTTP/1.1\r\nhost: test\r\nUpgrade: websocket\r\n\r\n";
const SWITCHING: &str = "HTTP/1.1 101 Switching Protocols\r\n\r\n";

/// Both ends of a connection.
struct Connection {
    server: GracefulIo<DuplexStream>,
    client: DuplexStream,
}

impl Connection {
    fn open(graceful: &Graceful) -> Self {
        let (client, server) = duplex(1024);
        let server = graceful.track(server);
        Self { server, client }
    }

    /// The server reads this.
    async fn read(&mut self, bytes: &str) {
        self.client.write_all(bytes.as_bytes()).await.unwrap();
        let mut read = vec![0; bytes.len()];
        self.server.read_exact(&mut read).await.unwrap();
    }

    /// The server writes this.
    async fn write(&mut self, bytes: &str) {
        self.server.write_all(bytes.as_bytes()).await.unwrap();
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n")
}

/// Connections that are left at the end of the drain are cut.
async fn stop(graceful: &Graceful) -> Report {
    let run = serve(graceful, server(graceful)).await;
    graceful.shutdown();
    run.await.unwrap()
}

/// The report of a service on which these bytes passed on one connection.
async fn passed(pieces: &[(&str, &str)]) -> Report {
    let graceful = without_delay();
    let mut connection = Connection::open(&graceful);
    for (read, written) in pieces {
        connection.read(read).await;
        connection.write(written).await;
    }
    drop(connection);
    stop(&graceful).await
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_sees_no_request_causes_a_warning() {
    let request = get("/orders?key=secret");
    // Two reads, as in servers that distinguish HTTP/1 from HTTP/2 first.
    let report = passed(&[(&request[..24], ""), (&request[24..], OK)]).await;
    let [Warning::NoRequestInLayer(request)] = report.warnings() else {
        panic!("{report}")
    };
    assert_eq!(
        (request.method.as_str(), &*request.path),
        ("GET", "/orders")
    );
    assert_eq!(report.outcome(), Outcome::Clean);
    let text = report.to_string();
    assert!(
        text.contains("\n  warning: no request has reached"),
        "{text}"
    );
    assert!(
        text.lines().all(|line| line.chars().count() <= 80),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn requests_outside_the_layer_are_not_named_where_there_may_be_two_servers() {
    let graceful = without_delay();
    let mut connection = Connection::open(&graceful);
    for (path, inside) in [
        ("/", true),
        ("/late", false),
        ("/", true),
        ("/later", false),
    ] {
        connection.read(&get(path)).await;
        if inside {
            assert_eq!(quick_request(&graceful).await, 200);
        }
        connection.write(OK).await;
    }
    drop(connection);
    let report = stop(&graceful).await;
    // Connections passed to `track` may belong to two servers, one of them without a layer.
    assert_eq!(report.warnings(), []);
}

#[tokio::test(start_paused = true)]
async fn requests_that_the_layer_need_not_see_cause_no_warning() {
    let not_found = "HTTP/1.1 404 Not Found\r\n\r\n";
    let health = get("/metrics");
    let body = "POST / HTTP/1.1\r\ncontent-length: 40\r\n\r\n";
    for pieces in [
        &[][..],
        &[("GET / HT", "")],
        &[("\x16\x03\x01\x02\x00", "\x16\x03\x03"), (&get("/"), OK)],
        &[("EHLO test\r\n\r\n", OK)],
        &[("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\0\0\0\x04\0\0\0\0\0")],
        &[(&get("/"), not_found), (&get("/"), not_found)],
        &[(&get("/"), "HTTP/1.1 503 Service Unavailable\r\n\r\n")],
        &[("OPTIONS / HTTP/1.1\r\n\r\n", OK)],
        // Bytes that look like a request may be the body of one.
        &[(body, not_found), (&get("/"), OK)],
        &[
            (body, "HTTP/1.1 100 Continue\r\n\r\n"),
            (&get("/"), not_found),
        ],
    ] {
        let report = passed(pieces).await;
        assert_eq!(report.warnings(), [], "{pieces:?}");
    }
    let graceful = plan().exempt("/metrics").build().unwrap();
    let mut connection = Connection::open(&graceful);
    connection.read(&health).await;
    connection.write(OK).await;
    // A probe.
    connection.read(&get("/livez")).await;
    let probe = graceful.liveness().oneshot(Request::new(()));
    assert_eq!(probe.await.unwrap().status(), 200);
    connection.write(OK).await;
    drop(connection);
    assert_eq!(stop(&graceful).await.warnings(), []);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_the_layer_refuses_or_exempts_causes_no_warning() {
    let graceful = plan().exempt("/open").max_in_flight(1).build().unwrap();
    let mut service = tower::Layer::layer(
        &graceful.layer(),
        tower::service_fn(|_: Request<Empty<Bytes>>| {
            ready(Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())))
        }),
    );
    let running = service.call(Request::new(Empty::new()));
    let mut connection = Connection::open(&graceful);
    for path in ["/open", "/other"] {
        connection.read(&get(path)).await;
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = path.parse().unwrap();
        drop(service.call(request).await);
        connection.write(OK).await;
    }
    drop((running, connection));
    assert_eq!(stop(&graceful).await.warnings(), []);
}

/// A connection whose upgrade was accepted, and which no hold counts.
async fn upgraded(graceful: &Graceful) -> Connection {
    let mut connection = Connection::open(graceful);
    connection.read(UPGRADE).await;
    assert_eq!(quick_request(graceful).await, 200);
    connection.write(SWITCHING).await;
    connection
}

#[tokio::test(start_paused = true)]
async fn upgrades_without_a_hold_cause_a_warning() {
    let graceful = without_delay();
    let connection = upgraded(&graceful).await;
    pass(s(5)).await;
    let report = stop(&graceful).await;
    drop(connection);
    let [Warning::UpgradesNotHeld(upgraded)] = report.warnings() else {
        panic!("{report}")
    };
    let [upgraded] = &**upgraded else {
        panic!("{report}")
    };
    assert_eq!(upgraded.path.as_deref(), Some("/ws/7"));
    assert!(
        upgraded.age >= s(5) && upgraded.age < s(7),
        "{:?}",
        upgraded.age
    );
    assert_eq!(report.outcome(), Outcome::Forced);
}

/// A task that is told of draining has a second to close its socket.
#[tokio::test(start_paused = true)]
async fn an_upgrade_without_a_hold_has_no_time_to_end_if_no_task_is_told_of_draining() {
    for told in [true, false] {
        let graceful = graceful();
        let connection = upgraded(&graceful).await;
        // So that the drain does not end at once.
        let request = request(&graceful);
        let handle = graceful.clone();
        tokio::spawn(async move {
            // A task may begin to wait in the delay.
            pass(DELAY / 2).await;
            let phases = told.then(|| handle.subscribe());
            pass(DELAY / 2 + ms(500)).await;
            drop((connection, phases, request));
        });
        let report = stop(&graceful).await;
        assert_eq!(report.warnings().is_empty(), told, "{report}");
    }
}

#[tokio::test(start_paused = true)]
async fn upgrades_that_end_in_time_cause_no_warning() {
    for held in [true, false] {
        let graceful = without_delay();
        let connection = upgraded(&graceful).await;
        let hold = held.then(|| graceful.hold("socket"));
        let draining = graceful.draining();
        tokio::spawn(async move {
            draining.await;
            // An upgraded connection with a hold may stay open.
            pass(if held { s(5) } else { ms(500) }).await;
            drop(hold);
            drop(connection);
        });
        pass(ms(1)).await;
        let report = stop(&graceful).await;
        assert_eq!(report.warnings(), [], "held: {held}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_upgrade_causes_no_warning() {
    let graceful = without_delay();
    let mut connection = Connection::open(&graceful);
    connection.read(UPGRADE).await;
    assert_eq!(quick_request(&graceful).await, 200);
    connection.write("HTTP/1.1 400 Bad Request\r\n\r\n").await;
    let report = stop(&graceful).await;
    drop(connection);
    assert_eq!(report.warnings(), []);
}
