//! Performs a number of requests in one way, for a tool that counts instructions. `.ci/instructions`
//! runs it under callgrind and compares the counts.
//!
//! Usage: `instructions STYLE MODE REQUESTS`. The style is how the service is driven:
//!
//! - `again`: one service, called again and again;
//! - `clone`: a clone of the service for each request;
//! - `boxed`: a clone for each request, with the future and the body behind pointers on both sides of
//!   the layer, as in a server, so that the compiler cannot inline across them;
//! - `router`: a clone of an axum router for each request, as hyper makes one.
//!
//! The mode is the layer around the handler: `none`; `tower-http`; `bare`, which only counts;
//! `graceful`; or `limited`, which is `graceful` with a limit.

use std::hint::black_box;

use axum::{Router, body::Body, routing::get};
use bytes::Bytes;
use http_body_util::Full;
use tower::{Layer, layer::util::Identity};
use tower_graceful::Graceful;
use tower_http::metrics::InFlightRequestsLayer;

use self::peers::{
    Bare, Boxed, Handler, Peer, request, request_behind_pointers, request_of_a_clone,
};

mod peers;

const STYLES: [&str; 4] = ["again", "clone", "boxed", "router"];
const MODES: [&str; 5] = ["none", "tower-http", "bare", "graceful", "limited"];

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    if let [style, mode, requests] = &*args {
        run(style, mode, requests.parse().expect("a number of requests"));
        return;
    }
    // `cargo bench` and `cargo test` pass no style: check that everything runs.
    for style in STYLES {
        for mode in MODES {
            run(style, mode, 10);
        }
    }
    println!("instructions: every style and mode runs; .ci/instructions counts them");
}

fn run(style: &str, mode: &str, requests: u32) {
    let app = Router::new().route("/", get(|| async { "hello" }));
    match mode {
        // A layer that does nothing, because axum's router boxes the service of every layer.
        "none" => {
            let app = app.layer(Identity::new());
            drive(style, &Identity::new(), &app, requests);
        }
        "tower-http" => {
            let (layer, _counter) = InFlightRequestsLayer::pair();
            drive(style, &layer, &app.layer(layer.clone()), requests);
        }
        "bare" => drive(style, &Bare, &app.layer(Bare), requests),
        "graceful" => {
            let layer = Graceful::new().layer();
            drive(style, &layer, &app.layer(layer.clone()), requests);
        }
        "limited" => {
            let limited = Graceful::builder().max_in_flight(1_000).build();
            let layer = limited.expect("a plan that fits").layer();
            drive(style, &layer, &app.layer(layer.clone()), requests);
        }
        other => panic!("no such mode: {other}"),
    }
}

fn drive<L>(style: &str, layer: &L, app: &Router, requests: u32)
where
    L: Layer<Handler, Service: Peer> + Layer<Boxed, Service: Peer>,
{
    match style {
        "again" => {
            let mut peer = black_box(layer.layer(Handler));
            (0..requests).for_each(|_| request::<_, Full<Bytes>, _>(&mut peer));
        }
        "clone" => {
            let peer = black_box(layer.layer(Handler));
            (0..requests).for_each(|_| request_of_a_clone(&peer));
        }
        "boxed" => {
            let peer = black_box(layer.layer(Boxed));
            (0..requests).for_each(|_| request_behind_pointers(&peer));
        }
        "router" => {
            // `axum::serve` does this once for each connection, and so no request pays for it.
            let app = app.clone().with_state(());
            (0..requests).for_each(|_| request::<_, Body, _>(&mut app.clone()));
        }
        other => panic!("no such style: {other}"),
    }
}
