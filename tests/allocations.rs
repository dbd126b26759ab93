//! The layer allocates nothing for a request, except for large pieces of a response body. And the heap memory
//! of a tracked connection has an upper bound.
//!
//! Allocations are counted on the measuring thread only, so that tests do not disturb one another. Tests of
//! connections compare with the same server without this crate.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    panic::resume_unwind,
    pin::pin,
    task::{Context, Poll, Waker},
};

use allocation_counter::measure;
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use tower::{Layer, Service};
use tower_graceful::Graceful;

const REQUESTS: u64 = 1_000;

#[derive(Clone)]
struct Handler;

impl Service<Request<Full<Bytes>>> for Handler {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Full<Bytes>>) -> Self::Future {
        ready(Ok(Response::new(Full::new(Bytes::from_static(b"hello")))))
    }
}

/// One request, and the body of its response to the end.
fn request<S, R, B>(service: &mut S)
where
    S: Service<Request<R>, Response = Response<B>, Error = Infallible>,
    R: Default,
    B: Body,
{
    let mut cx = Context::from_waker(Waker::noop());
    let future = pin!(service.call(Request::new(R::default())));
    let Poll::Ready(Ok(response)) = future.poll(&mut cx) else {
        panic!("the handler is ready at once")
    };
    assert_eq!(response.status(), 200);
    let mut body = pin!(response.into_body());
    while let Poll::Ready(Some(frame)) = body.as_mut().poll_frame(&mut cx) {
        assert!(frame.is_ok());
    }
}

/// The number of allocations of [`REQUESTS`] requests, after a first one.
fn allocations(mut request: impl FnMut()) -> u64 {
    request();
    measure(|| (0..REQUESTS).for_each(|_| request())).count_total
}

#[test]
fn a_request_allocates_nothing() {
    let graceful = Graceful::new();
    let limited = Graceful::builder().max_in_flight(1).build().unwrap();
    assert_eq!(allocations(|| request(&mut Handler)), 0);
    for graceful in [graceful, limited] {
        let mut service = graceful.layer().layer(Handler);
        assert_eq!(allocations(|| request(&mut service)), 0);
        assert_eq!(allocations(|| request(&mut service.clone())), 0);
        assert_eq!(graceful.in_flight(), 0);
    }
}

/// The number of allocations of [`REQUESTS`] requests whose response is one frame with these bytes.
fn of_size(graceful: &Graceful, bytes: &Bytes) -> u64 {
    let service = tower::service_fn(|_: Request<Full<Bytes>>| {
        ready(Ok::<_, Infallible>(Response::new(Full::new(bytes.clone()))))
    });
    let mut service = graceful.layer().layer(service);
    allocations(|| request::<_, Full<Bytes>, _>(&mut service))
}

#[test]
fn a_response_allocates_twice_if_its_last_frame_is_large() {
    const LARGE: usize = 16 * 1024;
    let graceful = Graceful::new();
    let bytes = Bytes::from(vec![0; LARGE]);
    drop(bytes.clone());
    assert_eq!(of_size(&graceful, &bytes.slice(1..)), 0);
    // One for the box that replaces the inner body, and one for the counter of the frame.
    assert_eq!(of_size(&graceful, &bytes), 2 * REQUESTS);
    assert_eq!(graceful.in_flight(), 0);
}

#[test]
fn a_worker_that_has_ended_holds_no_memory() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let graceful = Graceful::new();
    let run = |workers: u32| {
        runtime.block_on(async {
            for _ in 0..workers {
                graceful.worker("worker", |_| async {}).unwrap();
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
            }
        });
    };
    run(200);
    let held = measure(|| run(1000)).bytes_current;
    assert!(held < 1000, "{held} bytes for 1000 workers");
}

/// The payload of a panic, whose destructor panics too if it is asked to.
struct Payload {
    _text: String,
    panics: bool,
}

impl Drop for Payload {
    fn drop(&mut self) {
        if self.panics {
            self.panics = false;
            resume_unwind(Box::new("as the test wants it to"));
        }
    }
}

/// Panics, without a message in the output of the test.
fn fail(payload: Payload) {
    resume_unwind(Box::new(payload))
}

#[test]
fn a_worker_that_has_panicked_holds_no_memory() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let graceful = Graceful::new();
    let run = |workers: u32, panics: bool| {
        runtime.block_on(async {
            for _ in 0..workers {
                let payload = Payload {
                    _text: "x".repeat(1000),
                    panics,
                };
                graceful
                    .worker("worker", |_| async { fail(payload) })
                    .unwrap();
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
            }
        });
    };
    run(200, false);
    // A destructor that panics must not end the process.
    run(10, true);
    let held = measure(|| run(1000, false)).bytes_current;
    assert!(held < 1000, "{held} bytes for 1000 workers");
}

/// Shows that the counter works. If it counted nothing, the other tests would pass.
#[test]
fn what_allocates_is_counted() {
    let allocating = || drop(std::hint::black_box(vec![0_u8; 100]));
    assert_eq!(allocations(allocating), REQUESTS);
}

#[cfg(feature = "axum")]
mod in_axum {
    use axum::{Router, extract::State, routing::get};
    use tower_http::metrics::InFlightRequestsLayer;

    use super::*;

    /// hyper calls a clone of the router for each request.
    fn of(app: &Router) -> u64 {
        allocations(|| request::<_, axum::body::Body, _>(&mut app.clone()))
    }

    /// axum boxes the body of any layer that has one of its own.
    #[test]
    fn a_request_through_a_router_allocates_as_much_as_through_another_layer() {
        let app = Router::new().route("/", get(|| async { "hello" }));
        let (counting, _counter) = InFlightRequestsLayer::pair();
        let graceful = Graceful::new();
        let another = of(&app.clone().layer(counting));
        assert!(another > 0, "axum boxes futures");
        assert_eq!(of(&app.layer(graceful.layer())), another);
    }

    #[test]
    fn a_handler_that_takes_the_handle_allocates_as_much_as_one_that_does_not() {
        let without = Router::new().route("/", get(|| async { "hello" }));
        let with = Router::new()
            .route("/", get(|_: State<Graceful>| async { "hello" }))
            .with_state(Graceful::new());
        assert_eq!(of(&with), of(&without));
    }
}

/// Connections that are open, have made one request, and wait.
#[cfg(all(feature = "axum", feature = "signal"))]
mod idle_connections {
    use std::{
        io::{Read, Write},
        net::{SocketAddr, TcpStream},
        thread,
    };

    use axum::{Router, routing::get};
    use tokio::{net::TcpListener, runtime, sync::oneshot};
    use tower::layer::util::Identity;

    use super::*;

    /// A power of two, so that tables that double are as full as they can be.
    const CONNECTIONS: usize = 512;

    fn app() -> Router {
        Router::new().route("/", get(|| async { "hello" }))
    }

    fn connect(address: SocketAddr) -> TcpStream {
        let mut stream = TcpStream::connect(address).unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
            .unwrap();
        let mut read = Vec::new();
        while !read.ends_with(b"hello") {
            let mut piece = [0; 1024];
            let length = stream.read(&mut piece).unwrap();
            assert!(length > 0, "the server hung up");
            read.extend_from_slice(&piece[..length]);
        }
        stream
    }

    /// Bytes on the heap for each connection, all told: hyper's and tokio's too.
    fn heap_bytes<F>(serve: impl FnOnce(TcpListener) -> F) -> i64
    where
        F: Future<Output = ()> + Send + 'static,
    {
        // All of the server is on the thread that measures, and none of the clients.
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (listener, address) = runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            (listener, address)
        });
        let _entered = runtime.enter();
        let server = runtime.spawn(serve(listener));
        let clients = |count: usize| {
            let (done, is_done) = oneshot::channel();
            let clients = thread::spawn(move || {
                let clients: Vec<_> = (0..count).map(|_| connect(address)).collect();
                done.send(()).unwrap();
                clients
            });
            runtime.block_on(async { is_done.await.unwrap() });
            clients.join().unwrap()
        };
        let first = clients(1);
        let mut others = Vec::new();
        let held = measure(|| others = clients(CONNECTIONS - 1));
        assert!(!server.is_finished());
        drop((first, others));
        held.bytes_current / i64::try_from(CONNECTIONS - 1).unwrap()
    }

    fn plain() -> i64 {
        heap_bytes(|listener| async { axum::serve(listener, app()).await.unwrap() })
    }

    /// For axum with a layer that does nothing. axum copies the routes for each connection, and each route
    /// includes the layer.
    fn layered() -> i64 {
        let app = app().layer(Identity::new());
        heap_bytes(|listener| async { axum::serve(listener, app).await.unwrap() })
    }

    fn tracked(app: impl FnOnce(&Graceful) -> Router) -> i64 {
        heap_bytes(|listener| {
            let graceful = Graceful::new();
            let server = axum::serve(graceful.listener(listener), app(&graceful))
                .with_graceful_shutdown(graceful.drain());
            async move { drop(graceful.run(server).await) }
        })
    }

    fn serve() -> i64 {
        heap_bytes(|listener| {
            let graceful = Graceful::new();
            let app = app().layer(graceful.layer());
            async move { drop(graceful.serve(listener, app).await) }
        })
    }

    fn routes(count: usize, layers: usize) -> Router {
        let route = |app: Router, n| app.route(&format!("/{n}"), get(|| async {}));
        let app = (1..count).fold(app(), route);
        (0..layers).fold(app, |app, _| app.layer(Identity::new()))
    }

    /// The documentation of `serve` gives this cost and this remedy.
    #[test]
    fn a_make_service_copies_no_routes_for_a_connection() {
        const ROUTES: usize = 100;
        let axum = heap_bytes(|listener| async {
            axum::serve(listener, routes(ROUTES, 1)).await.unwrap();
        });
        let [copied, with_layers] = [1, 4].map(|layers| {
            heap_bytes(|listener| async move {
                drop(
                    Graceful::new()
                        .serve(listener, routes(ROUTES, layers))
                        .await,
                );
            })
        });
        let [one, shared] = [1, ROUTES].map(|count| {
            heap_bytes(|listener| async move {
                let app = routes(count, 1).into_make_service();
                drop(Graceful::new().serve(listener, app).await);
            })
        });
        let of = format!(
            "{ROUTES} routes: {copied} bytes, with four layers {with_layers}, with axum {axum}, \
             with a make-service {shared}, which is {one} with one route"
        );
        println!("{of}");
        let routes = i64::try_from(ROUTES).unwrap();
        assert!(shared - one < routes, "{of}");
        // If axum copies less, change the documentation.
        assert!((300..600).contains(&((copied - shared) / routes)), "{of}");
        assert!((copied - axum).abs() < 1000, "{of}");
    }

    /// Prints what is measured, and asserts upper bounds, so that no connection grows unnoticed. tokio rounds
    /// the size of a task up to a multiple of 128 bytes, so the bounds are coarse. If a value gets smaller, lower
    /// its bound.
    #[test]
    fn a_connection_adds_little_to_one_of_axum() {
        let [plain, layered] = [plain(), layered()];
        let alone = tracked(|_| app());
        let listener = tracked(|graceful| app().layer(graceful.layer()));
        let serve = serve();
        let of = format!(
            "{plain} bytes, with a layer that does nothing {layered}, with the listener alone {alone}, \
             with listener and layer {listener}, of serve {serve}"
        );
        println!("{of}");
        // On a few connections the next request is inspected, which takes memory until it arrives.
        assert!(alone - plain <= 172, "{of}");
        assert!(listener - plain <= 294, "{of}");
        assert!(listener - layered <= 214, "{of}");
        assert!(serve - plain <= 56, "{of}");
    }
}

/// Connections that end as fast as new ones come.
#[cfg(all(feature = "axum", feature = "signal"))]
mod short_connections {
    use std::{future, io, sync::Arc};

    use axum::{Router, serve::Listener};
    use tokio::{
        io::{Empty, Join, Sink, empty, join, sink},
        runtime,
        sync::Notify,
        task,
    };

    use super::*;

    const CONNECTIONS: usize = 10_000;

    /// Accepts connections that have ended, without a pause.
    struct Backlog {
        left: usize,
        empty: Arc<Notify>,
    }

    impl Listener for Backlog {
        type Io = Join<Empty, Sink>;
        type Addr = ();

        async fn accept(&mut self) -> (Self::Io, ()) {
            // As a `TcpListener` does.
            task::consume_budget().await;
            if self.left == 0 {
                self.empty.notify_one();
                return future::pending().await;
            }
            self.left -= 1;
            (join(empty(), sink()), ())
        }

        fn local_addr(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn connections_that_have_ended_hold_no_memory_while_others_wait_to_be_accepted() {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let graceful = Graceful::new();
        let empty = Arc::new(Notify::new());
        let backlog = Backlog {
            left: CONNECTIONS,
            empty: Arc::clone(&empty),
        };
        let server = graceful.serve(backlog, Router::new());
        let held = measure(|| {
            runtime.block_on(async {
                let _server = runtime.spawn(server.into_future());
                empty.notified().await;
            });
        });
        assert!(held.bytes_max < 3_000_000, "{} bytes", held.bytes_max);
    }
}
