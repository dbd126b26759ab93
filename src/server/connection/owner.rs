//! What a connection of `serve` and its requests share.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use axum::response::Response;
use http::{Method, Version};
use tokio::time;

use crate::{
    connection::{
        directive::Directive,
        flags::{RESPONDED, UPGRADES},
        outside::Window,
        state::ConnectionState,
        upgraded::TunnelNumber,
    },
    middleware::{connection_close, peer::TrackedPeer},
    phase::Phase,
    server::ConnectionEntry,
};

/// A watched connection opens a window for each request within its first `FIRST_READS` reads. Later it
/// opens one only for a request whose read has a number that is a multiple of `EVERY_READS`.
const FIRST_READS: u32 = 32;
const EVERY_READS: u32 = 256;

/// Boxed to keep connections small: most never need the timer, and there may be very many.
pub(super) type RareSleep = Option<Pin<Box<time::Sleep>>>;

/// What a connection and its requests share.
#[derive(Clone)]
pub(super) struct Owner(pub(super) Arc<ConnectionEntry>);

impl Owner {
    pub(super) fn phase(&self) -> Phase {
        self.0.owner.phase()
    }

    /// When the slot of this connection is reached.
    pub(super) fn slot_time(&self) -> time::Instant {
        self.0.owner.slot_time(self.0.place)
    }

    pub(super) fn poll_slot(&self, sleep: &mut RareSleep, cx: &mut Context<'_>) -> Poll<()> {
        let sleep = sleep.get_or_insert_with(|| Box::pin(time::sleep_until(self.slot_time())));
        sleep.as_mut().poll(cx)
    }

    /// Whether connections are asked to leave one after another in this phase.
    pub(super) fn is_spread(&self, phase: Phase) -> bool {
        phase == Phase::LameDuck && self.0.owner.policy().is_spread()
    }

    /// Whether a client loses something if its FIN drops a request that arrives now: not while
    /// draining, when it would be refused, and not a prober that has given up waiting.
    pub(super) fn loses_by_fin<B>(&self, request: &http::Request<B>) -> bool {
        let is_probe = || {
            matches!(*request.method(), Method::GET | Method::HEAD)
                && self.0.owner.is_probe(request.uri().path())
        };
        match self.phase() {
            Phase::Serving => true,
            phase => phase < Phase::Draining && !is_probe(),
        }
    }

    /// Adds the connection to a request, for the rules and routes that need the address of its peer. Few
    /// requests are for these, so the address is looked up only by them.
    pub(super) fn note_peer<B>(&self, request: &mut http::Request<B>) {
        if self.0.owner.wants_peers.load(Ordering::Relaxed) {
            let peer = TrackedPeer(Arc::clone(&self.0));
            request.extensions_mut().insert(peer);
        }
    }

    /// Opens a window to check whether the layer sees this request: for the first requests of a
    /// connection, and then for one in many.
    #[cold]
    pub(super) fn watch<B>(&self, request: &http::Request<B>) -> Option<Window> {
        let reads = self.0.sniffer.reads();
        if reads >= FIRST_READS && reads % EVERY_READS != 0 {
            return None;
        }
        let (shared, peer) = (&self.0.owner, self.0.peer());
        let path = request.uri().path();
        Window::open(shared, request.method(), path, peer, true)
    }

    /// Closes the window of a request with its response. A failed gRPC call is not evaluated,
    /// like a response with an error status.
    #[cold]
    pub(super) fn answered(&self, window: Window, response: &Response) {
        let shared = &self.0.owner;
        let grpc = response.headers().get("grpc-status");
        if grpc.is_none_or(|status| status == "0") {
            window.answered(shared, response.status());
        } else {
            window.close(shared);
        }
    }

    /// Records that a request asks for an upgrade. Over HTTP/2 it asks for a tunnel, which is one stream of many,
    /// and the connection itself is not upgraded. Returns the number of the tunnel.
    #[cold]
    pub(super) fn asks_for_upgrade<B>(&self, request: &http::Request<B>) -> Option<TunnelNumber> {
        let http2 = request.version() >= Version::HTTP_2;
        if http2 && request.method() != Method::CONNECT {
            return None;
        }
        let path = match request.uri().path() {
            // The target of a `CONNECT` is a host and has no path.
            "" => &*request.uri().to_string(),
            path => path,
        };
        let upgraded = &self.0.owner.upgraded;
        if http2 {
            return Some(upgraded.asked_for_tunnel(path, self.0.peer()));
        }
        self.0.flags.set(UPGRADES);
        upgraded.asked(self.0.number(), path, self.0.peer());
        None
    }

    /// Records that the connection speaks another protocol from now on.
    #[cold]
    pub(super) fn upgraded(&self) {
        self.0.sniffer.upgraded();
        self.0.upgraded();
    }

    /// Asks the peer to leave with this response, if the slot of the connection has been reached.
    #[cold]
    pub(super) fn ask_to_leave(&self, response: &mut Response, version: Version, phase: Phase) {
        self.0.flags.set(RESPONDED);
        let http2 = version == Version::HTTP_2;
        if self.is_spread(phase) {
            if time::Instant::now() < self.slot_time() {
                if http2 {
                    // The connection may have been opened after the others were instructed.
                    self.0.state.instruct(Directive::LeaveInSlot);
                }
                return;
            }
        } else if http2
            && self.0.sniffer.joined_during_stop()
            && phase == Phase::LameDuck
            && !self.0.owner.connections.asks_all()
        {
            // The client connected although the service is stopping, so it may know no other server. It
            // would reconnect here, and be asked to leave again with each request.
            return;
        }
        connection_close::say_close(response, version);
        if http2 {
            self.0.state.instruct(Directive::Leave);
        }
    }
}

/// Counts the task of a stream, or a response of which the server holds bytes, until it is dropped.
pub(super) struct OpenStream(Owner);

impl OpenStream {
    pub(super) fn new(owner: Owner) -> Self {
        owner.0.state.stream_began();
        Self(owner)
    }

    pub(super) fn owner(&self) -> &Owner {
        &self.0
    }

    pub(super) fn state(&self) -> &ConnectionState {
        &self.0.0.state
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.0.state.stream_ended();
    }
}

/// Counts an upload until it has ended, or until no task can read it any more.
pub(super) struct OpenUpload(Owner);

impl OpenUpload {
    pub(super) fn new(owner: Owner) -> Self {
        owner.0.state.upload_began();
        Self(owner)
    }
}

impl Drop for OpenUpload {
    fn drop(&mut self) {
        self.0.0.state.upload_ended();
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::{sync::mpsc, task::Waker, thread, time::Duration};

    use http::header::CONNECTION;

    use super::*;
    use crate::{connection::outside::Servers, handle::graceful::Graceful, middleware::peer};

    const HTTP1: Version = Version::HTTP_11;
    const HTTP2: Version = Version::HTTP_2;

    fn connected(graceful: &Graceful) -> Owner {
        let shared = graceful.shared();
        Owner(shared.connections.insert(shared.clone(), None))
    }

    fn request(method: Method, path: &str) -> http::Request<()> {
        let request = http::Request::builder().method(method).uri(path);
        request.body(()).unwrap()
    }

    /// Whether the response asks the client to leave, and the directive of the connection after it.
    fn asked(owner: &Owner, version: Version, phase: Phase) -> (bool, Directive) {
        let mut response = Response::default();
        owner.ask_to_leave(&mut response, version, phase);
        assert!(owner.0.flags.has(RESPONDED));
        let closes = response.headers().contains_key(CONNECTION);
        (closes, owner.0.state.directive())
    }

    #[tokio::test(start_paused = true)]
    async fn in_a_spread_a_client_is_asked_to_leave_once_its_slot_is_reached() {
        let spread = Duration::from_secs(4);
        let graceful = Graceful::builder().close_spread(spread).build().unwrap();
        graceful.shutdown();
        let [first, later] = [(); 2].map(|()| connected(&graceful));
        assert!(later.is_spread(Phase::LameDuck));
        assert!(!later.is_spread(Phase::Serving) && !later.is_spread(Phase::Draining));
        let ask = |owner, version| asked(owner, version, Phase::LameDuck);
        assert_eq!(ask(&first, HTTP1), (true, Directive::Stopping));
        assert_eq!(ask(&first, HTTP2), (false, Directive::Leave));
        assert_eq!(ask(&later, HTTP1), (false, Directive::Stopping));
        assert_eq!(ask(&later, HTTP2), (false, Directive::LeaveInSlot));
        let (mut sleep, cx) = (None, &mut Context::from_waker(Waker::noop()));
        assert!(later.poll_slot(&mut sleep, cx).is_pending());
        time::advance(later.slot_time() - time::Instant::now()).await;
        assert_eq!(ask(&later, HTTP1), (true, Directive::LeaveInSlot));
        assert_eq!(ask(&later, HTTP2), (false, Directive::Leave));
        time::advance(Duration::from_millis(1)).await;
        assert!(later.poll_slot(&mut sleep, cx).is_ready());
    }

    /// It would reconnect here, and be asked to leave again with each request.
    #[test]
    fn before_draining_an_http2_client_that_has_connected_during_the_stop_is_not_asked_to_leave() {
        for (version, phase, joins, asks_all, asks) in [
            (HTTP2, Phase::LameDuck, true, false, false),
            (HTTP2, Phase::LameDuck, false, false, true),
            (HTTP2, Phase::LameDuck, true, true, true),
            (HTTP2, Phase::Draining, true, false, true),
            (HTTP1, Phase::LameDuck, true, false, true),
        ] {
            let graceful = Graceful::new();
            if asks_all {
                graceful.shared().connections.instruct(Directive::Leave, 0);
            }
            let owner = connected(&graceful);
            assert!(!owner.is_spread(phase));
            if joins {
                owner.0.sniffer.mark_joined_during_stop();
            }
            let (closes, directive) = asked(&owner, version, phase);
            assert_eq!(closes, asks && version == HTTP1, "{version:?} {phase}");
            let leaves = directive == Directive::Leave;
            assert_eq!(leaves, asks && version == HTTP2, "{version:?} {phase}");
        }
    }

    #[test]
    fn a_client_loses_a_request_by_its_fin_unless_it_is_a_prober_or_would_be_refused() {
        let graceful = Graceful::new();
        let _probes: axum::Router = graceful.probes();
        let owner = connected(&graceful);
        for (phase, method, path, loses) in [
            (Phase::Serving, Method::GET, "/", true),
            (Phase::Serving, Method::GET, "/livez", true),
            (Phase::LameDuck, Method::GET, "/", true),
            (Phase::LameDuck, Method::GET, "/livez", false),
            (Phase::LameDuck, Method::HEAD, "/livez", false),
            (Phase::LameDuck, Method::POST, "/livez", true),
            (Phase::Draining, Method::GET, "/", false),
        ] {
            graceful.shared().advance(phase);
            let what = format!("{method} {path} {phase}");
            assert_eq!(owner.loses_by_fin(&request(method, path)), loses, "{what}");
        }
    }

    #[test]
    fn the_first_requests_of_a_connection_are_watched_and_then_one_in_many() {
        let graceful = Graceful::new();
        let owner = connected(&graceful);
        owner.0.sniffer.listen();
        let mut watched = Vec::new();
        for reads in 0..600 {
            assert_eq!(owner.0.sniffer.reads(), reads);
            if let Some(window) = owner.watch(&request(Method::GET, "/")) {
                window.close(graceful.shared());
                watched.push(reads);
            }
            owner.0.sniffer.note(b"x");
        }
        assert!(watched.into_iter().eq((0..FIRST_READS).chain([256, 512])));
    }

    #[test]
    fn a_grpc_call_that_has_failed_is_not_reported() {
        let servers = Servers {
            run: 1,
            drains: 0,
            listeners: 1,
            tracks: false,
        };
        for (status, is_reported) in [(None, true), (Some("0"), true), (Some("5"), false)] {
            let graceful = Graceful::new();
            let owner = connected(&graceful);
            let mut response = Response::default();
            if let Some(status) = status {
                let headers = response.headers_mut();
                headers.insert("grpc-status", status.parse().unwrap());
            }
            let window = owner.watch(&request(Method::POST, "/call")).unwrap();
            owner.answered(window, &response);
            let warning = graceful.shared().outside.warning(true, servers, true);
            assert_eq!(warning.is_some(), is_reported, "{status:?}");
        }
    }

    #[test]
    fn an_upload_counts_until_it_is_dropped() {
        let owner = connected(&Graceful::new());
        let upload = OpenUpload::new(owner.clone());
        assert!(owner.0.state.has_uploads());
        drop(upload);
        assert!(!owner.0.state.has_uploads());
    }

    /// Behind the PROXY protocol the address is in the table of connections, and all of them share its lock.
    #[test]
    fn a_request_does_not_wait_for_the_table_of_connections() {
        let graceful = Graceful::new();
        let _route = graceful.pre_stop();
        let shared = graceful.shared();
        let owner = Owner(shared.connections.insert(shared.clone(), None));
        let client = "192.0.2.1:1".parse().unwrap();
        shared.connections.rename(&owner.0, client);
        let (send, request) = mpsc::channel();
        let held = shared.connections.hold();
        let called = thread::spawn(move || {
            let mut request = http::Request::new(());
            owner.note_peer(&mut request);
            send.send(request).unwrap();
        });
        let request = request.recv_timeout(Duration::from_secs(10));
        drop(held);
        called.join().unwrap();
        let request = request.expect("the request waits");
        assert_eq!(peer::socket_addr(&request), Some(client));
    }
}
