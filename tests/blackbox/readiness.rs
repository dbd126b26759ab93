//! Readiness, and the delay in which load balancers stop sending traffic.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use crate::{
    Test,
    client::{Connection, http2},
    process::{Server, wait_for},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "readiness::fails_at_once_and_liveness_succeeds_to_the_end",
        Form::ALL,
        says_no_at_once,
    ),
    (
        "readiness::a_new_connection_is_served_and_asked_to_leave_in_the_delay",
        Form::ALL,
        served_in_the_delay,
    ),
    (
        "readiness::an_http_1_0_client_with_keep_alive_is_asked_to_leave",
        Form::ALL,
        http_1_0,
    ),
    (
        "readiness::clients_behind_a_balancer_lose_nothing",
        Form::ALL,
        clients_lose_nothing,
    ),
    (
        "readiness::answers_every_method_and_version_a_prober_uses",
        Form::ALL,
        methods_and_versions,
    ),
    (
        "readiness::fails_with_the_configured_status",
        Form::ALL,
        custom_status,
    ),
    (
        "readiness::can_be_switched_off_and_on_while_serving",
        Form::ALL,
        set_ready,
    ),
    (
        "readiness::probes_and_exempt_paths_are_never_refused",
        Form::ALL,
        never_refused,
    ),
];

fn says_no_at_once(form: Form) {
    let mut server = Server::start(form, &[]);
    let slow = server.get_in_background("/sleep/3000");
    assert_eq!(server.get("/readyz").status, 200);
    assert_eq!(server.get("/livez").status, 200);
    server.terminate();
    // Readiness must fail long before draining starts.
    let took = server.wait_for_unready();
    assert!(took < Duration::from_millis(800), "{took:?}");
    // Liveness succeeds through the delay and the drain.
    while server.elapsed() < Duration::from_millis(1900) {
        let live = server.get("/livez");
        assert_eq!(live.status, 200, "{live:?}");
        let ready = server.get("/readyz");
        assert_eq!(ready.status, 503, "{ready:?}");
        assert_eq!(ready.header("cache-control"), Some("no-store"));
        let phase = if server.elapsed() < Duration::from_millis(950) {
            "lame duck\n"
        } else {
            ""
        };
        assert!(ready.text().starts_with(phase), "{ready:?}");
        thread::sleep(Duration::from_millis(20));
    }
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

fn served_in_the_delay(form: Form) {
    let mut server = Server::start(form, &["delay=2000"]);
    let mut old = server.connect();
    let before = old.get("/");
    before.assert_ok();
    assert!(!before.says_close());
    server.terminate();
    server.wait_for_unready();
    let response = old.get("/");
    response.assert_ok();
    assert!(response.says_close(), "{response:?}");
    old.assert_closed();
    while server.elapsed() < Duration::from_millis(900) {
        let mut connection = server.connect();
        let response = connection.get("/");
        response.assert_ok();
        assert!(response.says_close(), "{response:?}");
        connection.assert_closed();
        thread::sleep(Duration::from_millis(10));
    }
    let missing = server.get("/missing");
    assert_eq!(missing.status, 404);
    assert!(missing.says_close());
    let http2 = http2::Connection::open(server.address).get("/");
    assert_eq!(http2.status, 200);
    assert!(!http2.headers.contains_key("connection"));
    server.exit().assert_clean();
}

fn http_1_0(form: Form) {
    const GET: &str = "GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n";
    let mut server = Server::start(form, &[]);
    let mut connection = server.connect();
    for _ in 0..2 {
        connection.send(GET);
        let response = connection.response("GET");
        response.assert_ok();
        assert_eq!(response.header("connection"), Some("keep-alive"));
    }
    server.terminate();
    server.wait_for_unready();
    connection.send(GET);
    let response = connection.response("GET");
    response.assert_ok();
    assert_eq!(response.header("connection"), Some("close"));
    connection.assert_closed();
    server.exit().assert_clean();
}

/// Eight clients, four of them with keep-alive, behind a balancer that probes readiness every 50 ms and
/// stops sending after the first failure.
fn clients_lose_nothing(form: Form) {
    for _ in 0..3 {
        let mut server = Server::start(form, &[]);
        let address = server.address;
        let away = Arc::new(AtomicBool::new(false));
        let balancer = {
            let away = away.clone();
            thread::spawn(move || {
                wait_for("the balancer to stop sending", || {
                    thread::sleep(Duration::from_millis(50));
                    Connection::open(address).get("/readyz").status != 200
                });
                away.store(true, Ordering::SeqCst);
            })
        };
        let clients: Vec<_> = (0..8)
            .map(|i| {
                let away = away.clone();
                thread::spawn(move || {
                    let keeps = i % 2 == 0;
                    let mut kept: Option<Connection> = None;
                    let mut answers = 0;
                    while !away.load(Ordering::SeqCst) {
                        let connection = kept.take();
                        let mut connection =
                            connection.unwrap_or_else(|| Connection::open(address));
                        let response = connection.get("/sleep/5");
                        response.assert_ok();
                        answers += 1;
                        if keeps && !response.says_close() {
                            kept = Some(connection);
                        }
                    }
                    answers
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(300));
        server.terminate();
        balancer.join().unwrap();
        for client in clients {
            assert!(client.join().unwrap() > 0);
        }
        server.exit().assert_clean();
    }
}

fn methods_and_versions(form: Form) {
    let mut server = Server::start(form, &[]);
    let check = |server: &Server, status| {
        for path in ["/readyz", "/livez", "/nested/readyz", "/nested/livez"] {
            let status = if path.ends_with("livez") { 200 } else { status };
            for method in ["GET", "HEAD", "OPTIONS"] {
                let response = server.connect().request(method, path);
                assert_eq!(response.status, status, "{method} {path} {response:?}");
                assert_ne!(response.header("content-length"), Some("0"), "{response:?}");
                // The probe of HAProxy: HTTP/1.0 without header fields.
                let mut connection = server.connect();
                connection.send(&format!("{method} {path} HTTP/1.0\r\n\r\n"));
                let response = connection.response(method);
                assert_eq!(response.status, status, "{method} {path} {response:?}");
                connection.assert_closed();
            }
            let mut post = server.connect();
            assert_eq!(post.request("POST", path).status, 405);
            let http2 = http2::Connection::open(server.address).get(path);
            assert_eq!(http2.status, status);
            assert!(!http2.body.is_empty());
        }
    };
    check(&server, 200);
    let slow = server.get_in_background("/sleep/1800");
    server.terminate();
    server.wait_for_unready();
    check(&server, 503);
    server.wait_for_draining();
    check(&server, 503);
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

fn custom_status(form: Form) {
    for (knob, status) in [("unready=404", 404), ("unready=204", 204)] {
        let mut server = Server::start(form, &[knob, "delay=500"]);
        assert_eq!(server.get("/readyz").status, 200);
        server.terminate();
        server.wait_for_unready();
        let mut connection = server.connect();
        let response = connection.get("/readyz");
        assert_eq!(response.status, status);
        assert_eq!(response.body.is_empty(), status == 204);
        connection.assert_closed();
        server.exit().assert_clean();
    }
}

fn set_ready(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    server.connect().request("POST", "/ready/false").assert_ok();
    let response = server.get("/readyz");
    assert_eq!((response.status, response.text()), (503, "not ready\n"));
    assert!(!response.says_close());
    server.get("/").assert_ok();
    assert_eq!(server.get("/livez").status, 200);
    server.connect().request("POST", "/ready/true").assert_ok();
    assert_eq!(server.get("/readyz").status, 200);
    server.terminate();
    server.exit().assert_clean();
}

fn never_refused(form: Form) {
    let mut server = Server::start(form, &["delay=0", "limit=1"]);
    let slow = server.get_in_background("/sleep/1000");
    let check = |server: &Server, refusal, readiness| {
        assert_eq!(server.get("/").status, refusal);
        assert_eq!(server.get("/missing").status, refusal);
        for path in ["/metrics", "/nested/metrics", "/metrics?since=1"] {
            server.get(path).assert_ok();
        }
        for path in ["/readyz", "/nested/readyz"] {
            assert_eq!(server.get(path).status, readiness);
        }
        for path in ["/livez", "/nested/livez"] {
            server.get(path).assert_ok();
        }
        assert_eq!(
            server.in_flight(),
            1,
            "exempt requests and probes are not counted while others are refused"
        );
    };
    check(&server, 429, 200);
    server.terminate();
    server.wait_for_unready();
    check(&server, 503, 503);
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}
