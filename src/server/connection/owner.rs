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
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;
    use crate::{handle::graceful::Graceful, middleware::peer};

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
