//! The tracked listener on real sockets, where it can be tried without a process of its own.

#![cfg(all(unix, feature = "axum", feature = "signal"))]

mod wakers;

use std::{
    future::{IntoFuture, pending, poll_fn},
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    time::Duration,
};

use axum::{
    Router,
    routing::get,
    serve::{Listener, ListenerExt},
};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixListener, UnixStream},
    runtime,
    task::JoinSet,
    time::timeout,
};
use tower_graceful::{Graceful, Outcome, Phase};

const BOUND: Duration = Duration::from_secs(5);

fn graceful() -> Graceful {
    Graceful::builder()
        .drain_delay(Duration::ZERO)
        .build()
        .unwrap()
}

fn app(graceful: &Graceful) -> Router {
    Router::new()
        .route("/", get(|| async { "hello" }))
        .layer(graceful.layer())
}

fn std_listener() -> (std::net::TcpListener, SocketAddr) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    tokio::task::spawn_blocking(move || TcpStream::connect_timeout(&address, BOUND))
        .await
        .unwrap()
}

/// All listeners and servers wait on the same channels, which have several lists of tasks.
#[tokio::test(start_paused = true)]
async fn a_listener_whose_waker_panics_does_not_keep_others_from_being_woken() {
    for form in ["own", "shared", "served"] {
        let builder = Graceful::builder().drain_delay(Duration::ZERO);
        let graceful = builder.shared_listener(form == "shared").build().unwrap();
        let mut first: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        for _ in 0..50 {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            first.push(if form == "served" {
                let server = graceful.serve(tcp, app(&graceful)).into_future();
                Box::pin(async { drop(server.await) })
            } else {
                let mut listener = graceful.listener(tcp);
                Box::pin(async move { drop(listener.accept().await) })
            });
        }
        let waker = wakers::panicking();
        for listener in &mut first {
            let polled = listener.as_mut().poll(&mut Context::from_waker(&waker));
            assert!(polled.is_pending());
        }
        let mut others = JoinSet::new();
        for _ in 0..50 {
            others.spawn(graceful.drain_on(pending()));
            let mut phases = graceful.subscribe();
            others.spawn(async move { assert!(phases.reached(Phase::Draining).await) });
        }
        tokio::task::yield_now().await;
        graceful.shutdown();
        let all = timeout(Duration::from_secs(60), others.join_all()).await;
        assert!(all.is_ok(), "{form}: they hang");
    }
}

/// After the stop, the socket still accepts connections for a supervisor or for the next process.
#[tokio::test(flavor = "multi_thread")]
async fn a_shared_socket_accepts_again_after_the_stop() {
    let (shared, address) = std_listener();
    let ours = TcpListener::from_std(shared.try_clone().unwrap()).unwrap();
    let graceful = graceful();
    let run = tokio::spawn(graceful.serve(ours, app(&graceful)).into_future());
    drop(connect(address).await.unwrap());
    graceful.shutdown();
    assert_eq!(run.await.unwrap().outcome(), Outcome::Clean);
    let next = TcpListener::from_std(shared).unwrap();
    let begun = std::time::Instant::now();
    let (client, _server) = tokio::join!(connect(address), next.accept());
    client.unwrap();
    // A client whose SYN was dropped would send it again after one second.
    assert!(
        begun.elapsed() < Duration::from_millis(900),
        "{:?}",
        begun.elapsed()
    );
}

/// Otherwise a connection would be reset that arrives between the detaching of the filter and the close.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_said_not_to_be_shared_keeps_its_filter_until_the_close() {
    for is_broken_off in [false, true] {
        // On a busy machine, a stop may be broken off before the listener has attached its filter.
        let mut attempts = if is_broken_off { 50 } else { 1 };
        while !keeps_its_filter(is_broken_off).await {
            attempts -= 1;
            assert!(attempts > 0, "{is_broken_off}");
        }
    }
}

/// Whether the filter is there after a stop. Contrary to what is said, the test has the socket too.
async fn keeps_its_filter(is_broken_off: bool) -> bool {
    let (shared, address) = std_listener();
    let ours = TcpListener::from_std(shared.try_clone().unwrap()).unwrap();
    let builder = Graceful::builder().drain_delay(Duration::ZERO);
    let graceful = builder.shared_listener(false).build().unwrap();
    if is_broken_off {
        break_off(&graceful, ours).await;
    } else {
        let run = tokio::spawn(graceful.serve(ours, app(&graceful)).into_future());
        // A stop before the first poll of the server would drop the listener unused.
        let mut client = connect(address).await.unwrap();
        let answer = tokio::task::spawn_blocking(move || {
            client.write_all(REQUEST)?;
            answer(client)
        });
        assert!(answer.await.unwrap().unwrap().ends_with("hello"));
        graceful.shutdown();
        assert_eq!(run.await.unwrap().outcome(), Outcome::Clean);
    }
    let kept = TcpStream::connect_timeout(&address, Duration::from_millis(300)).is_err();
    let _ = SockRef::from(&shared).detach_filter();
    connect(address).await.unwrap();
    kept
}

/// Stops the service, and drops its listener while it is closing.
async fn break_off(graceful: &Graceful, listener: TcpListener) {
    let mut listener = graceful.listener(listener);
    let mut cx = Context::from_waker(Waker::noop());
    assert!(pin!(listener.accept()).poll(&mut cx).is_pending());
    graceful.shutdown();
    // Polls until the listener has attached the filter that keeps new handshakes from beginning.
    let mut accept = pin!(listener.accept());
    for _ in 0..20 {
        assert!(
            poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx)))
                .await
                .is_pending()
        );
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_socket_accepts_again_after_a_stop_that_was_broken_off() {
    let (shared, address) = std_listener();
    let ours = TcpListener::from_std(shared.try_clone().unwrap()).unwrap();
    break_off(&graceful(), ours).await;
    let next = TcpListener::from_std(shared).unwrap();
    let (client, _server) = tokio::join!(connect(address), timeout(BOUND, next.accept()));
    client.unwrap();
}

#[test]
fn a_closing_listener_may_be_dropped_outside_a_runtime() {
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let graceful = runtime.block_on(async { graceful() });
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let mut listener = graceful.listener(listener);
    let mut cx = Context::from_waker(Waker::noop());
    {
        let _context = runtime.enter();
        assert!(pin!(listener.accept()).poll(&mut cx).is_pending());
        graceful.shutdown();
        assert!(pin!(listener.accept()).poll(&mut cx).is_pending());
    }
    let _queued = TcpStream::connect_timeout(&address, Duration::from_millis(200));
    drop(listener);
    runtime.block_on(graceful.stopped());
}

/// Sends a request on a new connection, and returns the response. `None` if the connection was too late, or if this
/// client has waited for a processor: a connection may be silent for 25 ms. Blocks the thread, because the runtime
/// rounds `moment` up to a millisecond.
fn ask_after(moment: Duration, address: SocketAddr) -> Option<io::Result<String>> {
    let at_once = Duration::from_millis(15);
    std::thread::sleep(moment);
    let begun = std::time::Instant::now();
    let mut stream = TcpStream::connect_timeout(&address, at_once).ok()?;
    let sent = stream.write_all(REQUEST);
    if begun.elapsed() > at_once {
        return None;
    }
    sent.unwrap();
    Some(answer(stream))
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";

fn answer(mut stream: TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(BOUND))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map(|_| answer)
}

/// The service has been silent for long, so only the listener itself delays the close.
#[tokio::test(flavor = "multi_thread")]
async fn the_very_last_connection_of_a_quiet_service_is_answered() {
    let mut answered = 0;
    // About the end of the delay. Each round brings it nearer to the moment of the close.
    let mut moment = Duration::from_millis(39);
    for round in 0..400 {
        // On a busy machine, most connections are too late.
        if round >= 100 && answered >= 10 {
            break;
        }
        let builder = Graceful::builder().drain_delay(Duration::from_millis(40));
        // The filter stays until the close. Otherwise a connection between the two would be reset.
        let graceful = builder.shared_listener(false).build().unwrap();
        let (listener, address) = std_listener();
        let listener = TcpListener::from_std(listener).unwrap();
        let run = tokio::spawn(graceful.serve(listener, app(&graceful)).into_future());
        let ask = async |moment| {
            let client = tokio::task::spawn_blocking(move || ask_after(moment, address));
            client.await.unwrap()
        };
        // If nothing were served yet, there would be no delay.
        ask(Duration::ZERO).await;
        graceful.shutdown();
        let answer = ask(moment).await;
        let report = timeout(BOUND, run).await.unwrap().unwrap();
        let step = Duration::from_micros(100);
        let Some(answer) = answer else {
            moment = moment.saturating_sub(step);
            continue;
        };
        moment += step;
        assert!(
            matches!(&answer, Ok(answer) if answer.starts_with("HTTP/1.1 ")),
            "{round}: {answer:?}, {report}"
        );
        assert_eq!(report.outcome(), Outcome::Clean, "{round}: {report}");
        answered += 1;
    }
    assert!(answered >= 10, "only {answered} connections were in time");
}

#[tokio::test]
async fn a_listener_that_never_accepts_holds_nothing_up() {
    let graceful = graceful();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let _unused = graceful.listener(listener);
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Stopped);
}

#[tokio::test]
async fn a_listener_of_any_kind_is_tracked_with_tap_io_before_or_after() {
    let graceful = graceful();
    let path = std::env::temp_dir().join(format!("graceful-{}.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let unix = UnixListener::bind(&path).unwrap();
    let mut unix = graceful.listener(unix.tap_io(|_| ())).tap_io(|_| ());
    let (client, (server, _)) = tokio::join!(UnixStream::connect(&path), unix.accept());
    assert_eq!(graceful.connections(), 1);
    drop((client, server));
    assert_eq!(graceful.connections(), 0);
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_on_one_lifecycle_stop_together() {
    let graceful = graceful();
    let listeners = [
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
    ];
    let runs = listeners.map(|listener| {
        let address = listener.local_addr().unwrap();
        let run = tokio::spawn(graceful.serve(listener, app(&graceful)).into_future());
        (address, run)
    });
    // The responses show that the servers run, and leave nothing in a queue.
    for (address, _) in &runs {
        let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
        client.write_all(request).await.unwrap();
        let mut response = String::new();
        client.read_to_string(&mut response).await.unwrap();
        assert!(response.ends_with("hello"), "{response}");
    }
    graceful.shutdown();
    for (address, run) in runs {
        let report = timeout(BOUND, run).await.unwrap().unwrap();
        assert_eq!(report.outcome(), Outcome::Clean, "{report}");
        let refused = connect(address).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
}

/// A response without a length ends with its connection (RFC 9112 §6.3), so only a reset shows that it was cut.
#[tokio::test(flavor = "multi_thread")]
async fn a_tracked_tcp_stream_is_reset_when_it_is_cut_and_its_peer_reported() {
    let (listener, address) = std_listener();
    let listener = TcpListener::from_std(listener).unwrap();
    let drain = Duration::from_millis(100);
    let builder = Graceful::builder().drain_delay(Duration::ZERO);
    let graceful = builder.drain_timeout(drain).build().unwrap();
    let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut io = graceful.track(listener.accept().await.unwrap().0);
    io.write_all(b"HTTP/1.0 200 OK\r\n\r\nhalf of it")
        .await
        .unwrap();
    let (began, begins) = tokio::sync::oneshot::channel();
    let run = tokio::spawn(graceful.run(async move {
        began.send(()).unwrap();
        let _ = io.read(&mut [0]).await;
    }));
    begins.await.unwrap();
    graceful.shutdown();
    let report = timeout(BOUND, run).await.unwrap().unwrap();
    let peers = report.connections_cut().iter().map(|cut| cut.peer);
    let expected = client.local_addr().unwrap();
    assert_eq!(peers.collect::<Vec<_>>(), [Some(expected)]);
    let error = client.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

/// A lifecycle whose listeners are left to the next process.
fn handing_over(delay: Duration) -> Graceful {
    Graceful::builder()
        .shared_listener(true)
        .drain_delay(delay)
        .build()
        .unwrap()
}

/// The request arrives on an idle connection that was already told to close. The task of the connection has not
/// run since then, because every thread of the runtime is blocked.
#[tokio::test]
async fn a_request_that_comes_before_its_connection_knows_of_the_close_is_served() {
    use std::thread::sleep;

    const MS: Duration = Duration::from_millis(1);

    let (shared, address) = std_listener();
    let ours = TcpListener::from_std(shared.try_clone().unwrap()).unwrap();
    let graceful = handing_over(100 * MS);
    let run = tokio::spawn(graceful.serve(ours, app(&graceful)).into_future());
    let mut idle = connect(address).await.unwrap();
    idle.set_read_timeout(Some(BOUND)).unwrap();
    // A request, so that the connection is idle and not new.
    let mut idle = tokio::task::spawn_blocking(move || {
        idle.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .unwrap();
        let mut response = [0; 1024];
        assert!(idle.read(&mut response).unwrap() > 0);
        idle
    })
    .await
    .unwrap();
    graceful.shutdown();
    // The connection learns that the service stops.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    // The delay ends, and connections are told to close, while nothing runs here.
    sleep(200 * MS);
    idle.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .unwrap();
    sleep(200 * MS);
    let response = tokio::task::spawn_blocking(move || {
        let mut response = String::new();
        idle.read_to_string(&mut response).unwrap();
        response
    });
    let response = response.await.unwrap();
    assert!(response.starts_with("HTTP/1.1 200"), "{response:?}");
    assert_eq!(run.await.unwrap().outcome(), Outcome::Clean);
}

/// The queue of a listener of any kind is left as it is, also above and below other listeners.
#[tokio::test]
async fn what_connects_during_the_stop_is_left_to_the_next_process() {
    use tower_graceful::HandshakeExt;

    async fn holds<L>(listener: L, graceful: Graceful, bound: Duration, next: impl AsyncFnOnce())
    where
        L: Listener<Addr: std::fmt::Debug>,
    {
        let app = app(&graceful);
        let run = tokio::spawn(graceful.serve(listener, app).into_future());
        tokio::task::yield_now().await;
        graceful.shutdown();
        // A wrapped listener keeps accepting for 60 ms.
        tokio::time::sleep(bound).await;
        next().await;
        assert_eq!(run.await.unwrap().outcome(), Outcome::Clean);
    }

    let delay = Duration::from_millis(300);
    let wrapped = Duration::from_millis(100);
    for way in 0..3 {
        let (shared, address) = std_listener();
        let ours = TcpListener::from_std(shared.try_clone().unwrap()).unwrap();
        let graceful = handing_over(delay);
        let next = async || {
            let next = TcpListener::from_std(shared).unwrap();
            let client = connect(address).await.unwrap();
            let (_, peer) = timeout(BOUND, next.accept()).await.unwrap().unwrap();
            assert_eq!(peer, client.local_addr().unwrap());
        };
        match way {
            0 => holds(ours, graceful, Duration::ZERO, next).await,
            1 => {
                let shaking = graceful
                    .listener(ours)
                    .handshakes(BOUND, async |io| Ok::<_, io::Error>(io));
                holds(shaking, graceful, Duration::ZERO, next).await;
            }
            _ => holds(ours.tap_io(|_| ()), graceful, wrapped, next).await,
        }
    }
    let path = std::env::temp_dir().join(format!("tower-graceful-shared-{}", std::process::id()));
    let shared = std::os::unix::net::UnixListener::bind(&path).unwrap();
    shared.set_nonblocking(true).unwrap();
    let ours = UnixListener::from_std(shared.try_clone().unwrap()).unwrap();
    let next = async || {
        let next = UnixListener::from_std(shared).unwrap();
        let _client = UnixStream::connect(&path).await.unwrap();
        timeout(BOUND, next.accept()).await.unwrap().unwrap();
    };
    holds(ours, handing_over(delay), Duration::ZERO, next).await;
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test]
async fn the_default_delay_is_shorter_where_every_listener_is_shared() {
    let half = Duration::from_millis(500);
    let build = |grace: u64, shared: bool| {
        let builder = Graceful::builder().grace_period(Duration::from_secs(grace));
        builder.shared_listener(shared).build().unwrap().plan()
    };
    assert_eq!(build(30, true).drain_delay, half);
    assert_eq!(build(30, true).drain_deadline, Duration::from_secs(24));
    assert_eq!(build(30, false).drain_delay, Duration::from_secs(5));
    // A sixth is less.
    assert_eq!(build(2, true).drain_delay, Duration::from_secs(2) / 6);
    let spread = Graceful::builder()
        .shared_listener(true)
        .close_spread(Duration::from_secs(2));
    assert_eq!(
        spread.build().unwrap().plan().drain_delay,
        Duration::from_secs(2)
    );
    let set = handing_over(Duration::from_secs(3)).plan();
    assert_eq!(set.drain_delay, Duration::from_secs(3));
    // A plan that fits only with the shorter delay is accepted.
    let full = Graceful::builder()
        .shared_listener(true)
        .drain_timeout(Duration::from_secs(28));
    assert_eq!(full.build().unwrap().plan().drain_delay, half);
}
